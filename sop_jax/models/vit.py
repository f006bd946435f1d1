"""The vision transformer of the paper, which is that of iBOT."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from sop_jax.errors import UserError
from sop_jax.models.attention import attend, padded_length
from sop_jax.models.gelu import gelu
from sop_jax.models.layers import (
    REMATS,
    Start,
    cut,
    dense,
    drop_draws,
    drop_path,
    drop_rates,
    layer_norm,
    patch_embedding,
)
from sop_jax.models.positions import resize_positions

POOLS = ("cls", "mean")  # what stands for an image: [CLS], or the mean of the patches
# From this width on, queries, keys and values have a product each rather than a part of one, which
# is estimated to be faster there on GPUs and slower below (docs/performance.md).
WIDE = 768


class Size(NamedTuple):
    """The size of a vision transformer.

    Attributes:
        width: D, the width of a token.
        depth: the number of layers.
        heads: the number of attention heads.
    """

    width: int
    depth: int
    heads: int


SIZES = {
    "ti": Size(192, 12, 3),
    "s": Size(384, 12, 6),
    "b": Size(768, 12, 12),
    "l": Size(1024, 24, 16),
    "h": Size(1280, 32, 16),
}


def custom(config: ml_collections.ConfigDict) -> Size:
    """Returns the size that `config.model` describes."""
    return Size(config.width, config.depth, config.heads)


def check_size(size: Size) -> None:
    """Raises UserError if the heads do not divide the width."""
    if size.width % size.heads:
        raise UserError(
            f"model.width {size.width} cannot be split over model.heads {size.heads}; "
            "choose a width that the heads divide"
        )


def token_side(config: ml_collections.ConfigDict) -> int:
    """Returns the pixels on each side of a patch."""
    return config.patch


class LayerScale(nnx.Module):
    """A learnt factor for each channel of a branch; all are equal at first (DINOv2)."""

    def __init__(self, width: int, value: float):
        self.scale = nnx.Param(jnp.full((width,), value))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the scaled branch, which is multiplied in float32."""
        return (x * self.scale[...]).astype(x.dtype)


class Block(nnx.Module):
    """A pre-norm transformer layer; a `layer_scale` of 0 leaves out `LayerScale`."""

    def __init__(self, width: int, heads: int, layer_scale: float, start: Start, rngs: nnx.Rngs):
        self.heads, self.implementation = heads, start.attention
        self.precision = start.precision
        self.ls1 = LayerScale(width, layer_scale) if layer_scale else None
        self.ls2 = LayerScale(width, layer_scale) if layer_scale else None
        self.norm1 = layer_norm(width, start, rngs)
        self.qkv = dense(width, 3 * width, start, rngs)
        self.proj = dense(width, width, start, rngs)
        self.norm2 = layer_norm(width, start, rngs)
        self.fc1 = dense(width, 4 * width, start, rngs)
        self.fc2 = dense(4 * width, width, start, rngs)

    def attention(self, x: Float[Array, "B T D"], length: int | None) -> Float[Array, "B T D"]:
        """Returns the multi-head self-attention of normalized tokens, the first `length`."""
        batch, tokens, width = x.shape
        heads = self.heads, width // self.heads
        if width >= WIDE:
            qkv = [part.reshape(batch, tokens, *heads) for part in self.qkv.parts(x, 3)]
        else:
            qkv = [*jnp.moveaxis(self.qkv(x).reshape(batch, tokens, 3, *heads), 2, 0)]
        mixed = attend(
            *qkv,
            implementation=self.implementation,
            precision=self.precision,
            length=length,
        )
        return self.proj(mixed.reshape(batch, tokens, width))

    def attention_weights(self, x: Float[Array, "B T D"]) -> Float[Array, "B h T T"]:
        """Returns the attention weights of each token in each head; rows sum to 1."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1)
        logits = jnp.einsum(
            *("bqhd,bkhd->bhqk", qkv[:, :, 0], qkv[:, :, 1]),
            precision=self.precision,
            preferred_element_type=jnp.float32,
        )
        return jax.nn.softmax(logits * (width // self.heads) ** -0.5)

    def mlp(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the output of two linear layers with exact GELU between them."""
        return self.fc2(gelu(self.fc1(x)))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rate: Float[Array, ""],
        draws: Float[Array, "B 2"] | None,
        length: int | None = None,
    ) -> Float[Array, "B T D"]:
        """Adds both residual branches, each dropped for samples whose draw is below `rate`.

        Tokens after the first `length` are padding, which other tokens do not see.
        """
        attention, mlp = (None, None) if draws is None else draws.T
        mixed = self.attention(self.norm1(x), length)
        x = x + drop_path(scaled(mixed, self.ls1), rate, attention)
        return x + drop_path(scaled(self.mlp(self.norm2(x)), self.ls2), rate, mlp)


