"""Reads packed files: encoded images concatenated in one .npz file."""

import hashlib
import os
import zipfile
from typing import Any

import numpy as np
from etils import epath

from sop_jax.data.labels import Labelled
from sop_jax.data.shared import SharedArray
from sop_jax.errors import UserError


class PackedSource(Labelled):
    """Encoded images concatenated in an .npz file: {split}_blob uint8, {split}_offsets [n + 1].

    {split}_labels [n] and class_names are optional. All processes of a machine share one copy of
    the images: a blob that is stored uncompressed in a local file is memory-mapped, any other is
    read once.
    """

    def __init__(self, path: str, split: str) -> None:
        """Reads and checks all arrays of a split.

        Raises:
            UserError: an array is damaged, or not of the expected kind.
        """
        self.path, self.split = path, split
        with epath.Path(path).open("rb") as file, np.load(file) as packed:
            offsets = _read(path, packed, f"{split}_offsets", "integers, [n + 1]", "iu")
            labels = names = None
            if f"{split}_labels" in packed:
                labels = _read(path, packed, f"{split}_labels", "integers, one per image", "iu")
            if "class_names" in packed:
                names = _read(path, packed, "class_names", "strings", "US")
            blob, self._read_blob = _map(path, f"{split}_blob"), None
            if blob is None:
                blob = _read(path, packed, f"{split}_blob", BYTES, "u")
                if blob.dtype != np.uint8:
                    raise UserError(_wrong(path, f"{split}_blob", BYTES, str(blob.dtype)))
                self._read_blob = SharedArray(blob)
                blob = self._read_blob.array
            else:
                _check_stored(path, f"{split}_blob")
            self._blob = blob
        offsets = offsets.astype(np.int64)
        ascending = len(offsets) > 1 and bool(np.all(np.diff(offsets) >= 0))
        if not ascending or offsets[0] < 0 or offsets[-1] > len(self._blob):
            raise UserError(
                f"{path} is damaged: {split}_offsets does not divide {split}_blob into records. "
                f"Expected ascending numbers from 0 to at most {len(self._blob)}, the length of "
                f"{split}_blob. Copy or make the file again."
            )
        self._offsets = SharedArray(offsets)
        self.class_names = None if names is None else [_text(name) for name in names]
        self._labels = None
        if labels is not None:
            _check_labels(path, f"{split}_labels", labels, len(self), self.class_names)
            self._labels = SharedArray(labels.astype(np.int32))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_blob"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        read = self._read_blob
        self._blob = _map(self.path, f"{self.split}_blob") if read is None else read.array

    def __len__(self) -> int:
        return len(self._offsets.array) - 1

    def __getitem__(self, index: int) -> bytes:
        start, end = self._offsets.array[index : index + 2]
        return self._blob[start:end].tobytes()

    def name(self, index: int) -> str:
        """Returns file, split and number."""
        return f"{self.path}:{self.split}[{index}]"

    @property
    def labels(self) -> np.ndarray | None:  # type: ignore[override]
        """The {split}_labels of the file, int32 [n], or None."""
        return None if self._labels is None else self._labels.array

    @property
    def digest(self) -> str:
        """A hash of the sizes of the records and of their labels."""
        sizes = np.diff(self._offsets.array).tobytes()
        labels = b"" if self.labels is None else self.labels.tobytes()
        return hashlib.sha256(sizes + labels).hexdigest()[:12]

    @property
    def stamp(self) -> str:
        """The size and the time of the file; "" on remote storage."""
        if "://" in self.path:
            return ""
        found = os.stat(self.path)
        return f"{found.st_size} {found.st_mtime_ns}"


BYTES = "bytes (uint8), the encoded images end to end"


def _read(path: str, packed: Any, name: str, expected: str, kinds: str) -> np.ndarray:
    """Reads a one-dimensional array of the file; `kinds` are the allowed kinds of NumPy dtypes."""
    try:
        array = packed[name]
    except ValueError as error:
        if "Object arrays" in str(error):
            raise UserError(_wrong(path, name, expected, "Python objects")) from error
        raise UserError(_damaged(path, name, error)) from error
    except Exception as error:  # zip, zlib and end-of-file errors, depending on the bytes
        raise UserError(_damaged(path, name, error)) from error
    _check(path, name, array, expected, kinds)
    return array


