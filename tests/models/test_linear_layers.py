"""Linear layers: the parts of their outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sop_jax.models.layers import Start, dense


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_are_the_outputs_in_order_with_their_gradients(dtype: str) -> None:
    layer = dense(8, 12, Start(jnp.dtype(dtype), std=0.5), nnx.Rngs(0))
    layer.bias[...] = jax.random.normal(jax.random.key(1), (12,))
    graph, params = nnx.split(layer)
    x = jax.random.normal(jax.random.key(2), (2, 5, 8))
    weights = jnp.cos(jnp.arange(12.0))

    def outputs(split: bool, params: nnx.State, x: jax.Array) -> jax.Array:
        layer = nnx.merge(graph, params)
        return jnp.concatenate(layer.parts(x, 3), axis=-1) if split else layer(x)

    def loss(params: nnx.State, x: jax.Array, split: bool) -> jax.Array:
        return (outputs(split, params, x).astype(jnp.float32) * weights).sum()

    whole, parts = (outputs(split, params, x) for split in (False, True))
    assert parts.dtype == whole.dtype == dtype
    np.testing.assert_allclose(parts, whole, rtol=1e-6, atol=1e-6)
    expected, found = (jax.grad(loss, (0, 1))(params, x, split) for split in (False, True))
    tolerance = 1e-5 if dtype == "float32" else 2e-2  # dx is a sum of three rounded products
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        found,
        expected,
    )
