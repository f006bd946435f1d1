"""Anchors are drawn uniformly, supports from the pool, and votes follow their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sop_jax.models.head import unit
from sop_jax.objectives.sop.prototypes import (
    POOLS,
    VOTES,
    build_sops,
    cast_votes,
    draw_anchors,
    find_supports,
)
from sop_jax.parallel.mesh import make_mesh

MESH = make_mesh(1)


def test_anchors_are_unique_and_every_row_is_equally_likely() -> None:
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: draw_anchors(key, 20, 5)))(keys))
    assert all(len(set(draw)) == 5 for draw in drawn.tolist())
    expected = 2000 * 5 / 20
    chi_square = ((np.bincount(drawn.ravel(), minlength=20) - expected) ** 2 / expected).sum()
    assert chi_square < 43.8  # 99.9 % of draws with 19 degrees of freedom
    firsts = np.bincount(drawn[:, 0], minlength=20)
    assert ((firsts - 100) ** 2 / 100).sum() < 43.8


def test_all_rows_can_be_anchors() -> None:
    assert sorted(draw_anchors(jax.random.key(0), 6, 6).tolist()) == list(range(6))


@pytest.mark.medium
def test_pools_differ_in_whether_anchors_support_each_other() -> None:
    """Returns rows on a circle, one degree apart, with adjacent anchors."""
    angles = jnp.deg2rad(jnp.arange(10.0))
    rows = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    anchors = jnp.array([4, 5])
    everywhere = find_supports(rows, anchors, 2, MESH, pool="all").T
    assert everywhere[0, 0] == 4 and set(everywhere[0, 1:].tolist()) == {3, 5}
    assert everywhere[1, 0] == 5 and set(everywhere[1, 1:].tolist()) == {4, 6}
    assert find_supports(rows, anchors, 2, MESH, pool="non_anchors").T.tolist() == [
        [4, 3, 2],
        [5, 6, 7],
    ]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_supports_obey_the_pool_and_come_nearest_first(pool: str, precision: str) -> None:
    rows = unit(jax.random.normal(jax.random.key(0), (60, 8)))
    anchors = draw_anchors(jax.random.key(1), 60, 20)
    found = np.asarray(find_supports(rows, anchors, 4, MESH, pool=pool, precision=precision)).T
    np.testing.assert_array_equal(found[:, 0], anchors)
    for own, *supports in found.tolist():
        assert own not in supports and len(set(supports)) == 4
        if pool == "non_anchors":
            assert not set(supports) & set(anchors.tolist())
    cosine = np.einsum("kd,kjd->kj", rows[found[:, 0]], rows[found[:, 1:]])
    slack = 1e-6 if precision == "float32" else 1e-2
    assert (np.diff(cosine, axis=1) <= slack).all()


@pytest.mark.parametrize("pool", POOLS)
def test_without_supports_a_prototype_is_its_anchor(pool: str) -> None:
    anchors = jnp.array([3, 1])
    assert find_supports(jnp.eye(5), anchors, 0, MESH, pool=pool).tolist() == [[3, 1]]
    sops = build_sops(jnp.eye(5), anchors[None], "smoothed", 0.1, MESH)
    np.testing.assert_array_equal(sops.embeddings[0], jnp.eye(5)[anchors])
    np.testing.assert_allclose(sops.votes, [[0.9, 0.9]])


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ("one_hot", [1.0, 1.0, 1.0, 1.0]),
        ("smoothed", [0.8, 0.8, 0.8, 0.8]),
        ("similarity", [0.8, 0.96, 0.28, 0.0]),
        ("pure_similarity", [1.0, 0.96, 0.28, 0.0]),
    ],
)
def test_votes_by_definition(votes: str, expected: list[float]) -> None:
    """Returns an anchor, and supports with cosines 0.96, 0.28 and -0.6."""
    group = jnp.array([[1.0, 0.0], [0.96, 0.28], [0.28, -0.96], [-0.6, 0.8]])
    np.testing.assert_allclose(cast_votes(group[:, None], votes, 0.2)[:, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("votes", VOTES)
def test_votes_of_an_anchor_without_supports_keep_their_shape(votes: str) -> None:
    assert cast_votes(jnp.ones((1, 3, 2)), votes, 0.1).shape == (1, 3)


def test_a_cosine_above_one_by_rounding_is_still_one_vote() -> None:
    group = jnp.full((2, 1, 4), 0.5000001)
    assert cast_votes(group, "similarity", 0.1)[1, 0] == 1
