"""Tables of runs: what they are, how they differ, and the results of their evaluations."""

import json
from collections.abc import Sequence
from typing import Any

import ml_collections
from etils import epath

from sop_jax.data.folders import printable
from sop_jax.evaluation.tables import Part, cell_text
from sop_jax.evaluation.tasks import TASKS
from sop_jax.models import FAMILIES
from sop_jax.monitor.metrics import time_text
from sop_jax.page import markup
from sop_jax.page.runs import Shown, images_of, last, number, series
from sop_jax.settings import flatten

DIAGNOSIS = "diagnosis_"  # how the names of files of `sop_jax.diagnose` begin


def summary(runs: Sequence[Shown]) -> str:
    """Returns what the runs are and how far they are, one column for each."""
    columns = [_facts(run) for run in runs]
    names = dict.fromkeys(name for facts in columns for name in facts)
    rows = [[name, *(facts.get(name) for facts in columns)] for name in names]
    return markup.table(["", *(run.name for run in runs)], rows, "The runs")


def _facts(run: Shown) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    config = run.config
    step = run.rows[-1]["step"] if run.rows else None
    if config is not None:
        facts["method"] = config.method
        facts["network"] = _network(config.model)
        facts["images"] = images_of(run)
        facts["global views, pixels"] = config.augment.global_size
        facts["batch"] = config.batch_size
        images = images_of(run)
        if images and step is not None:
            facts["epochs done"] = float(step * config.batch_size / images)
    steps = number(run.summary.get("steps"))
    facts["steps done"] = step
    facts["state"] = "has ended" if steps is not None else "is training or was interrupted"
    knn = [100 * value for _, value in series(run, "knn_top1")]
    if knn:
        facts["k-NN top-1 at first, %"] = knn[0]
        facts["k-NN top-1 now, %"] = knn[-1]
        facts["k-NN top-1 at best, %"] = max(knn)
    facts["loss"] = last(run, "loss")
    wall = last(run, "wall_s")
    facts["time"] = time_text(wall) if wall else None
    facts["folder"] = printable(run.workdir)
    return facts


def _network(model: ml_collections.ConfigDict) -> str:
    """Returns the name of a network, such as `vit s/16` or `vit of width 192 and depth 6, /8`."""
    size = model.size
    if size == "custom":
        size = f"of width {model.width}"
        size += f" and depth {model.depth}" if "depth" not in FAMILIES[model.family].unused else ""
    patch = "" if "patch" in FAMILIES[model.family].unused else f", patches of {model.patch}"
    return f"{model.family} {size}{patch}"


def differences(runs: Sequence[Shown]) -> str | None:
    """Returns the settings in which the runs differ, as a table; None if there are none."""
    own = [flatten(run.config) for run in runs if run.config is not None]
    if len(own) < 2:
        return None
    names = [run.name for run in runs if run.config is not None]
    keys = [key for key in own[0] if any(other.get(key) != own[0][key] for other in own)]
    if not keys:
        return None
    rows = [[key, *(_setting(settings.get(key)) for settings in own)] for key in sorted(keys)]
    title = f"Settings that differ: {len(rows)}"
    return markup.details(title, markup.table(["setting", *names], rows, title))


def _setting(value: Any) -> str:
    """Returns a setting as one would write it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_setting, value))
    return "unset" if value is None else printable(str(value))


def evaluations(run: Shown, several: bool) -> tuple[str, list[str]]:
    """Returns the results of `sop_jax.evaluate`, with the papers' numbers, and what is unreadable.

    The first is HTML; it is empty if there are no results. With several runs, titles name them.
    """
    parts, notes = [], []
    for path in result_files(run):
        if path.name.startswith(DIAGNOSIS):
            continue
        record = read_result(path)
        try:
            assert record is not None
            title, content = _result(record)
        except Exception as error:  # a file that another version, or no version, wrote
            name = printable(path.name)
            notes.append(f"{name} cannot be read as a result ({type(error).__name__}).")
            continue
        title = f"{run.name}: {title}" if several else title
        parts.append(f"<h3>{markup.escape(title)}</h3>" + _as_html(content, title))
    return "".join(parts), notes


def result_files(run: Shown) -> list[epath.Path]:
    """Returns the files of results of a run, by name."""
    folder = epath.Path(run.workdir) / "evaluations"
    return sorted(folder.glob("*.json"), key=str) if folder.is_dir() else []


def read_result(path: epath.Path) -> dict[str, Any] | None:
    """Returns the object in a file of results; None if it has none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _as_html(parts: Sequence[Part], title: str) -> str:
    """Returns sentences and tables; those with titles, such as the papers', are beside the rest."""
    blocks, caption = [""], ""
    for part in parts:
        if isinstance(part, str) and part.endswith(":"):
            caption = part.removesuffix(":")
        elif isinstance(part, str):
            blocks[-1] += markup.paragraph(part)
        else:
            cells = [
                [None if cell is None else cell_text(cell) for cell in row] for row in part[1:]
            ]
            columns = [str(name) for name in part[0]]
            blocks += [""] * bool(caption)
            blocks[-1] += markup.table(columns, cells, caption or title, shown=bool(caption))
            caption = ""
    return f'<div class="beside">{"".join(f"<div>{block}</div>" for block in blocks)}</div>'


def _result(record: dict[str, Any]) -> tuple[str, list[Part]]:
    """Returns the title of a result, and its sentences and tables."""
    task = TASKS[record["task"]]
    settings = task.settings()
    given = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in record["settings"].items()
    }
    settings.update_from_flattened_dict(
        {key: value for key, value in given.items() if key in flatten(settings)}
    )
    step = record.get("step")
    title = record["task"] + ("" if step is None else f", step {step:,}")
    images = ", ".join(
        f"{split}: {one['images']:,} images"
        for split, one in record["data"].items()
        if isinstance(one, dict) and "images" in one
    )
    return title, [*[images] * bool(images), *task.table(record["results"], settings)]
