"""The revisited Oxford and Paris sets for image retrieval (Radenović et al., CVPR 2018).

The layout is that of the official code: ROOT/roxford5k/gnd_roxford5k.pkl and
ROOT/roxford5k/jpg/*.jpg, and the same for rparis6k. The ground truth is a pickle, of which only
plain containers and arrays of numbers are read; nothing in it is run.
"""

import pickle
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from sop_jax.data.listed import ListedFiles
from sop_jax.errors import UserError

SETS = ("roxford5k", "rparis6k")
KINDS = ("easy", "hard", "junk")
SHOWN = 5  # the most names that a message lists

EXPECTED = (
    "the revisited Oxford and Paris sets, each as SET/gnd_SET.pkl and SET/jpg/*.jpg, for the SETs "
    "roxford5k and rparis6k. The ground truth is at "
    "http://cmp.felk.cvut.cz/revisitop/data/datasets/SET/gnd_SET.pkl, and the images are those of "
    "Oxford Buildings and Paris (https://www.robots.ox.ac.uk/~vgg/data/), all in one folder jpg"
)


class Truth(NamedTuple):
    """Which images of the database show what a query shows.

    Attributes:
        easy: the indices of images that clearly show the query's landmark, int64 [n].
        hard: the indices of those that show it poorly, or from another side.
        junk: the indices of those that are neither right nor wrong.
    """

    easy: np.ndarray
    hard: np.ndarray
    junk: np.ndarray


class Revisited(NamedTuple):
    """One of the two sets.

    Attributes:
        name: "roxford5k" or "rparis6k".
        images: the database.
        queries: the queries. These are whole images: the boxes of the ground truth, by which the
            official code can crop queries, are used by neither DINO nor iBOT nor the SOP paper.
        truth: for each query.
    """

    name: str
    images: ListedFiles
    queries: ListedFiles
    truth: list[Truth]


def open_revisited(root: epath.PathLike, name: str) -> Revisited:
    """Opens one of the two sets and checks that all its files exist.

    Args:
        root: the folder that contains the folder of the set.
        name: "roxford5k" or "rparis6k".

    Raises:
        UserError: the ground truth or images are missing, or the ground truth is damaged.
    """
    folder = epath.Path(root) / name
    path = folder / f"gnd_{name}.pkl"
    if not path.is_file():
        raise UserError(
            f"there is no {path}. Expected {EXPECTED}. Put the file there, or leave "
            "out the set with --eval.sets"
        )
    images, queries, truth = read_truth(path)
    jpg = folder / "jpg"
    if not jpg.is_dir():
        raise UserError(
            f"{folder} contains the ground truth of {len(images)} images and {len(queries)} "
            f"queries, but no folder called jpg. Expected {EXPECTED}. Put the images there"
        )
    there = {file.name for file in jpg.iterdir()}
    files = [[f"{image}.jpg" for image in names] for names in (images, queries)]
    if missing := [file for names in files for file in names if file not in there]:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise UserError(
            f"{jpg} does not contain {', '.join(missing[:SHOWN])}{more}, which {path.name} names. "
            f"Expected all {len(files[0])} images and {len(files[1])} queries as .jpg files. "
            "Download what is missing"
        )
    # The features of the database, which take long, do not depend on the truth.
    database, asked = ListedFiles(jpg, files[0]), ListedFiles(jpg, files[1], truth=[path])
    return Revisited(name, database, asked, truth)


def read_truth(path: epath.PathLike) -> tuple[list[str], list[str], list[Truth]]:
    """Reads a file `gnd_*.pkl` without running what it contains.

    Returns:
        The names of the images of the database and of the queries, without ending, and the truth
        for each query.

    Raises:
        UserError: the file contains more than containers and arrays, or something is missing.
    """
    try:
        with epath.Path(path).open("rb") as file:
            content = _Unpickler(file, encoding="latin1").load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # broken bytes can make the unpickler raise anything
        raise _damaged(path, str(error) or type(error).__name__) from error
    try:
        images, queries = _names(content, "imlist"), _names(content, "qimlist")
        truth = [_truth(entry, len(images)) for entry in content["gnd"]]
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise _damaged(path, reason) from error
    if len(truth) != len(queries):
        raise _damaged(path, f"it has {len(queries)} queries, but the truth of {len(truth)}")
    return images, queries, truth


def _names(content: Any, key: str) -> list[str]:
    names = content[key]
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{key} is not a list of names")
    return list(names)


def _truth(entry: Any, images: int) -> Truth:
    return Truth(*(_indices(entry[kind], kind, images) for kind in KINDS))


def _indices(values: Any, kind: str, images: int) -> np.ndarray:
    indices = np.asarray(values)
    if not indices.size:
        return np.zeros(0, np.int64)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise ValueError(f"{kind} is not a list of whole numbers")
    if indices.min() < 0 or indices.max() >= images:
        raise ValueError(f"{kind} has an index outside of 0 to {images - 1}")
    return indices.astype(np.int64)


def _damaged(path: epath.PathLike, reason: str) -> UserError:
    return UserError(
        f"{path} is not a ground truth of the revisited sets: {reason}. Expected a pickle with "
        "imlist, qimlist and gnd, whose entries have easy, hard and junk. Download it again"
    )


class _Unpickler(pickle.Unpickler):
    """Builds plain containers and NumPy's arrays of numbers only."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES:
            return _NAMES[module, name]
        raise UserError(
            f"it contains {module}.{name}, which is not an array, a number, text or a container of "
            "these and could run any code, so nothing of the file was run or loaded. Expected the "
            "ground truth of the revisited sets. Download it again from a source that you trust"
        )


class _Dtype:
    """Stands in for `numpy.dtype`, for types of numbers only."""

    def __init__(self, code: str, *rest: Any) -> None:
        del rest
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biuf":
            raise ValueError(f"it has an array of type {self.dtype}")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for `numpy.ndarray`; its state is a type of numbers, a shape and bytes."""

    def __init__(self, *description: Any) -> None:
        del description

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_column, content = state
        flat = np.frombuffer(_as_bytes(content), dtype.dtype)
        self.values = flat.reshape(shape, order="F" if by_column else "C")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns the array that was stored."""
        return np.array(self.values, dtype, copy=copy)


def _scalar(dtype: _Dtype, content: bytes | str) -> Any:
    """Stands in for NumPy's function of this name, which makes a number from its bytes."""
    return np.frombuffer(_as_bytes(content), dtype.dtype)[0]


def _as_bytes(content: bytes | str = b"", *encoding: Any) -> bytes:
    """Returns bytes, which old pickles store as text."""
    del encoding
    return content.encode("latin1") if isinstance(content, str) else content


# All names that a file may use.
_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _as_bytes,
    ("__builtin__", "bytes"): _as_bytes,
    **{
        (f"numpy.{core}.multiarray", name): stand_in
        for core in ("core", "_core")
        for name, stand_in in (("_reconstruct", _Array), ("scalar", _scalar))
    },
}
