"""Translates between the arrays of a file and a parameter tree, both ways, by the tables.

Trees are flat here: leaves are keyed by path, such as `backbone/blocks/qkv/kernel`.
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

# Only a head with these layers, two or three, is loaded; other heads are ignored.
_HEAD = re.compile(r"head\.mlp\.([024])\.(weight|bias)")
_POSITIONS = "backbone/pos_embed"
_SHOWN = 6  # the most differences of each kind that a message lists


class Entry(NamedTuple):
    """Maps one or more arrays of a file to a leaf, or to one layer of a stacked leaf."""

    names: tuple[str, ...]
    path: str
    layer: int | None
    row: Row


class Exported(NamedTuple):
    """A network in the layout of another project.

    Attributes:
        arrays: the arrays by the project's names.
        not_exported: the paths of leaves for which the project has no names: the head, and in some
            layouts the mask token.
        settings: the settings of `config.model` that the project uses by default.
    """

    arrays: Arrays
    not_exported: list[str]
    settings: Mapping[str, Any]


class Loaded(NamedTuple):
    """The leaves of a network that were loaded from a file.

    Attributes:
        leaves: the leaves by path, float32.
        ignored: names in the file that are not used.
        missing: paths of optional leaves that the file does not have.
        resized: a description of each array that was resized.
    """

    leaves: Arrays
    ignored: list[str]
    missing: list[str]
    resized: list[str]


def own_layout(family: str, paths: Collection[str]) -> Layout:
    """Returns the layout of this project, in which the names of leaves are their paths."""
    rows = tuple(Row((path,), path, optional=True) for path in sorted(paths))
    return Layout("sop_jax", family, rows, {}, ())


def describe(layout: Layout, arrays: Arrays) -> dict[str, Any]:
    """Infers the settings of the network that a file's arrays belong to.

    The number of heads of a ViT cannot be inferred and is not included.

    Args:
        layout: the layout of the file.
        arrays: the arrays by the layout's names.

    Returns:
        Settings by their dotted names, with `model.size=custom`.

    Raises:
        UserError: arrays that are needed are missing or have the wrong shape; lists all that are
            wrong.
    """
    shapes = _shapes(layout, arrays)
    try:
        found = _DESCRIBE[layout.family](shapes)
        if _known_head(_head(layout, arrays)):
            biases = [path for i in (1, 2, 3) if (path := f"head/fc{i}/bias") in shapes]
            sizes = [shapes[path][0] for path in biases]
            found |= {"head.layers": len(sizes), "head.hidden": sizes[0], "head.dim": sizes[-1]}
    except (KeyError, IndexError, ValueError):
        _check(_differences(layout, arrays))
        raise UserError("its arrays have too few dimensions to be a network's weights") from None
    settings = {f"model.{name}": value for name, value in layout.settings.items()}
    return {"model.family": layout.family, "model.size": "custom"} | settings | found


def _differences(layout: Layout, arrays: Arrays) -> dict[str, list[str]]:
    """Returns the differences that are errors for a network of any size, by kind."""
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
    return {"wrong shape": wrong, "missing": missing, "unexpected": unexpected}


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
        # The smallest image size whose last stage has this window, as most projects train with.
        "augment.global_size": 32 * last if last < window else max(224, 32 * window),
    }


def _resnet(shapes: Shapes) -> dict[str, Any]:
    first = _stages(shapes, "first/conv1/kernel")
    rest = [shapes.get(f"backbone/stages/{s}/blocks/conv1/kernel", (0,)) for s in range(len(first))]
    three = "backbone/stages/0/first/conv3/kernel" in shapes
    return {
        "model.width": shapes["backbone/stem/conv/kernel"][-1],
        "model.block": "bottleneck" if three else "basic",
        "model.stem": "imagenet" if shapes["backbone/stem/conv/kernel"][0] == 7 else "small",
        "model.stage_depths": tuple(1 + blocks for blocks, *_ in rest),
    }


_DESCRIBE = {"vit": _vit, "swin": _swin, "resnet": _resnet}


def _stages(shapes: Shapes, leaf: str) -> list[tuple[int, ...]]:
    found = [shapes[path] for s in range(9) if (path := f"backbone/stages/{s}/{leaf}") in shapes]
    if not found:
        raise KeyError(f"backbone/stages/0/{leaf}")
    return found


def load_leaves(
    layout: Layout,
    arrays: Arrays,
    shapes: Shapes,
    resize: Callable[[np.ndarray, int], np.ndarray],
) -> Loaded:
    """Converts the arrays of a file to the leaves of a network: all that it needs, or none.

    Args:
        layout: the layout, from `recognition.recognise`.
        arrays: the arrays by the layout's names, from `recognition.recognise`.
        shapes: the shapes of the network's leaves by path.
        resize: a function that takes positions [1 + n, D] of a square grid, [CLS] first, and a
            number of rows 1 + m, and returns positions [1 + m, D] of another square grid.

    Raises:
        UserError: the file is not of this network; lists the differences.
    """
    head = _head(layout, arrays)
    other_head = [] if _known_head(head) else head
    arrays = {name: array for name, array in arrays.items() if name not in other_head}

    def needed(path: str) -> bool:
        if path.startswith("head/"):
            return _known_head(head)
        return path != "backbone/mask_token"

    entries = list(_entries(layout, shapes))
    parts: dict[str, list[np.ndarray]] = {}
    wrong, not_finite, resized = [], [], []
    known = {entry.path for entry in entries}
    missing = [f"an array for {path}" for path in shapes if needed(path) and path not in known]
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
            not_finite.append(" ".join(entry.names))
        else:
            parts.setdefault(entry.path, []).append(leaf)
    used = {name for entry in entries for name in entry.names}
    others = [name for name in arrays if name not in used]
    ignored = [name for name in others if is_ignored(layout, name)]
    unexpected = [name for name in others if name not in ignored]
    _check(
        {
            "wrong shape": wrong,
            "not finite": not_finite,
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


def _head(layout: Layout, arrays: Arrays) -> list[str]:
    """Returns the names of a file's projection head."""
    return [x for x in arrays if x.startswith("head.") and not is_ignored(layout, x)]


