"""The vMF densities: normalized, right where scipy can tell, and finite for every prototype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import gammaln, ive

from sop_jax.objectives.prototypical.vmf import log_c, vmf_logits

KAPPA = np.array([0.0, 0.1, 1.0, 5.0, 30.0, 100.0, 1000.0])


@pytest.mark.parametrize("p", [64, 256])
def test_densities_integrate_to_one(p: int) -> None:
    cosine = np.linspace(-1, 1, 200_001)
    area = np.log(2) + (p - 1) / 2 * np.log(np.pi) - gammaln((p - 1) / 2)  # of a unit sphere
    with np.errstate(divide="ignore"):
        ring = area + (p - 3) / 2 * np.log1p(-(cosine**2))
    for kappa, normalizer in zip(KAPPA, log_c(jnp.asarray(KAPPA, jnp.float32), p), strict=True):
        density = np.exp(np.float64(normalizer) + kappa * cosine + ring)
        np.testing.assert_allclose(np.trapezoid(density, cosine), 1, rtol=2e-3)


@pytest.mark.parametrize("p", [16, 64])
def test_value_and_slope_are_those_of_the_bessel_functions(p: int) -> None:
    order, kappa = p / 2 - 1, KAPPA[1:]
    log_bessel = np.log(ive(order, kappa)) + kappa
    expected = order * np.log(kappa) - p / 2 * np.log(2 * np.pi) - log_bessel
    values, slopes = jax.vmap(jax.value_and_grad(lambda k: log_c(k, p)))(
        jnp.asarray(kappa, jnp.float32)
    )
    np.testing.assert_allclose(values, expected, atol=1e-3)
    np.testing.assert_allclose(-slopes, ive(order + 1, kappa) / ive(order, kappa), atol=1e-3)


def test_slope_at_zero_is_zero() -> None:
    value, slope = jax.value_and_grad(lambda kappa: log_c(kappa, 64))(jnp.zeros(()))
    assert jnp.isfinite(value)
    assert slope == 0


def test_too_few_dimensions_are_an_error() -> None:
    with pytest.raises(ValueError, match="p is 2; expected 3 or more"):
        log_c(jnp.ones(3), 2)


@pytest.mark.parametrize("length", [0.0, 1e-20, 1.0, 1e4])
def test_gradients_are_finite_for_prototypes_of_any_length(length: float) -> None:
    y = jnp.eye(2, 16)
    weight = jnp.eye(4, 16).at[1].multiply(length)

    def loss(weight: jax.Array) -> jax.Array:
        return -jax.nn.log_softmax(vmf_logits(y, weight, 0.04))[:, 0].sum()

    value, gradient = jax.value_and_grad(loss)(weight)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()


def test_prototypes_of_equal_length_are_compared_by_their_cosine() -> None:
    y, weight = (jax.random.normal(jax.random.key(i), (5, 16)) for i in (0, 1))
    weight /= jnp.linalg.norm(weight, axis=-1, keepdims=True)
    p = jax.nn.softmax(vmf_logits(y, weight, 0.1))
    np.testing.assert_allclose(p, jax.nn.softmax(y @ weight.T / 0.1), rtol=1e-3, atol=1e-6)


def test_a_long_prototype_is_narrow() -> None:
    weight = jnp.stack([10 * jnp.eye(16)[0], jnp.eye(16)[0]])
    near, far = jnp.eye(16)[0], (jnp.eye(16)[0] + jnp.eye(16)[1]) / jnp.sqrt(2)
    logits = vmf_logits(jnp.stack([near, far]), weight, 0.1)
    assert logits[0].argmax() == 0
    assert logits[1].argmax() == 1  # by the products alone, the long one would win here too
