"""The runs that claims compare: a recipe for the digits, what is changed in it, and its images."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from etils import epath
from PIL import Image
from rows import recipe, settings_digest

from sop_jax.data.sources import DigitsSource
from sop_jax.data.subsets import by_class, labels_of
from sop_jax.paths import draft_of

# All runs have the same number of steps: 800 are 35.6 epochs of the 1437 train images, and two
# thirds of the recipes' own length, so that a quick set ends in 100 minutes on two cores.
STEPS = 800
EVALUATIONS = 10  # by k-NN and of prototypes, after that of the untrained network

# `digits` are scikit-learn's as they are. `long_tail` is a part of them, in which the class of rank
# r has 1 / r of the images of the first. `half` are five of the ten classes; the others are for
# transfer. The ranks and the five classes are drawn by seed.
IMAGES = ("digits", "long_tail", "half")


class Run(NamedTuple):
    """A training.

    Attributes:
        recipe: the method whose recipe in configs/ it has.
        changes: what differs, as pairs of the dotted name of a setting and its value.
        images: one of IMAGES.
    """

    recipe: str
    changes: tuple[tuple[str, Any], ...] = ()
    images: str = "digits"


def run(recipe: str, changes: Mapping[str, Any] | None = None, images: str = "digits") -> Run:
    """Returns a run."""
    return Run(recipe, tuple((changes or {}).items()), images)


def label(run: Run) -> str:
    """Returns a readable name of a run."""
    words = [f"{name.removeprefix(f'{run.recipe}.')} {value}" for name, value in run.changes]
    words += [run.images.replace("_", " ")] * (run.images != "digits")
    return f"{run.recipe}: {', '.join(words)}" if words else run.recipe


def settings(run: Run, steps: int = STEPS) -> ml_collections.ConfigDict:
    """Returns the config of a run, with the name of its images in place of their path."""
    config = recipe(run.recipe)
    config.update_from_flattened_dict(dict(run.changes))
    config.steps = steps
    config.eval_every = max(1, steps // EVALUATIONS)
    config.checkpoint_every = max(1, steps // 4)
    config.eval.tasks = ("knn", "prototypes")
    if run.images != "digits":
        config.data.update(source="packed", path=run.images, train_split="train", test_split="test")
    return config


def digest(run: Run, steps: int = STEPS) -> str:
    """Returns a digest of all that determines a run, except its seed."""
    return settings_digest(settings(run, steps))


def prepared(run: Run, steps: int, seed: int, folder: Path) -> ml_collections.ConfigDict:
    """Returns the config with which a run trains, and writes its images unless they are there."""
    config = settings(run, steps)
    config.seed = seed
    if run.images != "digits":
        config.data.path = str(folder / f"{run.images}_{seed}.npz")
        if not Path(config.data.path).exists():
            folder.mkdir(parents=True, exist_ok=True)
            write(splits(run.images, seed), Path(config.data.path))
    return config


# The images


class Split(NamedTuple):
    """Some of the digits: pixels uint8 [n, h, w, 3] and labels [n]."""

    images: np.ndarray
    labels: np.ndarray


def splits(images: str, seed: int) -> dict[str, Split]:
    """Returns the splits of a part of the digits.

    Args:
        images: `long_tail` or `half`.
        seed: draws the ranks of the classes and the images, or the five classes.

    Returns:
        `train` and `test`; those of a half are followed by `train_others` and `test_others`, the
        images of the other classes.
    """
    draw = np.random.default_rng(seed)
    classes = draw.permutation(10)
    sources = {name: DigitsSource(name) for name in ("train", "test")}
    whole = {name: Split(x.images, labels_of(x)) for name, x in sources.items()}

    def part(split: str, records: np.ndarray) -> Split:
        return Split(whole[split].images[records], whole[split].labels[records])

    if images == "long_tail":
        own = by_class(whole["train"].labels)
        most = min(len(records) for records in own)
        counts = {int(label): round(most / (rank + 1)) for rank, label in enumerate(classes)}
        chosen = [draw.permutation(own[label])[: counts[label]] for label in range(10)]
        return {
            "train": part("train", np.sort(np.concatenate(chosen))),
            "test": whole["test"],
        }
    first = {name: np.isin(split.labels, classes[:5]) for name, split in whole.items()}
    kept = {name: part(name, first[name]) for name in whole}
    others = {f"{name}_others": part(name, ~first[name]) for name in whole}
    return kept | others


def write(parts: Mapping[str, Split], path: Path) -> None:
    """Writes splits as a packed file of PNG images; several processes may write the same file."""
    arrays: dict[str, np.ndarray] = {}
    for name, split in parts.items():
        encoded = [png(image) for image in split.images]
        arrays[f"{name}_blob"] = np.frombuffer(b"".join(encoded), np.uint8)
        arrays[f"{name}_offsets"] = np.cumsum([0, *map(len, encoded)])
        arrays[f"{name}_labels"] = split.labels
    with draft_of(epath.Path(path)) as draft, draft.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def png(image: np.ndarray) -> bytes:
    """Returns an image as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
