"""From the names of a file to a parameter tree and back, by way of the tables.

Trees are flat here: leaves by their paths, such as `backbone/blocks/qkv/kernel`.
"""

import functools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sop_jax.errors import UserError
from sop_jax.weights.tables import LAYOUTS, Arrays, Layout, Row

Shapes = Mapping[str, tuple[int, ...]]

# A head of other layers than those of the tables is no part of the backbone.
_HEAD = re.compile(r"head\.mlp\.([024])\.(weight|bias)")
_POSITIONS = "backbone/pos_embed"
_SHOWN = 6  # of a kind of differences


class Entry(NamedTuple):
    """Where an array of a file, or several that are one here, belong: a leaf, or a layer of it."""

    names: tuple[str, ...]
    path: str
    layer: int | None
    row: Row


class Exported(NamedTuple):
    """What a network is in another project.

    Attributes:
        arrays: by the project's names.
        left: paths of leaves that have no place there: the head, perhaps the mask token.
        settings: which the network has there where nobody says otherwise.
    """

    arrays: Arrays
    left: list[str]
    settings: Mapping[str, Any]


class Loaded(NamedTuple):
    """What a file gives a network.

    Attributes:
        leaves: by their paths, float32.
        ignored: names of the file that have no place.
        lacking: paths of leaves that the file does not have and a network may start without.
        resized: what was resized, in words.
    """

    leaves: Arrays
    ignored: list[str]
    lacking: list[str]
    resized: list[str]


def own(family: str, paths: Collection[str]) -> Layout:
    """The layout of this project, where leaves have their paths for names."""
    rows = tuple(Row((path,), path, optional=True) for path in sorted(paths))
    return Layout("sop_jax", family, rows, {}, ())


def describe(layout: Layout, arrays: Arrays) -> dict[str, Any]:
    """The network that a file is of, as settings by their dotted names, of any size custom.

    Not among them are what arrays do not tell: the heads of a ViT.

    Raises:
        UserError: arrays that would say it are missing or misshapen; lists all that are wrong.
    """
    shapes = _shapes(layout, arrays)
    try:
        found = _DESCRIBE[layout.family](shapes)
        if "head/fc1/bias" in shapes:
            found["head.hidden"] = shapes["head/fc1/bias"][0]
            found["head.dim"] = shapes["head/fc3/bias"][0]
    except (KeyError, IndexError, ValueError):
        _check(_lacking(layout, arrays))
        raise UserError("its arrays have too few dimensions to be of a network") from None
    settings = {f"model.{name}": value for name, value in layout.settings.items()}
    return {"model.family": layout.family, "model.size": "custom"} | settings | found


def _lacking(layout: Layout, arrays: Arrays) -> dict[str, list[str]]:
    """What is wrong whatever the numbers of the network may be."""
    wrong, seen = [], []
    known = set()
    for row in layout.rows:
        for pattern in row.names:
            for name in arrays:
                if match := regex(pattern).fullmatch(name):
                    known.add(name)
                    seen.append((_stage(pattern, match), int(match.groupdict().get("i", 0))))
                    if len(row.names) == 1 and _shape(row, arrays[name]) is None:
                        wrong.append(f"{name} is {list(arrays[name].shape)}")
    layers = {s: 1 + max(i for stage, i in seen if stage == s) for s, _ in seen}
    missing = []
    for row in layout.rows:
        for pattern in row.names:
            if row.optional or _is_spare(row.path):
                continue
            if "{i}" in pattern:
                stages = [s for s in layers if (s is not None) == ("{s}" in pattern)] or [None]
                names = [fill(pattern, s, i) for s in stages for i in range(layers.get(s, 1))]
                missing += [name for name in names if name not in arrays]
            elif not any(map(regex(pattern).fullmatch, arrays)):
                missing.append(pattern if "{s" not in pattern else fill(pattern, 0, 0))
    unexpected = [x for x in arrays if x not in known and not is_ignored(layout, x)]
    return {"of another shape": wrong, "missing": missing, "unexpected": unexpected}