def _known_head(head: Sequence[str]) -> bool:
    """Whether there is a head, and its layers can be loaded: two or three without a norm."""
    return bool(head) and all(map(_HEAD.fullmatch, head))


def export(project: str, family: str, leaves: Arrays) -> Exported:
    """Converts the leaves of a network to the names of a project.

    The project loads the result with `load_state_dict(..., strict=True)`.

    Args:
        project: the name of the project, for example `timm`.
        family: the family of the backbone, as in `model.family`.
        leaves: the leaves of the network by path.

    Raises:
        UserError: the project has no such network.
    """
    layouts = [x for x in LAYOUTS if (x.project, x.family) == (project, family)]
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    whys = []
    for layout in layouts:
        written = {entry.path for entry in _entries(layout, shapes)}
        lost = [path for path in leaves if path not in written and not _is_spare(path)]
        lacking = [
            row.path
            for row in layout.rows
            if not row.optional and not any(map(regex(row.path).fullmatch, leaves))
        ]
        if not lost and not lacking:
            return write_arrays(layout, leaves)
        whys.append(
            " and ".join(
                [f"has no place for {path}" for path in lost[:1]]
                + [f"needs {path}" for path in lacking[:1]]
            )
        )
    kinds = "; ".join(f"one layout {why}" for why in whys) or f"it has no {family}"
    raise UserError(f"{project} has no network like this one: {kinds}. Export to another project")


def write_arrays(layout: Layout, leaves: Arrays) -> Exported:
    """Converts the leaves of a network that fits a layout to the names of the layout."""
    changed = layout.write(leaves)
    arrays: Arrays = {}
    exported = set()
    for entry in _entries(layout, {path: leaf.shape for path, leaf in changed.items()}):
        if entry.row.exported:
            exported.add(entry.path)
            leaf = changed[entry.path]
            parts = _write(entry.row, leaf if entry.layer is None else leaf[entry.layer])
            arrays |= dict(zip(entry.names, parts, strict=True))
    rest = [path for path in leaves if path not in exported]
    return Exported(arrays, rest, layout.settings)


