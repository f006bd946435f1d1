"""Image files that a data set lists itself, by their names."""

import hashlib
from collections.abc import Sequence

import numpy as np
from etils import epath

from sop_jax.data.folders import Files


class ListedFiles(Files):
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
        truth: Sequence[epath.Path] = (),
    ) -> None:
        """Creates a source.

        Args:
            root: the folder.
            files: the images, relative to it.
            labels: their labels, int32 [n].
            class_names: the names of the labels in order.
            truth: other files with which results are compared, such as masks.
        """
        self.root, self.files, self.truth = str(root), list(files), list(truth)
        self.labels, self.class_names = labels, class_names

    @property
    def stamp(self) -> str:
        """A hash that changes with the files, their labels or the truth; see `sources.stamp`."""
        stamp = hashlib.sha256(super().stamp.encode())
        if self.labels is not None:
            stamp.update(self.labels.tobytes())
        for path in self.truth:
            stamp.update(hashlib.sha256(path.read_bytes()).digest())
        return stamp.hexdigest()[:12]
