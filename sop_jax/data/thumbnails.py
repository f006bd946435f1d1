"""Images at several sizes with their proportions kept, as image retrieval uses them."""

import math

import numpy as np
from PIL import Image


def thumbnail(image: np.ndarray, side: int) -> np.ndarray:
    """Returns the image with its longer side at most `side` pixels; it is never enlarged.

    This is Pillow's `thumbnail` with the Lanczos filter, which iBOT's `eval_image_retrieval.py`
    uses: where an image shrinks four-fold or more, boxes of pixels are averaged first, which
    differs from the filter by up to four grey levels.

    Args:
        image: uint8 [h, w, 3].
        side: in pixels.

    Returns:
        uint8 [h', w', 3].
    """
    picture = Image.fromarray(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return np.asarray(picture)


def scaled(image: np.ndarray, scale: float) -> np.ndarray:
    """Returns the image scaled by bilinear interpolation without antialiasing.

    This is PyTorch's `interpolate(scale_factor=scale, align_corners=False)`: a side of n pixels
    becomes floor(n scale), and pixel i of it is at (i + 1/2) / scale - 1/2 of the image. The
    coordinates depend on the scale itself and not on the ratio of the sizes, so that they do not
    depend on how many pixels follow.

    Args:
        image: numbers [h, w, 3].
        scale: more than 0 and at most 1.

    Returns:
        float32 [floor(h scale), floor(w scale), 3].
    """
    pixels = np.asarray(image, np.float32)
    if scale == 1:
        return pixels
    for axis in (0, 1):
        size = pixels.shape[axis]
        at = np.maximum((np.arange(math.floor(size * scale)) + 0.5) / scale - 0.5, 0)
        first = np.floor(at).astype(int)
        share = (at - first).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (-1, 1))
        second = np.minimum(first + 1, size - 1)
        pixels = pixels.take(first, axis) * (1 - share) + pixels.take(second, axis) * share
    return pixels


def cut(image: np.ndarray, multiple: int) -> np.ndarray:
    """Returns the image [h, w, 3] without the last rows and columns that complete no `multiple`."""
    height, width = (side - side % multiple for side in image.shape[:2])
    return image[:height, :width]
