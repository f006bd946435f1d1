"""PyTorch's checkpoint files, read without PyTorch and without running what they hold.

A `.pth` is a pickle, which is a program, beside the raw bytes of its arrays. The one here may build
plain containers, describe arrays and leave gaps for settings of the training, and call nothing
else. Formats: the zip archive that `torch.save` writes since version 1.6, and the pickles in a row
that it wrote before (`torch/serialization.py`, `_save` and `_legacy_save`).
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


class Code(UserError):
    """A file names objects that only running it could make."""


class Tensor(NamedTuple):
    """An array that is read when it is asked for.

    Attributes:
        shape: of the array.
        load: reads it; raises ValueError where the file does not hold what it says.
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
        """In bytes."""
        return self.length * self.dtype.itemsize


class _Gap:
    """Stands for an object of no interest, such as the arguments of a training."""

    def __init__(self, *args: Any, **settings: Any):
        del args, settings

    def __setstate__(self, state: Any) -> None:
        del state

    def __setitem__(self, key: Any, value: Any) -> None:
        del key, value

    def append(self, value: Any) -> None:
        """Leaves out an item of a list of its own kind."""
        del value


def _as_given(value: Any = (), *rest: Any) -> Any:
    del rest
    return value


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    """`torch._utils._rebuild_tensor_v2`: a view into a storage, in elements."""
    del rest
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise ValueError("an array is described wrongly")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("an array is described wrongly")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if math.prod(shape) > storage.length or (math.prod(shape) and last >= storage.length):
        raise ValueError("an array reaches beyond its bytes")

    def load() -> np.ndarray:
        flat = np.frombuffer(storage.read(storage), storage.dtype)[offset:]
        bytes_apart = tuple(step * storage.dtype.itemsize for step in strides)
        return np.lib.stride_tricks.as_strided(flat, shape, bytes_apart, writeable=False).copy()

    return Tensor(tuple(shape), load)


class _Function(NamedTuple):
    """A function that a pickle may call, but whose attributes it cannot set."""

    call: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


# All that a file may name. What a training leaves beside its weights is read as gaps.
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


# Projects whose objects a training leaves beside its weights: settings, callbacks.
_SETTINGS = {"lightning", "lightning_fabric", "omegaconf", "pytorch_lightning"}


class _Unpickler(pickle.Unpickler):
    """Builds containers and `Tensor`s, and refuses to so much as import anything."""

    def __init__(self, file: Any, read: Callable[[_Storage], bytes]):
        super().__init__(file, encoding="utf-8")
        self._read = read
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in _SETTINGS:
            return _Gap
        if module.startswith("torch.distributed"):
            raise Code(
                f"it holds {module}.{name}: it is the part of one process in a checkpoint of "
                "several. Take a file with the whole network: DINOv2's trainer writes "
                "eval/*/teacher_checkpoint.pth"
            )
        if (module, name) not in _NAMES:
            raise Code(
                f"it holds {module}.{name}, which is no array, number, text or container of them; "
                "it could run any code, so nothing of the file was run or loaded. If you trust "
                "where it comes from, load it with PyTorch and save its state_dict alone"
            )
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or dtype not in _DTYPES or type(count) is not int:
            raise ValueError("an array is described wrongly")
        if any(part is not None for part in view):
            raise ValueError("arrays that share bytes as PyTorch before 0.4 wrote them")
        storage = _Storage(str(key), np.dtype(_DTYPES[dtype]), count, self._read)
        return self.storages.setdefault(storage.key, storage)


def load(file: Any) -> Any:
    """Reads what a `.pth` holds, arrays as `Tensor`s, which need the file to stay open.

    Args:
        file: the open file, which can seek.

    Raises:
        Code: it is more than weights; nothing of it was run.
        Exception: of whatever kind, where it is damaged.
    """
    if zipfile.is_zipfile(file):
        return _load_zip(zipfile.ZipFile(file))
    file.seek(0)
    if file.read(2) == b"PK":
        raise ValueError("it ends too soon")
    file.seek(0)
    return _load_legacy(file)


def _load_zip(archive: zipfile.ZipFile) -> Any:
    pickles = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise ValueError("it is an archive, but not one that torch.save has written")
    root = pickles[0].split("/")[0]
    order = f"{root}/byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise ValueError("its numbers are in the byte order of another kind of machine")

    def read(storage: _Storage) -> bytes:
        name = f"{root}/data/{storage.key}"
        if archive.getinfo(name).file_size != storage.size:
            raise ValueError(f"the bytes of {name} are not all there")
        return archive.read(name)  # which checks their sum

    with archive.open(pickles[0]) as file:
        return _Unpickler(file, read).load()


def _load_legacy(file: Any) -> Any:
    def read(storage: _Storage) -> bytes:
        file.seek(places[storage.key])
        if len(data := file.read(storage.size)) != storage.size:
            raise ValueError("it ends too soon")
        return data

    def following() -> Any:
        return _Unpickler(file, read).load()

    if following() != _LEGACY_MAGIC or following() != _LEGACY_VERSION:
        raise ValueError("it is no file that torch.save has written")
    following()  # of the machine that wrote it
    content = _Unpickler(file, read)
    tree = content.load()
    keys = following()
    start = file.tell()
    size = file.seek(0, 2)
    file.seek(start)
    places = {}
    for key in keys:
        count = int.from_bytes(file.read(8), "little")
        storage = content.storages[key]
        if count != storage.length:
            raise ValueError("it ends too soon, or is damaged")
        places[key] = file.tell()
        if file.seek(storage.size, 1) > size:
            raise ValueError("it ends too soon")
    return tree
