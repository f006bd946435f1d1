"""Compares runs that learn with runs that collapse, at small scale, on scikit-learn's digits.

    python benchmarks/collapse.py --out=runs/collapse --steps=1000 --plot=docs/collapse.png

Trains configs/digits.py and variants of it, and draws their curves. Runs that are finished are not
trained again. Needs matplotlib (pip install matplotlib).
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import ml_collections

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "configs"), str(ROOT)]

import digits  # noqa: E402

from sop_jax.monitor.metrics import read_metrics  # noqa: E402
from sop_jax.train import train  # noqa: E402

IMAGENET_CROPS = {
    "augment.global_scale": (0.32, 1.0),
    "augment.local_scale": (0.05, 0.32),
    "augment.jitter": 0.8,
    "augment.brightness": 0.4,
    "augment.contrast": 0.4,
}
VARIANTS: dict[str, dict] = {
    "default, ratio 0.15": {},
    "ratio 0.4": {"sop.teacher_temperature": (0.04, 0.04)},
    "ratio 0.7": {"sop.teacher_temperature": (0.07, 0.07)},
    "ImageNet's crops, ratio 0.15": IMAGENET_CROPS,
    "ImageNet's crops, ratio 0.7": IMAGENET_CROPS | {"sop.teacher_temperature": (0.07, 0.07)},
    "fixed anchors: slots": {"sop.anchors": "fixed_slots"},
    "fixed anchors: frozen rows": {"sop.anchors": "frozen_rows"},
}
PANELS = ("knn_top1", "entropy", "entropy_of_mean", "embedding_std", "agreement", "effective_rank")


def variant(changes: dict, steps: int) -> ml_collections.ConfigDict:
    """Returns the digits config with some settings changed, for the given number of steps."""
    config = digits.get_config()
    config.update_from_flattened_dict(changes)
    config.update(dict(steps=steps, log_every=20, eval_every=100, checkpoint_every=steps))
    return config


def run_all(out: Path, steps: int) -> dict[str, list[dict]]:
    """Trains every variant, and returns the logged rows of each by its name."""
    rows = {}
    for name, changes in VARIANTS.items():
        print(f"== {name}", file=sys.stderr, flush=True)
        workdir = out / "".join(c if c.isalnum() else "_" for c in name)
        train(variant(changes, steps), workdir)
        rows[name] = read_metrics(workdir)
    return rows


def plot(rows: dict[str, list[dict]], path: Path) -> None:
    """Draws a panel per quantity with a line per run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 8), constrained_layout=True)
    for axis, key in zip(axes.flat, PANELS, strict=True):
        for name, run in rows.items():
            points = [(row["step"], row[key]) for row in run if row.get(key) is not None]
            style = "--" if "fixed" in name else "-"
            axis.plot(*zip(*points, strict=True), style, label=name, linewidth=1.5)
        axis.set_title(key)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if key.startswith("entropy"):
            axis.axhline(run[-1]["log_k"], color="black", linewidth=0.8, linestyle=":")
            axis.annotate("ln K", (0, run[-1]["log_k"]), va="bottom")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=80)


def table(rows: dict[str, list[dict]], early: int) -> str:
    """Returns a Markdown table of the signs of health early and at the end, with a row per run."""
    lines = [
        f"| run | agreement at {early} | std there | entropy | of mean | std | rank | k-NN % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cell: Callable[[dict, str], str] = lambda row, key: f"{row[key]:.2f}"  # noqa: E731
    for name, run in rows.items():
        first = next(row for row in run if row["step"] == early)
        last = run[-1]
        cells = [cell(first, "agreement"), cell(first, "embedding_std")]
        cells += [cell(last, key) for key in ("entropy", "entropy_of_mean", "embedding_std")]
        cells += [f"{last['effective_rank']:.1f}"]
        cells += [f"{100 * run[0]['knn_top1']:.1f} to {100 * last['knn_top1']:.1f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Trains all variants, draws their curves and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/collapse"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--plot", type=Path, default=Path("runs/collapse/collapse.png"))
    args = parser.parse_args()
    rows = run_all(args.out, args.steps)
    plot(rows, args.plot)
    print(table(rows, early=100))
    print(json.dumps({name: run[-1]["knn_top1"] for name, run in rows.items()}))


if __name__ == "__main__":
    main()
