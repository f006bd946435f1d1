"""Arrays and lists of names in memory that worker processes share, rather than copy."""

import os
import weakref
from collections.abc import Sequence
from typing import Any, overload

import numpy as np


class SharedArray:
    """An array that is stored once per machine, however many processes it is pickled for.

    It is kept in anonymous memory that other processes map through the process that created it, so
    that nothing is left behind however that process ends. On systems without such memory (outside
    Linux) the pickle contains the array itself.

    Attributes:
        array: the values, read-only.
    """

    def __init__(self, array: np.ndarray) -> None:
        """Copies the values of `array`."""
        self.array, self._path = array, ""
        if hasattr(os, "memfd_create") and array.size:
            file = os.memfd_create("sop_jax")
            weakref.finalize(self, os.close, file)
            os.truncate(file, array.nbytes)
            self._path = f"/proc/{os.getpid()}/fd/{file}"
            np.memmap(self._path, array.dtype, "r+", shape=array.shape)[...] = array
            self.array = _mapped(self._path, array.dtype, array.shape)

    def __getstate__(self) -> tuple[Any, ...]:
        return self._path, self.array.dtype, self.array.shape, None if self._path else self.array

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._path, dtype, shape, array = state
        self.array = _mapped(self._path, dtype, shape) if self._path else array


def _mapped(path: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype, "r", shape=shape))  # faster to index than a memmap


class SharedNames(Sequence[str]):
    """Strings concatenated in shared memory; names that are not UTF-8 keep their bytes."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._bytes = SharedArray(np.frombuffer(b"".join(encoded), np.uint8))
        self._ends = SharedArray(np.cumsum([0, *map(len, encoded)], dtype=np.int64))

    def __len__(self) -> int:
        return len(self._ends.array) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start, end = self._ends.array[index : index + 2]
        return self._bytes.array[start:end].tobytes().decode("utf-8", "surrogateescape")
