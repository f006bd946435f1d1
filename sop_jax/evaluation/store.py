"""Where features are kept: on disk, so that those of a network and a data set are computed once.

A folder of the cache has the arrays of one process as .npy files, which are filled in place, so
that an interrupted extraction continues where it stopped. Its name is a hash of all that the
features depend on: the weights, the images, the view, how images are decoded, the versions of the
packages and the number of processes.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath

from sop_jax.errors import UserError
from sop_jax.paths import write_whole

KEEP_SECONDS = 20.0  # between two notes of how far an extraction is
_FILE = "about.json"


@runtime_checkable
class Store(Protocol):
    """Where the arrays of one process are kept while they are filled."""

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Returns an array to fill, with what an earlier process has filled in."""

    def filled(self) -> int:
        """Returns the number of records, from the first on, that are filled already."""

    def keep(self, records: int) -> None:
        """Takes the number of records that are filled; called after every batch and at the end."""

    def close(self) -> None:
        """Ends the work; what is filled stays."""


class Memory:
    """A store that ends with the process."""

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Returns an empty array."""
        return np.empty(shape, dtype)

    def filled(self) -> int:
        """Returns 0."""
        return 0

    def keep(self, records: int) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class Disk:
    """A store of one process's arrays in a folder, see `Store`."""

    def __init__(self, folder: epath.Path, about: Mapping[str, Any], every: float) -> None:
        """Opens a folder, or creates it.

        Args:
            folder: the folder, local.
            about: what the arrays depend on, for people.
            every: the seconds between two notes of how far the extraction is.

        Raises:
            UserError: the folder cannot be created.
        """
        self.folder, self.about, self.every = folder, dict(about), every
        self._arrays: dict[str, np.memmap[Any, Any]] = {}
        self._noted, self._latest, self._records = time.monotonic(), 0, _records(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot create {folder} for the features: {error}; name another folder with "
                "--cache=DIR, or keep none with --cache=off"
            ) from error

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Returns an array that is mapped to a file."""
        path = self.folder / f"{name}.npy"
        if self._records and not _fits(path, shape, dtype):
            self._records = 0  # damaged, so all is computed again
        mode: Any = "r+" if self._records else "w+"
        self._arrays[name] = np.lib.format.open_memmap(str(path), mode, dtype, shape)
        return self._arrays[name]

    def filled(self) -> int:
        """Returns the number of records that an earlier process has noted."""
        return self._records

    def keep(self, records: int) -> None:
        """Remembers the number of records that are filled, and notes it when it is time."""
        self._latest = records
        if time.monotonic() - self._noted > self.every:
            self.close()

    def close(self) -> None:
        """Writes the arrays, and notes how many records are filled."""
        if self._latest <= self._records:
            return
        for array in self._arrays.values():
            array.flush()
        write_whole(self.folder / _FILE, json.dumps(self.about | {"records": self._latest}) + "\n")
        self._noted, self._records = time.monotonic(), self._latest


def _records(folder: epath.Path) -> int:
    """Returns the number of records that are noted in a folder; 0 if it is absent or damaged."""
    try:
        return int(json.loads((folder / _FILE).read_text())["records"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _fits(path: epath.Path, shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether a file is an array of this shape and type."""
    try:
        array = np.load(str(path), mmap_mode="r")
    except (OSError, ValueError):
        return False
    return bool(array.shape == shape and array.dtype == dtype)


def size_on_disk(folder: epath.Path) -> int:
    """Returns the bytes of the files in a folder."""
    return sum(file.stat().length for file in folder.glob("*.npy"))


def key_of(facts: Mapping[str, Any]) -> str:
    """Returns the name of the folder for features that depend on these facts."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
