"""Soft assignment equals softmax(u Dᵀ / τ) Y without building Y, and stays finite."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from sop_jax.models.head import unit
from sop_jax.objectives.losses import cls_loss
from sop_jax.objectives.sop.assignment import log_assignment
from sop_jax.objectives.sop.prototypes import VOTES, SOPs, cast_votes

assign = jax.jit(log_assignment)


def random_units(seed: int, *shape: int) -> jax.Array:
    return unit(jax.random.normal(jax.random.key(seed), shape))


def random_sops(votes: str, count: int = 8, size: int = 3, dim: int = 6) -> SOPs:
    """Returns SOPs with supports far from their anchors, so that some cosines are negative."""
    embeddings = random_units(0, size, count, dim)
    return SOPs(embeddings, cast_votes(embeddings, votes, 0.1))


def dense(u: Any, sops: SOPs, temperature: float) -> np.ndarray:
    """Computes the definition, with the whole of Y, in float64."""
    size, count = sops.votes.shape
    votes = np.asarray(sops.votes, float)
    labels = np.repeat((1 - votes).reshape(-1, 1) / (count - 1), count, axis=1)
    labels[np.arange(count * size), np.tile(np.arange(count), size)] = votes.ravel()
    logits = np.asarray(u, float) @ np.asarray(sops.embeddings, float).reshape(count * size, -1).T
    weights = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
    return weights / weights.sum(-1, keepdims=True) @ labels


@pytest.mark.parametrize("votes", VOTES)
@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
def test_equals_the_definition(votes: str, temperature: float) -> None:
    sops, u = random_sops(votes), random_units(1, 5, 4, 6)
    if votes.endswith("similarity"):
        assert (sops.votes == 0).any()  # negative cosines are clipped
    p = np.exp(np.asarray(assign(u, sops, temperature), float))
    np.testing.assert_allclose(p, dense(u, sops, temperature), atol=5e-6)
    np.testing.assert_allclose(p.sum(-1), 1, atol=5e-6)


def test_log_is_accurate_where_the_probability_is_small() -> None:
    sops, u = random_sops("one_hot"), random_units(1, 20, 6)
    expected = np.log(dense(u, sops, 0.05))
    assert expected.min() < -20
    np.testing.assert_allclose(assign(u, sops, 0.05), expected, atol=2e-5)


U = random_units(1, 5, 6)
SAME = SOPs(jnp.broadcast_to(U[0], (3, 4, 6)), jnp.full((3, 4), 0.9))
EXTREMES = {
    "long": (1e4 * U, random_sops("similarity"), 0.1),
    "long and one-hot": (1e4 * U, random_sops("one_hot"), 0.1),
    "very long": (1e15 * U, random_sops("pure_similarity"), 0.01),
    "cold": (U, random_sops("pure_similarity"), 0.01),
    "colder": (U, random_sops("similarity"), 1e-4),
    "hot": (U, random_sops("similarity"), 1e4),
    "prototypes all alike": (U, SAME, 0.01),
    "everything alike": (jnp.broadcast_to(U[0], U.shape), SAME, 0.01),
    "on an anchor": (random_sops("similarity").embeddings[0], random_sops("similarity"), 0.01),
    "on a support": (random_sops("similarity").embeddings[2], random_sops("similarity"), 0.01),
    "on a support, one-hot": (
        *(random_sops("one_hot").embeddings[2], random_sops("one_hot")),
        0.01,
    ),
    "two prototypes": (U, random_sops("similarity", count=2), 0.01),
    "two anchors alone": (U, random_sops("pure_similarity", count=2, size=1), 0.01),
    "no direction": (0 * U, random_sops("similarity"), 0.01),
    "half precision": (U.astype(jnp.bfloat16), random_sops("similarity"), 0.01),
}


@pytest.mark.parametrize("case", EXTREMES)
def test_is_finite_for_extreme_inputs_as_are_its_gradients(case: str) -> None:
    u, sops, temperature = EXTREMES[case]
    log_p, gradient = log_p_and_gradient(u, sops, temperature)
    assert log_p.dtype == jnp.float32
    assert np.isfinite(log_p).all()
    assert np.isfinite(gradient.astype(jnp.float32)).all()
    np.testing.assert_allclose(np.exp(np.asarray(log_p, float)).sum(-1), 1, atol=1e-5)


@jax.jit
def log_p_and_gradient(
    u: jax.Array, sops: SOPs, temperature: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """So is the gradient of the cross-entropy with uniform targets, which depends on all log P."""

    def mean(u: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_p = log_assignment(u, sops, temperature)
        return -log_p.mean(), log_p

    gradient, log_p = jax.grad(mean, has_aux=True)(u)
    return log_p, gradient


def test_gradient_is_that_of_the_definition() -> None:
    sops, u = random_sops("similarity"), random_units(1, 4, 6)
    target = random_units(2, 4, 8) ** 2
    gradient = jax.grad(lambda u: (target * log_assignment(u, sops, 0.1)).sum())(u)
    step = 1e-6
    for i, j in [(0, 0), (1, 3), (3, 5)]:
        ends = [np.asarray(u, float) for _ in range(2)]
        ends[0][i, j] -= step
        ends[1][i, j] += step
        low, high = ((np.asarray(target) * np.log(dense(x, sops, 0.1))).sum() for x in ends)
        assert gradient[i, j] == pytest.approx((high - low) / (2 * step), rel=1e-3, abs=1e-4)


def test_computes_in_float32_from_half_precision() -> None:
    sops, u = random_sops("similarity"), U.astype(jnp.bfloat16)
    np.testing.assert_array_equal(assign(u, sops, 0.05), assign(u.astype(jnp.float32), sops, 0.05))


def array_sizes(jaxpr: Any) -> Iterator[int]:
    """Returns the number of elements of every array in a program and its nested programs."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from array_sizes(inner)


def test_labels_are_never_built() -> None:
    count, size, dim = 32, 4, 8
    sops = random_sops("similarity", count, size, dim)
    student, targets = random_units(1, 4, 3, dim), jnp.full((4, 2, count), 1 / count)

    def loss(student: jax.Array) -> jax.Array:
        return cls_loss(student, targets, lambda _, u: log_assignment(u, sops, 0.1))

    program = jax.make_jaxpr(jax.value_and_grad(loss))(student)
    sizes = list(array_sizes(program.jaxpr))
    logits = 4 * count * size
    assert max(sizes) >= logits  # the walk reaches the nested programs
    assert max(sizes) < count * size * count
