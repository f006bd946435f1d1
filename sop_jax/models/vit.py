"""The vision transformer of the paper, which is iBOT's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from sop_jax.mesh import is_gathered
from sop_jax.models.attention import Implementation, attend
from sop_jax.models.linear import Linear
from sop_jax.models.positions import resize_positions

EPS = 1e-6  # of every LayerNorm

# What a layer stores for the backward pass; the rest is computed again. Parameters that had to be
# gathered from other devices are always gathered again: stored, all would be whole at once.
REMATS = {
    "none": lambda *operation, **details: not is_gathered(*operation, **details),
    "products": jax.checkpoint_policies.dots_saveable,  # of matrices, attention's too
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # of its linear layers
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Size(NamedTuple):
    """Width D, depth and heads of a vision transformer."""

    width: int
    depth: int
    heads: int


SIZES = {
    "ti": Size(192, 12, 3),
    "s": Size(384, 12, 6),
    "b": Size(768, 12, 12),
    "l": Size(1024, 24, 16),
}


class Start(NamedTuple):
    """How layers are made: dtype of the computation, and the start of their float32 parameters.

    Linear layers start from N(0, std), positions from N(0, position_std), biases from zero. iBOT
    takes 0.02 for both. At widths far below 384 that leaves all images with nearly the same
    embedding, which SOP leaves slowly or never, and positions that a patch embedding of about
    unit size drowns until they have grown: small networks and short runs want more.
    """

    dtype: jnp.dtype
    std: float = 0.02
    position_std: float = 0.02


def dense(inputs: int, outputs: int, start: Start, rngs: nnx.Rngs) -> Linear:
    """A linear layer."""
    init = nnx.initializers.normal(start.std)
    return Linear(inputs, outputs, kernel_init=init, dtype=start.dtype, rngs=rngs)


def layer_norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm in float32, gradients too; the layer after it takes what it gives as it likes."""
    return nnx.LayerNorm(width, epsilon=EPS, dtype=jnp.float32, rngs=rngs)