def _vit(shapes: Shapes) -> dict[str, Any]:
    kernel, positions = shapes["backbone/patch_embed/kernel"], shapes[_POSITIONS]
    patch = math.isqrt(kernel[0] // 3)
    registers = shapes.get("backbone/register_tokens", (0,))[0]
    return {
        "model.width": kernel[1],
        "model.depth": shapes["backbone/blocks/qkv/kernel"][0],
        "model.patch": patch,
        "model.registers": registers,
        "model.layer_scale": float("backbone/blocks/ls1/scale" in shapes),
        "augment.global_size": math.isqrt(positions[0]) * patch,
    }


def _swin(shapes: Shapes) -> dict[str, Any]:
    tables = _stages(shapes, "blocks/relative_bias")
    window, last = ((math.isqrt(tables[s][1]) + 1) // 2 for s in (0, -1))
    return {
        "model.width": shapes["backbone/patch_embed/bias"][0],
        "model.stage_depths": tuple(depth for depth, _, _ in tables),
        "model.stage_heads": tuple(heads for _, _, heads in tables),
        "model.window": window,
        # The least images whose last stage has this window, as in most trainings.
        "augment.global_size": 32 * last if last < window else max(224, 32 * window),
    }


def _resnet(shapes: Shapes) -> dict[str, Any]:
    first = _stages(shapes, "first/conv1/kernel")
    rest = [shapes.get(f"backbone/stages/{s}/blocks/conv1/kernel", (0,)) for s in range(len(first))]
    return {
        "model.width": shapes["backbone/stem/conv/kernel"][-1],
        "model.stage_depths": tuple(1 + blocks for blocks, *_ in rest),
    }


_DESCRIBE = {"vit": _vit, "swin": _swin, "resnet": _resnet}


def _stages(shapes: Shapes, leaf: str) -> list[tuple[int, ...]]:
    found = [shapes[path] for s in range(9) if (path := f"backbone/stages/{s}/{leaf}") in shapes]
    if not found:
        raise KeyError(f"backbone/stages/0/{leaf}")
    return found


def load(
    layout: Layout,
    arrays: Arrays,
    shapes: Shapes,
    resize: Callable[[np.ndarray, int], np.ndarray],
) -> Loaded:
    """The leaves of a network from the arrays of a file: all that it needs, or none.

    Args:
        layout: from `recognition.recognise`, as the next.
        arrays: by their names.
        shapes: of the network's leaves, by their paths.
        resize: from positions [1+n, D], [CLS] first, of a square grid to so many rows of another.

    Raises:
        UserError: the file is not of this network; lists the differences.
    """
    head = [x for x in arrays if x.startswith("head.") and not is_ignored(layout, x)]
    known_head = all(map(_HEAD.fullmatch, head))
    other_head = [] if known_head else head
    arrays = {name: array for name, array in arrays.items() if name not in other_head}

    def needed(path: str) -> bool:
        if path.startswith("head/"):
            return bool(head) and known_head
        return path != "backbone/mask_token"

    entries = list(_entries(layout, shapes))
    parts: dict[str, list[np.ndarray]] = {}
    wrong, wild, resized = [], [], []
    known = {entry.path for entry in entries}
    missing = [f"what would be {path}" for path in shapes if needed(path) and path not in known]
    for entry in entries:
        absent = [name for name in entry.names if name not in arrays]
        if absent:
            if needed(entry.path) or len(absent) < len(entry.names):
                missing += absent
            continue
        given = [arrays[name] for name in entry.names]
        expected = shapes[entry.path] if entry.layer is None else shapes[entry.path][1:]
        leaf = _read(entry.row, given)
        if leaf is not None and entry.path == _POSITIONS and _is_other_grid(leaf.shape, expected):
            resized.append(f"{entry.names[0]} from {_grid(leaf.shape)} to {_grid(expected)}")
            leaf = resize(leaf, expected[0])
        if leaf is None or leaf.shape != expected:
            shape = list(_write(entry.row, np.empty(expected, np.float32))[0].shape)
            wrong += [
                f"{name} is {list(array.shape)}, expected {shape}"
                for name, array in zip(entry.names, given, strict=True)
            ]
        elif not np.isfinite(leaf).all():
            wild.append(" ".join(entry.names))
        else:
            parts.setdefault(entry.path, []).append(leaf)
    used = {name for entry in entries for name in entry.names}
    others = [name for name in arrays if name not in used]
    ignored = [name for name in others if is_ignored(layout, name)]
    unexpected = [name for name in others if name not in ignored]
    _check(
        {
            "of another shape": wrong,
            "not finite": wild,
            "missing": missing,
            "unexpected": unexpected,
        }
    )
    stacked = {entry.path for entry in entries if entry.layer is not None}
    return Loaded(
        {path: np.stack(found) if path in stacked else found[0] for path, found in parts.items()},
        sorted({*ignored, *other_head}),
        [path for path in shapes if path not in parts],
        resized,
    )


def export(project: str, family: str, leaves: Arrays) -> Exported:
    """Arrays by the names of a project, for `load_state_dict(..., strict=True)` there.

    Args:
        project: such as `timm`.
        family: as `model.family`.
        leaves: of a network, by their paths.

    Raises:
        UserError: the project has no such network.
    """
    layouts = [x for x in LAYOUTS if (x.project, x.family) == (project, family)]
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    whys = []
    for layout in layouts:
        placed = {entry.path for entry in _entries(layout, shapes)}
        lost = [path for path in leaves if path not in placed and not _is_spare(path)]
        lacking = [
            row.path
            for row in layout.rows
            if not row.optional and not any(map(regex(row.path).fullmatch, leaves))
        ]
        if not lost and not lacking:
            return _export(layout, leaves)
        whys.append(
            " and ".join(
                [f"has no place for {path}" for path in lost[:1]]
                + [f"needs {path}" for path in lacking[:1]]
            )
        )
    kinds = "; ".join(f"one {why}" for why in whys) or f"it has no {family}"
    raise UserError(f"{project} has no network like this one: {kinds}. Export to another")


def _export(layout: Layout, leaves: Arrays) -> Exported:
    changed = layout.write(leaves)
    arrays: Arrays = {}
    exported = set()
    for entry in _entries(layout, {path: leaf.shape for path, leaf in changed.items()}):
        if entry.row.exported:
            exported.add(entry.path)
            leaf = changed[entry.path]
            parts = _write(entry.row, leaf if entry.layer is None else leaf[entry.layer])
            arrays |= dict(zip(entry.names, parts, strict=True))
    left = [path for path in leaves if path not in exported]
    return Exported(arrays, left, layout.settings)


def _is_spare(path: str) -> bool:
    return path.startswith("head/") or path == "backbone/mask_token"


def _entries(layout: Layout, shapes: Shapes) -> Iterator[Entry]:
    """What the table says of the leaves that a network has."""
    for row in layout.rows:
        for path, shape in shapes.items():
            if not (match := regex(row.path).fullmatch(path)):
                continue
            stacked = any("{i" in name for name in row.names)
            for i in range(shape[0]) if stacked else [None]:
                yield Entry(
                    tuple(fill(name, match.groupdict().get("s"), i) for name in row.names),
                    path,
                    i,
                    row,
                )


def _shapes(layout: Layout, arrays: Arrays) -> dict[str, tuple[int, ...]]:
    """Shapes of leaves by their paths, as far as a file says, whether or not they make sense."""
    shapes: dict[str, tuple[int, ...]] = {}
    for row in layout.rows:
        for name in arrays:
            if not (match := regex(row.names[0]).fullmatch(name)):
                continue
            shape = _shape(row, arrays[name])
            if shape is None:
                continue
            stage = _stage(row.names[0], match)
            path = row.path if stage is None else row.path.replace("{s}", str(stage))
            layers = shapes.get(path, (0,))[0] + 1
            shapes[path] = (layers, *shape) if "i" in match.groupdict() else shape
    return shapes


def _shape(row: Row, array: np.ndarray) -> tuple[int, ...] | None:
    """Of a leaf, or a layer of one; None where the array cannot be one."""
    leaf = _read(row, [array])
    return leaf.shape if leaf is not None and leaf.ndim and leaf.size else None


def _stage(pattern: str, match: re.Match[str]) -> int | None:
    """The stage that a name belongs to by its pattern."""
    stage = match.groupdict().get("s")
    return None if stage is None else int(stage) - ("{s+1}" in pattern)


@functools.cache
def regex(pattern: str) -> re.Pattern[str]:
    """What a pattern with `{s}` and `{i}` stands for; the numbers are groups of these names."""
    text = re.escape(pattern)
    for place in "is":
        text = re.sub(rf"\\{{{place}\\\+1\\}}", rf"(?P<{place}>[1-9][0-9]*)", text, count=1)
        text = re.sub(rf"\\{{{place}\\}}", rf"(?P<{place}>[0-9]+)", text, count=1)
    return re.compile(text)


def fill(pattern: str, stage: int | str | None, layer: int | None) -> str:
    """The name that a pattern with `{s}` and `{i}` stands for."""
    for place, number in (("s", stage), ("i", layer)):
        if number is not None:
            pattern = pattern.replace(f"{{{place}}}", str(number))
            pattern = pattern.replace(f"{{{place}+1}}", str(int(number) + 1))
    return pattern


def _read(row: Row, arrays: Sequence[np.ndarray]) -> np.ndarray | None:
    """A leaf, or a layer of one; None where the arrays have too few dimensions for it."""
    try:
        whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return np.asarray(row.transform.read(whole), np.float32)
    except (ValueError, IndexError):
        return None


def _write(row: Row, leaf: np.ndarray) -> list[np.ndarray]:
    """The arrays of a file."""
    return np.split(np.asarray(row.transform.write(leaf)), len(row.names))


def is_ignored(layout: Layout, name: str) -> bool:
    """Whether a layout knows a name and has no place for it."""
    return any(re.fullmatch(pattern, name) for pattern in layout.ignored)


def _is_other_grid(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether both are positions of square grids, and not of the same."""
    if len(shape) != 2 or shape[0] < 2:
        return False
    squares = all(math.isqrt(rows - 1) ** 2 == rows - 1 for rows, *_ in (shape, expected))
    return shape[1:] == expected[1:] and shape != expected and squares


def _grid(shape: tuple[int, ...]) -> str:
    side = math.isqrt(shape[0] - 1)
    return f"{side}x{side}"


def _check(differences: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError with what differs, a line a kind, sensibly shortened."""
    lines = []
    for kind, found in differences.items():
        if found:
            lines.append(f"{kind}: {'; '.join(shortened(found))}")
    if lines:
        raise UserError("\n  ".join(["it does not make a whole network, or not this one:", *lines]))


def shortened(names: Sequence[str]) -> list[str]:
    """One of all that differ in the numbers of layers alone, and not too many."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"\.[0-9]+\.", ".*.", name), []).append(name)
    shown = [
        f"{items[0]} (and {len(items) - 1} alike)" if items[1:] else items[0]
        for items in alike.values()
    ]
    more = [f"and {len(shown) - _SHOWN} more"] if len(shown) > _SHOWN else []
    return [*shown[:_SHOWN], *more]
