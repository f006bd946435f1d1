"""Image files that a data set lists itself, by their names."""

import hashlib
from collections.abc import Sequence

import numpy as np
from etils import epath

from sop_jax.data.folders import printable
from sop_jax.data.labels import Labelled


class ListedFiles(Labelled):
    """Files below one folder, in a given order.

    They are not rotated according to EXIF unless `data.orientation` is "exif", because the codes
    that data sets come with do not do so.
    """

    def __init__(
        self,
        root: epath.PathLike,
        files: Sequence[str],
        labels: np.ndarray | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        """Creates a source from files relative to `root`, and their labels int32 [n]."""
        self.root, self.files = str(root), list(files)
        self.labels, self.class_names = labels, class_names

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> bytes:
        return (epath.Path(self.root) / self.files[index]).read_bytes()

    def name(self, index: int) -> str:
        """Returns the path of the file in printable form."""
        return printable(f"{self.root}/{self.files[index]}")

    @property
    def digest(self) -> str:
        """A hash of the file names in order, relative to the root."""
        names = "\0".join(self.files).encode("utf-8", "surrogateescape")
        return hashlib.sha256(names).hexdigest()[:12]
