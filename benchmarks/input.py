"""Measures images per second of the input pipeline on one and two cores, and of Pillow's.

    python benchmarks/input.py [--images=FOLDER] [--rounds=7]

Each image is a JPEG of 500 x 375 pixels, from which 2 views of 224 and 10 of 96 pixels with all
augmentations and two masks are made. *Ours* is `train_batches` with the default settings, in whole
batches of 32, in one process on one core. *Pillow* makes the same batches, with the same function
for masks, by the operations that torchvision applies to Pillow images: antialiased bicubic crops,
ImageEnhance, hue in HSV, GaussianBlur, solarize. Both alternate on the same core (A B A B); ratios
are of neighbours, and their spreads are printed. Other projects also convert views to normalized
float32 on the host. That is timed separately and not counted, because here the device does it.

Then one and two worker processes alternate on two cores. The parallel efficiency is the throughput
of two workers over twice that of one worker, and over twice that of the single core. Finally the
cost of each part of the work on an image is measured.

Images are photos from --images (any folder tree; resized to 500 x 375 pixels and encoded again with
quality 92), or else they are drawn: noise whose amplitude falls with frequency as that of photos
does, in files of 37 to 70 KB. Runs on Linux only, because it binds processes to cores. The last
line is JSON.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sop_jax.config import paper  # noqa: E402
from sop_jax.data import augment, masks, pipeline  # noqa: E402
from sop_jax.data.decode import decode  # noqa: E402
from sop_jax.data.folders import FolderSource, list_images  # noqa: E402

WIDTH, HEIGHT, QUALITY = 500, 375, 92
FALL = 1.5  # exponent of the drawn images' spectrum, for the file sizes of photos
PATCH = 16
MEAN = np.array((0.485, 0.456, 0.406), np.float32)
STD = np.array((0.229, 0.224, 0.225), np.float32)
Batch = dict[str, np.ndarray]


# The recipe in Pillow


def pillow_views(
    record: bytes, c: Any, rng: np.random.Generator
) -> tuple[list[Image.Image], list[Image.Image]]:
    """Decodes an image and draws its views as torchvision does from Pillow images."""
    image = Image.open(io.BytesIO(record)).convert("RGB")
    first, others, local = c.blur
    chances = [(first, 0.0)] + [(others, c.solarize)] * (c.global_crops - 1)
    globals_ = [
        _pillow_view(image, c, rng, c.global_size, c.global_scale, blur, solarize)
        for blur, solarize in chances
    ]
    locals_ = [
        _pillow_view(image, c, rng, c.local_size, c.local_scale, local, 0.0)
        for _ in range(c.local_crops)
    ]
    return globals_, locals_


def _pillow_view(
    image: Image.Image,
    c: Any,
    rng: np.random.Generator,
    size: int,
    scale: tuple[float, float],
    blur: float,
    solarize: float,
) -> Image.Image:
    top, left, h, w = augment.crop_box(image.height, image.width, scale, rng)
    view = image.crop((left, top, left + w, top + h))
    view = view.resize((size, size), Image.Resampling.BICUBIC)
    if rng.random() < c.flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < c.jitter:
        for name in rng.permutation(("brightness", "contrast", "saturation", "hue")):
            view = _pillow_jitter(view, name, c, rng)
    if rng.random() < c.grayscale:
        grey = view.convert("L")
        view = Image.merge("RGB", (grey, grey, grey))
    if rng.random() < blur:
        view = view.filter(ImageFilter.GaussianBlur(rng.uniform(*c.blur_sigma)))
    if rng.random() < solarize:
        view = ImageOps.solarize(view, threshold=128)
    return view


def _pillow_jitter(view: Image.Image, name: str, c: Any, rng: np.random.Generator) -> Image.Image:
    if name == "hue":
        hue, saturation, value = view.convert("HSV").split()
        turned = np.asarray(hue) + np.int32(rng.uniform(-c.hue, c.hue) * 255).astype(np.uint8)
        return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
    kinds = {
        "brightness": (ImageEnhance.Brightness, c.brightness),
        "contrast": (ImageEnhance.Contrast, c.contrast),
        "saturation": (ImageEnhance.Color, c.saturation),
    }
    enhance, strength = kinds[name]
    return enhance(view).enhance(rng.uniform(1 - strength, 1 + strength))


def pillow_batches(source: Any, config: Any) -> Iterator[Batch]:
    """Yields batches like those of `train_batches`, made with Pillow."""
    side = config.augment.global_size // PATCH
    c, mask = (SimpleNamespace(**part.to_dict()) for part in (config.augment, config.mask))
    rng = np.random.default_rng(0)
    while True:
        indices = rng.integers(len(source), size=config.batch_size)
        views = [pillow_views(source[int(i)], c, rng) for i in indices]
        yield {
            "global_views": np.array([[np.asarray(v) for v in globals_] for globals_, _ in views]),
            "local_views": np.array([[np.asarray(v) for v in locals_] for _, locals_ in views]),
            "mask": np.stack(
                [
                    [masks.view_mask((side, side), rng, mask) for _ in globals_]
                    for globals_, _ in views
                ]
            ),
        }


def normalized(views: np.ndarray) -> np.ndarray:
    """Returns normalized views in float32, channels first, as other projects do on the host."""
    return ((views.astype(np.float32) / 255 - MEAN) / STD).swapaxes(-1, -3)


# Images


def write_images(folder: Path, count: int, photos: str) -> list[int]:
    """Fills a folder with JPEGs of 500 x 375 pixels, and returns their sizes in bytes."""
    files = list_images(photos).files if photos else []
    chosen = files[:: max(1, len(files) // count)][:count]
    sizes = []
    for i in range(len(chosen) or count):
        if chosen:
            with Image.open(f"{photos}/{chosen[i]}") as photo:
                size = (WIDTH, HEIGHT)
                image = photo.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        else:
            image = Image.fromarray(drawn_image(i))
        path = folder / f"{i:04}.jpg"
        image.save(path, quality=QUALITY)
        sizes.append(path.stat().st_size)
    return sizes


def drawn_image(seed: int) -> np.ndarray:
    """Returns colourful noise whose amplitude falls with frequency, uint8 [375, 500, 3]."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.rfftfreq(WIDTH), np.fft.fftfreq(HEIGHT)))
    shape = np.maximum(frequency, 1 / WIDTH)[..., None] ** -FALL
    white = np.fft.rfft2(rng.normal(size=(HEIGHT, WIDTH, 3)), axes=(0, 1))
    pink = np.fft.irfft2(white * shape, (HEIGHT, WIDTH), axes=(0, 1))
    grey = pink.mean(2, keepdims=True)  # channels of photos mostly agree
    pixels = grey / grey.std() + 0.3 * (pink - grey) / (pink - grey).std()
    return (128 + rng.uniform(36, 54) * pixels).clip(0, 255).astype(np.uint8)


