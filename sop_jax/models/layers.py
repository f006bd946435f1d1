"""What the layers of all backbones have in common: their options, drop path, norm and patches."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from sop_jax.models.attention import Implementation
from sop_jax.models.linear import Linear, Precision
from sop_jax.parallel.mesh import is_gathered

# What a layer stores for the backward pass; the rest is computed again. Parameters that had to be
# gathered from other devices are always gathered again: stored, all would be whole at once.
REMATS = {
    "none": lambda *operation, **details: not is_gathered(*operation, **details),
    "products": jax.checkpoint_policies.dots_saveable,  # of matrices, attention's too
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # of its linear layers
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Start(NamedTuple):
    """How layers are made: dtype of the computation, and the start of their float32 parameters.

    Linear layers start from N(0, std), positions from N(0, position_std), biases from zero. iBOT
    takes 0.02 for both. At widths far below 384 that leaves all images with nearly the same
    embedding, which SOP leaves slowly or never, and positions that a patch embedding of about
    unit size drowns until they have grown: small networks and short runs want more. `eps` is what
    LayerNorm adds to the variance, `attention` xla or cudnn, see `models.attention`, `precision`
    that of all products, see `models.linear`.
    """

    dtype: jnp.dtype
    std: float = 0.02
    position_std: float = 0.02
    eps: float = 1e-6
    attention: Implementation = "xla"
    precision: Precision = None


def drop_rates(last: float, depth: int) -> tuple[float, ...]:
    """Drop path of each of so many layers, which grows linearly from 0 to that of the last."""
    return tuple(last * i / max(depth - 1, 1) for i in range(depth))


def drop_draws(keys: Key[Array, " B"], depth: int) -> Float[Array, "{depth} B 2"]:
    """What decides on both branches of each layer, from a key for each image."""
    draws = jax.vmap(lambda key: jax.random.uniform(key, (depth, 2)))(keys)
    return jnp.moveaxis(draws, 1, 0)


def drop_path(
    x: Float[Array, "B T D"], rate: Float[Array, ""], draws: Float[Array, " B"] | None
) -> Float[Array, "B T D"]:
    """Stochastic depth: a sample's branch is zero where its draw is below `rate`, else scaled up.

    Draws are uniform in [0, 1).
    """
    if draws is None:
        return x
    keep = (draws >= rate)[:, None, None]
    return x * (keep / (1 - rate)).astype(x.dtype)


def dense(inputs: int, outputs: int, start: Start, rngs: nnx.Rngs) -> Linear:
    """A linear layer."""
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
    """A patch embedding by convolution, as the matrix product that it is."""
    inputs = 3 * patch * patch

    def uniform(key: Array, shape: tuple, dtype: Any) -> Array:
        # PyTorch's default start of a convolution, which iBOT leaves as it is.
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
    """Pixels of each patch in the order (row, column, channel), patches row by row."""
    batch, height, width, _ = images.shape
    h, w = height // patch, width // patch
    patches = images.reshape(batch, h, patch, w, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(batch, h * w, patch * patch * 3)


def layer_norm(width: int, start: Start, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm in float32, gradients too; the layer after it takes what it gives as it likes."""
    return nnx.LayerNorm(width, epsilon=start.eps, dtype=jnp.float32, rngs=rngs)
