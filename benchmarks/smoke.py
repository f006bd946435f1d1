"""Checks in seconds that a device can train: a tiny step, and cuDNN's attention against float32.

    python benchmarks/smoke.py

Attention has the tokens of a ViT/16's global and local views, 197 and 37, padded as in training.
The relative distances of its results and gradients to those of XLA in float32 are printed: the norm
of the difference over the norm. Where cuDNN does not work, XLA's attention in bfloat16 is compared.
The last line is JSON. The exit code is 1 if a number is not finite or a distance above `--limit`.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from step import random_batch  # noqa: E402

from sop_jax.config import paper  # noqa: E402
from sop_jax.models.attention import Implementation, attend, padded_length, refuses  # noqa: E402
from sop_jax.parallel.mesh import make_mesh, put, replicated, to_devices  # noqa: E402
from sop_jax.training.assemble import assemble  # noqa: E402

TOKENS = (197, 37)


def distances(implementation: Implementation, tokens: int) -> dict[str, float]:
    """Returns the distances of attention in bfloat16 to that of XLA in float32."""
    length = padded_length(tokens, implementation)
    shape = (4, 2, length, 3, 64)
    q, k, v, weights = jax.random.normal(jax.random.key(0), shape).astype(jnp.bfloat16)
    weights = weights.at[:, tokens:].set(0)

    def both(implementation: Implementation, dtype: jnp.dtype) -> tuple[Array, ...]:
        def loss(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
            mixed = attend(q, k, v, implementation=implementation, length=tokens)
            return (mixed * weights.astype(dtype)).astype(jnp.float32).sum(), mixed

        given = (x.astype(dtype) for x in (q, k, v))
        gradients, mixed = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*given)
        return mixed, *gradients

    found = {}
    with jax.default_matmul_precision("float32"):
        exact = both("xla", jnp.float32)
    names, half = ("mixed", "q", "k", "v"), both(implementation, jnp.bfloat16)
    for name, *pair in zip(names, half, exact, strict=True):
        one, other = (np.asarray(x, np.float32)[:, :tokens] for x in pair)
        found[name] = float(np.linalg.norm(one - other) / np.linalg.norm(other))
    return found


def tiny_step() -> float:
    """Returns the loss of a step of a tiny network."""
    config = paper()
    config.batch_size = 2
    config.augment.update(global_size=32, local_size=16, local_crops=1)
    config.model.update(size="custom", width=64, depth=1, heads=1, patch=8)
    config.head.update(hidden=16, dim=8)
    config.sop.cls.update(memory=64, anchors=16)
    config.sop.patch.update(memory=32, anchors=8)
    run = assemble(config, make_mesh(1, 1, jax.devices()[:1]), config.batch_size)
    batch = to_devices(run.mesh, random_batch(config, run))
    state = run.init(jax.random.key(0))
    _, metrics = run.train_step(state, batch, put(np.array(False), replicated(run.mesh)))
    return float(metrics["loss"])


def main() -> None:
    """Prints what was found, with a JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=2e-2)
    limit = parser.parse_args().limit
    device, began = jax.devices()[0], time.perf_counter()
    refusal = refuses("bfloat16", 64, device, TOKENS)
    implementation: Implementation = "cudnn" if refusal is None else "xla"
    apart = {str(tokens): distances(implementation, tokens) for tokens in TOKENS}
    loss = tiny_step()
    found = {
        "device": f"{jax.device_count()} x {device.device_kind}",
        "jax": jax.__version__,
        "attention": implementation,
        "refusal": refusal,
        "distances": apart,
        "loss": loss,
        "wall_s": round(time.perf_counter() - began, 2),
    }
    print(json.dumps(found))
    largest = max(max(each.values()) for each in apart.values())
    if not (largest <= limit and math.isfinite(loss)):
        sys.exit(f"error: a distance of {largest:.3g} is above {limit}, or the loss not finite")


if __name__ == "__main__":
    main()