def scaled(x: Float[Array, "B T D"], scale: LayerScale | None) -> Float[Array, "B T D"]:
    """Returns a branch, scaled if its layer has a `LayerScale`."""
    return x if scale is None else scale(x)


class ViT(nnx.Module):
    """A vision transformer for NHWC images, whose layers are stacked and scanned.

    Args:
        size: the width, depth and heads.
        config: `config.model` of the run; `drop_path` is the rate of the last layer, and the rates
            grow linearly from 0 at the first.
        image_size: the pixels on each side of the images for which positions are made.
        gather: gathers the parameters of a layer that are split over devices.
        start: the dtype and the initialization of the parameters.
    """

    def __init__(
        self,
        size: Size,
        config: ml_collections.ConfigDict,
        image_size: int,
        gather: Callable[[Any], Any],
        start: Start,
        rngs: nnx.Rngs,
    ):
        width, depth, heads = size
        patch, side = config.patch, image_size // config.patch
        self.width, self.patch, self.grid, self.dtype = width, patch, (side, side), start.dtype
        self.remat, self.gather, self.positions = config.remat, gather, config.positions
        self.implementation, self.unroll = start.attention, start.unroll
        self.rates = drop_rates(config.drop_path, depth)
        self.patch_embed = patch_embedding(patch, width, start, rngs)
        normal = nnx.initializers.normal(start.position_std)
        self.cls_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,)))
        self.pos_embed = nnx.Param(normal(rngs.params(), (1 + side * side, width)))
        self.registers, self.pool = config.registers, config.pool
        if config.registers:  # initialized as in DINOv2
            tokens = 1e-6 * jax.random.normal(rngs.params(), (config.registers, width))
            self.register_tokens = nnx.Param(tokens)
        self.mask_token = nnx.Param(jnp.zeros((width,)))
        self.norm = layer_norm(width, start, rngs)

        @nnx.split_rngs(splits=depth)
        @nnx.vmap
        def layers(rngs: nnx.Rngs) -> Block:
            return Block(width, heads, config.layer_scale, start, rngs)

        self.blocks = layers(rngs)

    def embed(
        self,
        images: Float[Array, "B H W 3"],
        mask: Bool[Array, "B h w"] | None,
        kept: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns [CLS], registers and patches; positions are added to all except the registers.

        Args:
            images: normalized pixels.
            mask: the patches whose embedding is replaced by the mask token.
            kept: the indices of the patches to keep; all by default.
        """
        batch, height, width, _ = images.shape
        h, w = height // self.patch, width // self.patch
        x = self.patch_embed(cut(images, self.patch)).astype(jnp.float32)
        if mask is not None:
            x = jnp.where(mask.reshape(batch, h * w, 1), self.mask_token[...], x)
        positions = self.pos_embed[...]
        table = positions[1:].reshape(*self.grid, -1)
        table = resize_positions(table, (h, w), self.positions).reshape(h * w, -1)
        cls = jnp.broadcast_to(self.cls_token[...] + positions[0], (batch, 1, table.shape[-1]))
        # The sum is in float32, so that the gradients of these parameters are summed in float32.
        x = x + table
        if kept is not None:
            x = jnp.take_along_axis(x, kept[..., None], axis=1)
        parts = [cls, x]
        if self.registers:
            tokens = self.register_tokens[...]
            parts.insert(1, jnp.broadcast_to(tokens, (batch, *tokens.shape)))
        return jnp.concatenate(parts, axis=1).astype(self.dtype)

    def __call__(
        self,
        images: Float[Array, "B H W 3"],
        mask: Bool[Array, "B h w"] | None = None,
        keys: Key[Array, " B"] | None = None,
        last: int = 1,
        kept: Int[Array, "B S"] | None = None,
        norm: bool = True,
    ) -> list[Float[Array, "B T D"]]:
        """Returns the tokens of the `last` layers; see `tokens`.

        Args:
            images: normalized pixels; the patch divides the height and the width.
            mask: the patches to replace by the mask token; none by default.
            keys: a key per image, with which drop path is on (training of the student).
            last: the number of last layers to return, the final one last.
            kept: the indices of the patches that enter the first layer; all by default.
            norm: whether the final norm is applied to each of them.
        """
        x, states = self.encode(self.embed(images, mask, kept), keys, every=last > 1)
        if last == 1:
            return [self.tokens(x, norm)]
        depth = len(self.rates)
        return [self.tokens(states[i], norm) for i in range(depth - last, depth)]

    def encode(
        self, x: Float[Array, "B S D"], keys: Key[Array, " B"] | None, every: bool
    ) -> tuple[Float[Array, "B S D"], Float[Array, "depth b S D"]]:
        """Returns the output of the last layer and, if `every`, the outputs of all layers.

        Args:
            x: the tokens that enter the first layer.
            keys: a key per image, with which drop path is on.
            every: whether the second array has the outputs; without it, it is empty (b = 0).
        """
        graph, layers = nnx.split(self.blocks)
        depth, length = len(self.rates), x.shape[1]
        draws = None if keys is None else drop_draws(keys, depth)
        padding = padded_length(length, self.implementation) - length  # once, for all layers
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))

        def layer(x: Array, inputs: tuple) -> tuple[Array, Array]:
            params, rate, layer_draws = inputs
            block = nnx.merge(graph, self.gather(params))
            x = block(x, rate, layer_draws, length if padding else None)
            return x, x[:, :length] if every else x[:0, :length]

        layer = jax.checkpoint(layer, prevent_cse=False, policy=REMATS[self.remat])
        inputs = (layers, jnp.array(self.rates), draws)
        x, states = jax.lax.scan(layer, x, inputs, unroll=depth if self.unroll else 1)
        return x[:, :length], states

    def maps(
        self,
        images: Float[Array, "B H W 3"],
        layers: Sequence[int],
        keys: Key[Array, " B"] | None = None,
        norm: bool = True,
    ) -> list[Float[Array, "B h w D"]]:
        """Returns the patch tokens of layers as feature maps in float32.

        Args:
            images: normalized pixels; the patch divides the height and the width.
            layers: the indices of the layers, counted from 0.
            keys: a key per image, with which drop path is on.
            norm: whether the tokens of each layer pass the final norm.
        """
        grid = images.shape[1] // self.patch, images.shape[2] // self.patch
        _, states = self.encode(self.embed(images, None), keys, every=True)
        tokens = [self.tokens(states[i], norm)[:, 1:].astype(jnp.float32) for i in layers]
        return [x.reshape(len(x), *grid, -1) for x in tokens]

    def tokens(self, x: Float[Array, "B S D"], norm: bool) -> Float[Array, "B T D"]:
        """Returns the image token and then the patch tokens, after the final norm if `norm`.

        The first is [CLS], or with `pool="mean"` the mean of the patches that entered the encoder,
        masked ones included (table C.2 of the paper). Registers are left out of both.
        """
        x = self.norm(x) if norm else x
        if self.pool == "mean":
            patches = x[:, 1 + self.registers :]
            return jnp.concatenate([patches.mean(1, keepdims=True), patches], axis=1)
        if self.registers:
            x = jnp.concatenate([x[:, :1], x[:, 1 + self.registers :]], axis=1)
        return x

    def attention(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h S S"]:
        """Returns the last layer's weights among [CLS], registers and patches, in this order."""
        graph, layers = nnx.split(self.blocks)

        def layer(x: Array, params: Any) -> tuple[Array, None]:
            return nnx.merge(graph, self.gather(params))(x, jnp.zeros(()), None), None

        before = jax.tree.map(lambda leaf: leaf[:-1], layers)
        last = jax.tree.map(lambda leaf: leaf[-1], layers)
        x, _ = jax.lax.scan(layer, self.embed(images, None), before)
        return nnx.merge(graph, self.gather(last)).attention_weights(x)
