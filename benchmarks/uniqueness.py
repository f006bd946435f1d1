"""Measures time and memory of counting unique prototypes; prints a Markdown table and a JSON line.

    python benchmarks/uniqueness.py [--prototypes=65536 --dim=256]

Counts them for all distances of `uniqueness.EPS` at once, each case in a process of its own:

- distinct: random directions, all of them unique at every distance;
- close: the same and a common direction, so that a tenth of all pairs lies within the widest
  distance, and most prototypes are unique at the others;
- collapsed: a thousandth as many directions, each with small noise.

Memory is the peak of the process, and the growth is that less what it held before counting, with
the prototypes. Linux only.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sop_jax.diagnosis.uniqueness import EPS, covers  # noqa: E402

CASES = ("distinct", "close", "collapsed")
SHARE = 0.1  # of pairs, of the case `close`
SAMPLE = 2000  # prototypes from whose pairs a share is estimated


def within(prototypes: np.ndarray, eps: float) -> float:
    """Returns the share of pairs with 1 - cos < eps, of the first SAMPLE prototypes."""
    rows = prototypes[:SAMPLE] / np.linalg.norm(prototypes[:SAMPLE], axis=1, keepdims=True)
    first, second = np.triu_indices(len(rows), 1)
    return float(np.mean((rows @ rows.T)[first, second] > 1 - eps))


def prototypes_of(case: str, count: int, dim: int) -> np.ndarray:
    """Returns the prototypes of a case, float32 [count, dim]."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((count, dim), np.float32) / np.float32(np.sqrt(dim))
    if case == "close":
        low, high = 0.0, 10.0  # of the common direction's weight
        original = rows[:, 0].copy()
        for _ in range(30):
            weight = (low + high) / 2
            rows[:, 0] = original + np.float32(weight)
            low, high = (weight, high) if within(rows, EPS[-1]) < SHARE else (low, weight)
    elif case == "collapsed":
        directions = rows[: max(1, count // 1000)].copy()
        rows = directions[rng.integers(0, len(directions), count)] + np.float32(0.05) * rows
    return rows


def peak() -> int:
    """Returns the largest number of bytes that this process has held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(case: str, count: int, dim: int) -> dict[str, Any]:
    """Returns seconds, bytes and the numbers of unique prototypes of a case."""
    prototypes = prototypes_of(case, count, dim)
    before, start, cpu = peak(), time.perf_counter(), time.process_time()
    found = covers(prototypes, EPS)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    after = peak()
    return {
        "case": case,
        "prototypes": count,
        "dimensions": dim,
        "pairs_within_widest": within(prototypes, EPS[-1]),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": after,
        "grown_bytes": after - before,
        "unique": {f"{cover.eps:g}": len(cover.representatives) for cover in found},
    }


def main() -> None:
    """Prints the table, and the JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--case", choices=CASES, help="measure this one only, and print no table")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case, args.prototypes, args.dim)))
        return
    print("| case | pairs within the widest | s | CPU s | peak, GiB | growth, GiB | unique |")
    print("|---" * 7 + "|", flush=True)
    rows = []
    for case in CASES:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], f"--case={case}"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        unique = ", ".join(f"{count} at {eps}" for eps, count in row["unique"].items())
        print(
            f"| {case} | {row['pairs_within_widest']:.2g} | {row['seconds']:.1f} "
            f"| {row['cpu_seconds']:.1f} | {row['peak_bytes'] / 2**30:.2f} "
            f"| {row['grown_bytes'] / 2**30:.2f} | {unique} |",
            flush=True,
        )
    print(json.dumps({"cases": rows}))


if __name__ == "__main__":
    main()