# Measuring


def timed(batches: Iterator[Batch], count: int) -> float:
    """Returns the images per second over `count` batches."""
    start = time.perf_counter()
    images = sum(len(next(batches)["mask"]) for _ in range(count))
    return images / (time.perf_counter() - start)


def on_one_core(source: Any, config: Any, rounds: int, count: int) -> dict[str, list[float]]:
    """Returns the images per second of ours and of Pillow's, alternating on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    rates: dict[str, list[float]] = {"ours": [], "pillow": []}
    with contextlib.closing(pipeline.train_batches(source, config, PATCH)) as ours:
        sides = {"ours": ours, "pillow": pillow_batches(source, config)}
        for batches in sides.values():
            timed(batches, 2)  # warm-up
        for _, (name, batches) in itertools.product(range(rounds), sides.items()):
            rates[name].append(timed(batches, count))
    os.sched_setaffinity(0, cores)
    return rates


def on_two_cores(source: Any, config: Any, rounds: int, count: int) -> dict[str, list[float]]:
    """Returns the images per second of one and two workers, alternating on the first two cores."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(cores)[:2]))
    rates: dict[str, list[float]] = {"one worker": [], "two workers": []}
    for _, (workers, name) in itertools.product(range(rounds), enumerate(rates, 1)):
        config.data.workers, config.data.threads = workers, 1
        with contextlib.closing(pipeline.train_batches(source, config, PATCH)) as batches:
            timed(batches, 6 * workers)  # the start, and batches that were made ahead
            rates[name].append(timed(batches, count * workers))
    os.sched_setaffinity(0, cores)
    return rates


