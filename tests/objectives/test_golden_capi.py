"""CAPI's online clustering and its student's loss, beside the numbers of the authors' code."""

import golden_numbers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_numbers import Found

from sop_jax.objectives.capi.clustering import (
    Balance,
    assign,
    balance,
    cluster_logits,
    clustering_loss,
    clustering_optimizer,
)
from sop_jax.objectives.losses import cross_entropy

pytestmark = pytest.mark.medium

TARGET, PREDICTION = 0.06, 0.12  # temperatures
LR = 5e-4
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    arrays = golden_numbers.load("family.npz")
    return {key: array for key, array in arrays.items() if key.startswith("capi/")}


@pytest.fixture(scope="module")
def numbers(golden: dict[str, np.ndarray]) -> dict[str, Found]:
    """Computes the expected arrays by name; [positions, samples, features] are the inputs."""
    x = jnp.asarray(golden["capi/x"], jnp.float32)
    clustering = {
        "kernel": jnp.asarray(golden["capi/weight"].T, jnp.float32),
        "bias": jnp.asarray(golden["capi/bias"], jnp.float32),
    }
    computed: dict[str, jax.Array] = {}
    for name, rows in (("positionwise", x), ("pooled", x.reshape(1, -1, x.shape[-1]))):
        scores = cluster_logits(clustering, rows) / TARGET
        balanced = jax.vmap(balance)(scores)
        assigned = jax.vmap(assign)(scores, balanced)
        computed[f"assignments_{name}"] = assigned.reshape(*x.shape[:2], -1)

        def loss(clustering: dict[str, jax.Array], rows=rows, balanced=balanced) -> jax.Array:
            def position(x: jax.Array, balanced: Balance) -> jax.Array:
                return clustering_loss(clustering, x, balanced, TARGET, PREDICTION)

            return jax.vmap(position)(rows, balanced).mean()

        computed[f"loss_{name}"], gradient = jax.value_and_grad(loss)(clustering)
        computed[f"grad_weight_{name}"] = gradient["kernel"].T
        computed[f"grad_bias_{name}"] = gradient["bias"]
        if name == "positionwise":
            tx = clustering_optimizer(LR)
            updates, _ = tx.update(gradient, tx.init(clustering), clustering)
            after = optax.apply_updates(clustering, updates)
            computed["weight_after"], computed["bias_after"] = after["kernel"].T, after["bias"]

    targets = jnp.asarray(golden["capi/student_targets"], jnp.float32)

    def student(logits: jax.Array) -> jax.Array:
        return cross_entropy(targets, jax.nn.log_softmax(logits / PREDICTION)).mean()

    logits = jnp.asarray(golden["capi/student_logits"], jnp.float32)
    computed["student_loss"], computed["student_grad"] = jax.value_and_grad(student)(logits)
    return {f"capi/{name}": Found(array, TOLERANCE) for name, array in computed.items()}


def test_every_number(golden: dict[str, np.ndarray], numbers: dict[str, Found]) -> None:
    assert golden_numbers.differences(golden, numbers) == []
    inputs = ("x", "weight", "bias", "student_logits", "student_targets")
    assert golden.keys() - numbers.keys() == {f"capi/{name}" for name in inputs}


def test_any_changed_number_fails(golden: dict[str, np.ndarray], numbers: dict[str, Found]) -> None:
    assert golden_numbers.unnoticed(golden, numbers) == []
