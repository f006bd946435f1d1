"""Folders of images: which files are read, and which labels they have."""

import hashlib
import os
from typing import Any

import numpy as np
from etils import epath

from sop_jax.errors import UserError

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"))


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

    @property
    def digest(self) -> str:
        """Of the names below the root."""
        names = "\0".join(self.files).encode("utf-8", "surrogateescape")
        return hashlib.sha256(names).hexdigest()[:12]


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


def open_folder(data_config: Any, split: str) -> FolderSource | None:
    """Opens one split of a tree, as `sources.open_source` does."""
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
