"""Recognizes by names which network a file of weights contains, and which project's layout it has.

A training checkpoint contains more than a backbone: teacher and student, projection heads, queues,
decoders, the state of the optimizer. Backbones are found by the names of their layers, whatever
the prefix.
"""

import collections
import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sop_jax.errors import UserError
from sop_jax.weights import mapping
from sop_jax.weights.tables import LAYOUTS, Arrays, Layout

# The names under which backbones store their layers. A ResNet's first stage is `4` if its modules
# were put into one nn.Sequential, as in lightly's examples.
_LAYERS = ("blocks", "layers", "encoder.layer", "encoder.layers", "encoder.stages", "layer1", "4.0")
_SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
# What wrappers insert anywhere into names, and what a network that has a head calls its backbone.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_BACKBONE = re.compile(
    r"(?:(?<=\.)|^)((module|_orig_mod|backbone|vit|dinov2|dinov2_with_registers|swin|resnet)\.)+$"
)
# Where a file stores the arrays of its networks, next to the state of the optimizer.
_PARTS = re.compile(r"^(state_dict|model)(_ema)?\.")
# DINOv2's trainer groups blocks into chunks; the numbers of blocks continue across chunks.
_CHUNK = re.compile(r"^blocks\.\d+\.(?=\d+\.)")
_SWIGLU = re.compile(r".*\.(w12|w3|weights_in|weights_out)\.(weight|bias)")

# Words in the names of networks that are moving averages, and of networks that are trained.
_TEACHER = {"teacher", "momentum", "ema", "target", "key", "k"}
_STUDENT = {"student", "online", "anchor", "query", "q"}
# Networks of solo-learn, lightly and MoCo-v3, whose ViTs are timm's.
_OF_TIMM = re.compile(r"(^|\.)(base_encoder|momentum_encoder|\w+_backbone|backbone\.vit)\.")
_SHOWN = 8  # the most names that a message lists


class Recognised(NamedTuple):
    """The network that was recognized in a file.

    Attributes:
        layout: the layout that its names have.
        arrays: the arrays of the network, by names without their prefix.
        alike: layouts that have the same names but other settings.
        words: lines for the user: which of several networks was taken, and what was not used.
    """

    layout: Layout
    arrays: Arrays
    alike: list[Layout]
    words: list[str]


def recognise(
    arrays: Mapping[str, np.ndarray],
    likely: str,
    network: str | None = None,
    prefix: str | None = None,
) -> Recognised:
    """Finds the backbone in a file, with the head that belongs to it.

    Args:
        arrays: all arrays of a file by name; only those of the network are read.
        likely: the project to assume if the names have no prefix and fit several projects, as those
            of DINO's backbones and of timm's ViTs without a classifier do.
        network: which of several networks to take: `teacher`, `student` or a part of a prefix. By
            default the teacher, if there is one.
        prefix: the prefix of the network's names, if the network is not found otherwise.

    Raises:
        UserError: there is no network of a known layout, no network fits `network` or `prefix`, or
            several do.
    """
    starts = _starts(arrays)
    if prefix:
        starts = _under(prefix, arrays, starts)
    start = _choose(starts, network) if starts else ""
    names, aside = _divide(arrays, start, [other for other in starts if other != start])

    if start:
        likely = "timm" if _OF_TIMM.search(start) else "ibot"
    fits = [_fit(layout, names) for layout in LAYOUTS]
    best = [layout for layout, how_well in zip(LAYOUTS, fits, strict=True) if how_well == max(fits)]
    if not names or max(fits) <= 0:
        known = "; ".join(mapping.shortened([*names])) or "none at all"
        raise UserError(
            "its names do not fit a known backbone (ViT, Swin or ResNet of iBOT, DINO, DINOv2, "
            f"timm, torchvision or transformers); the names are: {known}"
        )
    layout = next((layout for layout in best if layout.project == likely), best[0])
    own = {bare: arrays[name] for bare, name in names.items()}
    _refuse_other_layers(own)
    alike = [other for other in best if other.settings != layout.settings]
    return Recognised(layout, layout.read(own), alike, _words(start, starts, aside))


def _starts(names: Collection[str]) -> list[str]:
    """Returns the prefixes of all backbones, each empty or with a trailing dot."""
    found = {
        name[:at]
        for name in names
        for layers in _LAYERS
        if (at := f".{name}".find(f".{layers}.")) >= 0
    }
    starts: list[str] = []
    for start in sorted(found, key=lambda start: (len(start), start)):
        if any(start.startswith(outer) for outer in starts):
            continue  # a part of a backbone can look like a backbone itself
        if max(_fit(layout, _own(names, start)) for layout in LAYOUTS) > 0:
            starts.append(start)
    return starts


def _under(prefix: str, names: Collection[str], starts: Sequence[str]) -> list[str]:
    """Returns the prefixes of backbones below a prefix, or the prefix if there is none."""
    wanted = f"{prefix.strip('.')}."
    begin = {
        name[: at + len(wanted)] for name in names if (at := f".{name}".find(f".{wanted}")) >= 0
    }
    if len(begin) != 1:
        there = begin or {*starts} - {""} or {name.split(".")[0] for name in names}
        what = "several networks have" if begin else "no name has"
        raise UserError(f"{what} the prefix {prefix}; its prefixes are: {_shown(sorted(there))}")
    (full,) = begin
    return [start for start in starts if start.startswith(full)] or [full]


