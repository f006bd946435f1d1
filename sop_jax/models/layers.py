"""Layers that the networks share, with their options, drop path and rematerialisation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from sop_jax.models.attention import Implementation
from sop_jax.models.linear import PRODUCT, Linear, Precision
from sop_jax.parallel.mesh import is_gathered


def is_product(primitive: Any, *_: Any, name: str | None = None, **__: Any) -> bool:
    """Whether an operation is the output of a linear layer, for policies of `jax.checkpoint`."""
    return name == PRODUCT


def is_attention(primitive: Any, *_: Any, dimension_numbers: Any = None, **__: Any) -> bool:
    """Whether an operation is a product within attention, or all of it by cuDNN."""
    if primitive.name == "dot_general":  # those of linear layers have no batch axes
        return bool(dimension_numbers[1][0])
    return primitive.name.startswith("dot_product_attention_fwd")


# What a layer stores for the backward pass, which computes the rest again, by `model.remat`.
# Parameters that were gathered from other devices are always gathered again: if they were stored,
# all of them would be in memory at the same time.
REMATS = {
    "none": lambda *operation, **details: not is_gathered(*operation, **details),
    "products": jax.checkpoint_policies.save_from_both_policies(is_product, is_attention),
    "dots": is_product,
    "full": jax.checkpoint_policies.nothing_saveable,
}

EPS = 1e-5  # added to the variance in every batch norm
MOMENTUM = 0.1  # the weight of a batch in the running statistics

Statistics = dict[str, Any]  # nested as the parameters, with {"mean", "var"} for each batch norm


class Start(NamedTuple):
    """The options of layers: how they compute, and how their float32 parameters are initialized.

    iBOT uses 0.02 for both standard deviations. At widths far below 384, all images then have
    nearly the same embedding at first, from which SOP recovers slowly or never, and positions are
    negligible next to a patch embedding of about unit size until they have grown. Small networks
    and short runs need larger values.

    Attributes:
        dtype: the dtype of the computation.
        std: the standard deviation of the initial weights of linear layers; biases are zero.
        position_std: the standard deviation of the initial positional embeddings.
        eps: added to the variance in every LayerNorm.
        attention: the implementation of attention, see `models.attention`.
        precision: the precision of all products, see `models.linear`.
        unroll: whether the layers of a ViT follow one another in the program rather than in a
            loop, so that the compiler can fuse their parts; it compiles for longer and needs more
            memory.
    """

    dtype: jnp.dtype
    std: float = 0.02
    position_std: float = 0.02
    eps: float = 1e-6
    attention: Implementation = "xla"
    precision: Precision = None
    unroll: bool = False


def drop_rates(last: float, depth: int) -> tuple[float, ...]:
    """Returns the drop path rate of each layer, which grows linearly from 0 to `last`."""
    return tuple(last * i / max(depth - 1, 1) for i in range(depth))


def drop_draws(keys: Key[Array, " B"], depth: int) -> Float[Array, "{depth} B 2"]:
    """Returns the uniform draws for both branches of each layer, from a key per image."""
    draws = jax.vmap(lambda key: jax.random.uniform(key, (depth, 2)))(keys)
    return jnp.moveaxis(draws, 1, 0)


def drop_path(
    x: Float[Array, "B T D"], rate: Float[Array, ""], draws: Float[Array, " B"] | None
) -> Float[Array, "B T D"]:
    """Applies stochastic depth to a branch.

    Args:
        x: the branch.
        rate: the probability to drop it, in [0, 1).
        draws: uniform in [0, 1). The branch of a sample is zero if its draw is below `rate`, and
            scaled by 1 / (1 - rate) otherwise. None drops nothing.
    """
    if draws is None:
        return x
    keep = (draws >= rate)[:, None, None]
    return x * (keep.astype(rate.dtype) / (1 - rate)).astype(x.dtype)


def dense(inputs: int, outputs: int, start: Start, rngs: nnx.Rngs) -> Linear:
    """Returns a linear layer."""
    init = nnx.initializers.normal(start.std)
    return Linear(
        inputs,
        outputs,
        kernel_init=init,
        dtype=start.dtype,
        precision=start.precision,
        rngs=rngs,
    )


def patch_embedding(patch: int, width: int, start: Start, rngs: nnx.Rngs) -> Linear:
    """Returns a patch embedding: the convolution of iBOT, computed as a matrix product."""
    inputs = 3 * patch * patch

    def uniform(key: Array, shape: tuple, dtype: Any) -> Array:
        # PyTorch's default initialization of a convolution, which iBOT does not change.
        return jax.random.uniform(key, shape, dtype, -(inputs**-0.5), inputs**-0.5)

    return Linear(
        inputs,
        width,
        kernel_init=uniform,
        bias_init=uniform,
        dtype=start.dtype,
        precision=start.precision,
        rngs=rngs,
    )


def cut(images: Float[Array, "B H W 3"], patch: int) -> Float[Array, "B L P"]:
    """Cuts images into patches, row by row, each with its pixels as (row, column, channel)."""
    batch, height, width, _ = images.shape
    h, w = height // patch, width // patch
    patches = images.reshape(batch, h, patch, w, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(batch, h * w, patch * patch * 3)


def layer_norm(width: int, start: Start, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Returns a LayerNorm in float32, gradients included; the next layer converts its output."""
    return nnx.LayerNorm(width, epsilon=start.eps, dtype=jnp.float32, rngs=rngs)


class BatchNorm(nnx.Module):
    """Batch norm in float32, over all positions of the batch on all devices."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.var = nnx.BatchStat(jnp.ones(channels))

    def __call__(
        self, x: Float[Array, "*B C"], training: bool
    ) -> tuple[Float[Array, "*B C"], Statistics]:
        """Normalizes by the batch in training, and by the running statistics otherwise.

        Returns:
            The normalized x in its dtype, and the new running statistics. In training these move
            by MOMENTUM towards the batch's mean and unbiased variance, as in PyTorch.
        """
        wide = x.astype(jnp.float32)
        mean, var = self.mean[...], self.var[...]
        moved = {"mean": mean, "var": var}
        if training:
            axes = tuple(range(x.ndim - 1))
            mean, var = wide.mean(axes), wide.var(axes)
            count = x.size // x.shape[-1]
            seen = {"mean": mean, "var": var * count / max(count - 1, 1)}
            moved = jax.tree.map(lambda old, new: old + MOMENTUM * (new - old), moved, seen)
        normed = (wide - mean) * (jax.lax.rsqrt(var + EPS) * self.scale[...]) + self.bias[...]
        return normed.astype(x.dtype), jax.lax.stop_gradient(moved)