def _is_spare(path: str) -> bool:
    return path.startswith("head/") or path == "backbone/mask_token"


def _entries(layout: Layout, shapes: Shapes) -> Iterator[Entry]:
    """Yields the entries of a layout's table for the leaves that a network has."""
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
    """Returns the shapes of leaves by path, as far as a file determines them, without checks."""
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
    """Returns the shape of a leaf, or of one layer, or None if the array does not fit the row."""
    leaf = _read(row, [array])
    return leaf.shape if leaf is not None and leaf.ndim and leaf.size else None


def _stage(pattern: str, match: re.Match[str]) -> int | None:
    """Returns the stage in a name that matched a pattern, or None if the pattern has none."""
    stage = match.groupdict().get("s")
    return None if stage is None else int(stage) - ("{s+1}" in pattern)


@functools.cache
def regex(pattern: str) -> re.Pattern[str]:
    """Compiles a pattern with `{s}` and `{i}`; the numbers are groups of the same names."""
    text = re.escape(pattern)
    for place in "is":
        text = re.sub(rf"\\{{{place}\\\+1\\}}", rf"(?P<{place}>[1-9][0-9]*)", text, count=1)
        text = re.sub(rf"\\{{{place}\\}}", rf"(?P<{place}>[0-9]+)", text, count=1)
    return re.compile(text)


def fill(pattern: str, stage: int | str | None, layer: int | None) -> str:
    """Fills in the stage `{s}` and the layer `{i}` of a pattern."""
    for place, number in (("s", stage), ("i", layer)):
        if number is not None:
            pattern = pattern.replace(f"{{{place}}}", str(number))
            pattern = pattern.replace(f"{{{place}+1}}", str(int(number) + 1))
    return pattern


def _read(row: Row, arrays: Sequence[np.ndarray]) -> np.ndarray | None:
    """Returns a leaf, or one layer, float32; None if the arrays have too few dimensions."""
    try:
        whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return np.asarray(row.transform.read(whole), np.float32)
    except (ValueError, IndexError):
        return None


def _write(row: Row, leaf: np.ndarray) -> list[np.ndarray]:
    """Returns the arrays of a file that make a leaf, or one layer of it."""
    return np.split(np.asarray(row.transform.write(leaf)), len(row.names))


def is_ignored(layout: Layout, name: str) -> bool:
    """Whether a layout knows a name but does not use its array."""
    return any(re.fullmatch(pattern, name) for pattern in layout.ignored)


def _is_other_grid(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether both shapes are those of positions of square grids, and the grids differ."""
    if len(shape) != 2 or shape[0] < 2:
        return False
    squares = all(math.isqrt(rows - 1) ** 2 == rows - 1 for rows, *_ in (shape, expected))
    return shape[1:] == expected[1:] and shape != expected and squares


def _grid(shape: tuple[int, ...]) -> str:
    side = math.isqrt(shape[0] - 1)
    return f"{side}x{side}"


def _check(differences: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError if there are differences; lists each kind on one line, shortened."""
    lines = []
    for kind, found in differences.items():
        if found:
            lines.append(f"{kind}: {'; '.join(shortened(found))}")
    if lines:
        raise UserError("\n  ".join(["its arrays do not match the network:", *lines]))


def shortened(names: Sequence[str]) -> list[str]:
    """Returns one name of each group that differs only in layer numbers, up to a limit."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"\.[0-9]+\.", ".*.", name), []).append(name)
    shown = [
        f"{items[0]} (and {len(items) - 1} similar)" if items[1:] else items[0]
        for items in alike.values()
    ]
    more = [f"and {len(shown) - _SHOWN} more"] if len(shown) > _SHOWN else []
    return [*shown[:_SHOWN], *more]
