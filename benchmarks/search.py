"""Times the support search by itself, over memory size, anchors and k, and compares with its limit.

    python benchmarks/search.py [--rows=65536 --anchors=4096 --supports=8] [--quick]

The limit is the larger of two times: the time of the inner products at the rate of a large product
of the same precision, and the time to read the rows and write the found ones at the bandwidth of a
large copy. A search whose scores never leave the chip could reach it. Recall is the share of the
float32 neighbours that are found. Prints a Markdown table and then a JSON line.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ceilings import bandwidth, matrix_rate, seconds  # noqa: E402

from sop_jax.models.head import unit  # noqa: E402
from sop_jax.parallel.mesh import make_mesh  # noqa: E402
from sop_jax.parallel.search import PRECISIONS, nearest  # noqa: E402

DIM = 256
SWEEPS = {
    "rows": (8192, 16384, 32768, 65536, 131072),
    "anchors": (512, 1024, 2048, 4096, 8192),
    "supports": (1, 8, 32),
}


def measure(rows: int, anchors: int, supports: int, precision: str, steps: int) -> dict[str, Any]:
    """Returns the milliseconds and the recall of one search."""
    mesh = make_mesh(1)
    memory = unit(jax.random.normal(jax.random.key(0), (rows, DIM)))
    own = jnp.arange(anchors)

    def search(precision: str) -> Any:
        return jax.jit(
            lambda memory: nearest(
                memory[:anchors], memory, supports, mesh, own=own, precision=precision
            )[1]
        )

    timed = search(precision)
    taken = seconds(lambda: timed(memory), 2, steps)
    exact, found = np.asarray(search("float32")(memory)), np.asarray(timed(memory))
    shared = [len(np.intersect1d(a, b)) for a, b in zip(exact, found, strict=True)]
    return {
        "rows": rows,
        "anchors": anchors,
        "supports": supports,
        "precision": precision,
        "ms": 1e3 * statistics.median(taken),
        "ms_range": [1e3 * min(taken), 1e3 * max(taken)],
        "recall": float(np.mean(shared)) / supports,
    }


def limit(row: dict[str, Any], rates: dict[str, float], bytes_per_s: float) -> float:
    """Returns the least milliseconds of any search of these sizes, see the top of this file."""
    products = 2.0 * row["rows"] * row["anchors"] * DIM / rates[row["precision"]]
    moved = 4.0 * (row["rows"] * DIM + row["anchors"] * (DIM + 2 * row["supports"]))
    return 1e3 * max(products, moved / bytes_per_s)


def main() -> None:
    """Prints a Markdown table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--anchors", type=int, default=4096)
    parser.add_argument("--supports", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="measure the given size only")
    args = parser.parse_args()
    paper = {"rows": args.rows, "anchors": args.anchors, "supports": args.supports}
    cases = [paper | {"precision": precision} for precision in PRECISIONS]
    if not args.quick:
        cases += [
            paper | {name: value, "precision": "float32"}
            for name, values in SWEEPS.items()
            for value in values
            if value != paper[name]
        ]
    rates = {name: matrix_rate(*precision) for name, precision in PRECISIONS.items()}
    bytes_per_s = bandwidth()
    rows = []
    print(
        f"| rows | anchors | k | precision, on {jax.devices()[0].device_kind} "
        "| ms | limit, ms | of the limit | recall |"
    )
    print("|---" * 8 + "|")
    for case in cases:
        row = measure(**case, steps=args.steps)
        row["limit_ms"] = limit(row, rates, bytes_per_s)
        rows.append(row)
        print(
            f"| {row['rows']} | {row['anchors']} | {row['supports']} | {row['precision']} "
            f"| {row['ms']:.4g} | {row['limit_ms']:.4g} | {row['limit_ms'] / row['ms']:.0%} "
            f"| {row['recall']:.4f} |",
            flush=True,
        )
    print(json.dumps({"searches": rows, "flops_per_s": rates, "bytes_per_s": bytes_per_s}))


if __name__ == "__main__":
    main()
