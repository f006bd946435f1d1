"""Features of images whose sizes differ, averaged over scales, as in image retrieval."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float32, UInt8

from sop_jax.data.thumbnails import cut, scaled

SCALES = (1.0, 1 / 2**0.5, 0.5)


def multi_scale(
    features: Callable[[np.ndarray], np.ndarray],
    image: UInt8[np.ndarray, "h w 3"],
    scales: Sequence[float],
    patch: int,
) -> Float32[np.ndarray, " D"]:
    """Returns the mean of the features of an image at several scales.

    Args:
        features: maps pixels float32 [h, w, 3] from 0 to 255, whose sides are multiples of `patch`,
            to features [D].
        image: the image at scale 1.
        scales: the scales; one that would leave less than one patch is left out.
        patch: the side of a patch in pixels. Rows and columns that complete no patch are cut off.

    Raises:
        ValueError: a side of the image is less than one patch.
    """
    sizes = (cut(scaled(image, scale), patch) for scale in scales)
    found = [np.asarray(features(pixels)) for pixels in sizes if pixels.size]
    if not found:
        height, width = image.shape[:2]
        raise ValueError(f"{height} x {width} pixels are less than a patch of {patch} x {patch}")
    return np.stack(found).mean(axis=0)
