"""Multi-crop of the iBOT recipe (its `DataAugmentationiBOT`), and the crop of the k-NN protocol.

Every operation follows torchvision on Pillow images: the order, probabilities, ranges and meaning
are the same. The work is done by OpenCV, so pixels differ from Pillow's by rounding; the blur is a
true Gaussian, whereas Pillow stacks three box filters. All images are uint8 RGB [h, w, 3].

Decoding and these functions determine how many images per second a core makes
(benchmarks/input.py). A few unusual choices are made for speed: sums of bytes that OpenCV saturates
instead of look-up tables, and separable filters with given weights instead of cv2.GaussianBlur,
which takes twice as long.
"""

import itertools
import math
from typing import Any

import cv2
import numpy as np
from PIL import Image

cv2.setNumThreads(0)  # parallel over images, not within one

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as in Pillow and OpenCV
LOG_RATIO = math.log(3 / 4), math.log(4 / 3)  # torchvision's default
THIN = 8  # the ratio of sides above which an evaluation scales only the centre crop
MOST_FILTERED = 2.5  # the shrink factor above which area averages come closer to Pillow
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
JITTER_ORDERS = tuple(itertools.permutations(("brightness", "contrast", "saturation", "hue")))


def multi_crop(
    image: np.ndarray, rng: np.random.Generator, augment_config: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the views of one image.

    Args:
        image: uint8 [h, w, 3].
        rng: the generator of all draws.
        augment_config: has the names of `config.augment` as attributes. A plain namespace is much
            faster here than a ConfigDict.

    Returns:
        Global views uint8 [Q, S, S, 3] and local views uint8 [V, s, s, 3]; V may be 0. Blur and
        solarize have probabilities of their own for the first global view; all later ones are
        drawn as the second one, since the recipe has only two.
    """
    c = augment_config
    first, others, local = c.blur
    globals_ = np.empty((c.global_crops, c.global_size, c.global_size, 3), np.uint8)
    locals_ = np.empty((c.local_crops, c.local_size, c.local_size, 3), np.uint8)
    for i, out in enumerate(globals_):
        blur, solarize = (first, 0.0) if i == 0 else (others, c.solarize)
        out[:] = _view(image, rng, c, c.global_size, c.global_scale, blur, solarize)
    for out in locals_:
        out[:] = _view(image, rng, c, c.local_size, c.local_scale, local, 0.0)
    return globals_, locals_


def _view(
    image: np.ndarray,
    rng: np.random.Generator,
    c: Any,
    size: int,
    scale: tuple[float, float],
    blur: float,
    solarize: float,
) -> np.ndarray:
    """Makes one augmented crop, uint8 [size, size, 3]."""
    draw = rng.random
    top, left, h, w = crop_box(image.shape[0], image.shape[1], scale, rng)
    view = resize(image, (top, left, h, w), size, c.resample)
    if draw() < c.flip:
        view = cv2.flip(view, 1)
    if draw() < c.jitter:
        view = color_jitter(view, rng, c.brightness, c.contrast, c.saturation, c.hue)
    if draw() < c.grayscale:
        view = grayscale(view)
    if draw() < blur:
        low, high = c.blur_sigma
        view = gaussian_blur(view, low + (high - low) * draw())
    if draw() < solarize:
        view = solarized(view)
    return view


def crop_box(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draws a box as torchvision's RandomResizedCrop does, with an aspect ratio of 3/4 to 4/3.

    Args:
        height: the height of the image in pixels.
        width: the width of the image in pixels.
        scale: the smallest and the largest share of the image's area.
        rng: the generator of all draws.

    Returns:
        (top, left, height, width) in pixels. After ten boxes that do not fit, the largest centred
        box whose aspect ratio is allowed.
    """
    draw = rng.random
    (low, high), (log_low, log_high) = scale, LOG_RATIO
    for _ in range(10):
        area = height * width * (low + (high - low) * draw())
        aspect = math.exp(log_low + (log_high - log_low) * draw())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int((height - h + 1) * draw()), int((width - w + 1) * draw()), h, w
    w = min(width, max(1, round(height * 4 / 3)))
    h = min(height, max(1, round(width * 4 / 3)))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(
    image: np.ndarray, box: tuple[int, int, int, int], size: int, resample: str
) -> np.ndarray:
    """Cuts `box` (top, left, height, width) out of the image and scales it to a square.

    Args:
        image: uint8 [h, w, 3].
        box: in pixels.
        size: the side of the result in pixels.
        resample: "pillow" is bicubic with antialiasing, as in iBOT; "opencv" approximates it in a
            fraction of the time, by a low-pass filter of three weights followed by bicubic
            interpolation. A side that shrinks f-fold is filtered with the weights [t, 1 - 2t, t],
            t = (f - 1) / 4 clipped to [0, 1/4]; a side that grows is not filtered. On photos the
            result differs from Pillow's by 1 to 2 grey levels (root mean square), less than area
            averages do. Boxes that shrink more than 2.5-fold are averaged over areas instead.

    Returns:
        uint8 [size, size, 3].
    """
    top, left, h, w = box
    view = image[top : top + h, left : left + w]
    if resample == "pillow":
        return resized_crop(image, box, size, "bicubic")
    if max(h, w) > MOST_FILTERED * size and min(h, w) >= size:
        return cv2.resize(view, (size, size), interpolation=cv2.INTER_AREA)
    if max(h, w) > size:
        # Bicubic interpolation sees only the four nearest pixels, which would cause aliasing.
        horizontal, vertical = _low_pass(w / size), _low_pass(h / size)
        view = cv2.sepFilter2D(view, -1, horizontal, vertical, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(view, (size, size), interpolation=cv2.INTER_CUBIC)


def resized_crop(
    image: np.ndarray, box: tuple[int, int, int, int], size: int, interpolation: str
) -> np.ndarray:
    """Cuts out a box and scales it to a square with Pillow's antialiased filters.

    As in torchvision, pixels outside the box do not contribute.

    Args:
        image: uint8 [h, w, 3].
        box: (top, left, height, width) in pixels.
        size: the side of the result in pixels.
        interpolation: "bicubic" or "bilinear".

    Returns:
        uint8 [size, size, 3].
    """
    top, left, h, w = box
    view = Image.fromarray(image[top : top + h, left : left + w])
    return np.asarray(view.resize((size, size), FILTERS[interpolation]))


def _low_pass(shrink: float) -> np.ndarray:
    """Returns the three weights of the filter, which sum to 1."""
    t = min(max(shrink - 1, 0.0), 1.0) / 4
    return np.array((t, 1 - 2 * t, t))


def color_jitter(
    image: np.ndarray,
    rng: np.random.Generator,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
) -> np.ndarray:
    """Applies the four adjustments in random order (torchvision's ColorJitter).

    Args:
        image: uint8 [h, w, 3].
        rng: the generator of the order and of the four strengths.
        brightness: the factor is ~ U(max(0, 1 - brightness), 1 + brightness).
        contrast: the factor is drawn as for brightness.
        saturation: the factor is drawn as for brightness.
        hue: the shift is ~ U(-hue, hue), in turns of the colour circle.

    Returns:
        uint8 [h, w, 3].
    """
    draw = rng.random
    for name in JITTER_ORDERS[int(len(JITTER_ORDERS) * draw())]:
        if name == "brightness":
            image = adjust_brightness(image, _factor(brightness, draw()))
        elif name == "contrast":
            image = adjust_contrast(image, _factor(contrast, draw()))
        elif name == "saturation":
            image = adjust_saturation(image, _factor(saturation, draw()))
        else:
            image = adjust_hue(image, hue * (2 * draw() - 1))
    return image


def _factor(strength: float, uniform: float) -> float:
    low = max(0.0, 1 - strength)
    return low + (1 + strength - low) * uniform


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies the image by `factor` and clips; uint8 [h, w, 3] in and out."""
    return cv2.convertScaleAbs(image, alpha=factor)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the mean grey value of the image; uint8 [h, w, 3] in and out."""
    mean = round(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0])
    return cv2.addWeighted(image, factor, image, 0.0, (1 - factor) * mean)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends every pixel with its own grey value; uint8 [h, w, 3] in and out."""
    return cv2.transform(image, factor * np.eye(3) + (1 - factor) * LUMA)


def adjust_hue(image: np.ndarray, turns: float) -> np.ndarray:
    """Rotates the hue in HSV by `turns` of the circle; uint8 [h, w, 3] in and out."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    row = np.zeros(hsv.shape[1:], np.uint8)
    row[:, 0] = int(turns * 255) % 256
    hsv += row  # wraps around the circle; adding to just every third byte takes twice as long
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def grayscale(image: np.ndarray) -> np.ndarray:
    """Sets all three channels to the grey value; uint8 [h, w, 3] in and out."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Returns a uint8 [h, w, 3] image blurred by `sigma` pixels, truncated at 3 sigma."""
    weights = cv2.getGaussianKernel(round(6 * sigma) | 1, sigma)
    return cv2.sepFilter2D(image, -1, weights, weights, borderType=cv2.BORDER_REPLICATE)


def solarized(image: np.ndarray) -> np.ndarray:
    """Inverts values of 128 and above; uint8 [h, w, 3] in and out."""
    return cv2.min(image, cv2.bitwise_not(image))


def eval_image(
    image: np.ndarray, resize: int, crop: int, interpolation: str = "bicubic"
) -> np.ndarray:
    """Makes the view of the k-NN protocol: scales the short side to `resize`, then crops.

    Only the centre is scaled if the long side is more than THIN times the short side, because such
    an image could become arbitrarily large.

    Args:
        image: uint8 [h, w, 3].
        resize: the length of the short side in pixels, by one of Pillow's antialiased filters.
        crop: the side of the centre crop in pixels, at most `resize`.
        interpolation: "bicubic" or "bilinear".

    Returns:
        uint8 [crop, crop, 3].
    """
    height, width = image.shape[:2]
    h, w = _scaled_sides(height, width, resize)
    top, left = round((h - crop) / 2), round((w - crop) / 2)
    if max(h, w) > THIN * min(h, w) and (h, w) != (height, width):
        x, y = width / w, height / h
        box = (left * x, top * y, (left + crop) * x, (top + crop) * y)
        picture = Image.fromarray(image)
        return np.asarray(picture.resize((crop, crop), FILTERS[interpolation], box))
    return resize_short(image, resize, interpolation)[top : top + crop, left : left + crop]


def resize_short(image: np.ndarray, short: int, interpolation: str) -> np.ndarray:
    """Scales the short side to a length with one of Pillow's antialiased filters.

    Args:
        image: uint8 [h, w, 3].
        short: the new length of the short side in pixels; that of the long side is rounded down.
        interpolation: "bicubic" or "bilinear".

    Returns:
        uint8 [H, W, 3].
    """
    height, width = image.shape[:2]
    h, w = _scaled_sides(height, width, short)
    if (h, w) == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((w, h), FILTERS[interpolation]))


def _scaled_sides(height: int, width: int, short: int) -> tuple[int, int]:
    """Returns height and width after the short side was scaled to `short`."""
    shorter = min(height, width)
    return int(short * height / shorter), int(short * width / shorter)
