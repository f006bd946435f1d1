"""KoLeo: it repels neighbours, leaves out no prototype, and is finite at the edges."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sop_jax.models.head import unit
from sop_jax.objectives.prototypical.koleo import koleo, koleo_of_prototypes, partitions

# What XLA does outside of the tests, which skip most optimizations.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


def nearest_distance(x: jax.Array) -> float:
    rows = np.asarray(unit(x))
    distances = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    return float((distances + 10 * np.eye(len(rows))).min())


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize(
    "x",
    [
        jnp.ones((1, 16)),
        jnp.zeros((1, 16)),
        jnp.zeros((5, 16)),
        jnp.ones((3, 16)),
        jnp.concatenate([jnp.ones((3, 16)), jnp.eye(4, 16), -1e-20 * jnp.eye(4, 16)]),
    ],
    ids=["one row", "one zero row", "zero rows", "equal rows", "tiny rows"],
)
def test_value_and_gradient_are_finite(x: jax.Array, eps: float) -> None:
    value, gradient = jax.jit(jax.value_and_grad(lambda x: koleo(x, eps)))(x)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("place", [1, 3, 4])
def test_rows_are_equal_at_any_place_in_an_optimized_program(place: int) -> None:
    x = jax.random.normal(jax.random.key(3), (5, 16)).at[place].set(2.0).at[0].set(2.0)
    value, gradient = jax.jit(jax.value_and_grad(koleo), compiler_options=OPTIMIZED)(x)
    rows = np.asarray(unit(x), np.float64)
    cosines = rows @ rows.T - 2 * np.eye(5)
    differences = rows - rows[cosines.argmax(1)]
    differences[[0, place]] = 0
    expected = -np.log(np.linalg.norm(differences + 1e-8, axis=-1) + 1e-8).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert abs(gradient).max() < 1


def test_neighbours_repel_each_other() -> None:
    x = jax.random.normal(jax.random.key(0), (24, 8))
    before = nearest_distance(x)
    step = jax.jit(lambda x: x - 0.5 * jax.grad(koleo)(x))
    for _ in range(100):
        x = step(x)
    assert nearest_distance(x) > 1.5 * before


def test_more_neighbours_than_other_rows_are_all_other_rows() -> None:
    x = jax.random.normal(jax.random.key(0), (4, 8))
    one, three, seven = (jax.jit(partial(koleo, nearest=nearest))(x) for nearest in (1, 3, 7))
    np.testing.assert_allclose(seven, three)
    assert three < one


@pytest.mark.parametrize(("count", "size"), [(12, 4), (13, 4), (15, 4), (3, 4), (8142, 2048)])
def test_every_prototype_is_in_one_part(count: int, size: int) -> None:
    parts = [part for array in partitions(jax.random.key(0), count, size) for part in array]
    assert len(parts) == -(-count // size)
    sizes = [len(part) for part in parts]
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(count))


def test_parts_are_random() -> None:
    one, other = (partitions(jax.random.key(seed), 64, 16)[0] for seed in (0, 1))
    assert not np.array_equal(one, other)
    assert not np.array_equal(one.reshape(-1), np.arange(64))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_prototypes_are_compared_within_their_part(reduction: str) -> None:
    weight = jax.random.normal(jax.random.key(0), (11, 8))
    blocks = partitions(jax.random.key(1), 11, 4)
    alone = jax.jit(koleo)
    each = [alone(weight[part]) for array in blocks for part in array]
    assert len(each) == 3
    total = sum(each) if reduction == "sum" else sum(each) / 3
    value, gradient = jax.value_and_grad(lambda w: koleo_of_prototypes(w, blocks, reduction))(
        weight
    )
    np.testing.assert_allclose(value, total, rtol=1e-6)
    assert (abs(gradient).max(-1) > 1e-3).all()  # none is left out, though 4 does not divide 11


def test_memory_holds_one_part_at_a_time() -> None:
    count, size, dim = 65536, 2048, 32

    def loss(weight: jax.Array, key: jax.Array) -> jax.Array:
        return koleo_of_prototypes(weight, partitions(key, count, size))

    weight = jax.ShapeDtypeStruct((count, dim), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(weight, jax.random.key(0)).compile()
    used = compiled.memory_analysis().temp_size_in_bytes
    assert used < 4 * (4 * size**2 + 8 * count * dim)  # all pairs would take 16 GiB
