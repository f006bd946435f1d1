"""Reports the memory, operations and collectives of a train step on TPU slices of 8 to 1024 chips.

    python benchmarks/scale.py [--table=models|growth|remat] [--out=FILE]

Compiles the step of each recipe for each slice, on a machine that need not have a TPU, and prints
Markdown tables. Each compilation takes a minute or more. FILE stores the results so far, and the
same command continues from there.
"""

import argparse
import functools
import json
import math
import runpy
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import ml_collections

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sop_jax.errors import UserError  # noqa: E402
from sop_jax.plan import GIB, MIB, described_devices, largest_batch, plan, record  # noqa: E402

MODELS = ("s", "b", "l")
# The names of v5p slices count two cores per chip, so that v5p-128 has 64 chips.
SLICES = {"v5e-64": "v5e:8x8", "v5e-256": "v5e:16x16", "v5p-128": "v5p:4x4x4"}
SHARED = (("l", "v5e-64", 8), ("l", "v5e-256", 16))  # the last is the chips that share parameters
GROWTH = ("v5p:2x2x2", "v5p:2x4x4", "v5p:4x4x8", "v5p:8x8x8", "v5p:8x8x16")
GROWTH_BATCH = 1024

Row = dict[str, Any]


def recipe(model: str, fsdp: int = 1) -> ml_collections.ConfigDict:
    """Returns the paper's recipe of a model, with its parameters split over `fsdp` chips."""
    config = runpy.run_path(str(ROOT / f"configs/imagenet_vit{model}16.py"))["get_config"]()
    config.mesh.fsdp = fsdp
    return config


