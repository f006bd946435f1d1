"""Where images come from: TFDS, a folder tree, a packed .npz file or scikit-learn's digits.

Each kind is a `Source`, which returns records by index and is as cheap to pickle as a path,
because each of the pipeline's worker processes receives one. Workers share what is large, see
`shared.py`.
"""

import hashlib
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np
from PIL import Image

from sop_jax.data.folders import open_folder
from sop_jax.data.labels import Labelled
from sop_jax.data.packed import open_packed
from sop_jax.data.tfds import open_tfds
from sop_jax.errors import UserError

DIGITS_TRAIN = 1437  # four fifths of 1797
DIGITS_SIZE = 32  # pixels


@runtime_checkable
class Source(Protocol):
    """A data set whose records are read by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> bytes | np.ndarray:
        """Returns an encoded image, or pixels uint8 [h, w, 3]."""

    def name(self, index: int) -> str:
        """Returns a readable name of the record: a path, or data set, split and number."""

    @property
    def has_labels(self) -> bool:
        """Whether the records have labels; does not read them."""

    def label(self, index: int) -> int:
        """Returns the label of a record, if there are labels; free after the record was read."""

    @property
    def class_names(self) -> list[str] | None:
        """The names of the labels in order, or None."""

    @property
    def digest(self) -> str:
        """A short hash that identifies the records, independent of where they are stored."""


class Identity(TypedDict):
    """Identifies the records of a split.

    Attributes:
        images: the number of images.
        names: the `digest` of the source.
    """

    images: int
    names: str


def identity(source: Source) -> Identity:
    """Returns what identifies the records of a source, independent of where they are stored."""
    return Identity(images=len(source), names=source.digest)


def stamp(source: Source) -> str:
    """Returns what shows that files were changed in place, under the same names; "" if unknown."""
    return getattr(source, "stamp", "")


def open_source(data_config: Any, split: str, train: Source | None = None) -> Source | None:
    """Opens one split of the configured data set.

    Args:
        data_config: has `source` ("tfds" | "folder" | "packed" | "digits"), `path`, `name`,
            `train_split` and `test_split`.
        split: "train" or "test", mapped to the two names above.
        train: the opened train split, whose classes the test split of a folder uses; if it is not
            given, the train split is listed to find them.

    Returns:
        The source, or None if there is no test split.

    Raises:
        UserError: the data is missing, empty or not of the kind that `source` names.
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
            f"data.source={data_config.source} needs the path of the data, and none is set. "
            "Set --config.data.path=PATH."
        )
    if data_config.source == "folder":
        return open_folder(data_config, split, train)
    return kinds[data_config.source](data_config, split)


def notes(train: Source, test: Source | None = None) -> list[str]:
    """Returns sentences for the user on opened splits: what was left out, and why."""
    found = [note for source in (train, test) for note in getattr(source, "notes", [])]
    if test is not None and len(train) == len(test) and train.name(0) == test.name(0):
        found.append(
            "the train split and the test split are the same images, so the k-NN accuracy is that "
            "of images trained on; set data.test_split to held-out images"
        )
    return found


# The built-in data set


class DigitsSource(Labelled):
    """scikit-learn's digits, uint8 [32, 32, 3], shuffled and split into 1437 to train, 360 to test.

    The shuffle is fixed. The images are enlarged from 8 x 8 pixels (bicubic), because the borders
    of crops would otherwise fall on a coarse grid.
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
        """Returns split and number."""
        return f"digits:{self.split}[{index}]"

    @property
    def digest(self) -> str:
        """A hash of the split's name only, because the images are always the same."""
        return hashlib.sha256(f"digits {self.split}".encode()).hexdigest()[:12]
