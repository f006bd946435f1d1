"""Linear layers: the parts of their outputs, and gradients that are summed over groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sop_jax.models import linear as linear_lib
from sop_jax.models.layers import Start, dense
from sop_jax.models.linear import group_size, linear, summed


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


def meshes() -> dict[str, jax.sharding.AbstractMesh]:
    names = ("data", "fsdp")
    return {
        "one device": jax.sharding.AbstractMesh((1, 1), names),
        "two": jax.sharding.AbstractMesh((2, 1), names),
        "unknown": jax.sharding.AbstractMesh((), ()),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("devices", meshes())
def test_only_one_device_sums_gradients_over_groups(
    devices: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = jax.random.normal(jax.random.key(0), (6, 5, 8), dtype)
    y = jax.random.normal(jax.random.key(1), (6, 5, 4), dtype)
    kernel, bias = jnp.ones((8, 4)), jnp.ones(4)

    def gradients(x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
        return jax.vjp(linear, x, kernel, bias)[1](y)

    expected = jax.jit(gradients)(x, y)
    monkeypatch.setattr(linear_lib, "ROWS", 12)  # ten of thirty rows are a group
    with jax.sharding.use_abstract_mesh(meshes()[devices]):
        traced = jax.jit(lambda x, y: gradients(x, y)).trace(x, y)
    assert ("scan[" in str(traced.jaxpr)) == (devices == "one device")
    found = traced.lower().compile()(x, y)
    assert found[1].dtype == jnp.float32
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "rows", "size"),
    [(12, 1, 6), (12, 2, 4), (12, 3, 2), (12, 9, 1), (8, 1, None), (4, 2, None), (13, 1, None)],
)
def test_groups_are_as_large_as_divides_the_entries(
    count: int, rows: int, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows need no groups, and thirteen entries would be in groups of one."""
    monkeypatch.setattr(linear_lib, "ROWS", 8)
    assert group_size(count, rows) is None
    with jax.sharding.use_abstract_mesh(meshes()["one device"]):
        assert group_size(count, rows) == size
        assert group_size(0) is None


def test_a_sum_over_groups_has_every_entry_once() -> None:
    x, y = jax.random.normal(jax.random.key(0), (2, 12, 3))
    found = summed(lambda x, y: x.T @ y, x, y, 4)
    np.testing.assert_allclose(found, x.T @ y, rtol=1e-6, atol=1e-6)
