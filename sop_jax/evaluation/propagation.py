"""Masks of objects, propagated from frame to frame by the similarity of patch tokens.

This is the protocol of DINO (`eval_video_segmentation.py`, which iBOT copied) after Jabri et al.
(2020): a token of a new frame has the mean mask of the most similar tokens in its neighbourhood,
of the first frame and of the last few. That script computes the similarities of all pairs of
tokens, and then sets those outside the neighbourhood to zero. Here they are computed in blocks of
tokens, each with the window around it, which saves half of the products at 480 x 854 pixels.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt8

from sop_jax.evaluation.features import unit

# Tokens of a block: few columns, because the window of each has 2 * radius more. 128 in total fill
# the lanes of a TPU and keep the similarities of a block in the cache of a CPU.
BLOCK_ROWS, BLOCK_COLUMNS = 32, 4
FLOAT32 = lax.Precision.HIGHEST


class Contexts(NamedTuple):
    """The frames from which masks are propagated: the first, and a ring of the last n-1.

    Attributes:
        features: unit vectors of the h*w tokens of each.
        masks: the share of each of C objects in each token; object 0 is the background.
        seen: the number of frames so far; only the first `seen` rows are filled.
    """

    features: Float32[Array, "n h w D"]
    masks: Float32[Array, "n h w C"]
    seen: Int32[Array, ""]


def start(
    features: Float32[Array, "h w D"], masks: Float32[Array, "h w C"], last_frames: int
) -> Contexts:
    """Returns the contexts of the second frame: the first one, and room for `last_frames` more."""
    empty = Contexts(
        jnp.zeros((1 + last_frames, *features.shape)),
        jnp.zeros((1 + last_frames, *masks.shape)),
        jnp.int32(0),
    )
    return remember(empty, features, masks)


@functools.partial(jax.jit, donate_argnames="contexts")
def remember(
    contexts: Contexts, features: Float32[Array, "h w D"], masks: Float32[Array, "h w C"]
) -> Contexts:
    """Returns the contexts with a new frame, which replaces the oldest one other than the first.

    The memory of the given contexts is reused, so they cannot be read afterwards.
    """
    frame, last_frames = contexts.seen, len(contexts.features) - 1
    row = jnp.where(frame == 0, 0, 1 + (frame - 1) % last_frames)
    return Contexts(
        contexts.features.at[row].set(unit(features)), contexts.masks.at[row].set(masks), frame + 1
    )


@functools.partial(jax.jit, static_argnames=("radius", "top_k", "temperature"))
def propagate(
    contexts: Contexts,
    features: Float32[Array, "h w D"],
    radius: int,
    top_k: int,
    temperature: float,
) -> Float32[Array, "h w C"]:
    """Returns the masks of a new frame, as shares per object that add up to those of the contexts.

    Args:
        contexts: the frames whose masks are known.
        features: the tokens of the new frame, of any length.
        radius: a token's neighbours differ from it by at most so many rows and columns.
        top_k: the number of neighbours, of all contexts together, that are averaged, with weights
            exp(cosine / temperature). Neighbours that tie with the last of them are kept, too.
        temperature: the temperature of the weights.
    """
    n, h, w, width = contexts.features.shape
    objects = contexts.masks.shape[-1]
    down, across = -(-h // BLOCK_ROWS), -(-w // BLOCK_COLUMNS)  # the number of blocks
    rows, columns = -(-h // down), -(-w // across)  # of a block
    high, wide = min(rows + 2 * radius, h), min(columns + 2 * radius, w)  # the window
    padding = (0, down * rows - h), (0, across * columns - w), (0, 0)
    targets = jnp.pad(unit(features), padding)
    filled = jnp.arange(n) < contexts.seen

    def block(corner: Int32[Array, "2"]) -> Float32[Array, "rows columns C"]:
        y, x = corner
        top, left = jnp.clip(y - radius, 0, h - high), jnp.clip(x - radius, 0, w - wide)

        def window(frames: Float32[Array, "n h w X"]) -> Float32[Array, "n high wide X"]:
            return lax.dynamic_slice(frames, (0, top, left, 0), (n, high, wide, frames.shape[-1]))

        tokens = lax.dynamic_slice(targets, (y, x, 0), (rows, columns, width))
        cosines = jnp.einsum(
            "nabd,ijd->nabij", window(contexts.features), tokens, precision=FLOAT32
        )
        near_y = near(top + jnp.arange(high), y + jnp.arange(rows), radius)
        near_x = near(left + jnp.arange(wide), x + jnp.arange(columns), radius)
        known = filled[:, None, None, None, None] & near_y[:, None, :, None] & near_x[:, None, :]
        cosines = jnp.where(known, cosines, -jnp.inf).reshape(-1, rows * columns)
        largest, least = largest_and_kth(cosines, top_k)
        weights = jnp.exp((cosines - largest) / temperature)
        weights = jnp.where(cosines >= least, weights, 0)
        masks = window(contexts.masks).reshape(-1, objects)
        total = jnp.einsum("st,sc->tc", weights, masks, precision=FLOAT32)
        return (total / weights.sum(0)[:, None]).reshape(rows, columns, objects)

    corners = jnp.stack(
        jnp.meshgrid(jnp.arange(down) * rows, jnp.arange(across) * columns, indexing="ij"), -1
    )
    blocks = lax.map(block, corners.reshape(-1, 2)).reshape(down, across, rows, columns, objects)
    whole = blocks.swapaxes(1, 2).reshape(down * rows, across * columns, objects)
    return whole[:h, :w]


def near(a: Int32[Array, " a"], b: Int32[Array, " b"], radius: int) -> Bool[Array, "a b"]:
    """Returns which coordinates differ by at most `radius`."""
    return jnp.abs(a[:, None] - b) <= radius


def largest_and_kth(
    x: Float32[Array, "s t"], k: int
) -> tuple[Float32[Array, " t"], Float32[Array, " t"]]:
    """Returns the largest and the k-th largest value of each column, equal values counted apart.

    A column of fewer than k finite values gives -inf. Each of the k passes finds the largest of the
    values that are smaller than those found so far. On CPUs this is 60 times as fast as
    `lax.top_k`, for which XLA sorts whole columns.
    """
    largest = x.max(0)

    def lower(_: Int32[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
        value, found = state  # the values that are at least `value`
        below = jnp.max(jnp.where(x < value, x, -jnp.inf), 0)
        value = jnp.where(found < k, below, value)
        return value, jnp.sum(x >= value, 0, dtype=jnp.int32)

    found = jnp.sum(x >= largest, 0, dtype=jnp.int32)
    return largest, lax.fori_loop(1, k, lower, (largest, found))[0]


def one_hot(objects: UInt8[np.ndarray, "h w"]) -> Float32[Array, "h w C"]:
    """Returns masks that give each token wholly to one object; C - 1 is the largest number."""
    return jax.nn.one_hot(objects, int(objects.max()) + 1, dtype=jnp.float32)


def harden(masks: Float32[Array, "h w C"]) -> Float32[Array, "h w C"]:
    """Returns masks that give each token wholly to the object with the largest share."""
    return jax.nn.one_hot(masks.argmax(-1), masks.shape[-1], dtype=jnp.float32)


@functools.partial(jax.jit, static_argnames="patch")
def decide(masks: Float32[Array, "h w C"], patch: int) -> UInt8[Array, "H W"]:
    """Returns the object of each pixel of tokens that are `patch` pixels high and wide.

    The masks are enlarged bilinearly, then each object's is scaled to reach from 0 to 1, unless it
    is 0 everywhere, and the largest one wins.
    """
    h, w, objects = masks.shape
    shape = h * patch, w * patch, objects
    pixels = jax.image.resize(masks, shape, "bilinear", precision=FLOAT32)
    low, high = pixels.min((0, 1)), pixels.max((0, 1))
    scale = jnp.where(high > low, high - low, 1)
    scaled = jnp.where(high > 0, (pixels - low) / scale, pixels)
    return jnp.argmax(scaled, -1).astype(jnp.uint8)