def parts(source: Any, config: Any) -> dict[str, float]:
    """Returns the milliseconds per image of each part on one core, at the recipe's probabilities.

    `python` is the time of the whole beyond that sum: random draws, calls, Grain and batching.
    """
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    c = SimpleNamespace(**config.augment.to_dict())
    mask = SimpleNamespace(**config.mask.to_dict())
    rng = np.random.default_rng(0)
    images = [decode(source[i]) for i in range(min(32, len(source)))]
    sizes = [
        (c.global_size, c.global_scale, c.global_crops),
        (c.local_size, c.local_scale, c.local_crops),
    ]
    views = {size: [cv2.resize(image, (size, size)) for image in images] for size, _, _ in sizes}
    first, others, local = c.blur
    blurred = {
        c.global_size: first + (c.global_crops - 1) * others,
        c.local_size: local * c.local_crops,
    }
    side = config.augment.global_size // PATCH

    def cost(work: Callable[[int], Any]) -> float:
        """Returns the milliseconds per call, as the median of five passes."""
        passes = []
        for _ in range(6):
            start = time.perf_counter()
            for i in range(len(images)):
                work(i)
            passes.append((time.perf_counter() - start) / len(images) * 1000)
        return statistics.median(passes[1:])

    def over_views(work: Callable[[np.ndarray], Any], share: float) -> float:
        return sum(n * share * cost(functools.partial(on_view, work, size)) for size, _, n in sizes)

    def on_view(work: Callable[[np.ndarray], Any], size: int, i: int) -> None:
        work(views[size][i])

    def crop(size: int, scale: tuple[float, float], i: int) -> None:
        box = augment.crop_box(HEIGHT, WIDTH, scale, rng)
        augment.resize(images[i], box, size, c.resample)

    def strength(limit: float) -> float:
        return 1 + limit * (2 * rng.random() - 1)

    def blur(view: np.ndarray) -> None:
        low, high = c.blur_sigma
        augment.gaussian_blur(view, low + (high - low) * rng.random())

    table = {
        "read and decode": cost(lambda i: decode(source[i])),
        "crop and resize": sum(n * cost(functools.partial(crop, *which)) for *which, n in sizes),
        "brightness": over_views(
            lambda v: augment.adjust_brightness(v, strength(c.brightness)), c.jitter
        ),
        "contrast": over_views(
            lambda v: augment.adjust_contrast(v, strength(c.contrast)), c.jitter
        ),
        "saturation": over_views(
            lambda v: augment.adjust_saturation(v, strength(c.saturation)), c.jitter
        ),
        "hue": over_views(lambda v: augment.adjust_hue(v, strength(c.hue) - 1), c.jitter),
        "grayscale": over_views(augment.grayscale, c.grayscale),
        "flip": over_views(lambda v: cv2.flip(v, 1), c.flip),
        "blur": sum(n * cost(functools.partial(on_view, blur, s)) for s, n in blurred.items()),
        "masks": c.global_crops * cost(lambda i: masks.view_mask((side, side), rng, mask)),
    }
    with contextlib.closing(pipeline.train_batches(source, config, PATCH)) as batches:
        timed(batches, 2)
        whole = 1000 / statistics.median(timed(batches, 2) for _ in range(5))
    table["python"] = whole - sum(table.values())
    table["whole"] = whole
    os.sched_setaffinity(0, cores)
    return table


def spread(values: list[float]) -> str:
    """Returns the median and the range of some values as text."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Prints the tables and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", default="", help="folder of photos; by default they are drawn")
    parser.add_argument("--count", type=int, default=128, help="number of different images")
    parser.add_argument("--rounds", type=int, default=7, help="alternations of both sides")
    parser.add_argument("--resample", choices=("opencv", "pillow"), default="opencv")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = write_images(Path(folder), args.count, args.images)
        config = paper()
        config.batch_size = 32
        config.augment.resample = args.resample
        config.data.update(workers=0, threads=0)
        # Repeated to the length of a real data set: with only a hundred images, Grain takes 0.2 ms
        # to shuffle each index.
        source = FolderSource(folder, list_images(folder).files * (8192 // len(sizes)), None, None)
        print(
            f"{len(sizes)} {'photos' if args.images else 'drawn images'} of {WIDTH} x {HEIGHT}, "
            f"{min(sizes) / 1e3:.0f} to {max(sizes) / 1e3:.0f} KB, "
            f"{statistics.mean(sizes) / 1e3:.0f} on average",
            flush=True,
        )
        rates = on_one_core(source, config, args.rounds, 3)
        table = parts(source, config)
        views = next(pillow_batches(source, config))
        start = time.perf_counter()
        for key in ("global_views", "local_views"):
            normalized(views[key])
        conversion = (time.perf_counter() - start) / config.batch_size * 1000
        rates |= on_two_cores(source, config, args.rounds, 16)
    ratios = [ours / pillow for ours, pillow in zip(rates["ours"], rates["pillow"], strict=True)]
    pairs = list(zip(rates["two workers"], rates["one worker"], strict=True))
    core = statistics.median(rates["ours"])
    efficiency = [two / (2 * one) for two, one in pairs]
    per_core = [two / (2 * core) for two, _ in pairs]
    for name, values in rates.items():
        print(f"{name}: {spread(values)} images/s")
    print(f"ours over pillow, one core: {spread(ratios)}")
    print(f"two workers over twice one worker: {spread(efficiency)}")
    print(f"two workers over twice one core: {spread(per_core)}")
    print(f"not counted, conversion to float32 in other projects: {conversion:.2f} ms per image")
    print("\n| part | ms per image | share |\n|---|---|---|")
    for name, cost in table.items():
        print(f"| {name} | {cost:.3f} | {100 * cost / table['whole']:.0f} % |")
    medians = {name.replace(" ", "_"): statistics.median(v) for name, v in rates.items()}
    line = {
        **{f"{name}_images_per_s": round(value, 1) for name, value in medians.items()},
        "speed_ratio": round(statistics.median(ratios), 3),
        "speed_ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "parallel_efficiency": round(statistics.median(efficiency), 3),
        "parallel_efficiency_spread": [round(min(efficiency), 3), round(max(efficiency), 3)],
        "efficiency_over_one_core": round(statistics.median(per_core), 3),
        "jpeg_kilobytes": round(statistics.mean(sizes) / 1e3, 1),
        "resample": args.resample,
        "parts_ms": {name: round(cost, 4) for name, cost in table.items()},
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
