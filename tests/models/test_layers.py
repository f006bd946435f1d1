"""What the layers of all networks share: batch norm and its statistics."""

import jax.numpy as jnp
import numpy as np
import pytest

from sop_jax.models.layers import BatchNorm, Statistics


def normed(x: np.ndarray, training: bool) -> tuple[np.ndarray, Statistics]:
    """Returns the result of a batch norm whose parameters are not the initial ones."""
    layer = BatchNorm(3)
    for name, value in (("scale", 2.0), ("bias", 0.5), ("mean", 1.0), ("var", 4.0)):
        setattr(layer, name, type(getattr(layer, name))(jnp.full(3, value)))
    return layer(jnp.asarray(x), training)


@pytest.mark.medium
def test_batch_norm_takes_its_statistics_from_the_batch_only_in_training() -> None:
    x = np.random.default_rng(0).normal(3, 2, (4, 3, 5, 3)).astype(np.float32)
    out, moved = normed(x, training=True)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(out, 2 * (x - mean) / np.sqrt(var + 1e-5) + 0.5, atol=1e-5)
    np.testing.assert_allclose(moved["mean"], 0.9 * 1 + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(moved["var"], 0.9 * 4 + 0.1 * var * 60 / 59, rtol=1e-5)
    out, still = normed(x, training=False)
    np.testing.assert_allclose(out, 2 * (x - 1) / np.sqrt(4 + 1e-5) + 0.5, atol=1e-5)
    assert still["mean"].tolist() == [1] * 3 and still["var"].tolist() == [4] * 3


@pytest.mark.medium
def test_batch_norm_of_half_precision_is_computed_in_float32() -> None:
    """In bfloat16, sums of so many numbers and squares of such large ones would be inaccurate."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(100, 1, (64, 16, 16, 3)), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    out, moved = normed(x, training=True)
    assert out.dtype == jnp.bfloat16 and moved["mean"].dtype == jnp.float32
    np.testing.assert_allclose(moved["mean"], 0.9 + 0.1 * wide.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(moved["var"], 3.6 + 0.1 * wide.var((0, 1, 2), ddof=1), rtol=1e-5)


@pytest.mark.medium
def test_one_value_a_channel_has_finite_statistics() -> None:
    _, moved = normed(np.ones((1, 1, 1, 3), np.float32), training=True)
    np.testing.assert_allclose(moved["var"], 3.6, rtol=1e-6)


@pytest.mark.medium
@pytest.mark.parametrize("shape", [(60, 3), (4, 15, 3), (2, 2, 3, 5, 3)])
def test_batch_norm_is_over_all_axes_but_the_channels(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(3, 2, (60, 3)).astype(np.float32)
    flat, expected = normed(x, training=True)
    out, moved = normed(x.reshape(shape), training=True)
    np.testing.assert_allclose(out.reshape(60, 3), flat, atol=1e-5)
    np.testing.assert_allclose(moved["var"], expected["var"], rtol=1e-6)
