"""Heads with weight-normed prototypes give the outputs and gradients of DINO's and iBOT's heads."""

from typing import Any

import golden_numbers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_numbers import Found, differences, unnoticed

from sop_jax.config import paper
from sop_jax.models.head import Head
from sop_jax.models.layers import Start
from sop_jax.objectives.prototypical.layers import logits

pytestmark = pytest.mark.medium

TOLERANCE = 1e-5
FAMILY = golden_numbers.load("family.npz")
MLP = {"fc1": "mlp.0", "fc2": "mlp.2", "fc3": "mlp.4"}


def single(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def from_pytorch(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns the parameters of the head, and those of its prototypes by their golden names."""
    layers = {
        ours: {"kernel": single(arrays[f"{name}.weight"]).T, "bias": single(arrays[f"{name}.bias"])}
        for ours, name in MLP.items()
    }
    prototypes = {
        name: {
            "direction": single(arrays[f"{name}.weight_v"]),
            "length": single(arrays[f"{name}.weight_g"])[:, 0],
        }
        for name in ("last_layer", "last_layer2")
        if f"{name}.weight_v" in arrays
    }
    return {"head": layers, "prototypes": prototypes}


def to_pytorch(params: dict[str, Any]) -> dict[str, jax.Array]:
    """Returns what `from_pytorch` reads."""
    arrays = {}
    for ours, name in MLP.items():
        arrays[f"{name}.weight"] = params["head"][ours]["kernel"].T
        arrays[f"{name}.bias"] = params["head"][ours]["bias"]
    for name, layer in params["prototypes"].items():
        arrays[f"{name}.weight_v"] = layer["direction"]
        arrays[f"{name}.weight_g"] = layer["length"][:, None]
    return arrays


def section(name: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a golden section by their names in it."""
    before = f"{name}/"
    return {key.removeprefix(before): x for key, x in FAMILY.items() if key.startswith(before)}


@pytest.mark.parametrize("name", ["dino/head", "ibot/head_shared", "ibot/head_separate"])
def test_outputs_and_gradients_are_those_of_the_authors_head(name: str) -> None:
    """iBOT's heads have a first token for [CLS], and the others go through `last_layer2`, if any.

    Without it, [CLS] and patches share the prototypes.
    """
    given = section(name)
    weights = {k.removeprefix("weights/"): x for k, x in given.items() if k.startswith("weights/")}
    params, x = from_pytorch(weights), single(given["x"])
    config = paper().head
    config.hidden, config.dim = weights["mlp.2.weight"].shape[0], weights["mlp.4.weight"].shape[0]
    start = Start(jnp.dtype("float32"), precision=jax.lax.Precision.HIGHEST)
    graph, state = nnx.split(Head(x.shape[-1], config, start, nnx.Rngs(0)))

    def outputs(params: dict[str, Any]) -> list[jax.Array]:
        own = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(own, params["head"])
        u, _ = nnx.merge(graph, own)(x, training=True)
        of_cls = params["prototypes"]["last_layer"]
        of_patches = params["prototypes"].get("last_layer2", of_cls)
        tokens = [(of_cls, u)] if u.ndim == 2 else [(of_cls, u[:, 0]), (of_patches, u[:, 1:])]
        return [logits("weight_norm", layer, some, 1.0) for layer, some in tokens]

    found, pull = jax.vjp(outputs, params)
    (gradients,) = pull([single(given[f"cotangent_{i}"]) for i in range(len(found))])
    numbers = {f"out_{i}": out for i, out in enumerate(found)}
    numbers |= {f"grads/{key}": value for key, value in to_pytorch(gradients).items()}
    inputs = ("weights/", "x", "cotangent_")
    assert set(numbers) == {key for key in given if not key.startswith(inputs)}
    judged = {key: Found(value, TOLERANCE) for key, value in numbers.items()}
    assert differences(given, judged) == []
    assert unnoticed(given, judged) == []
