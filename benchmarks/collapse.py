"""Compares runs that learn with runs that collapse, at small scale, on scikit-learn's digits.

    python benchmarks/collapse.py --out=runs/collapse --steps=1000 --plot=docs/collapse.png

Trains configs/digits.py and variants of it that differ in one setting each, prints a table of their
signs of health, and draws their curves where --plot names a file, which needs matplotlib (pip
install matplotlib). Runs that are finished are not trained again.
"""

import argparse
import json
import runpy
import sys
from pathlib import Path

import ml_collections

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

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


EARLY = 60  # the step at which agreement decides how a run goes on
LOG_EVERY = 20


def variant(changes: dict, steps: int) -> ml_collections.ConfigDict:
    """Returns the digits config with some settings changed, for a number of steps."""
    config = runpy.run_path(str(ROOT / "configs" / "digits.py"))["get_config"]()
    config.update_from_flattened_dict(changes)
    config.update(dict(steps=steps, log_every=LOG_EVERY, eval_every=100, checkpoint_every=steps))
    return config


def run_all(names: list[str], out: Path, steps: int) -> dict[str, list[dict]]:
    """Trains variants, and returns the metrics of each, a row for each logged step."""
    rows = {}
    for name in names:
        print(f"== {name}", file=sys.stderr, flush=True)
        workdir = out / "".join(c if c.isalnum() else "_" for c in name)
        train(variant(VARIANTS[name], steps), workdir)
        rows[name] = read_metrics(workdir)
    return rows


def plot(rows: dict[str, list[dict]], path: Path) -> None:
    """Draws a panel for each quantity, with a line for each run."""
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


def table(rows: dict[str, list[dict]]) -> str:
    """Returns the signs of health at step EARLY and at the end, as a Markdown table of the runs."""
    heads = ["run", f"agreement at step {EARLY}", f"std at {EARLY}", "entropy at the end"]
    heads += ["of batch mean", "std", "rank", "k-NN %"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, run in rows.items():
        first = next(row for row in run if row["step"] == EARLY)
        last = run[-1]
        cells = [f"{first[key]:.2f}" for key in ("agreement", "embedding_std")]
        cells += [f"{last[key]:.2f}" for key in ("entropy", "entropy_of_mean", "embedding_std")]
        cells += [f"{last['effective_rank']:.1f}"]
        cells += [f"{100 * run[0]['knn_top1']:.1f} to {100 * last['knn_top1']:.1f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Trains, prints the table and a JSON line, and draws."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/collapse"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="all by default")
    parser.add_argument("--plot", type=Path, help="a PNG file of the curves; none by default")
    args = parser.parse_args()
    if args.steps < EARLY:
        parser.error(f"--steps={args.steps} ends before step {EARLY}, which the table shows")
    rows = run_all(args.variant or list(VARIANTS), args.out, args.steps)
    if args.plot:
        plot(rows, args.plot)
    print(table(rows))
    print(json.dumps({name: run[-1]["knn_top1"] for name, run in rows.items()}))


if __name__ == "__main__":
    main()