def _choose(starts: Sequence[str], network: str | None) -> str:
    """Returns the prefix of the backbone to take: the teacher's, unless another is requested."""
    fitting = list(starts)
    if network:
        fitting = [start for start in starts if f".{network}." in f".{start}"]
        if not fitting and network in ("teacher", "student"):
            ranks = sorted({rank_of(start) for start in starts})
            rank = ranks[-1] if network == "teacher" else ranks[0]
            if len(ranks) > 1 or rank == (1 if network == "teacher" else -1):
                fitting = [start for start in starts if rank_of(start) == rank]
        if not fitting:
            raise UserError(
                f"it has no network {network!r}; choose one of those that it contains: "
                f"{_shown(starts)}"
            )
    highest = max(map(rank_of, fitting))
    taken = [start for start in fitting if rank_of(start) == highest]
    if len(taken) > 1:
        raise UserError(
            f"it contains several networks: {_shown(taken)}; choose one with --prefix=... of "
            "sop_jax.convert"
        )
    return taken[0]


def rank_of(start: str) -> int:
    """Returns 1 for the prefix of a teacher, -1 for that of a student, and 0 if it is unclear."""
    words = {*re.split(r"[._]", start.lower())}
    return bool(words & _TEACHER) - bool(words & _STUDENT)


def _divide(
    arrays: Collection[str], start: str, others: Sequence[str]
) -> tuple[dict[str, str], dict[str, int]]:
    """Separates the names of a network from those of other parts of a file.

    Returns:
        A dict from the names in the layout to the names in the file; and the number of arrays that
        belong neither to this network nor to another backbone, by the part that they belong to.
    """
    outside = _BACKBONE.sub("", start)  # the prefix of the head, which is next to the backbone
    heads: dict[str, str] = {}
    aside: collections.Counter[str] = collections.Counter()
    for name in arrays:
        if not name.startswith((start, *others)):
            part = _WRAPPERS.sub("", name.removeprefix(outside))
            if name.startswith(outside) and part.startswith("head."):
                heads[part] = name
            else:
                aside[_PARTS.sub("", part).split(".")[0]] += 1
    return heads | _own(arrays, start), aside


def _own(arrays: Iterable[str], start: str) -> dict[str, str]:
    """Maps names in the layout to names in the file, for all names with a backbone's prefix."""
    below = [name for name in arrays if name.startswith(start)]
    numbered = _SEQUENTIAL if f"{start}4.0.conv1.weight" in below else {}
    names: dict[str, str] = {}
    for name in below:
        bare = _CHUNK.sub("blocks.", _WRAPPERS.sub("", name.removeprefix(start)))
        first, dot, rest = bare.partition(".")
        bare = f"{numbered.get(first, first)}{dot}{rest}"
        if bare in names:
            raise UserError(
                f"{names[bare]} and {name} are both {bare} of the network; expected one of them. "
                "Remove the other from the file"
            )
        names[bare] = name
    return names


def _fit(layout: Layout, names: Iterable[str]) -> int:
    """Returns a score of how well names fit a layout; positive if they may belong to it."""
    names = set(names)
    rows = [(name, row) for row in layout.rows for name in row.names]
    known = _any(tuple(name for name, _ in rows))
    matched = sum(bool(known.fullmatch(name)) for name in names)
    ignored = sum(mapping.is_ignored(layout, name) for name in names)
    lacking = [
        name for name, row in rows if not row.optional and mapping.fill(name, 0, 0) not in names
    ]
    return 2 * matched + ignored - 2 * len(lacking)


@functools.cache
def _any(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """Compiles an expression that matches any of some patterns."""
    return re.compile(
        "|".join(re.sub(r"\?P<.>", "?:", mapping.regex(pattern).pattern) for pattern in patterns)
    )


def _refuse_other_layers(arrays: Arrays) -> None:
    """Raises UserError if a network has the names of a known one but different layers."""
    gates = [name for name in arrays if _SWIGLU.fullmatch(name)]
    fc1, fc2 = (arrays.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    if fc1 is not None and fc2 is not None and fc1.ndim == fc2.ndim == 2:
        # timm keeps both halves in one array.
        gates += ["blocks.0.mlp.fc1.weight"] * (fc1.shape[0] == 2 * fc2.shape[1])
    if gates:
        raise UserError(
            f"its layers have SwiGLU feed-forward networks ({gates[0]}), as in DINOv2's giant ViT; "
            "only two linear layers with GELU between them are supported. Use a small, base or "
            "large network"
        )


def _words(start: str, starts: Sequence[str], aside: Mapping[str, int]) -> list[str]:
    words = []
    if len(starts) > 1:
        others = [other for other in starts if other != start]
        as_teacher = ", as the teacher" if all(rank_of(start) > rank_of(x) for x in others) else ""
        words.append(
            f"taken: {_shown([start])}{as_teacher}; not taken: {_shown(others)} (to take another, "
            "use --key or --prefix of sop_jax.convert)"
        )
    if aside:
        parts = [f"{part} ({n} array{'s' * (n > 1)})" for part, n in aside.items()]
        words.append(f"not used: {_shown(parts)}")
    return words


def _shown(names: Sequence[str]) -> str:
    shown = [name.removesuffix(".") or "one without a prefix" for name in names[:_SHOWN]]
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return ", ".join([*shown, *more]) or "one network, without a name"
