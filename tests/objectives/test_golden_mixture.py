"""The mixture of decoupled prototypes gives the numbers of its formulas."""

from typing import Any

import golden_numbers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_numbers import Found, differences, unnoticed

from sop_jax.objectives.prototypical import mixture

pytestmark = pytest.mark.medium

TOLERANCE = 1e-5

# The section of each way to forget, and its setting.
RUNS = {"mass": "mass", "annealed": "mass", "plain": "plain"}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return golden_numbers.load("family.npz")


def single(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def start(golden: dict[str, np.ndarray]) -> mixture.Mixture:
    mass, variance = (float(golden[f"gmm/{name}_start"]) for name in ("mass", "var"))
    return mixture.init_mixture(single(golden["gmm/mu_start"]), mass, variance)


def online(golden: dict[str, np.ndarray], run: str) -> dict[str, jax.Array]:
    """Computes the arrays of every batch of a run, by name."""
    eta, beta = (float(golden[f"gmm/{run}/{name}"]) for name in ("eta", "beta"))
    floor = float(golden["gmm/var_floor"])
    found, current = {}, start(golden)
    for i, h in enumerate(single(golden["gmm/h"])):
        parts = mixture.components(current, floor)
        r = mixture.responsibilities(h, parts, beta)
        current = mixture.update(current, h, beta, eta, floor, RUNS[run])
        parts = mixture.components(current, floor)
        numbers = {
            "responsibilities": r,
            "mass": current.mass,
            "sum": current.total,
            "square": current.square,
            "weights": jnp.exp(parts.log_weights),
            "means": parts.means,
            "variances": parts.variances,
            "prototypes": mixture.prototypes(current),
        }
        found |= {f"gmm/{run}/{name}_{i}": array for name, array in numbers.items()}
    return found


def batch(golden: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Computes one step of batch EM, which is an online step from no mass that forgets nothing."""
    h, means = single(golden["gmm/h"])[0], single(golden["gmm/mu_start"])[:-1]
    first = mixture.components(mixture.init_mixture(means, 1.0, 0.05), 0.0)
    r = mixture.responsibilities(h, first, 1.0)
    empty = mixture.init_mixture(jnp.zeros_like(means), 0.0, 0.0)
    parts = mixture.components(mixture.accumulate(empty, h, r, 0.0), 0.0)
    return {
        "gmm/batch/weights": jnp.exp(parts.log_weights),
        "gmm/batch/means": parts.means,
        "gmm/batch/variances": parts.variances,
        "gmm/batch/loglik": jax.nn.logsumexp(mixture.log_joint(h, first), axis=-1).mean(),
    }


@pytest.fixture(scope="module")
def numbers(golden: dict[str, np.ndarray]) -> dict[str, Found]:
    found = batch(golden)
    for run in RUNS:
        found |= online(golden, run)
    return {name: Found(array, TOLERANCE) for name, array in found.items()}


def test_every_number(golden: dict[str, np.ndarray], numbers: dict[str, Found]) -> None:
    inputs = {f"gmm/{name}" for name in ("h", "mu_start", "var_start", "mass_start", "var_floor")}
    inputs |= {f"gmm/{run}/{name}" for run in RUNS for name in ("eta", "beta")}
    assert {name for name in golden if name.startswith("gmm/")} - inputs == numbers.keys()
    assert differences(golden, numbers) == []


def test_any_changed_number_fails(golden: dict[str, np.ndarray], numbers: dict[str, Found]) -> None:
    assert unnoticed(golden, numbers) == []


@pytest.mark.parametrize("run", ["mass", "annealed"])
def test_a_component_without_features_keeps_its_bits(
    golden: dict[str, np.ndarray], run: str
) -> None:
    before = start(golden)
    after, mean = before, mixture.components(before, 0.0).means[-1]
    eta, beta = (float(golden[f"gmm/{run}/{name}"]) for name in ("eta", "beta"))
    for h in single(golden["gmm/h"]):
        after = mixture.update(after, h, beta, eta, 0.02)
    assert after.mass[-1] == before.mass[-1]
    np.testing.assert_array_equal(mixture.components(after, 0.0).means[-1], mean)