class Block(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(
        self, width: int, heads: int, attention: Implementation, start: Start, rngs: nnx.Rngs
    ):
        self.heads, self.implementation = heads, attention
        self.norm1 = layer_norm(width, rngs)
        self.qkv = dense(width, 3 * width, start, rngs)
        self.proj = dense(width, width, start, rngs)
        self.norm2 = layer_norm(width, rngs)
        self.fc1 = dense(width, 4 * width, start, rngs)
        self.fc2 = dense(4 * width, width, start, rngs)

    def attention(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Multi-head self-attention."""
        batch, tokens, width = x.shape
        q, k, v = jnp.moveaxis(
            self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads), 2, 0
        )
        mixed = attend(q, k, v, self.implementation)
        return self.proj(mixed.reshape(batch, tokens, width))

    def mlp(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Two layers with exact GELU."""
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rate: Float[Array, ""],
        draws: Float[Array, "B 2"] | None,
    ) -> Float[Array, "B T D"]:
        """Both residual branches, each dropped per sample where its draw is below `rate`."""
        attention, mlp = (None, None) if draws is None else draws.T
        x = x + drop_path(self.attention(self.norm1(x)), rate, attention)
        return x + drop_path(self.mlp(self.norm2(x)), rate, mlp)


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


class ViT(nnx.Module):
    """Vision transformer over NHWC images, its layers stacked and scanned.

    Args:
        size: width, depth and heads.
        patch: patch side in pixels.
        grid: rows and columns of patches that the positional embeddings are made for.
        drop_rate: drop path of the last layer; it grows linearly from 0 at the first.
        remat: a key of REMATS.
        gather: makes the parameters of a layer whole where they lie split over devices.
        attention: xla or cudnn, see `models.attention`.
        start: dtype and start of the parameters.
    """

    def __init__(
        self,
        size: Size,
        patch: int,
        grid: tuple[int, int],
        drop_rate: float,
        remat: str,
        gather: Callable[[Any], Any],
        attention: Implementation,
        start: Start,
        rngs: nnx.Rngs,
    ):
        width, depth, heads = size
        self.patch, self.grid, self.dtype = patch, grid, start.dtype
        self.remat, self.gather = remat, gather
        self.rates = tuple(drop_rate * i / max(depth - 1, 1) for i in range(depth))
        inputs = 3 * patch * patch

        def uniform(key: Array, shape: tuple, dtype: Any) -> Array:
            # PyTorch's default start of a convolution, which iBOT leaves as it is.
            return jax.random.uniform(key, shape, dtype, -(inputs**-0.5), inputs**-0.5)

        self.patch_embed = Linear(
            inputs, width, kernel_init=uniform, bias_init=uniform, dtype=start.dtype, rngs=rngs
        )
        normal = nnx.initializers.normal(start.position_std)
        self.cls_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,)))
        self.pos_embed = nnx.Param(normal(rngs.params(), (1 + grid[0] * grid[1], width)))
        self.mask_token = nnx.Param(jnp.zeros((width,)))
        self.norm = layer_norm(width, rngs)

        @nnx.split_rngs(splits=depth)
        @nnx.vmap
        def layers(rngs: nnx.Rngs) -> Block:
            return Block(width, heads, attention, start, rngs)

        self.blocks = layers(rngs)

    def embed(
        self, images: Float[Array, "B H W 3"], mask: Bool[Array, "B h w"] | None
    ) -> Float[Array, "B T D"]:
        """[CLS] and patch embeddings plus positions; masked patches show the mask token alone."""
        batch, height, width, _ = images.shape
        p, (h, w) = self.patch, (height // self.patch, width // self.patch)
        # A patch embedding by convolution, written as the matrix product that it is.
        patches = images.reshape(batch, h, p, w, p, 3).transpose(0, 1, 3, 2, 4, 5)
        x = self.patch_embed(patches.reshape(batch, h * w, p * p * 3)).astype(jnp.float32)
        if mask is not None:
            x = jnp.where(mask.reshape(batch, h * w, 1), self.mask_token[...], x)
        positions = self.pos_embed[...]
        table = positions[1:].reshape(*self.grid, -1)
        table = resize_positions(table, (h, w)).reshape(h * w, -1)
        cls = jnp.broadcast_to(self.cls_token[...] + positions[0], (batch, 1, table.shape[-1]))
        # Added in float32, in which the gradients of these parameters are then summed.
        return jnp.concatenate([cls, x + table], axis=1).astype(self.dtype)

    def __call__(
        self,
        images: Float[Array, "B H W 3"],
        mask: Bool[Array, "B h w"] | None = None,
        keys: Key[Array, " B"] | None = None,
        last: int = 1,
    ) -> list[Float[Array, "B T D"]]:
        """Tokens ([CLS] first, then patches row by row) of the `last` layers, each normed.

        Args:
            images: normalised pixels; any size that the patch divides.
            mask: patches to replace by the mask token.
            keys: one for each image, turn on drop path (training of the student).
            last: how many of the last layers to return, the final one last.
        """
        x = self.embed(images, mask)
        graph, layers = nnx.split(self.blocks)
        depth = len(self.rates)
        draws = None
        if keys is not None:
            draws = jax.vmap(lambda key: jax.random.uniform(key, (depth, 2)))(keys)
            draws = jnp.moveaxis(draws, 1, 0)  # layers first

        def layer(x: Array, inputs: tuple) -> tuple[Array, Array]:
            params, rate, layer_draws = inputs
            x = nnx.merge(graph, self.gather(params))(x, rate, layer_draws)
            return x, x if last > 1 else x[:0]

        layer = jax.checkpoint(layer, prevent_cse=False, policy=REMATS[self.remat])
        x, states = jax.lax.scan(layer, x, (layers, jnp.array(self.rates), draws))
        if last == 1:
            return [self.norm(x)]
        return [self.norm(states[i]) for i in range(depth - last, depth)]
