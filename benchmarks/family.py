r"""Trains every method on scikit-learn's digits, and compares their accuracy, steps and memory.

    python benchmarks/family.py --out=docs/family.jsonl --seeds=3
    python benchmarks/family.py --out=docs/family.jsonl --table
    python benchmarks/family.py --steps --rounds=7
    python benchmarks/family.py --finite=200

The first command trains configs/digits.py and every configs/digits_METHOD.py with some seeds, and
appends a row for each finished run; a run that has a row is not repeated, and an interrupted one
resumes. A row is known by its method, its seed and its settings. The second prints the rows as a
table; its minutes are those of the runs with the most processor cores (taskset gives a run fewer).
The third times one step of each method beside one of SOP, in turns, on a batch that stays in
memory, and prints the ratios of the medians and of the memory that the compiler reports. The fourth
trains each method for 200 steps on the digits, in float32 and in bfloat16, and prints its first and
last loss, and whether every number that a step reports was finite.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rows import append, check_out, has, read, recipe, settings_digest  # noqa: E402
from turns import compiled, in_turns  # noqa: E402

import sop_jax  # noqa: E402
from sop_jax.data.pipeline import train_batches  # noqa: E402
from sop_jax.data.sources import open_source  # noqa: E402
from sop_jax.errors import Interrupted, UserError  # noqa: E402
from sop_jax.objectives.methods import METHODS  # noqa: E402
from sop_jax.parallel.mesh import make_mesh, put, replicated, to_devices  # noqa: E402
from sop_jax.train import train  # noqa: E402
from sop_jax.training.assemble import assemble, traced_step  # noqa: E402

GOAL = 89.8  # percent: four points above the untrained network of configs/digits.py
KEYS = ("method", "seed", "settings")  # what every row has
DIGITS = 1437  # images in the train split


def current(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of the settings that the recipes have now."""
    digests = {name: settings_digest(recipe(name)) for name in METHODS}
    return [row for row in rows if digests.get(row["method"]) == row["settings"]]


def run_all(methods: list[str], seeds: int, out: Path, workdirs: Path) -> None:
    """Trains what has no row yet, seed by seed."""
    for seed in range(seeds):
        for method in methods:
            config = recipe(method)
            digest = settings_digest(config)
            key = {"method": method, "seed": seed, "settings": digest}
            if has(read(out, KEYS), key):
                continue
            print(f"== {method}, seed {seed}", file=sys.stderr, flush=True)
            config.seed = seed
            began = time.monotonic()
            result = train(config, str(workdirs / f"{method}_{seed}_{digest}"))
            names = ("knn_top1_untrained", "knn_top1", "wall_s", "compile_s", "images_per_s")
            row = key | {name: result[name] for name in names}
            row |= {"command_s": time.monotonic() - began, "version": sop_jax.__version__}
            row["cores"] = len(os.sched_getaffinity(0))
            append(out, row)


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the k-NN accuracies of the digits as a Markdown table."""
    lines = [
        "| method | k-NN top-1 at the end, % | mean | standard error | minutes | cores |",
        "|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["seed"])
        if not own:
            continue
        found = [100 * row["knn_top1"] for row in own]
        mean = statistics.mean(found)
        error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else None
        cores = max(row["cores"] for row in own)
        minutes = statistics.median(row["wall_s"] for row in own if row["cores"] == cores) / 60
        lines.append(
            f"| {method} | {', '.join(f'{x:.1f}' for x in found)} | "
            + (f"**{mean:.1f}**" if mean >= GOAL else f"{mean:.1f}")
            + f" | {'-' if error is None else f'{error:.1f}'} | {minutes:.1f} | {cores} |"
        )
    return "\n".join(lines)


def compare(methods: list[str], rounds: int, repeats: int = 5) -> str:
    """Times steps of the methods and of SOP in turns, and returns the ratios as a table."""
    names = ["sop", *(method for method in methods if method != "sop")]
    steps = {name: compiled(recipe(name), DIGITS) for name in names}
    seconds = in_turns(steps, rounds, repeats)
    lines = ["| method | ms per step | of SOP's | memory, MB | of SOP's |", "|---|---|---|---|---|"]
    base = steps["sop"].size
    for name, (_, _, size) in steps.items():
        ratio = statistics.median(
            own / other for own, other in zip(seconds[name], seconds["sop"], strict=True)
        )
        median = 1e3 * statistics.median(seconds[name])
        lines.append(
            f"| {name} | {median:.1f} | {ratio:.2f} | {size / 1e6:.1f} | {size / base:.2f} |"
        )
    return "\n".join(lines)


def finite(config: ml_collections.ConfigDict, steps: int) -> tuple[float, float, int]:
    """Takes the first steps of a run, and returns the first and last loss, and the finite steps.

    A step is finite if its loss, its terms, the norm of its gradient and its schedules are. The
    signs of health are measured in all steps, and count as well.
    """
    run = assemble(config, make_mesh(1), DIGITS)
    step = traced_step(run).lower().compile()
    state, source = run.init(jax.random.key(config.seed)), open_source(config.data, "train")
    assert source is not None
    batches = train_batches(source, config, run.model.patch, 0, range(config.batch_size))
    measure, losses, count = put(np.array(True), replicated(run.mesh)), [], 0
    try:
        for _ in range(steps):
            state, metrics = step(state, to_devices(run.mesh, next(batches)), measure)
            metrics = jax.device_get(metrics)
            losses.append(float(metrics["loss"]))
            count += all(np.isfinite(value).all() for value in metrics.values())
    finally:
        batches.close()
    return losses[0], losses[-1], count


def print_finite(methods: list[str], steps: int) -> bool:
    """Prints a row for each method and type; returns whether all steps were finite."""
    print("| method | type | first loss | last loss | finite steps |\n|---|---|---|---|---|")
    every = True
    for method in methods:
        for dtype in ("float32", "bfloat16"):
            config = recipe(method)
            config.model.dtype = dtype
            first, last, count = finite(config, steps)
            every = every and count == steps
            row = f"| {method} | {dtype} | {first:.4f} | {last:.4f} | {count} of {steps} |"
            print(row, flush=True)
    return every


def main() -> None:
    """Trains, prints the table, compares steps, or verifies that steps are finite."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workdirs", type=Path, default=ROOT / "runs" / "family")
    parser.add_argument("--table", action="store_true", help="print the rows that are there")
    parser.add_argument("--steps", action="store_true", help="compare steps and memory instead")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--finite", type=int, default=0, help="take so many steps in both types")
    args = parser.parse_args()
    methods = args.methods.split(",")
    if unknown := [name for name in methods if name not in METHODS]:
        parser.error(f"unknown methods {', '.join(unknown)}; expected some of {', '.join(METHODS)}")
    if min(args.seeds, args.rounds) < 1 or args.finite < 0:
        parser.error("--seeds and --rounds must be 1 or more, and --finite 0 or more")
    if args.steps:
        print(compare(methods, args.rounds))
        return
    if args.finite:
        if not print_finite(methods, args.finite):
            sys.exit("error: some steps were not finite")
        return
    if args.out is None:
        parser.error("--out names the file of rows; for example, --out=docs/family.jsonl")
    if not args.table:
        check_out(args.out)
        run_all(methods, args.seeds, args.out, args.workdirs)
    print(table(current(read(args.out, KEYS))))


if __name__ == "__main__":
    try:
        main()
    except (UserError, Interrupted) as error:
        sys.exit(f"error: {error}")
