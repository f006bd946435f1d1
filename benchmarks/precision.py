"""Compares the train step of a device and dtype with that in float32 on the CPU.

    python benchmarks/precision.py [--dtype=bfloat16] [--config.KEY=VALUE ...]

Takes one step from the same state on the same batch twice: with full float32 products on the CPU,
and on the first device as in training. Prints the relative distances of the losses, the gradients
and the new rows of the memories: the norm of the difference over the norm on the CPU. The last line
is JSON. The exit code is 1 if a distance is not finite or above `--limit`.
"""

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from step import ARCHS, METHODS, random_batch, settings  # noqa: E402

from sop_jax.parallel.mesh import make_mesh, put, replicated, to_devices  # noqa: E402
from sop_jax.training.assemble import assemble  # noqa: E402
from sop_jax.training.step import make_train_step  # noqa: E402


def keep_gradients() -> optax.GradientTransformation:
    """Returns an optimizer that leaves parameters unchanged and stores gradients in its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradients, state, params=None: (jax.tree.map(jnp.zeros_like, gradients), gradients),
    )


def step(config: ml_collections.ConfigDict, device: jax.Device, start: Any) -> dict[str, Any]:
    """Returns the results of one step on a device.

    `start` is the state of another device to start from; None for a new state.
    """
    run = assemble(config, make_mesh(1, 1, [device]), config.batch_size)
    tx = keep_gradients()
    train_step = jax.jit(make_train_step(run.model, run.objective, tx, run.schedules))
    state = run.init(jax.random.key(0))
    state = state._replace(opt_state=tx.init(state.student))
    names = ("student", "teacher", "carried")
    if start is not None:
        lay = functools.partial(jax.tree.map, lambda a, b: jax.device_put(a, b.sharding))
        state = state._replace(**{name: lay(start[name], getattr(state, name)) for name in names})
    first = {name: jax.device_get(getattr(state, name)) for name in names}
    batch = to_devices(run.mesh, random_batch(config, run))
    state, metrics = train_step(state, batch, put(np.array(False), replicated(run.mesh)))
    found = {
        "losses": {name: metrics[name] for name in ("cls", "mim")},
        "gradients": state.opt_state,
        "memories": {name: memory.rows[:, 0] for name, memory in state.carried.items()},
    }
    return jax.device_get(found) | {"start": first}


def distance(one: Any, other: Any) -> float:
    """Returns the norm of the difference of two trees of arrays over the norm of the first."""
    a, b = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)
        for tree in (one, other)
    )
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def main() -> None:
    """Prints the distances as a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="vit_tiny", choices=ARCHS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--method", default="paper", choices=METHODS)
    parser.add_argument("--local-crops", type=int, default=4)
    parser.add_argument("--limit", type=float, default=0.05)
    args, changes = parser.parse_known_args()
    config = settings(args, changes)
    device = jax.devices()[0]
    expected = step(in_float32(config), jax.devices("cpu")[0], None)
    found = step(config, device, expected["start"])
    result = {
        name: distance(expected[name], found[name]) for name in ("losses", "gradients", "memories")
    }
    result |= {"dtype": args.dtype, "device": device.device_kind, "arch": args.arch}
    print(json.dumps(result))
    sys.exit(not all(result[name] <= args.limit for name in ("losses", "gradients", "memories")))


def in_float32(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns the same config with float32 everywhere."""
    plain = config.copy_and_resolve_references()
    plain.model.dtype, plain.model.attention = "float32", "xla"
    plain.sop.search_precision = "float32"
    return plain


if __name__ == "__main__":
    main()
