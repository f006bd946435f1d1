"""Multi-crop of the iBOT recipe (its `DataAugmentationiBOT`), and the crop of the k-NN protocol.

Every operation follows torchvision on Pillow images: same order, probabilities, ranges and
meaning. OpenCV does the work, so that pixels differ from Pillow's by rounding; blur is a true
Gaussian where Pillow stacks three box filters. All images are uint8 RGB [h, w, 3].

Decoding and these functions decide how many images a core makes (benchmarks/input.py), hence a few
unusual ways: sums of bytes that OpenCV saturates instead of look-up tables, separable filters with
given weights instead of cv2.GaussianBlur, which takes twice as long.
"""

import itertools
import math
from typing import Any

import cv2
import numpy as np
from PIL import Image

cv2.setNumThreads(0)  # parallel over images, not within one

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow and OpenCV
LOG_RATIO = math.log(3 / 4), math.log(4 / 3)  # torchvision's default
THIN = 8  # times longer than wide: where an evaluation scales only what it looks at
MOST_FILTERED = 2.5  # times smaller: where areas come nearer to Pillow than three weights do
JITTER_ORDERS = tuple(itertools.permutations(("brightness", "contrast", "saturation", "hue")))


def multi_crop(
    image: np.ndarray, rng: np.random.Generator, augment_config: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the views of one image.

    Args:
        image: uint8 [h, w, 3].
        rng: where every draw comes from.
        augment_config: the names of `config.augment` as attributes. A plain namespace is much
            faster here than a ConfigDict.

    Returns:
        Global views uint8 [2, S, S, 3] and local views uint8 [V, s, s, 3]; V may be 0.
    """
    c = augment_config
    first, second, local = c.blur
    globals_ = np.empty((2, c.global_size, c.global_size, 3), np.uint8)
    locals_ = np.empty((c.local_crops, c.local_size, c.local_size, 3), np.uint8)
    globals_[0] = _view(image, rng, c, c.global_size, c.global_scale, first, 0.0)
    globals_[1] = _view(image, rng, c, c.global_size, c.global_scale, second, c.solarize)
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
    """One augmented crop, uint8 [size, size, 3]."""
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
    """A random box as torchvision's RandomResizedCrop draws it, aspect 3/4 to 4/3.

    Args:
        height: of the image, pixels.
        width: of the image, pixels.
        scale: smallest and largest share of the image's area.
        rng: where every draw comes from.

    Returns:
        (top, left, height, width). After ten boxes that do not fit: the largest centred one
        whose aspect is allowed.
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
        box: pixels.
        size: side of the result, pixels.
        resample: "pillow" is bicubic with antialiasing, as iBOT; "opencv" comes close to it in a
            fraction of the time: a low-pass of three weights, then bicubic. A side that shrinks
            f-fold gets the weights [t, 1 - 2t, t], t = (f - 1) / 4 from 0 to 1/4, and none when
            it grows. Photos come out 1 to 2 grey levels (root mean square) from Pillow's, less
            than area averages do. Boxes that are to shrink more than 2.5-fold are averaged over
            areas instead.

    Returns:
        uint8 [size, size, 3].
    """
    top, left, h, w = box
    view = image[top : top + h, left : left + w]
    if resample == "pillow":
        # Pixels outside the box have no part in it, as in torchvision.
        return np.asarray(Image.fromarray(view).resize((size, size), Image.Resampling.BICUBIC))
    if max(h, w) > MOST_FILTERED * size and min(h, w) >= size:
        return cv2.resize(view, (size, size), interpolation=cv2.INTER_AREA)
    if max(h, w) > size:
        # Aliasing is what bicubic alone would add: it looks at the four nearest pixels.
        horizontal, vertical = _low_pass(w / size), _low_pass(h / size)
        view = cv2.sepFilter2D(view, -1, horizontal, vertical, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(view, (size, size), interpolation=cv2.INTER_CUBIC)


def _low_pass(shrink: float) -> np.ndarray:
    """Three weights that sum to one."""
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
    """The four adjustments in random order (torchvision's ColorJitter).

    Args:
        image: uint8 [h, w, 3].
        rng: where the order and the four strengths come from.
        brightness: its factor is ~ U(max(0, 1 - brightness), 1 + brightness); the next two alike.
        contrast: see brightness.
        saturation: see brightness.
        hue: its shift is ~ U(-hue, hue) turns of the colour circle.

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
    """The image times `factor`, clipped; uint8 [h, w, 3] in and out."""
    return cv2.convertScaleAbs(image, alpha=factor)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the mean grey value of the image; uint8 [h, w, 3] in and out."""
    mean = round(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0])
    return cv2.addWeighted(image, factor, image, 0.0, (1 - factor) * mean)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends every pixel with its own grey value; uint8 [h, w, 3] in and out."""
    return cv2.transform(image, factor * np.eye(3) + (1 - factor) * LUMA)


def adjust_hue(image: np.ndarray, turns: float) -> np.ndarray:
    """Turns the hue in HSV by `turns` of the circle; uint8 [h, w, 3] in and out."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    row = np.zeros(hsv.shape[1:], np.uint8)
    row[:, 0] = int(turns * 255) % 256
    hsv += row  # wraps round the circle; adding to every third byte alone takes twice as long
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def grayscale(image: np.ndarray) -> np.ndarray:
    """Grey in all three channels; uint8 [h, w, 3] in and out."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian of `sigma` pixels to 3 sigma, edges repeated; uint8 [h, w, 3] in and out."""
    weights = cv2.getGaussianKernel(round(6 * sigma) | 1, sigma)
    return cv2.sepFilter2D(image, -1, weights, weights, borderType=cv2.BORDER_REPLICATE)


def solarized(image: np.ndarray) -> np.ndarray:
    """Inverts values from 128 on; uint8 [h, w, 3] in and out."""
    return cv2.min(image, cv2.bitwise_not(image))


def eval_image(image: np.ndarray, resize: int, crop: int) -> np.ndarray:
    """The view of the k-NN protocol: short side to `resize`, then the centre.

    Of images more than THIN times as long as they are wide, which would be scaled to any size at
    all, only the centre is scaled.

    Args:
        image: uint8 [h, w, 3].
        resize: the short side, pixels; bicubic with antialiasing (Pillow).
        crop: side of the centre crop, pixels, at most `resize`.

    Returns:
        uint8 [crop, crop, 3].
    """
    height, width = image.shape[:2]
    short = min(height, width)
    w, h = int(resize * width / short), int(resize * height / short)
    top, left = round((h - crop) / 2), round((w - crop) / 2)
    pixels = image
    if (h, w) != (height, width):
        picture, cubic = Image.fromarray(image), Image.Resampling.BICUBIC
        if max(h, w) > THIN * min(h, w):
            x, y = width / w, height / h
            box = (left * x, top * y, (left + crop) * x, (top + crop) * y)
            return np.asarray(picture.resize((crop, crop), cubic, box))
        pixels = np.asarray(picture.resize((w, h), cubic))
    return pixels[top : top + crop, left : left + crop]
