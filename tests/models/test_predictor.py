"""The predictor: what each query depends on, and what it does not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sop_jax.errors import UserError
from sop_jax.models.layers import Start
from sop_jax.models.predictor import predictor, rotate

pytestmark = pytest.mark.medium

BATCH, TOKENS, QUERIES, WIDTH, DEPTH = 3, 5, 4, 16, 2


def inputs(queries: int = QUERIES) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns a context, its places, and the places of the queries."""
    keys = jax.random.split(jax.random.key(0), 3)
    context = jax.random.normal(keys[0], (BATCH, TOKENS, WIDTH))
    tokens = jax.random.uniform(keys[1], (BATCH, TOKENS, 2))
    return context, tokens, jax.random.uniform(keys[2], (BATCH, queries, 2))


def build(dtype: Any = jnp.float32, drop_rate: float = 0.0, **options: Any) -> tuple:
    start = Start(jnp.dtype(dtype), std=0.3, precision=jax.lax.Precision.HIGHEST)
    found = predictor(WIDTH, 2, DEPTH, drop_rate, start, **options)
    return found, found.init(jax.random.key(1))


def test_a_query_depends_on_its_place_and_on_no_other_query() -> None:
    found, params = build()
    context, tokens, places = inputs()
    expected = found.predict(params, context, tokens, places)
    assert expected.shape == (BATCH, QUERIES, WIDTH)
    moved = found.predict(params, context, tokens, places.at[:, 0].add(0.25))
    assert np.abs(np.asarray(moved - expected)[:, 0]).min(axis=-1).max() > 1e-3
    np.testing.assert_allclose(moved[:, 1:], expected[:, 1:], atol=1e-5)


def test_the_order_of_the_context_does_not_matter_but_its_places_do() -> None:
    found, params = build()
    context, tokens, places = inputs()
    expected = found.predict(params, context, tokens, places)
    reverse = found.predict(params, context[:, ::-1], tokens[:, ::-1], places)
    np.testing.assert_allclose(reverse, expected, atol=1e-5)
    swapped = found.predict(params, context, tokens[:, ::-1], places)
    assert np.abs(np.asarray(swapped - expected)).max() > 1e-2


def test_only_offsets_between_places_matter() -> None:
    found, params = build()
    context, tokens, places = inputs()
    expected = found.predict(params, context, tokens, places)
    shifted = found.predict(params, context, tokens + 0.3, places + 0.3)
    np.testing.assert_allclose(shifted, expected, atol=1e-4)


def test_rotations_keep_lengths() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 3, 1, 8))
    places = jax.random.uniform(jax.random.key(1), (2, 3, 2))
    turned = rotate(x, places)
    norms = np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), norms, rtol=1e-5)
    np.testing.assert_array_equal(rotate(x, jnp.zeros_like(places)), x)


def test_dropped_branches_leave_the_mask_token() -> None:
    found, params = build(drop_rate=0.5)
    context, tokens, places = inputs()
    draws = jnp.zeros((BATCH, DEPTH, 2)).at[0].set(0.9)  # only the first sample keeps its branches
    out = np.asarray(found.predict(params, context, tokens, places, draws))
    assert np.abs(out[0] - out[0, :1]).max() > 1e-2
    np.testing.assert_array_equal(out[1], out[2])
    np.testing.assert_array_equal(out[1], np.broadcast_to(out[1, :1], out[1].shape))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_reach_every_parameter_and_the_context(remat: str) -> None:
    found, params = build(remat=remat)
    context, tokens, places = inputs()

    def total(params: Any, context: jax.Array) -> jax.Array:
        return (found.predict(params, context, tokens, places)[..., 0] ** 2).sum()

    by_params, by_context = jax.grad(total, argnums=(0, 1))(params, context)
    for path, leaf in jax.tree.leaves_with_path(by_params):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-6, jax.tree_util.keystr(path)
    assert (np.abs(by_context).max(axis=(1, 2)) > 1e-6).all()


def test_it_computes_in_bfloat16() -> None:
    context, tokens, places = inputs()
    (found, params), (rounded, _) = build(), build(jnp.bfloat16)
    expected = found.predict(params, context, tokens, places)
    out = rounded.predict(params, context, tokens, places)
    assert out.dtype == jnp.float32
    assert np.abs(np.asarray(out - expected)).max() < 0.2


def test_heads_need_channels_for_rows_and_columns() -> None:
    with pytest.raises(UserError, match=r"3 channels per head; expected a multiple of 4"):
        predictor(6, 2, 1, 0.0, Start(jnp.dtype("float32")))
