"""The Swin transformer, as in iBOT and in the paper."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Key, Shaped

from sop_jax.errors import UserError
from sop_jax.models.attention import attend
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
from sop_jax.models.linear import Linear

PATCH = 4  # pixels on each side of a patch
STAGES = 4

Grid = tuple[int, int]  # rows and columns of tokens


class Size(NamedTuple):
    """The size of a Swin.

    Attributes:
        width: the width of the first stage, which doubles from stage to stage.
        depths: the number of layers of each stage.
        heads: the number of heads of each stage.
    """

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]


SIZES = {
    "t": Size(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "s": Size(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "b": Size(128, (2, 2, 18, 2), (4, 8, 16, 32)),
}


def custom(config: ml_collections.ConfigDict) -> Size:
    """Returns the size that `config.model` describes."""
    return Size(config.width, tuple(config.stage_depths), tuple(config.stage_heads))


def check_size(size: Size) -> None:
    """Raises UserError unless four stages have pairs of layers and heads that divide them."""
    if not len(size.depths) == len(size.heads) == 4:
        raise UserError(
            f"model.stage_depths is {size.depths} and stage_heads {size.heads}; expected four "
            "stages"
        )
    if any(depth % 2 for depth in size.depths):
        raise UserError(
            f"model.stage_depths is {size.depths}; expected even numbers, because every second "
            "layer moves the windows of the one before"
        )
    for i, heads in enumerate(size.heads):
        if size.width * 2**i % heads:
            raise UserError(
                f"model.width {size.width} makes stage {i + 1} {size.width * 2**i} wide, which "
                f"cannot be split over its {heads} heads; choose other model.stage_heads"
            )


def token_side(config: ml_collections.ConfigDict) -> int:
    """Returns the pixels on each side of the square that a token of the last stage stands for."""
    del config
    return PATCH * 2 ** (STAGES - 1)


class Window(NamedTuple):
    """The windows of a stage.

    Attributes:
        side: the tokens on each side of a window; these attend to each other.
        shift: the tokens by which the windows of every second layer are shifted, in both axes.
    """

    side: int
    shift: int


def window_of(side: int, tokens: int) -> Window:
    """Returns the window of a stage with `tokens` tokens on each side.

    If these are at most `side`, the stage is a single window, which is never shifted.
    """
    return Window(tokens, 0) if tokens <= side else Window(side, side // 2)


def split(x: Shaped[Any, "B H W *C"], side: int) -> Shaped[Any, "B N n *C"]:
    """Splits grids into N windows, which divide them, of n = side * side tokens row by row."""
    batch, high, wide, *rest = x.shape
    x = x.reshape(batch, high // side, side, wide // side, side, *rest)
    return x.swapaxes(2, 3).reshape(batch, -1, side * side, *rest)


def join(windows: Float[Array, "B N n D"], grid: Grid) -> Float[Array, "B H W D"]:
    """Joins the windows from `split` into the grid."""
    batch, _, tokens, width = windows.shape
    side = round(tokens**0.5)
    x = windows.reshape(batch, grid[0] // side, grid[1] // side, side, side, width)
    return x.swapaxes(2, 3).reshape(batch, *grid, width)


def padded(grid: Grid, side: int) -> Grid:
    """Returns the smallest grid that contains another and that windows of `side` tokens divide."""
    high, wide = (-(-tokens // side) * side for tokens in grid)
    return high, wide


def pad(x: Float[Array, "B H W D"], grid: Grid) -> Float[Array, "B h w D"]:
    """Pads to a larger grid with zeros, below and to the right."""
    _, high, wide, _ = x.shape
    return jnp.pad(x, ((0, 0), (0, grid[0] - high), (0, grid[1] - wide), (0, 0)))


def relative_positions(side: int) -> np.ndarray:
    """Returns, for each query and key of a window [n, n], their row in the table of biases."""
    row, column = np.divmod(np.arange(side * side), side)
    down, across = (x[:, None] - x[None, :] + side - 1 for x in (row, column))
    return down * (2 * side - 1) + across


def shift_mask(grid: Grid, window: Window) -> np.ndarray:
    """Returns the mask of shifted windows [N, n, n], to be added to the products of attention.

    It is -100 for each query and key that only the cyclic shift brought into the same window, and 0
    for all others.
    """
    rows, columns = (
        (np.arange(n) >= n - window.side).astype(int) + (np.arange(n) >= n - window.shift)
        for n in grid
    )
    region = split((3 * rows[:, None] + columns)[None], window.side)[0]
    return np.where(region[:, :, None] == region[:, None, :], 0, -100).astype(np.float32)


class Block(nnx.Module):
    """A pre-norm transformer layer whose attention is within windows."""

    def __init__(self, width: int, heads: int, window: Window, start: Start, rngs: nnx.Rngs):
        self.heads, self.window, self.dtype = heads, window, start.dtype
        self.precision = start.precision
        self.norm1 = layer_norm(width, start, rngs)
        self.qkv = dense(width, 3 * width, start, rngs)
        offsets = (2 * window.side - 1) ** 2
        table = start.position_std * jax.random.normal(rngs.params(), (offsets, heads))
        self.relative_bias = nnx.Param(table)
        self.proj = dense(width, width, start, rngs)
        self.norm2 = layer_norm(width, start, rngs)
        self.fc1 = dense(width, 4 * width, start, rngs)
        self.fc2 = dense(4 * width, width, start, rngs)

    def windows(
        self, x: Float[Array, "B T D"], grid: Grid, shift: int
    ) -> tuple[Float[Array, "3 B N n h d"], Float[Array, "N h n n"]]:
        """Returns the queries, keys and values of windows, and the bias of each window.

        Grids that the windows do not divide are padded with zeros, which are attended to as well.
        """
        batch, _, width = x.shape
        side, whole = self.window.side, padded(grid, self.window.side)
        x = pad(self.norm1(x).astype(self.dtype).reshape(batch, *grid, width), whole)
        bias = jnp.moveaxis(self.relative_bias[...][relative_positions(side)], -1, 0)[None]
        if shift:
            x = jnp.roll(x, (-shift, -shift), (1, 2))
            bias = bias + shift_mask(whole, self.window)[:, None]
        qkv = self.qkv(split(x, side))
        qkv = qkv.reshape(*qkv.shape[:3], 3, self.heads, width // self.heads)
        count = qkv.shape[1]
        return jnp.moveaxis(qkv, 3, 0), jnp.broadcast_to(bias, (count, *bias.shape[1:]))

    def attention(self, x: Float[Array, "B T D"], grid: Grid, shift: int) -> Float[Array, "B T D"]:
        """Returns the multi-head self-attention within windows, with its softmax in float32."""
        batch, _, width = x.shape
        (q, k, v), bias = self.windows(x, grid, shift)
        one_window = functools.partial(attend, implementation="xla", precision=self.precision)
        mixed = jax.vmap(one_window, (1, 1, 1, 0), 1)(q, k, v, bias[:, None])
        mixed = self.proj(mixed.reshape(*q.shape[:3], width))
        x = jnp.roll(join(mixed, padded(grid, self.window.side)), (shift, shift), (1, 2))
        return x[:, : grid[0], : grid[1]].reshape(batch, -1, width)

    def attention_weights(
        self, x: Float[Array, "B T D"], grid: Grid, shift: int
    ) -> Float[Array, "B h T T"]:
        """Returns the attention weights of each token in each head; 0 outside of its window.

        Rows sum to less than 1 if there was attention to the zeros that pad a grid.
        """
        (q, k, _), bias = self.windows(x, grid, shift)
        logits = jnp.einsum(
            *("bnqhd,bnkhd->bnhqk", q, k),
            precision=self.precision,
            preferred_element_type=jnp.float32,
        )
        weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5 + bias)
        high, wide = padded(grid, self.window.side)
        cells = np.roll(np.arange(high * wide).reshape(1, high, wide), (-shift, -shift), (1, 2))
        cells = split(cells, self.window.side)[0]  # [N, n]
        inside = np.arange(high * wide).reshape(high, wide)[: grid[0], : grid[1]].reshape(-1)
        found = jnp.zeros((len(x), self.heads, high * wide, high * wide))
        found = found.at[:, :, cells[:, :, None], cells[:, None, :]].set(weights.swapaxes(1, 2))
        return found[:, :, inside[:, None], inside]

    def __call__(
        self,
        x: Float[Array, "B T D"],
        grid: Grid,
        shift: int,
        rate: Float[Array, ""],
        draws: Float[Array, "B 2"] | None,
    ) -> Float[Array, "B T D"]:
        """Adds both residual branches, each dropped for samples whose draw is below `rate`."""
        attention, mlp = (None, None) if draws is None else draws.T
        x = x + drop_path(self.attention(x, grid, shift), rate, attention)
        hidden = gelu(self.fc1(self.norm2(x)))
        return x + drop_path(self.fc2(hidden), rate, mlp)


class Merging(nnx.Module):
    """Merges 2 x 2 neighbours into one token of twice the width.

    Their channels are concatenated column by column, as in the first Swin: (0, 0), (1, 0), (0, 1),
    (1, 1), as (row, column).
    """

    def __init__(self, width: int, start: Start, rngs: nnx.Rngs):
        init = nnx.initializers.normal(start.std)
        self.norm = layer_norm(4 * width, start, rngs)
        self.reduction = Linear(
            *(4 * width, 2 * width),
            kernel_init=init,
            use_bias=False,
            dtype=start.dtype,
            precision=start.precision,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "B T D"], grid: Grid) -> tuple[Float[Array, "B t E"], Grid]:
        """Returns the merged tokens and their grid; an odd grid is padded with zeros first."""
        batch, _, width = x.shape
        high, wide = padded(grid, 2)
        x = pad(x.reshape(batch, *grid, width), (high, wide))
        x = x.reshape(batch, high // 2, 2, wide // 2, 2, width).transpose(0, 1, 3, 4, 2, 5)
        x = x.reshape(batch, high * wide // 4, 4 * width)
        return self.reduction(self.norm(x)), (high // 2, wide // 2)


class Stage(nnx.Module):
    """The layers of one width, stacked and scanned; every second one shifts its windows.

    Args:
        width: the width of its tokens.
        depth: the number of layers, which is even.
        heads: the number of heads of each layer.
        window: the windows of its attention.
        merges: whether it merges its tokens for a next stage.
        start: the dtype and the initialization of the parameters.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        window: Window,
        merges: bool,
        start: Start,
        rngs: nnx.Rngs,
    ):
        self.window = window

        @nnx.split_rngs(splits=depth)
        @nnx.vmap
        def layers(rngs: nnx.Rngs) -> Block:
            return Block(width, heads, window, start, rngs)

        self.blocks = layers(rngs)
        self.downsample = Merging(width, start, rngs) if merges else None

    def run(
        self,
        x: Float[Array, "B T D"],
        grid: Grid,
        rates: Float[Array, " depth"],
        draws: Float[Array, "depth B 2"] | None,
        remat: str,
        gather: Callable[[Any], Any],
        keep: bool,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "layers B T D"] | None]:
        """Returns the output of the last layer and, if `keep`, the outputs of all layers."""
        graph, layers = nnx.split(self.blocks)
        # The scan is over pairs of layers, of which the second shifts its windows; if no windows
        # are shifted, it is over layers.
        shifts = (0, self.window.shift) if self.window.shift else (0,)

        def layer(shift: int, x: Array, inputs: tuple) -> Array:
            params, rate, layer_draws = inputs
            return nnx.merge(graph, gather(params))(x, grid, shift, rate, layer_draws)

        def group(x: Array, inputs: tuple) -> tuple[Array, Array | None]:
            states = []
            for i, shift in enumerate(shifts):
                one = jax.checkpoint(
                    functools.partial(layer, shift), prevent_cse=False, policy=REMATS[remat]
                )
                x = one(x, jax.tree.map(lambda leaf, i=i: leaf[i], inputs))
                states.append(x)
            return x, jnp.stack(states) if keep else None

        groups = jax.tree.map(
            lambda leaf: leaf.reshape(-1, len(shifts), *leaf.shape[1:]), (layers, rates, draws)
        )
        x, states = jax.lax.scan(group, x, groups)
        return x, None if states is None else states.reshape(-1, *x.shape)


