"""Measures the recall of the support search with faster precisions, relative to full float32.

    python benchmarks/recall.py [--workdir=DIR]

Searches random unit rows, clustered ones, and the [CLS] memory of a trained run. The meaning of
`high` depends on the device: TF32 on GPUs, three bfloat16 passes on TPUs, float32 on CPUs. That of
`TF32, emulated` does not: the rows are rounded to its 10 bits of mantissa, and multiplied in
float32.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sop_jax import config as config_lib  # noqa: E402
from sop_jax.models.head import unit  # noqa: E402
from sop_jax.objectives.memory import flat_rows  # noqa: E402
from sop_jax.parallel.mesh import make_mesh  # noqa: E402
from sop_jax.parallel.search import PRECISIONS, nearest  # noqa: E402
from sop_jax.training import checkpoint  # noqa: E402
from sop_jax.training.assemble import assemble  # noqa: E402

MESH = make_mesh(1)
TF32 = "TF32, emulated"


def recall(rows: jax.Array, anchors: int, k: int) -> dict[str, float]:
    """Returns the share of the float32 neighbours that each precision finds."""
    own = jnp.arange(anchors)
    found = {
        name: np.asarray(nearest(rows[:anchors], rows, k, MESH, own=own, precision=name)[1])
        for name in PRECISIONS
    }
    rounded = jax.lax.reduce_precision(rows, exponent_bits=8, mantissa_bits=10)
    found[TF32] = np.asarray(nearest(rounded[:anchors], rounded, k, MESH, own=own)[1])
    exact = found["float32"]
    return {
        name: float(np.mean([len(np.intersect1d(a, b)) for a, b in zip(exact, other, strict=True)]))
        / k
        for name, other in found.items()
    }


def trained_memory(workdir: Path) -> jax.Array:
    """Returns the rows of the [CLS] memory in a run's newest checkpoint."""
    config = config_lib.read_config(workdir)
    abstract = assemble(config, MESH, images=config.batch_size).abstract.carried
    memory = checkpoint.restore_part(workdir, abstract, "carried")["cls"]
    return flat_rows(memory)


def main() -> None:
    """Prints a Markdown table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--anchors", type=int, default=4096)
    parser.add_argument("--supports", type=int, default=8)
    args = parser.parse_args()
    random = unit(jax.random.normal(jax.random.key(0), (args.rows, 256)))
    centres = random[jax.random.randint(jax.random.key(1), (args.rows,), 0, 1000)]
    noise = jax.random.normal(jax.random.key(2), random.shape) / 16
    banks = {
        "random": random,
        "clusters of 0.3": unit(centres + 0.3 * noise),
        "clusters of 0.05": unit(centres + 0.05 * noise),
    }
    if args.workdir:
        banks[f"memory of {args.workdir.name}"] = trained_memory(args.workdir)
    results = {
        name: recall(rows, min(args.anchors, len(rows) // 2), args.supports)
        for name, rows in banks.items()
    }
    precisions = [*PRECISIONS, TF32]
    print(f"| rows, on {jax.devices()[0].device_kind} | {' | '.join(precisions)} |")
    print("|---" * (1 + len(precisions)) + "|")
    for name, by_precision in results.items():
        cells = " | ".join(f"{share:.4f}" for share in by_precision.values())
        print(f"| {name}, {len(banks[name])} x {banks[name].shape[1]} | {cells} |")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
