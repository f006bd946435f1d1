"""The signs of health of SOP on known assignments, and the verdict on a run."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sop_jax.models.head import unit
from sop_jax.objectives.sop import health
from sop_jax.objectives.sop.prototypes import SOPs

measure = jax.jit(health.measure)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def measured(teacher: jax.Array, targets: jax.Array, sops: SOPs, filled: int = 5) -> dict[str, Any]:
    return jax.device_get(measure(teacher, teacher, targets, sops, jnp.float32(filled / 20)))


def test_signs_of_a_batch_that_picks_every_second_prototype() -> None:
    teacher = unit(normal(0, 4, 2, 3))
    anchors = jnp.eye(3)[jnp.array([0, 1, 2, 0, 1, 2, 0, 1])]
    sops = SOPs(jnp.stack([anchors, -anchors, anchors], axis=0)[None], jnp.ones((1, 3, 8)))
    targets = jnp.eye(8)[jnp.array([[0, 6], [2, 4], [4, 2], [6, 0]])][None]
    signs = measured(teacher, targets, sops)
    assert signs["log_k"] == pytest.approx(math.log(8), rel=1e-6)
    assert signs["entropy"] == pytest.approx(0, abs=1e-6)
    assert signs["entropy_of_mean"] == pytest.approx(math.log(4), rel=1e-5)
    assert signs["winning_sops"] == 0.5
    assert signs["support_cosine"] == pytest.approx(0, abs=1e-6)
    assert signs["memory_filled"] == 0.25


def test_signs_are_means_over_tasks() -> None:
    teacher, sops = unit(normal(0, 2, 2, 3)), SOPs(jnp.ones((2, 1, 4, 3)), jnp.ones((2, 1, 4)))
    targets = jnp.stack([jnp.eye(4)[jnp.array([[0, 1], [2, 3]])], jnp.full((2, 2, 4), 0.25)])
    signs = measured(teacher, targets, sops)
    assert signs["entropy"] == pytest.approx(math.log(4) / 2, rel=1e-5)
    assert signs["winning_sops"] == pytest.approx((1 + 0.25) / 2)
    assert signs["support_cosine"] == 1


def row(**signs: float) -> dict[str, float]:
    return {"log_k": 4.85, "student_temperature": 0.1, **signs}


COLLAPSED = row(
    entropy=4.85, entropy_of_mean=4.85, embedding_std=0.08, agreement=0.05, teacher_temperature=0.04
)


def test_verdict_on_a_collapsed_run_names_the_cause_and_settings_that_help() -> None:
    words = health.verdict([COLLAPSED] * 3)
    assert words is not None
    assert words.startswith("collapsing")
    assert "0.05" in words and "0.40" in words
    for setting in ("sop.teacher_temperature", "augment.global_scale", "augment.local_scale"):
        assert setting in words


@pytest.mark.parametrize(
    "signs",
    [
        COLLAPSED | {"agreement": 0.9},
        COLLAPSED | {"entropy": 4.5},
        COLLAPSED | {"entropy": 0.5, "entropy_of_mean": 0.6, "embedding_std": 0.5},
    ],
    ids=["one point that agrees", "shrinking", "one prototype for all"],
)
def test_verdict_speaks_of_other_kinds_of_collapse(signs: dict[str, float]) -> None:
    assert health.verdict([signs] * 3) is not None


@pytest.mark.parametrize(
    "signs",
    [
        row(
            entropy=4.39,
            entropy_of_mean=4.8,
            embedding_std=0.25,
            agreement=0.24,
            teacher_temperature=0.02,
        ),
        row(
            entropy=2.1,
            entropy_of_mean=4.68,
            embedding_std=0.73,
            agreement=0.8,
            teacher_temperature=0.02,
        ),
        row(
            entropy=5.36,
            entropy_of_mean=6.18,
            embedding_std=0.39,
            agreement=0.45,
            teacher_temperature=0.04,
            log_k=6.24,
        ),
    ],
    ids=["early", "late", "slow"],
)
def test_verdict_is_silent_on_runs_that_learn(signs: dict[str, float]) -> None:
    assert health.verdict([signs] * 3) is None


def test_verdict_waits_until_a_run_has_looked_collapsed_for_a_while() -> None:
    healthy = COLLAPSED | {"entropy": 3.0, "embedding_std": 0.6, "agreement": 0.7}
    assert health.verdict([COLLAPSED] * 2) is None
    assert health.verdict([COLLAPSED, COLLAPSED, healthy]) is None
    assert health.verdict([healthy, COLLAPSED, COLLAPSED, COLLAPSED]) is not None
