"""The projection head, which [CLS] and patches share."""

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Float

from sop_jax.errors import UserError
from sop_jax.models.gelu import gelu
from sop_jax.models.layers import BatchNorm, Start, Statistics, dense


class Head(nnx.Module):
    """An MLP with GELU, whose output is L2-normalized in float32 unless `head.unit` is false.

    Its defaults are the head of the authors' code: three layers without norm, with 2048 hidden
    units and 256 outputs. It is that of DINO and iBOT without their prototypes. With `batch_norm`,
    batch norm follows each hidden layer, over all tokens that the head is given at once. These are
    the views of one size, as in MSN's code, or those of all sizes, as in the codes of DINO and
    SwAV; see `head.batch_norm_views`.

    Args:
        width: the numbers in a token.
        config: `config.head` of the run.
        start: the options of the linear layers.

    Raises:
        UserError: the head has no layers, and `head.dim` is not the width.
    """

    def __init__(self, width: int, config: ml_collections.ConfigDict, start: Start, rngs: nnx.Rngs):
        if config.layers == 0 and config.dim != width:
            raise UserError(
                f"head.layers is 0, so that embeddings have the {width} numbers of a token, but "
                f"head.dim is {config.dim}; set --config.head.dim={width}, or --config.head.layers "
                "to 1 or more"
            )
        self.layers, self.batch_norm = config.layers, config.batch_norm
        self.normalized = config.unit
        for i in range(1, config.layers):
            setattr(self, f"fc{i}", dense(width, config.hidden, start, rngs))
            if config.batch_norm:
                setattr(self, f"bn{i}", BatchNorm(config.hidden))
            width = config.hidden
        if config.layers:
            setattr(self, f"fc{config.layers}", dense(width, config.dim, start, rngs))

    def __call__(
        self, x: Float[Array, "*B D"], training: bool
    ) -> tuple[Float[Array, "*B d"], Statistics]:
        """Returns the embeddings of tokens in float32, and the new running statistics.

        Args:
            x: the tokens.
            training: whether batch norm normalizes by these tokens, see `layers.BatchNorm`.
        """
        moved: Statistics = {}
        for i in range(1, self.layers):
            x = getattr(self, f"fc{i}")(x)
            if self.batch_norm:
                x, moved[f"bn{i}"] = getattr(self, f"bn{i}")(x, training)
            x = gelu(x)
        if self.layers:
            x = getattr(self, f"fc{self.layers}")(x)
        return (unit(x) if self.normalized else x.astype(jnp.float32)), moved


def unit(x: Float[Array, "*B d"]) -> Float[Array, "*B d"]:
    """Returns rows scaled to unit norm in float32; zeros remain zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


def check_unit(config: ml_collections.ConfigDict) -> None:
    """Raises UserError if a run's embeddings are not L2-normalized, for methods that need them."""
    if not config.head.unit:
        raise UserError(
            "head.unit is false, but this method compares embeddings by their cosines; set "
            "--config.head.unit=true"
        )
