"""Files of weights: PyTorch's (`.pth` and its other endings), `.safetensors` and `.npz`."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from sop_jax.errors import UserError
from sop_jax.weights import pytorch
from sop_jax.weights.pytorch import Tensor

# Of several networks in a file, whose weights are taken where nobody says.
NETWORKS = ("teacher", "student")
# Under which name a file of one network may hold it; averaged weights before the last ones.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")

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
_SHOWN = 8  # names


def read(path: epath.PathLike, network: str | None = None) -> dict[str, np.ndarray]:
    """The weights of one network of a file.

    Args:
        path: local or remote (`gs://`).
        network: which of several, such as `teacher` or `student`; the teacher where a file has
            both and nothing is said.

    Returns:
        Arrays by the names that the file gives them, of the types that it has.

    Raises:
        UserError: there is no such file or network, it cannot be read, or it holds code.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise UserError(f"there is no file of weights {path}")
    try:
        with path.open("rb") as file:
            tensors = _choose(_content(path, file), network, path)
            return {name: tensor.load() for name, tensor in tensors.items()}
    except pytorch.Code as error:
        raise UserError(f"{path} is refused: {error}") from None
    except UserError:
        raise
    except Exception as error:  # whatever a damaged pickle, archive or array leads to
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise UserError(
            f"{path} cannot be read: {reason}. It may be truncated, damaged or of another kind "
            "than PyTorch's, .safetensors or .npz; compare its size with the original"
        ) from error


def write(path: epath.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a `.safetensors`, which appears when it is complete.

    Raises:
        UserError: it cannot be written there.
    """
    path = epath.Path(path)
    draft = path.parent / f"{path.name}.tmp"
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    data = safetensors.numpy.save(whole, {"format": "pt"})  # transformers loads no file without
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(data)
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error}; choose another --to") from error


def _content(path: epath.Path, file: Any) -> Any:
    """What a file holds: containers with `Tensor`s in them."""
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
        raise ValueError(f"it has numbers of type {entry['dtype']}")
    flat = np.frombuffer(entry["data"], _SAFETENSORS_DTYPES[entry["dtype"]])
    return _loaded(flat.reshape(entry["shape"]))


def _loaded(array: np.ndarray) -> Tensor:
    return Tensor(array.shape, lambda: array)


def _choose(content: Any, network: str | None, path: epath.Path) -> dict[str, Tensor]:
    """The tensors of one network."""
    tree = content if isinstance(content, Mapping) else {}
    parts = {str(name): value for name, value in tree.items() if isinstance(value, Mapping)}
    for prefix in NETWORKS:
        if under := {
            n[len(prefix) + 1 :]: tree[n] for n in tree if str(n).startswith(f"{prefix}.")
        }:
            parts[prefix] = under
    for name in [network] if network else NETWORKS:
        if name in parts:
            return _tensors(parts[name])
    for name in _WRAPPERS:
        if name in parts:
            return _choose(parts[name], network, path)
    if network:
        known = ", ".join([*parts][:_SHOWN]) or "one network, without a name"
        raise UserError(f"{path} has no {network!r}; it holds: {known}")
    found = _tensors(tree)
    if parts and not found:
        known = ", ".join([*parts][:_SHOWN])
        raise UserError(f"{path} holds several parts: {known}; say which with --key")
    return found


def _tensors(tree: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(name): value for name, value in tree.items() if isinstance(value, Tensor)}