def _check(path: str, name: str, array: Any, expected: str, kinds: str) -> None:
    if not isinstance(array, np.ndarray):  # NumPy returns a member that is not an array as bytes
        raise UserError(_wrong(path, name, expected, "it is not an array"))
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise UserError(_wrong(path, name, expected, f"{array.dtype} {list(array.shape)}"))


def _check_labels(
    path: str, name: str, labels: np.ndarray, images: int, class_names: list[str] | None
) -> None:
    if len(labels) != images:
        raise UserError(
            f"{path}: the array {name} has {len(labels)} labels for {images} images. Expected one "
            "label per image. Make the file again."
        )
    most = np.iinfo(np.int32).max if class_names is None else len(class_names) - 1
    wrong = labels[(labels < 0) | (labels > most)]
    if len(wrong):
        why = "" if class_names is None else f", because class_names has {len(class_names)} names"
        raise UserError(
            f"{path}: the array {name} has the label {wrong[0]}. Expected numbers from 0 to {most}"
            f"{why}. Make the file again."
        )


def _wrong(path: str, name: str, expected: str, found: str) -> str:
    return (
        f"{path}: the array {name} is of the wrong kind: {found}. Expected {expected}. "
        "Make the file again."
    )


def _damaged(path: str, name: str, error: Exception) -> str:
    return f"{path} is damaged: the array {name} cannot be read ({error}). Copy or make it again."


def _text(name: Any) -> str:
    return name.decode(errors="surrogateescape") if isinstance(name, bytes) else str(name)


def _check_stored(path: str, name: str) -> None:
    """Verifies the checksum of a member that is to be mapped, as reading it would.

    Raises:
        UserError: the member is damaged.
    """
    try:
        with zipfile.ZipFile(path) as packed, packed.open(f"{name}.npy") as member:
            while member.read(2**24):
                pass
    except Exception as error:  # zip and end-of-file errors, depending on the bytes
        raise UserError(_damaged(path, name, error)) from error


def _map(path: str, name: str) -> Any:
    """Maps an array of bytes that is stored uncompressed in a local file, else returns None."""
    if "://" in path:
        return None
    with zipfile.ZipFile(path) as packed, open(path, "rb") as file:
        member = packed.getinfo(f"{name}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            return None
        # The local header of a member has 30 bytes; the last four are the lengths of two fields
        # that follow it.
        file.seek(member.header_offset + 26)
        lengths = file.read(4)
        file.seek(sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2)), os.SEEK_CUR)
        try:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype != np.uint8 or len(shape) != 1:
                return None
            return np.asarray(np.memmap(path, dtype, "r", file.tell(), shape))
        except ValueError:  # damaged, or of length 0, which cannot be mapped
            return None


def open_packed(data_config: Any, split: str) -> PackedSource | None:
    """Opens one split as `sources.open_source` does; returns None if there is no test split."""
    path, name = str(data_config.path), getattr(data_config, f"{split}_split")
    if not epath.Path(path).is_file():
        raise UserError(f"There is no file {path}. Set --config.data.path to a packed .npz file.")
    try:
        with epath.Path(path).open("rb") as file, np.load(file) as packed:
            keys = set(packed.files)
    except Exception as error:  # zip, pickle and value errors, depending on the bytes
        raise UserError(
            f"{path} is not an .npz file ({error}). Set --config.data.path to a packed .npz file."
        ) from error
    if f"{name}_blob" not in keys or f"{name}_offsets" not in keys:
        if split == "test":
            return None
        raise UserError(
            f"{path} has no {name}_blob and {name}_offsets; it contains {', '.join(sorted(keys))}. "
            "Set --config.data.train_split to the name of a split that it has."
        )
    return PackedSource(path, name)