class Store:
    """Rows by key, stored in a file with one row per line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: dict[str, Row] = dict(json.loads(line) for line in lines)

    def get(self, key: str, make: Callable[[], Row]) -> Row:
        """Returns the row of a key, which is made and stored if it is missing."""
        if key not in self.rows:
            print(f"{key} ...", file=sys.stderr, flush=True)
            self.rows[key] = make()
            with self.path.open("a") as file:
                file.write(json.dumps([key, self.rows[key]]) + "\n")
        return self.rows[key]


def planned(config: ml_collections.ConfigDict, topology: str) -> Row:
    """Returns the plan of a config as numbers."""
    return record(plan(config, described_devices(topology)))


def largest(config: ml_collections.ConfigDict, topology: str) -> Row:
    """Returns the largest batch per chip, and whether the sizes of the memories limit it."""
    found = largest_batch(config, described_devices(topology))
    if found is None:
        return {"images": 0, "bound": False}
    unit = found.chips * found.accumulate
    return {
        "images": found.batch_size // found.chips,
        "bound": found.bound is not None and found.batch_size + unit > found.bound[0],
    }


def sent(row: Row, kinds: Iterable[str] = (), where: Iterable[str] = ()) -> float:
    """Returns the MiB of collectives per step and chip, except those of the signs of health.

    `kinds` and `where` select kinds of collectives and scopes; by default all count.
    """
    kinds, where = tuple(kinds), tuple(where)
    return sum(
        (math.nan if c["bytes"] is None else c["bytes"]) / MIB
        for c in row["collectives"]
        if c["where"] != "health"
        and (not kinds or c["kind"] in kinds)
        and (not where or c["where"] in where)
    )


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def models(store: Store) -> None:
    """Prints the memory, and then the operations and collectives, of recipes on some slices."""
    cases = [(model, name, 1) for name in SLICES for model in MODELS] + list(SHARED)
    found = []
    for find in (planned, largest):  # the quicker one first
        rows = []
        for model, name, fsdp in cases:
            topology = SLICES[name]
            key = f"{find.__name__} vit{model}16 {topology} fsdp {fsdp}"
            config = recipe(model, fsdp)
            rows.append(store.get(key, functools.partial(find, config, topology)))
        found.append(rows)
    memory, cost = [], []
    for (model, name, fsdp), row, top in zip(cases, *found, strict=True):
        chips = math.prod(row["mesh"].values())
        title = [f"ViT-{model.upper()}/16", name + f", fsdp {fsdp}" * (fsdp > 1)]
        parts = ("parameters", "optimizer", "carried", "batch", "activations")
        memory.append(
            title
            + [f"{row['batch_size'] // chips}"]
            + [f"{row['memory'].get(part, math.nan) / MIB:.1f}" for part in parts]
            + [f"{row['wanted'] / GIB:.2f}", f"{row['limit'] / GIB:.2f}"]
            + ["yes" if row["fits"] else "no", f"{top['images']}{'*' * top['bound']}"]
        )
        operations = sum(row["flops"].values())
        kinds = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
        cost.append(
            title
            + [f"{row['batch_size']}", f"{operations / 1e12:.1f}"]
            + [f"{1000 * operations / chips / row['rate']:.1f}"]
            + [f"{sent(row, [kind]):.1f}" for kind in kinds]
            + [f"{row['compile_s']:.0f}"]
        )
    print("Memory per chip in MiB; its sum and the chip's limit in GiB\n")
    heads = ["model", "slice", "images per chip", "parameters", "optimizer", "memories", "batch"]
    print(markdown([*heads, "activations", "total", "limit", "fits", "largest"], memory))
    print("Operations in TFLOP and collectives in MiB per chip, of one step\n")
    heads = ["model", "slice", "batch", "operations", "at least, ms", "all-reduce", "all-gather"]
    print(markdown([*heads, "reduce-scatter", "all-to-all", "compiled in s"], cost))


def growth(store: Store) -> None:
    """Prints how the cost of one batch of ViT-S/16 depends on the number of chips."""
    rows = []
    for topology in GROWTH:
        config = recipe("s")
        config.batch_size = GROWTH_BATCH
        key = f"growth vits16 {topology} batch {GROWTH_BATCH}"
        row = store.get(key, functools.partial(planned, config, topology))
        chips = math.prod(row["mesh"].values())
        rows.append(
            [f"{chips}", topology, f"{GROWTH_BATCH // chips}"]
            + [f"{row['flops']['prototypes'] / chips / 1e9:.3f}"]
            + [f"{sent(row, where=['prototypes']):.2f}", f"{sent(row, where=['memories']):.2f}"]
            + [f"{sent(row, where=['student', 'teacher']):.1f}", f"{sent(row):.1f}"]
            + [f"{row['memory']['carried'] / MIB:.2f}"]
            + [f"{row['memory']['activations'] / MIB:.0f}", f"{row['wanted'] / GIB:.2f}"]
            + [f"{row['compile_s']:.0f}"]
        )
    print(f"ViT-S/16, a batch of {GROWTH_BATCH}, per chip and step\n")
    heads = ["chips", "slice", "images", "search, GFLOP", "sent by prototypes, MiB"]
    heads += ["by memories", "by student", "total", "memories, MiB", "activations, MiB"]
    print(markdown([*heads, "total, GiB", "compiled in s"], rows))


def remat(store: Store) -> None:
    """Prints the memory and the operations of each kind of rematerialisation."""
    rows = []
    for kind in ("none", "products", "dots", "full"):
        config = recipe("b")
        config.model.remat = kind
        key = f"remat {kind} vitb16 {SLICES['v5e-64']}"
        row = store.get(key, functools.partial(planned, config, SLICES["v5e-64"]))
        operations = sum(row["flops"].values())
        rows.append(
            [kind, f"{row['memory'].get('activations', math.nan) / MIB:.0f}"]
            + [f"{row['wanted'] / GIB:.2f}", f"{operations / 1e12:.1f}"]
        )
    print("ViT-B/16 on v5e-64, 8 images per chip\n")
    print(markdown(["model.remat", "activations, MiB", "total, GiB", "TFLOP per step"], rows))


TABLES = {"models": models, "growth": growth, "remat": remat}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", choices=TABLES, action="append")
    parser.add_argument("--out", type=Path, default=Path("scale.jsonl"))
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    try:
        for name in args.table or TABLES:
            TABLES[name](Store(args.out))
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"JAX {jax.__version__}, compiler libtpu {libtpu_version()}.")


def libtpu_version() -> str:
    """Returns the version of the compiler."""
    from importlib import metadata

    return metadata.version("libtpu")


if __name__ == "__main__":
    main()
