"""Reads PyTorch's checkpoint files, without PyTorch and without running what they contain.

A `.pth` file is a pickle, which is a program, together with the raw bytes of its arrays. Here the
pickle can only build plain containers and describe arrays; training settings become placeholders,
and nothing else can be called. Two formats are read: the zip archive that `torch.save` has written
since version 1.6, and the sequence of pickles that it wrote before (`torch/serialization.py`,
`_save` and `_legacy_save`).
"""

import collections
import math
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sop_jax.errors import UserError

_DTYPES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001


class ContainsCode(UserError):
    """A file contains objects that can only be created by running its code."""


class Tensor(NamedTuple):
    """An array that is read on demand.

    Attributes:
        shape: the shape of the array.
        load: reads the array; raises ValueError if the file does not contain its bytes.
    """

    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    length: int  # in elements
    read: Callable[["_Storage"], bytes]

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self.length * self.dtype.itemsize


class _Gap:
    """Replaces an object that is not needed, such as training arguments."""

    def __init__(self, *args: Any, **settings: Any):
        del args, settings

    def __setstate__(self, state: Any) -> None:
        del state

    def __setitem__(self, key: Any, value: Any) -> None:
        del key, value

    def append(self, value: Any) -> None:
        """Ignores an item of a list-like object."""
        del value


def _as_given(value: Any = (), *rest: Any) -> Any:
    del rest
    return value


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    """Stands in for `torch._utils._rebuild_tensor_v2`: a strided view of a storage, in elements."""
    del rest
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise ValueError("an array has an invalid description")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("an array has an invalid description")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if math.prod(shape) > storage.length or (math.prod(shape) and last >= storage.length):
        raise ValueError("an array extends beyond its storage")

    def load() -> np.ndarray:
        flat = np.frombuffer(storage.read(storage), storage.dtype)[offset:]
        bytes_apart = tuple(step * storage.dtype.itemsize for step in strides)
        return np.lib.stride_tricks.as_strided(flat, shape, bytes_apart, writeable=False).copy()

    return Tensor(tuple(shape), load)


class _Function(NamedTuple):
    """A function that a pickle can call, but whose attributes it cannot set."""

    call: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


# All names that a file may use. Objects that trainers save besides weights become gaps.
_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): _Gap,
    ("typing", "Any"): _Gap,
    ("torch._utils", "_rebuild_tensor"): _Function(_rebuild),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild),
    ("torch._utils", "_rebuild_parameter"): _Function(_as_given),
    ("torch", "Size"): _Function(_as_given),
    **{("torch", name): name for name in _DTYPES},
    **{("torch", name): _Gap for name in ("device", "float16", "bfloat16", "float32", "float64")},
    ("argparse", "Namespace"): _Gap,
    ("pathlib", "PosixPath"): _Gap,
    ("pathlib", "WindowsPath"): _Gap,
    ("builtins", "set"): _Gap,
    ("__builtin__", "set"): _Gap,
    ("numpy", "dtype"): _Gap,
    ("numpy", "ndarray"): _Gap,
    **{
        (f"numpy.{core}.multiarray", name): _Gap
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    },
    ("_codecs", "encode"): _Gap,
}


# Packages whose objects, such as settings and callbacks, trainers save besides weights.
_SETTINGS = {"lightning", "lightning_fabric", "omegaconf", "pytorch_lightning"}


class _Unpickler(pickle.Unpickler):
    """Builds containers and `Tensor`s only, and imports nothing."""

    def __init__(self, file: Any, read: Callable[[_Storage], bytes]):
        super().__init__(file, encoding="utf-8")
        self._read = read
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in _SETTINGS:
            return _Gap
        if module.startswith("torch.distributed"):
            raise ContainsCode(
                f"it contains {module}.{name}, so it is the part of one process of a checkpoint "
                "that several wrote. Use a file with the whole network; DINOv2's trainer writes "
                "eval/*/teacher_checkpoint.pth"
            )
        if (module, name) not in _NAMES:
            raise ContainsCode(
                f"it contains {module}.{name}, which is not an array, a number, text or a "
                "container of these and could run any code, so nothing of the file was run or "
                "loaded. If you trust its source, load it with PyTorch and save only its state_dict"
            )
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or dtype not in _DTYPES or type(count) is not int:
            raise ValueError("an array has an invalid description")
        if any(part is not None for part in view):
            raise ValueError("it has shared storages as written by PyTorch before 0.4")
        storage = _Storage(str(key), np.dtype(_DTYPES[dtype]), count, self._read)
        return self.storages.setdefault(storage.key, storage)


def load(file: Any) -> Any:
    """Reads the content of a `.pth` file; its `Tensor`s can be read while the file is open.

    Args:
        file: the open file, which must be seekable.

    Returns:
        Nested containers of `Tensor`s and plain values.

    Raises:
        ContainsCode: the file contains more than weights; nothing of it was run.
        Exception: the file is damaged; the exception can be of any type.
    """
    if zipfile.is_zipfile(file):
        return _load_zip(zipfile.ZipFile(file))
    file.seek(0)
    if file.read(2) == b"PK":
        raise ValueError("it is truncated")
    file.seek(0)
    return _load_legacy(file)


def _load_zip(archive: zipfile.ZipFile) -> Any:
    pickles = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise ValueError("it is an archive, but not one written by torch.save")
    root = pickles[0].split("/")[0]
    order = f"{root}/byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise ValueError("its numbers are big-endian, and only little-endian files are supported")

    def read(storage: _Storage) -> bytes:
        name = f"{root}/data/{storage.key}"
        if archive.getinfo(name).file_size != storage.size:
            raise ValueError(f"{name} is not complete")
        return archive.read(name)  # verifies the checksum

    with archive.open(pickles[0]) as file:
        return _Unpickler(file, read).load()


def _load_legacy(file: Any) -> Any:
    def read(storage: _Storage) -> bytes:
        file.seek(offsets[storage.key])
        if len(data := file.read(storage.size)) != storage.size:
            raise ValueError("it is truncated")
        return data

    def following() -> Any:
        return _Unpickler(file, read).load()

    if following() != _LEGACY_MAGIC or following() != _LEGACY_VERSION:
        raise ValueError("it was not written by torch.save")
    following()  # a description of the machine that wrote the file
    content = _Unpickler(file, read)
    tree = content.load()
    keys = following()
    start = file.tell()
    size = file.seek(0, 2)
    file.seek(start)
    offsets = {}
    for key in keys:
        count = int.from_bytes(file.read(8), "little")
        storage = content.storages[key]
        if count != storage.length:
            raise ValueError("it is truncated, or is damaged")
        offsets[key] = file.tell()
        if file.seek(storage.size, 1) > size:
            raise ValueError("it is truncated")
    return tree
