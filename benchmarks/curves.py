r"""Adds the k-NN curves of runs to a file of rows, and prints all of them as a Markdown table.

    python benchmarks/curves.py --out=docs/cifar10.jsonl [--workdir RUN ...]

A row has the settings of a run that differ from `config.paper`, its curve as pairs of images seen
and accuracy in percent, the wall-clock minutes with evaluations, and the median of the images per
second over the intervals that the run logged. A run that goes on replaces its row.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rows as table  # noqa: E402
from etils import epath  # noqa: E402

from sop_jax.check import without_use  # noqa: E402
from sop_jax.config import paper, read_config  # noqa: E402
from sop_jax.errors import UserError  # noqa: E402
from sop_jax.monitor.metrics import read_metrics  # noqa: E402
from sop_jax.paths import expand, write_whole  # noqa: E402
from sop_jax.settings import flatten  # noqa: E402

KEY = ("run", "settings", "curve")
# Settings that do not change what a run learns, that the runs of a table share, or that the curve
# shows.
APART = (
    *("data.", "eval.", "checkpoint.", "mesh.", "log_every", "eval_every", "checkpoint_every"),
    *("steps", "epochs"),
)


def measure(workdir: str) -> dict[str, Any]:
    """Returns the row of a run.

    Raises:
        UserError: the folder is not that of a run, or the run has measured no accuracy yet.
    """
    config, metrics = read_config(workdir), read_metrics(workdir)
    default, idle = flatten(paper()), without_use(config)
    settings = {
        name: value
        for name, value in flatten(config).items()
        if value != default[name] and name not in idle and not name.startswith(APART)
    }
    curve = [
        (row["step"] * config.batch_size, round(100 * row["knn_top1"], 2))
        for row in metrics
        if "knn_top1" in row
    ]
    if not curve:
        raise UserError(
            f"the run in {workdir} has measured no accuracy: eval.tasks must have knn, and its "
            "images need labels"
        )
    speeds = [row["images_per_s"] for row in metrics if "images_per_s" in row]
    return {
        "run": Path(workdir).name,
        "settings": settings,
        "curve": curve,
        "minutes": round(metrics[-1]["wall_s"] / 60, 1),
        "images_per_s": round(statistics.median(speeds), 1) if speeds else None,
    }


def shown(rows: list[dict[str, Any]]) -> str:
    """Returns the table: each run with the settings in which it differs from the first one."""
    lines = [
        "| run | differs from the first in | images/s | minutes | untrained, % | at images: % |",
        "|---|---|---|---|---|---|",
    ]
    first, default = rows[0]["settings"] if rows else {}, flatten(paper())
    for row in rows:
        own = row["settings"]
        names = [name for name in {**first, **own} if first.get(name) != own.get(name)]
        changes = ", ".join(f"`{name}={own.get(name, default[name])}`" for name in names) or "-"
        points = ", ".join(f"{images:,}: {accuracy:.1f}" for images, accuracy in row["curve"][1:])
        start = row["curve"][0][1]
        lines.append(
            f"| {row['run']} | {changes} | {row['images_per_s']} | {row['minutes']} | "
            f"{start:.1f} | {points} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Writes the rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=lambda path: Path(expand(path)), required=True)
    parser.add_argument("--workdir", nargs="*", default=[])
    args = parser.parse_args()
    try:
        table.check_out(args.out)
        rows = {row["run"]: row for row in table.read(args.out, KEY)}
        rows |= {row["run"]: row for row in map(measure, map(expand, args.workdir))}
    except UserError as error:
        sys.exit(f"error: {error}")
    if args.workdir:
        write_whole(epath.Path(args.out), "".join(json.dumps(row) + "\n" for row in rows.values()))
    print(shown(list(rows.values())))


if __name__ == "__main__":
    main()
