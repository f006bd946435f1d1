"""Where images come from: TFDS, a folder tree, a packed .npz or scikit-learn's digits.

Each kind is a `Source`: records by index, as cheap to pickle as a path, because each of the
pipeline's worker processes gets one. What is large they share, see `shared.py`.
"""

import hashlib
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np
from PIL import Image

from sop_jax.data.folders import open_folder
from sop_jax.data.packed import open_packed
from sop_jax.data.tfds import open_tfds
from sop_jax.errors import UserError

DIGITS_TRAIN = 1437  # of 1797: four fifths
DIGITS_SIZE = 32  # pixels


@runtime_checkable
class Source(Protocol):
    """Records by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> bytes | np.ndarray:
        """An encoded image, or uint8 [h, w, 3]."""

    def name(self, index: int) -> str:
        """What a person would call the record: a path, or data set, split and number."""

    @property
    def has_labels(self) -> bool:
        """Whether the records have labels; found out without reading them."""

    def label(self, index: int) -> int:
        """The label of a record, where there are labels; free after the record was read."""

    @property
    def class_names(self) -> list[str] | None:
        """The names of the labels in order, or None."""

    @property
    def digest(self) -> str:
        """Which records these are, in a few letters, the same wherever they are stored."""


class Identity(TypedDict):
    """What tells the records of one split from others.

    Attributes:
        images: how many there are.
        names: the `digest` of the source.
    """

    images: int
    names: str


def identity(source: Source) -> Identity:
    """Which records a source has, wherever they are stored."""
    return Identity(images=len(source), names=source.digest)


def open_source(data_config: Any, split: str, train: Source | None = None) -> Source | None:
    """Opens one split of the configured data set.

    Args:
        data_config: has `source` ("tfds" | "folder" | "packed" | "digits"), `path`, `name`,
            `train_split` and `test_split`.
        split: "train" or "test", mapped to the two names above.
        train: the opened train split, whose classes a test split of a folder has; without it that
            is listed for them.

    Returns:
        The source, or None when there is no test split.

    Raises:
        UserError: the data is missing, empty or not what `source` says.
    """
    kinds = {"tfds": open_tfds, "packed": open_packed}
    if data_config.source == "digits":
        return DigitsSource(split)
    if data_config.source not in ("folder", *kinds):
        raise UserError(
            f"Unknown data.source {data_config.source!r}. "
            f"Choose one of: digits, folder, {', '.join(kinds)}."
        )
    if not data_config.path and data_config.source != "tfds":
        raise UserError(
            f"data.source={data_config.source} needs to know where the data is. "
            "Set --config.data.path=..."
        )
    if data_config.source == "folder":
        return open_folder(data_config, split, train)
    return kinds[data_config.source](data_config, split)


def notes(*sources: Source | None) -> list[str]:
    """What a person should know about opened sources: what was left out, and why."""
    return [note for source in sources for note in getattr(source, "notes", [])]


# The embedded default


class DigitsSource:
    """scikit-learn's digits, uint8 [32, 32, 3]: 1437 to train and 360 to test, a fixed shuffle.

    Enlarged from 8 pixels (bicubic), because crops of so few would fall on a coarse grid.
    """

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.RandomState(0).permutation(len(digits.target))
        rows = order[:DIGITS_TRAIN] if split == "train" else order[DIGITS_TRAIN:]
        grey = (digits.images[rows] * (255 / 16)).round().astype(np.uint8)  # ink 0..16
        size, cubic = (DIGITS_SIZE, DIGITS_SIZE), Image.Resampling.BICUBIC
        large = [np.asarray(Image.fromarray(image).resize(size, cubic)) for image in grey]
        self.images = np.repeat(np.stack(large)[..., None], 3, axis=3)
        self.split = split
        self.labels = digits.target[rows].astype(np.int32)
        self.class_names = [str(name) for name in digits.target_names]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[index]

    def name(self, index: int) -> str:
        """Split and number."""
        return f"digits:{self.split}[{index}]"

    @property
    def has_labels(self) -> bool:
        """Whether there are `labels`."""
        return self.labels is not None

    def label(self, index: int) -> int:
        """Which digit it is."""
        return int(self.labels[index])

    @property
    def digest(self) -> str:
        """Of the split: the images are always the same."""
        return hashlib.sha256(f"digits {self.split}".encode()).hexdigest()[:12]
