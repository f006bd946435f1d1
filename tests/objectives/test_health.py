"""The signs of health of any objective, on embeddings whose values are known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sop_jax.models.head import unit
from sop_jax.objectives import health


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_entropy_of_even_and_certain_distributions() -> None:
    p = jnp.array([[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    np.testing.assert_allclose(health.entropy(p), [math.log(4), 0, math.log(2)], atol=1e-6)


def test_agreement_is_one_for_views_alike_up_to_place_and_size() -> None:
    teacher = jnp.tile(normal(0, 30, 1, 8), (1, 2, 1))
    student = 3 * jnp.tile(teacher[:, :1], (1, 4, 1)) + normal(1, 8)
    assert health.agreement(student, teacher) == pytest.approx(1, abs=1e-5)
    assert health.agreement(-student, teacher) == pytest.approx(-1, abs=1e-5)


def test_agreement_is_none_for_independent_views_whatever_they_share() -> None:
    student, teacher = normal(0, 400, 4, 32) + 5, normal(1, 400, 2, 32) + 5
    assert abs(health.agreement(student, teacher)) < 0.02


def test_agreement_leaves_out_a_view_with_itself() -> None:
    views = normal(0, 400, 2, 32)
    assert abs(health.agreement(views, views)) < 0.02


def test_agreement_of_collapsed_embeddings_is_finite() -> None:
    views = jnp.ones((4, 2, 3))
    assert health.agreement(views, views) == pytest.approx(0, abs=1e-6)


def test_agreement_weighs_what_views_share() -> None:
    """Signal and noise of equal size in every view correlate at one half."""
    views = normal(0, 2000, 1, 16) + normal(1, 2000, 2, 16)
    assert health.agreement(views, views) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("rows", [16, 200])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_effective_rank_of_equal_orthogonal_directions(rank: int, rows: int) -> None:
    """There are more rows than dimensions, or fewer."""
    signs = np.linalg.qr(np.random.default_rng(0).normal(size=(rows, rank + 1)))[0]
    centred = np.linalg.qr(signs - signs.mean(0))[0][:, :rank]
    directions = np.linalg.qr(np.random.default_rng(1).normal(size=(32, rank)))[0]
    x = jnp.asarray(centred @ directions.T + 0.5, jnp.float32)
    assert health.effective_rank(x) == pytest.approx(rank, rel=0.02)


def test_effective_rank_of_a_point_is_finite() -> None:
    assert health.effective_rank(jnp.ones((4, 3))) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_embedding_std_distinguishes_a_point_from_a_full_sphere(spread: float) -> None:
    x = unit(spread * normal(0, 400, 16) + (1 - spread))
    assert health.embedding_std(x) == pytest.approx(spread, abs=0.02)
