"""The GELU of the networks, against JAX's exact one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sop_jax.models.gelu import gelu


@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
def test_values_and_slopes_are_those_of_the_exact_gelu(dtype: Any, limit: float) -> None:
    """In bfloat16 it is nearer to the truth than JAX's, which rounds in between."""
    x = jnp.linspace(-9, 9, 2001).astype(dtype)

    def both(function: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, pull = jax.vjp(function, x)
        return value, pull(jnp.ones_like(value))[0]

    plain = both(lambda x: jax.nn.gelu(x, approximate=False), x.astype(jnp.float32))
    for found, expected in zip(both(gelu, x), plain, strict=True):
        assert found.dtype == dtype
        scale = np.maximum(1, np.abs(expected))
        assert np.max(np.abs(found.astype(jnp.float32) - expected) / scale) < limit


def test_float64_stays_float64() -> None:
    with jax.enable_x64(True):
        x = jnp.linspace(-9.0, 9.0, 2001)
        expected = jax.nn.gelu(x, approximate=False)
        np.testing.assert_allclose(gelu(x), expected, atol=1e-14)