class Swin(nnx.Module):
    """A Swin transformer for NHWC images, whose [CLS] is the mean of its tokens.

    Windows are chosen for images of `image_size`, whatever the size of the given images: a stage
    that has at most a window's tokens on each side is a single window, which is not shifted. Other
    images are padded.

    Args:
        size: the width, depths and heads.
        config: `config.model` of the run; `drop_path` is the rate of the last layer, and the rates
            grow linearly from 0 at the first.
        image_size: the pixels on each side of the images for which windows are chosen.
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
        self.width = size.width * 2 ** (STAGES - 1)
        self.dtype, self.remat, self.gather = start.dtype, config.remat, gather
        self.depths, self.rates = size.depths, drop_rates(config.drop_path, sum(size.depths))
        self.patch_embed = patch_embedding(PATCH, size.width, start, rngs)
        self.patch_norm = layer_norm(size.width, start, rngs)
        # iBOT initializes this to zero, and masks only from epoch 50 on. Since a Swin adds no
        # positions to patches, masked patches would stay zero in all layers while biases are zero.
        # LayerNorm is 1000 times as steep there, which gives gradients of 1e11 in a new Swin-T.
        self.mask_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (size.width,)))
        stages = {}
        for i, (depth, heads) in enumerate(zip(size.depths, size.heads, strict=True)):
            window = window_of(config.window, image_size // PATCH // 2**i)
            merges = i < STAGES - 1
            stages[str(i)] = Stage(size.width * 2**i, depth, heads, window, merges, start, rngs)
        self.stages = nnx.Dict(stages)
        self.norm = layer_norm(self.width, start, rngs)

    def embed(
        self, images: Float[Array, "B H W 3"], mask: Bool[Array, "B h w"] | None
    ) -> tuple[Float[Array, "B T C"], Grid]:
        """Returns normalized patch embeddings, with the mask token for patches of masked tokens."""
        _, height, width, _ = images.shape
        grid = height // PATCH, width // PATCH
        x = self.patch_norm(self.patch_embed(cut(images, PATCH)))
        if mask is not None:
            times = 2 ** (STAGES - 1)
            fine = jnp.repeat(jnp.repeat(mask, times, axis=1), times, axis=2)
            fine = fine[:, : grid[0], : grid[1]].reshape(*x.shape[:2], 1)
            x = jnp.where(fine, self.mask_token[...], x)
        return x.astype(self.dtype), grid

    def states(
        self,
        images: Float[Array, "B H W 3"],
        mask: Bool[Array, "B h w"] | None,
        keys: Key[Array, " B"] | None,
        last: int,
    ) -> tuple[list[Float[Array, "B _ _"]], Grid]:
        """Returns the outputs of the `last` layers, and the grid of the final tokens."""
        x, grid = self.embed(images, mask)
        rates = jnp.array(self.rates)
        draws = None if keys is None else drop_draws(keys, len(self.rates))
        found: list[Array] = []
        first = 0
        for i, depth in enumerate(self.depths):
            stage = self.stages[str(i)]
            part = slice(first, first + depth)
            keep = min(depth, last - (len(self.rates) - part.stop))
            x, states = stage.run(
                *(x, grid, rates[part], None if draws is None else draws[part]),
                *(self.remat, self.gather, keep > 1),
            )
            if keep > 0:
                found += [x] if states is None else list(states[depth - keep :])
            if stage.downsample is not None:
                x, grid = stage.downsample(x, grid)
            first += depth
        return found, grid

    def __call__(
        self,
        images: Float[Array, "B H W 3"],
        mask: Bool[Array, "B h w"] | None = None,
        keys: Key[Array, " B"] | None = None,
        last: int = 1,
    ) -> list[Float[Array, "B _ _"]]:
        """Returns the tokens of the `last` layers: first their mean, then all row by row.

        Tokens of the last stage are normalized and stand for 32 x 32 pixels. Tokens of earlier
        stages are not normalized, narrower, and stand for fewer pixels, as in iBOT's
        `get_intermediate_layers`.

        Args:
            images: normalized pixels; PATCH divides the height and the width.
            mask: the tokens of 32 x 32 pixels to replace by the mask token.
            keys: a key per image, with which drop path is on (training of the student).
            last: the number of last layers to return, the final one last.
        """
        found, _ = self.states(images, mask, keys, last)
        tokens = [
            self.norm(x) if x.shape[-1] == self.width else x.astype(jnp.float32) for x in found
        ]
        return [jnp.concatenate([x.mean(1, keepdims=True), x], axis=1) for x in tokens]

    def attention(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h L L"]:
        """Returns the attention weights of the last layer among its tokens, without a [CLS]."""
        (before, _), grid = self.states(images, None, None, last=2)
        stage = self.stages[str(STAGES - 1)]
        graph, layers = nnx.split(stage.blocks)
        block = nnx.merge(graph, self.gather(jax.tree.map(lambda leaf: leaf[-1], layers)))
        return block.attention_weights(before, grid, stage.window.shift)
