"""Segments images of any size with a network for crops of one size, as in mmsegmentation.

Windows of the size of the crops slide over the image, and their logits are averaged.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sop_jax.models.segmentation import resize


class Window(NamedTuple):
    """A window of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def windows(height: int, width: int, crop: int, stride: int) -> list[Window]:
    """Returns the windows that cover an image, row by row.

    The last ones are pushed back inside the image. A window is smaller than the crop only if the
    image is. All windows of an image have the same size.
    """
    h, w = min(height, crop), min(width, crop)

    def starts(side: int) -> list[int]:
        count = max(side - crop + stride - 1, 0) // stride + 1
        return [max(min(i * stride + crop, side) - crop, 0) for i in range(count)]

    return [Window(top, left, h, w) for top in starts(height) for left in starts(width)]


@functools.partial(jax.jit, static_argnames=("boxes", "size", "shape"))
def merge(
    logits: Float[Array, "n h w classes"],
    boxes: Sequence[Window],
    size: tuple[int, int],
    shape: tuple[int, int],
) -> Float[Array, "H W classes"]:
    """Returns the logits of an image from those of its windows.

    Args:
        logits: the logits of the windows, at any resolution; they are resized to the windows.
        boxes: the windows.
        size: the height and the width of the image that the windows are of.
        shape: the height and the width of the result, to which the averages are resized.
    """
    total = jnp.zeros((*size, logits.shape[-1]), jnp.float32)
    for box, part in zip(boxes, resize(logits, (boxes[0].height, boxes[0].width)), strict=True):
        place = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
        total = total.at[place].add(part)
    average = total / counts(boxes, size)[..., None]
    return resize(average[None], shape)[0]


def counts(boxes: Sequence[Window], size: tuple[int, int]) -> Float[np.ndarray, "H W"]:
    """Returns the number of windows that cover each pixel."""
    found = np.zeros(size, np.float32)
    for top, left, height, width in boxes:
        found[top : top + height, left : left + width] += 1
    return found
