"""The search, in chunks and at each precision, finds the same as a sort of all scores."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest

from sop_jax.models.head import unit
from sop_jax.parallel.mesh import make_mesh
from sop_jax.parallel.search import nearest, take, top_k

MESHES = {devices: make_mesh(devices) for devices in (1, 2, 8)}


@functools.partial(jax.jit, static_argnames=("devices", "k", "precision", "chunk"))
def search(queries: jax.Array, rows: jax.Array, devices: int = 1, **options: Any) -> Any:
    return nearest(queries, rows, mesh=MESHES[devices], **options)


def reference(
    queries: np.ndarray,
    rows: np.ndarray,
    k: int,
    allowed: np.ndarray | None = None,
    own: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Sorts all scores, in float64."""
    scores = queries.astype(float) @ rows.astype(float).T
    if allowed is not None:
        scores[:, ~allowed] = -np.inf
    if own is not None:
        scores[np.arange(len(queries)), own] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


def small_integers(seed: int, *shape: int) -> np.ndarray:
    """Returns vectors whose inner products are exact at every precision, and often equal."""
    return np.random.default_rng(seed).integers(-1, 2, shape).astype(np.float32)


@pytest.mark.parametrize(("devices", "chunk"), [(1, 1), (1, 3), (1, 10), (1, 64), (2, 5), (8, 4)])
@pytest.mark.parametrize("masks", ["none", "allowed", "own", "both"])
def test_agrees_with_a_sort_on_any_number_of_devices(devices: int, chunk: int, masks: str) -> None:
    """Chunks can have any size, and k is more than the five rows that each of eight devices has."""
    rows, queries = small_integers(0, 40, 6), small_integers(1, 10, 6)
    options = {}
    if masks in ("allowed", "both"):
        options["allowed"] = np.random.default_rng(2).random(40) < 0.5
    if masks in ("own", "both"):
        options["own"] = np.arange(10, dtype=np.int32) * 3
    scores, found = search(
        jnp.asarray(queries),
        jnp.asarray(rows),
        devices=devices,
        k=8,
        chunk=chunk,
        **{name: jnp.asarray(x) for name, x in options.items()},
    )
    expected_scores, expected = reference(queries, rows, 8, **options)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(scores, expected_scores)


@pytest.mark.parametrize("devices", [1, 2])
def test_equal_rows_come_by_index(devices: int) -> None:
    rows = jnp.ones((6, 2))
    _, found = search(jnp.ones((2, 2)), rows, devices, k=4, own=jnp.array([0, 4]))
    assert found.tolist() == [[1, 2, 3, 4], [0, 1, 2, 3]]


@pytest.mark.parametrize("devices", [1, 2])
def test_can_return_every_row(devices: int) -> None:
    rows = small_integers(0, 12, 4)
    _, found = search(jnp.asarray(rows[:3]), jnp.asarray(rows), devices, k=12)
    assert [sorted(row) for row in found.tolist()] == [list(range(12))] * 3


@pytest.mark.parametrize("devices", [1, 8])
def test_takes_rows_from_wherever_they_lie(devices: int) -> None:
    rows = jnp.asarray(small_integers(0, 40, 6))
    indices = jnp.array([[0, 39, 7], [8, 8, 21]])
    found = jax.jit(lambda rows: take(rows, indices, MESHES[devices]))(rows)
    np.testing.assert_array_equal(found, rows[indices])


@functools.cache
def embeddings(kind: str) -> tuple[jax.Array, jax.Array]:
    """Returns queries and rows, uniform on the sphere or in 32 clusters with noise of 0.3."""
    keys = jax.random.split(jax.random.key(0), 3)
    noise = jax.random.normal(keys[0], (2048, 64)) / 8
    if kind == "random":
        rows = unit(noise)
    else:
        centres = unit(jax.random.normal(keys[1], (32, 64)))
        rows = unit(centres[jax.random.randint(keys[2], (2048,), 0, 32)] + 0.3 * noise)
    return rows[:64], rows


@pytest.mark.parametrize(
    ("precision", "kind", "least"),
    [("high", "random", 0.99), ("high", "clusters", 0.99)]
    + [("bfloat16", "random", 0.98), ("bfloat16", "clusters", 0.94)],
)
def test_a_faster_precision_finds_nearly_the_same_rows(
    precision: str, kind: str, least: float
) -> None:
    queries, rows = embeddings(kind)
    own = jnp.arange(len(queries))
    _, found = search(queries, rows, k=8, own=own, precision=precision)
    _, exact = reference(np.asarray(queries), np.asarray(rows), 8, own=np.asarray(own))
    recall = np.mean([len(set(a) & set(b)) / 8 for a, b in zip(found.tolist(), exact, strict=True)])
    assert recall >= least


@pytest.mark.parametrize("precision", ["float32", "high", "bfloat16"])
def test_is_exact_on_the_scores_of_its_precision(precision: str) -> None:
    queries, rows = embeddings("random")
    if precision == "bfloat16":
        rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (queries, rows)]
    else:
        rounded = [queries, rows]
    scores, _ = search(queries, rows, k=8, precision=precision)
    expected, _ = reference(*map(np.asarray, rounded), 8)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, expected, atol=2e-6)


def test_bfloat16_scores_are_not_those_of_float32() -> None:
    queries, rows = embeddings("random")
    coarse, _ = search(queries, rows, k=8, precision="bfloat16")
    fine, _ = search(queries, rows, k=8)
    assert 1e-5 < jnp.abs(coarse - fine).max() < 2e-2


def test_chunks_keep_the_scores_of_all_queries_out_of_memory() -> None:
    queries, rows = jnp.zeros((256, 8)), jnp.zeros((4096, 8))

    def temporary(chunk: int) -> int:
        with layouts.usual_passes():
            compiled = search.lower(queries, rows, k=4, chunk=chunk).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    everything = 256 * 4096 * 4
    assert temporary(256) >= everything
    assert temporary(16) < everything / 4


@pytest.mark.parametrize("count", [7, 64, 300, 512, 640, 1024, 8192])
@pytest.mark.parametrize("k", [1, 5, 7])
def test_groups_find_what_a_whole_top_k_finds(count: int, k: int) -> None:
    """Many scores are equal, and many rows must not be found."""
    rng = np.random.default_rng(count)
    scores = rng.integers(0, 6, (20, count)).astype(np.float32)
    scores[:, rng.random(count) < 0.3] = -np.inf
    found = jax.jit(jax.vmap(lambda row: top_k(row, k)))(scores)
    expected = jax.lax.top_k(scores, k)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
