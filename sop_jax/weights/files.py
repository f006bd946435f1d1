"""Reads files of weights: PyTorch's (`.pth` and other extensions), `.safetensors` and `.npz`.

Hugging Face may split weights over several files, with an index that maps names to files.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from sop_jax import paths
from sop_jax.errors import UserError
from sop_jax.weights import pytorch
from sop_jax.weights.pytorch import Tensor

# The name of one of several files, and the end of the name of their index.
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.\w+)")
_INDEX = ".index.json"

_SAFETENSORS_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_SHOWN = 4  # the most names that a message lists


class _Arrays(Mapping[str, np.ndarray]):
    """Arrays by name, each read on access."""

    def __init__(self, path: epath.Path, tensors: dict[str, Tensor]):
        self._path, self._tensors = path, tensors

    def __getitem__(self, name: str) -> np.ndarray:
        with _reading(self._path):
            return self._tensors[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@contextlib.contextmanager
def opened(path: epath.PathLike) -> Iterator[Mapping[str, np.ndarray]]:
    """Opens the arrays of a file, or of several files that an index names.

    Args:
        path: the file, or the index (`.index.json`) of several; local or remote (`gs://`).

    Yields:
        Arrays by name, with the dtypes that the file has. The names of nested containers are joined
        by dots. Each array is read on access.

    Raises:
        UserError: there is no such file, it cannot be read, it contains code, or it is one of
            several files.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}; give the path of a file of weights")
    with contextlib.ExitStack() as stack:
        if path.name.endswith(_INDEX):
            tensors = _of_index(path, stack)
        else:
            _refuse_shard(path)
            tensors = _of_file(path, stack)
        yield _Arrays(path, tensors)


def index_of(folder: epath.Path) -> epath.Path | None:
    """Returns the index of weights that are split over several files of a folder, or None."""
    found = [folder / name for name in _names(folder) if name.endswith(_INDEX)]
    return min(found, key=lambda path: (".safetensors" not in path.name, path.name), default=None)


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[None]:
    """Turns any exception into a UserError that names the file that cannot be read."""
    try:
        yield
    except pytorch.ContainsCode as error:
        raise UserError(f"{path} is refused: {error}") from None
    except UserError:
        raise
    except Exception as error:  # damaged pickles, archives and arrays can raise anything
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise UserError(
            f"{path} cannot be read: {reason}. It may be truncated or damaged, or not a PyTorch, "
            ".safetensors or .npz file; compare its size with the original"
        ) from error


def write(path: epath.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a `.safetensors` file atomically: it appears when it is complete.

    Raises:
        UserError: the file cannot be written.
    """
    path = epath.Path(path)
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    data = safetensors.numpy.save(whole, {"format": "pt"})  # transformers requires this entry
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with paths.draft_of(path) as draft:
            draft.write_bytes(data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; choose another --to") from error


def _names(folder: epath.Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def _of_index(index: epath.Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    """Returns the tensors of all files that an index names."""
    with _reading(index):
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        parts = sorted(set(weight_map.values()))
        lost = [part for part in parts if not (index.parent / part).is_file()]
    if lost:
        more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        raise UserError(
            f"{index} names {len(parts)} files, but these are missing from its folder: "
            f"{', '.join(lost[:_SHOWN])}{more}; put all files into the folder of the index"
        )
    content = {part: _of_file(index.parent / part, stack) for part in parts}
    absent = [name for name, part in weight_map.items() if name not in content[part]]
    if absent:
        raise UserError(
            f"{index} says that {absent[0]} is in {weight_map[absent[0]]}, but it is not; use an "
            "index and files from the same download"
        )
    return {name: content[part][name] for name, part in weight_map.items()}


def _refuse_shard(path: epath.Path) -> None:
    """Raises UserError if a file is one of several."""
    match = _SHARD.fullmatch(path.name)
    if match and int(match[2]) > 1:
        index = f"{match[1]}{match[3]}{_INDEX}"
        there = (path.parent / index).is_file()
        where = "in the same folder" if there else "which must be in the same folder"
        raise UserError(
            f"{path} is one of {int(match[2])} files that form one network; give their index, "
            f"{index}, {where}"
        )


def _of_file(path: epath.Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    """Returns the tensors of one file by their full names."""
    with _reading(path):
        content = _content(path, stack.enter_context(path.open("rb")))
        return dict(_flat(content if isinstance(content, Mapping) else {}))


def _flat(tree: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in tree.items():
        if isinstance(value, Tensor):
            yield f"{before}{name}", value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")


def _content(path: epath.Path, file: Any) -> Any:
    """Returns the content of a file: nested containers of `Tensor`s."""
    if path.suffix == ".safetensors":
        return {
            name: _from_safetensors(entry) for name, entry in safetensors.deserialize(file.read())
        }
    if path.suffix == ".npz":
        with np.load(file, allow_pickle=False) as arrays:
            return {name: _loaded(array) for name, array in arrays.items()}
    return pytorch.load(file)


def _from_safetensors(entry: Mapping[str, Any]) -> Tensor:
    if entry["dtype"] not in _SAFETENSORS_DTYPES:
        raise ValueError(f"it has the unsupported dtype {entry['dtype']}")
    flat = np.frombuffer(entry["data"], _SAFETENSORS_DTYPES[entry["dtype"]])
    return _loaded(flat.reshape(entry["shape"]))


def _loaded(array: np.ndarray) -> Tensor:
    return Tensor(array.shape, lambda: array)
