"""Small data sets, in the layouts in which tasks read them."""

import pathlib
import pickle
from typing import Any

import numpy as np
from PIL import Image

from sop_jax.data import ade20k, davis


def colours(root: pathlib.Path, labelled: bool, count: int = 12, held: int = 5) -> None:
    """Makes splits of two classes, red and green, or a folder without classes.

    Args:
        root: the folder.
        labelled: whether there are classes, and the splits train and val.
        count: the number of images to train on, of each colour.
        held: the same of test images.
    """
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("val", held)) if labelled else ((".", count),):
        for channel, name in enumerate(("red", "green")):
            folder = root / split / (name if labelled else "")
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(number):
                pixels = rng.integers(0, 60, (20, 24, 3)).astype(np.uint8)
                pixels[..., channel] += 180
                Image.fromarray(pixels).save(folder / f"{name}{i}.png")


def pack(root: pathlib.Path, file: pathlib.Path, test: str = "val", times: int = 1) -> None:
    """Writes the images of `colours` to one file.

    Args:
        root: the folder of images.
        file: the `.npz` file.
        test: the name of the test split.
        times: how often each image is there.
    """
    arrays: dict[str, Any] = {"class_names": np.array(["green", "red"])}
    for folder, split in (("train", "train"), ("val", test)):
        images = sorted((root / folder).rglob("*.png")) * times
        records = [image.read_bytes() for image in images]
        arrays[f"{split}_blob"] = np.frombuffer(b"".join(records), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, records)])
        arrays[f"{split}_labels"] = np.array([image.parent.name == "red" for image in images], int)
    np.savez(file, **arrays)


def picture(seed: int, height: int = 24, width: int = 32) -> Image.Image:
    """Returns large random squares, which survive JPEG and scaling."""
    squares = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(squares).resize((width, height), Image.Resampling.NEAREST)


def write_small_set(root: pathlib.Path, name: str = "roxford5k") -> pathlib.Path:
    """Writes a set of six images, two for each of three queries, which show the same."""
    folder = root / name
    (folder / "jpg").mkdir(parents=True)
    none: list[int] = []
    entries = [dict(easy=[i], hard=[i + 3], junk=none) for i in range(3)]
    names = dict(imlist=[f"i{i}" for i in range(6)], qimlist=["q0", "q1", "q2"])
    (folder / f"gnd_{name}.pkl").write_bytes(pickle.dumps(names | dict(gnd=entries)))
    for i in range(6):
        picture(i % 3).save(folder / "jpg" / f"i{i}.jpg")
    for i in range(3):
        picture(i).save(folder / "jpg" / f"q{i}.jpg")
    return folder


def write_clip(root: pathlib.Path, name: str, frames: int, masks: int | None = None) -> None:
    """Writes two coloured squares that move to the right by a pixel per frame."""
    for folder in (davis.FRAMES, davis.MASKS):
        (root / folder / name).mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 60, (64, 128, 3))
    for number in range(frames):
        pixels, mask = noise.astype(np.uint8), np.zeros((64, 128), np.uint8)
        for identity, top in ((1, 6), (2, 34)):
            area = np.s_[top : top + 24, 16 + number : 48 + number]
            pixels[area], mask[area] = [0, 255 * (identity == 1), 255 * (identity == 2)], identity
        Image.fromarray(pixels).save(root / davis.FRAMES / name / f"{number:05d}.jpg", quality=95)
        if masks is None or number < masks:
            path = root / davis.MASKS / name / f"{number:05d}.png"
            path.write_bytes(davis.encode_mask(mask))


def write_pairs(root: pathlib.Path, count: int = 3, classes: int = 5) -> pathlib.Path:
    """Writes pairs of random blocks, in the layout of the benchmark."""
    rng = np.random.default_rng(0)
    for split in ade20k.SPLITS:
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            mask = np.kron(rng.integers(0, classes + 1, (6, 8)), np.ones((8, 8))).astype(np.uint8)
            image = rng.integers(0, 256, (48, 64, 3)).astype(np.uint8)
            Image.fromarray(image).save(root / "images" / split / f"ADE_{i:04}.jpg")
            Image.fromarray(mask).save(root / "annotations" / split / f"ADE_{i:04}.png")
    return root


def write_tree(root: pathlib.Path, files: list[str]) -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(root / file, "JPEG")
