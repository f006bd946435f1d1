"""What a page shows of runs: their rows of metrics, settings and results, as their folders say."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
from etils import epath

from sop_jax.config import read_config
from sop_jax.data.folders import printable
from sop_jax.errors import UserError
from sop_jax.monitor.metrics import read_metrics

Row = Mapping[str, Any]


class Shown(NamedTuple):
    """A run on a page.

    Attributes:
        name: tells it apart from the others.
        workdir: its folder.
        rows: its rows of metrics, by ascending step.
        config: its settings; None if they cannot be read.
        data: the content of data.json; {} without one.
        summary: the content of summary.json; {} unless the run has ended.
        notes: what cannot be read, and why.
    """

    name: str
    workdir: str
    rows: Sequence[Row]
    config: ml_collections.ConfigDict | None
    data: Mapping[str, Any]
    summary: Mapping[str, Any]
    notes: Sequence[str]


def read_runs(workdirs: Sequence[epath.PathLike]) -> list[Shown]:
    """Reads runs, which may still be training.

    Raises:
        UserError: one of them is not the folder of a run.
    """
    folders = [epath.Path(workdir) for workdir in workdirs]
    names = [printable(folder.name) for folder in folders]
    if len(set(names)) < len(names):
        names = [printable(str(folder)) for folder in folders]
    return [_read(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read(folder: epath.Path, name: str) -> Shown:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected the folder of a run. Check --workdir")
    notes = []
    config = None
    try:
        config = read_config(folder)
    except UserError as error:
        if not (folder / "metrics.jsonl").exists():
            raise
        notes.append(str(error))
    rows = sorted(read_metrics(folder), key=lambda row: row["step"])
    if not rows:
        notes.append("there are no curves, because metrics.jsonl is missing or has no whole line")
    return Shown(
        name,
        str(folder),
        rows,
        config,
        _object(folder / "data.json"),
        _object(folder / "summary.json"),
        notes,
    )


def _object(path: epath.Path) -> dict[str, Any]:
    """Returns the object in a file; {} if there is none, or a run is just writing it."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def number(value: Any) -> float | None:
    """Returns a finite number of a row, and None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def series(run: Shown, key: str) -> list[tuple[int, float]]:
    """Returns the steps that have a value, and the values."""
    found = [(row["step"], number(row.get(key))) for row in run.rows]
    return [(step, value) for step, value in found if value is not None]


def last(run: Shown, key: str) -> float | None:
    """Returns the newest value of a key; None if there is none."""
    values = series(run, key)
    return values[-1][1] if values else None


def images_of(run: Shown) -> int | None:
    """Returns the number of images that a run learns from; None if unknown."""
    split = run.data.get("train")
    count = split.get("images") if isinstance(split, Mapping) else None
    return count if isinstance(count, int) and count > 0 else None
