"""RandAugment and random erasing, which fine-tuning applies to a training crop.

Both follow timm 0.4.12, whose names are `rand-m9-mstd0.5-inc1` and `reprob` with the mode "pixel".
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from sop_jax.data.augment import FILTERS

CHOSEN = 2  # operations drawn for an image, with replacement
APPLIED = 0.5  # the probability that a drawn operation is applied
SPREAD = 0.5  # the standard deviation of the magnitude
STRONGEST = 10.0  # the largest magnitude
MEAN = np.array((0.485, 0.456, 0.406), np.float32) * 255  # the channel statistics of ImageNet
STD = np.array((0.229, 0.224, 0.225), np.float32) * 255
FILL = tuple(round(float(value)) for value in MEAN)  # the colour outside of a moved image
ERASED = 0.02, 1 / 3  # the smallest and the largest share of the area that is erased
LOG_ASPECT = math.log(0.3), math.log(1 / 0.3)  # height / width of an erased box


# Maps (RGB picture, strength from 0 to 1, sign -1 or 1, filter for moved pixels) to a picture.
Operation = Callable[..., Image.Image]


def _enhance(kind: Callable[[Image.Image], Any]) -> Operation:
    return lambda picture, strength, sign, kernel: kind(picture).enhance(1 + sign * 0.9 * strength)


def _move(matrix: Callable[[float, tuple[int, int]], tuple[float, ...]]) -> Operation:
    def move(picture: Image.Image, strength: float, sign: float, kernel: Any) -> Image.Image:
        affine = matrix(sign * strength, picture.size)
        return picture.transform(
            picture.size, Image.Transform.AFFINE, affine, kernel, fillcolor=FILL
        )

    return move


def _solarize_add(picture: Image.Image, strength: float, *_: object) -> Image.Image:
    added = int(110 * strength)
    table = [min(255, value + added) if value < 128 else value for value in range(256)]
    return picture.point(table * 3)


def _posterize(picture: Image.Image, strength: float, *_: object) -> Image.Image:
    dropped = 4 + int(4 * strength)  # all eight bits at the largest strength, as in timm
    return picture.point([value >> dropped << dropped for value in range(256)] * 3)


# In the order of timm's list.
OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda picture, *_: ImageOps.autocontrast(picture),
    "equalize": lambda picture, *_: ImageOps.equalize(picture),
    "invert": lambda picture, *_: ImageOps.invert(picture),
    "rotate": lambda picture, strength, sign, kernel: picture.rotate(
        sign * 30 * strength, kernel, fillcolor=FILL
    ),
    "posterize": _posterize,
    "solarize": lambda picture, strength, *_: ImageOps.solarize(picture, 256 - int(256 * strength)),
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _move(lambda amount, size: (1, 0.3 * amount, 0, 0, 1, 0)),
    "shear_y": _move(lambda amount, size: (1, 0, 0, 0.3 * amount, 1, 0)),
    "translate_x": _move(lambda amount, size: (1, 0, 0.45 * amount * size[0], 0, 1, 0)),
    "translate_y": _move(lambda amount, size: (1, 0, 0, 0, 1, 0.45 * amount * size[1])),
}


def rand_augment(
    image: np.ndarray, rng: np.random.Generator, magnitude: float, interpolation: str
) -> np.ndarray:
    """Applies up to two random operations.

    Args:
        image: uint8 [h, w, 3].
        rng: the generator of all draws.
        magnitude: the mean of the magnitude, from 0 to 10; that of each operation is drawn from a
            normal distribution and limited to this range.
        interpolation: "bilinear" or "bicubic", for operations that move pixels.

    Returns:
        uint8 [h, w, 3].
    """
    picture, names = Image.fromarray(image), tuple(OPERATIONS)
    for number in rng.integers(len(names), size=CHOSEN):
        if rng.random() < APPLIED:
            drawn = min(STRONGEST, max(0.0, rng.normal(magnitude, SPREAD)))
            sign = -1.0 if rng.random() < 0.5 else 1.0
            operation = OPERATIONS[names[number]]
            picture = operation(picture, drawn / STRONGEST, sign, FILTERS[interpolation])
    return np.asarray(picture)


def erase_box(
    height: int, width: int, rng: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """Draws the box that is erased: its area and its aspect ratio, and then where it fits.

    Args:
        height: the height of the image in pixels.
        width: the width of the image in pixels.
        rng: the generator of all draws.

    Returns:
        (top, left, height, width) in pixels, or None if ten draws did not fit.
    """
    for _ in range(10):
        area = rng.uniform(*ERASED) * height * width
        aspect = math.exp(rng.uniform(*LOG_ASPECT))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return int(top), int(left), h, w
    return None


def erase(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fills a random box with normal noise, drawn for each pixel and channel.

    The noise has ImageNet's channel means and standard deviations. timm draws it after the image
    was normalized; here it is rounded and limited to the range of pixels, which is at least 1.8
    standard deviations on both sides of the mean.

    Args:
        image: uint8 [h, w, 3].
        rng: the generator of all draws.

    Returns:
        uint8 [h, w, 3].
    """
    box = erase_box(image.shape[0], image.shape[1], rng)
    if box is None:
        return image
    top, left, h, w = box
    noise = MEAN + STD * rng.standard_normal((h, w, 3), np.float32)
    erased = image.copy()
    erased[top : top + h, left : left + w] = np.clip(np.rint(noise), 0, 255)
    return erased
