"""Priors over prototypes: divergences, power laws, and what a prior may be."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sop_jax.errors import UserError
from sop_jax.objectives.prototypical.priors import (
    check_prior,
    mean_to_prior,
    memax,
    power_law,
    prior_to_mean,
)

PRIOR = jnp.asarray(power_law(6, 0.25), jnp.float32)


def test_memax_is_between_zero_and_ln_k() -> None:
    np.testing.assert_allclose(memax(jnp.full(8, 1 / 8)), 0, atol=1e-6)
    np.testing.assert_allclose(memax(jnp.eye(8)[3]), np.log(8), rtol=1e-6)


@pytest.mark.parametrize("divergence", [mean_to_prior, prior_to_mean])
def test_only_the_prior_itself_is_at_zero(divergence: Callable[..., jax.Array]) -> None:
    np.testing.assert_allclose(divergence(PRIOR, PRIOR), 0, atol=1e-6)
    assert divergence(PRIOR[::-1], PRIOR) > 0.01
    assert divergence(jnp.full(6, 1 / 6), PRIOR) > 0.005


def test_the_two_directions_differ() -> None:
    mean = jnp.asarray([0.7, 0.1, 0.05, 0.05, 0.05, 0.05])
    assert abs(mean_to_prior(mean, PRIOR) - prior_to_mean(mean, PRIOR)) > 0.02


@pytest.mark.parametrize("divergence", [lambda mean, _: memax(mean), mean_to_prior, prior_to_mean])
def test_gradients_are_finite_where_a_prototype_is_never_chosen(
    divergence: Callable[..., jax.Array],
) -> None:
    logits = jnp.zeros((4, 6)).at[:, 0].set(1e4)

    def loss(logits: jax.Array) -> jax.Array:
        return divergence(jax.nn.softmax(logits).mean(0), PRIOR)

    value, gradient = jax.value_and_grad(loss)(logits)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()


def test_power_laws_sum_to_one() -> None:
    for exponent in (0.0, 0.25, 1.0):
        shares = power_law(8142, exponent)
        np.testing.assert_allclose(shares.sum(), 1)
        np.testing.assert_allclose(shares[0] / shares[99], 100**exponent)
        check_prior(shares, 8142, "pmsn.prior")


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ([0.5, 0.5], "pmsn.prior has 2 entries; expected one for each of the 3 prototypes"),
        ([0.5, 0.25, 0.2], "pmsn.prior sums to 0.95; expected 1; divide its entries by their sum"),
        ([0.75, 0.5, -0.25], "entry 2 of pmsn.prior is -0.25; expected a share greater than 0"),
        ([0.0, 0.5, 0.5], "entry 0 of pmsn.prior is 0; expected a share greater than 0"),
        ([float("nan"), 0.5, 0.5], "entry 0 of pmsn.prior is nan"),
        ([float("inf"), 0.5, 0.5], "pmsn.prior sums to inf"),
    ],
)
def test_what_is_no_distribution_is_an_error(prior: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_prior(np.array(prior), 3, "pmsn.prior")
