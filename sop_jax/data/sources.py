"""Where images come from: TFDS, a folder tree, a packed .npz or scikit-learn's digits.

Each kind is a `Source`: records by index, as cheap to pickle as a path, because the pipeline's
worker processes each get a copy. Files are opened when the first record is asked for.
"""

import os
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath
from PIL import Image

from sop_jax.data.packed import open_packed
from sop_jax.data.tfds import open_tfds
from sop_jax.errors import UserError

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"))
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
    def labels(self) -> np.ndarray | None:
        """int32 [n], or None. TFDS reads all records for it, when first asked."""

    @property
    def class_names(self) -> list[str] | None:
        """The names of the labels in order, or None."""


def open_source(data_config: Any, split: str) -> Source | None:
    """Opens one split of the configured data set.

    Args:
        data_config: has `source` ("tfds" | "folder" | "packed" | "digits"), `path`, `name`,
            `train_split` and `test_split`.
        split: "train" or "test", mapped to the two names above.

    Returns:
        The source, or None when there is no test split.

    Raises:
        UserError: the data is missing, empty or not what `source` says.
    """
    kinds = {"tfds": open_tfds, "folder": _open_folder, "packed": open_packed}
    if data_config.source == "digits":
        return DigitsSource(split)
    if data_config.source not in kinds:
        raise UserError(
            f"Unknown data.source {data_config.source!r}. "
            f"Choose one of: digits, {', '.join(kinds)}."
        )
    if not data_config.path and data_config.source != "tfds":
        raise UserError(
            f"data.source={data_config.source} needs to know where the data is. "
            "Set --config.data.path=..."
        )
    return kinds[data_config.source](data_config, split)


# Folders of images


class FolderSource:
    """Image files below one folder, sorted by path."""

    def __init__(
        self, root: str, files: list[str], labels: np.ndarray | None, class_names: list[str] | None
    ) -> None:
        """Takes files relative to `root` and their labels, int32 [n]."""
        self.root, self.files, self.labels, self.class_names = root, files, labels, class_names

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> bytes:
        return epath.Path(self.name(index)).read_bytes()

    def name(self, index: int) -> str:
        """The path of the file."""
        return f"{self.root}/{self.files[index]}"


def image_files(root: str) -> list[str]:
    """All image files below `root`, as sorted relative paths; hidden ones are left out.

    Args:
        root: a folder, local or gs://.

    Raises:
        UserError: the folder is missing or holds no image.
    """
    folder = epath.Path(root)
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {root}. Give the path of a folder of images, or of one that "
            "holds such a folder for every split."
        )
    # Class folders are often links; walking with epath would pass over those silently.
    remote = "://" in str(folder)
    files = []
    for parent, _, names in folder.walk() if remote else os.walk(folder, followlinks=True):
        inside = str(parent)[len(str(folder)) :].strip("/")
        if any(part.startswith(".") for part in inside.split("/")):
            continue
        for name in names:
            suffix = name[name.rfind(".") :].lower() if "." in name else ""
            if suffix in IMAGE_SUFFIXES and not name.startswith("."):
                files.append(f"{inside}/{name}" if inside else name)
    if not files:
        raise UserError(
            f"The folder {root} holds no images. Expected files ending in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}, in it or in folders below it."
        )
    return sorted(files)


def class_folders(files: list[str]) -> list[str] | None:
    """The classes of a tree: its first-level folders, sorted.

    Args:
        files: relative paths.

    Returns:
        None for an unlabelled tree: some files lie in no folder, or all in the same one.
    """
    names = {file.split("/", 1)[0] if "/" in file else "" for file in files}
    return None if "" in names or len(names) < 2 else sorted(names)


def folder_source(root: str, like: FolderSource | None = None) -> FolderSource:
    """The images below one folder.

    Args:
        root: the folder, local or gs://.
        like: a source whose class ids to use; without it the tree's own folders are the classes.

    Raises:
        UserError: no image, or a class that `like` does not have.
    """
    root = str(epath.Path(root))
    files = image_files(root)
    names = like.class_names if like else class_folders(files)
    if names is None:
        return FolderSource(root, files, None, None)
    ids = {name: label for label, name in enumerate(names)}
    folders = [file.split("/", 1)[0] for file in files]
    unknown = sorted(set(folders) - set(ids))
    if unknown:
        raise UserError(
            f"{root} holds {unknown[0]!r}, which is no class of {like.root if like else root} "
            f"({len(unknown)} such names). The images of every split must lie in folders named "
            "as the train classes are."
        )
    return FolderSource(root, files, np.array([ids[name] for name in folders], np.int32), names)


def _open_folder(data_config: Any, split: str) -> FolderSource | None:
    path, train, test = str(data_config.path), data_config.train_split, data_config.test_split
    has_train = bool(train) and (epath.Path(path) / train).is_dir()
    has_test = bool(test) and (epath.Path(path) / test).is_dir()
    if has_test and not has_train:
        raise UserError(
            f"{path} has a folder {test!r} but none called {train!r}. "
            "Set --config.data.train_split to the folder to train on."
        )
    if split == "test" and not has_test:
        return None
    source = folder_source(str(epath.Path(path) / train) if has_train else path)
    return source if split == "train" else folder_source(str(epath.Path(path) / test), source)


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
