"""Finds layers of prototypes in files of weights, by their names, and reads their rows.

The names of the arrays, after any prefix, are from the code of each project:

| project | layer |
|---|---|
| DINO, iBOT, CARP | `head.last_layer`, with weight norm; iBOT's for patches: `last_layer2` |
| DINOv2 | `dino_head.last_layer` and `ibot_head.last_layer`, with weight norm |
| CAPI | `head.layer` of the teacher, and `head.last_layer` of the student, with weight norm |
| MSN, PMSN | `prototypes`, one tensor for both networks |
| SwAV | `prototypes`, or `prototypes.prototypes0` and so on for several heads |

A layer with weight norm has the lengths and the directions of its rows in two arrays, `weight_g`
and `weight_v`, or in newer versions of PyTorch `parametrizations.weight.original0` and `original1`.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from sop_jax.errors import UserError, nearest
from sop_jax.weights.recognition import rank_of

# The name of a layer, without the parts of its arrays.
_LAYER = re.compile(r"(?:.*\.)?(?:last_layer2?|prototypes\d*|head\.layer)")
# The arrays that a layer can consist of: the lengths and directions of its rows, or the rows.
_FORMS = (
    (".weight_g", ".weight_v"),
    (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
    (".weight",),
    ("",),
)
_SHOWN = 8  # the most names that a message lists

EXPECTED = (
    "prototypes are in the checkpoints of a training: DINO's *_full_checkpoint.pth, iBOT's and "
    "CARP's checkpoint.pth with `student` and `teacher`, MSN's *-latest.pth.tar, SwAV's "
    "*_pretrain.pth.tar, CAPI's teacher_checkpoint.pth. Files of a backbone alone, such as "
    "dino_deitsmall16_pretrain.pth, do not have them"
)


class Layer(NamedTuple):
    """A layer of prototypes that was read from a file.

    Attributes:
        name: its name in the file, without the names of its arrays.
        rows: the prototypes, of their own lengths.
    """

    name: str
    rows: Float32[np.ndarray, "K d"]


def find(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Returns the names of the arrays of each layer of prototypes, by the name of the layer.

    Args:
        names: the names of all arrays of a file.
    """
    known = set(names)
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        for form in _FORMS:
            layer = name.removesuffix(form[-1])
            parts = tuple(layer + part for part in form)
            if name.endswith(form[-1]) and _LAYER.fullmatch(layer) and known.issuperset(parts):
                found.setdefault(layer, parts)
    return found


def choose(
    layers: Collection[str], network: str | None = None, layer: str | None = None
) -> tuple[list[str], list[str]]:
    """Chooses the layers of one network, in the order of the file.

    Args:
        layers: the names of the layers of a file.
        network: `teacher` or `student`; by default the teacher's layers, if the file has a teacher.
        layer: the name of the only layer to take, or words of its name, between dots, that no
            other layer has.

    Returns:
        The names of the layers, and lines for the user: what was taken, and how to take another.

    Raises:
        UserError: no layer fits.
    """
    ranks = {name: rank_of(name) for name in layers}
    if network is not None:
        wanted = 1 if network == "teacher" else -1
        ranks = {name: rank for name, rank in ranks.items() if rank == wanted}
        if not ranks:
            raise UserError(
                f"no layer of prototypes belongs to a {network}: it has {_shown(list(layers))}; "
                "leave out --network, or choose one with --layer"
            )
    if layer is not None:
        fitting = [name for name in ranks if f".{layer.strip('.')}." in f".{name}."]
        exact = [name for name in fitting if name == layer]
        if len(exact or fitting) != 1:
            problem = "several layers fit" if fitting else "no layer of prototypes is called"
            like = "" if fitting else nearest(layer, list(ranks))
            raise UserError(
                f"{problem} {layer!r}{like}; expected one of {_shown(fitting or list(ranks))}; "
                "choose it with --layer"
            )
        return exact or fitting, []
    wanted = max(ranks.values())
    first = next(name for name, rank in ranks.items() if rank == wanted)
    taken = [name for name, rank in ranks.items() if rank == wanted and _same_network(name, first)]
    others = [name for name in layers if name not in taken]
    if not others:
        return taken, []
    whose = ", as the teacher's" if wanted == 1 and network is None else ""
    return taken, [
        f"taken: {_shown(taken)}{whose}; not taken: {_shown(others)} (choose one with --layer)"
    ]


def read(
    arrays: Mapping[str, np.ndarray], network: str | None = None, layer: str | None = None
) -> tuple[list[Layer], list[str]]:
    """Reads the prototypes of one network of a file.

    Args:
        arrays: all arrays of the file by name; only those of the layers that are taken are read.
        network: see `choose`.
        layer: see `choose`.

    Returns:
        The layers, and lines for the user.

    Raises:
        UserError: the file has no such layer, or what it has is not a matrix.
    """
    found = find(list(arrays))
    if not found:
        raise UserError(
            f"it has no prototypes: none of its {len(arrays)} arrays has the name of a layer of "
            f"prototypes (last_layer, prototypes or head.layer); {EXPECTED}"
        )
    taken, words = choose(list(found), network, layer)
    layers: list[Layer] = []
    for name in taken:
        rows = _rows(name, [arrays[part] for part in found[name]])
        same = [other.name for other in layers if np.array_equal(other.rows, rows)]
        if same:
            words.append(f"{name} is the same as {same[0]}, and left out")
        else:
            layers.append(Layer(name, rows))
    return layers, words


def _rows(name: str, parts: Sequence[np.ndarray]) -> Float32[np.ndarray, "K d"]:
    """Returns the rows of a layer, of the lengths that its weight norm gives them.

    Raises:
        UserError: see `read`.
    """
    for part in parts:
        if not np.can_cast(part.dtype, np.float32, "same_kind"):
            raise UserError(
                f"{name} has values of the type {part.dtype}; expected real numbers; choose "
                "another layer with --layer"
            )
    directions = np.asarray(parts[-1], np.float32)
    if directions.ndim != 2 or directions.size == 0:
        raise UserError(
            f"{name} has the shape {list(directions.shape)}; expected prototypes as the rows of a "
            "matrix [K, d]; choose another layer with --layer"
        )
    if len(parts) == 1:
        return directions
    lengths = np.asarray(parts[0], np.float32).reshape(-1, 1)
    if len(lengths) not in (1, len(directions)):
        raise UserError(
            f"{name} has {len(directions)} directions, but {len(lengths)} lengths; expected one "
            "for each. The file is damaged; use another checkpoint"
        )
    norms = np.linalg.norm(directions, axis=1, keepdims=True)
    return lengths * directions / np.maximum(norms, np.finfo(np.float32).tiny)


def _same_network(one: str, other: str) -> bool:
    """Whether two layers have the same prefix, apart from the name of a head."""
    heads = re.compile(r"(?:\w*head\.)?(?:last_layer2?|layer|(?:prototypes\.)?prototypes\d*)$")
    return heads.sub("", one) == heads.sub("", other)


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
