"""Accuracies against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from sop_jax.evaluation.accuracy import NEVER, count_right, rank_of, summary


def scores(images: int = 300, classes: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits with ties, and labels of which the last class has none."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes - 1, images)
    logits = rng.normal(size=(images, classes)) + 1.5 * np.eye(classes)[labels]
    return logits.round(1).astype(np.float32), labels.astype(np.int32)


def counted(logits: np.ndarray, labels: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    valid = np.ones(len(labels), bool) if valid is None else valid
    return np.asarray(count_right(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(valid)))


@pytest.mark.medium
def test_accuracies_are_those_of_scikit_learn():
    logits, labels = scores()
    found = summary(counted(logits, labels))
    assert found["top1"] == pytest.approx(metrics.accuracy_score(labels, logits.argmax(1)))
    expected = metrics.recall_score(
        labels, logits.argmax(1), labels=np.unique(labels), average="macro", zero_division=0
    )
    assert found["mean_per_class"] == pytest.approx(expected)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    assert found["top5"] == pytest.approx((order == labels[:, None]).any(1).mean())
    assert found["head"] is None


def test_ranks_break_ties_as_argmax_does():
    logits = jnp.array([[1.0, 2.0, 2.0, 0.0]] * 4)
    np.testing.assert_array_equal(rank_of(logits, jnp.arange(4)), [2, 0, 1, 3])


def test_scores_that_are_not_numbers_are_wrong():
    logits = jnp.array([[jnp.nan, jnp.nan], [jnp.nan, 1.0], [1.0, jnp.nan]])
    assert rank_of(logits, jnp.zeros(3, jnp.int32)).tolist() == [NEVER, NEVER, 1]


def test_a_class_without_a_score_is_never_right():
    logits = jnp.ones((2, 2, 3))  # of any number of leading axes
    labels = jnp.array([[0, 3], [-1, 2]], jnp.int32)
    assert rank_of(logits, labels).tolist() == [[0, NEVER], [NEVER, 2]]


@pytest.mark.medium
def test_counts_add_up_and_leave_out_invalid_rows():
    logits, labels = scores()
    valid = np.arange(len(labels)) % 7 != 0
    whole = counted(logits[valid], labels[valid])
    parts = [slice(0, 100), slice(100, 300)]
    padded = np.where(valid, labels, -1)
    found = sum(counted(logits[part], padded[part], valid[part]) for part in parts)
    np.testing.assert_array_equal(found, whole)
    assert whole[0].sum() == valid.sum()


@pytest.mark.parametrize(
    ("name", "truth"), [("top1", [0.6] * 4), ("mean_per_class", [0.9, 0.4, 0.6, 0.7])]
)
def test_standard_errors_are_the_spread_of_draws(name, truth):
    images = np.array([40, 200, 20, 90])
    draws = np.random.default_rng(0).binomial(images, truth, (4000, 4))
    found = [summary(np.stack([images, right, right])) for right in draws]
    error = np.mean([one[f"{name}_error"] for one in found])
    assert np.std([one[name] for one in found]) == pytest.approx(error, rel=0.06)


def test_frequent_and_rare_classes():
    counts = np.array([[10, 10, 20, 10, 5, 0], [9, 7, 10, 3, 1, 0], [10, 9, 20, 5, 2, 0]])
    found = summary(counts, np.array([500, 101, 100, 20, 19, 5]))
    assert found["head"] == pytest.approx((0.9 + 0.7) / 2)
    assert found["middle"] == pytest.approx((0.5 + 0.3) / 2)
    assert found["tail"] == pytest.approx(0.2)  # the last class has no images to classify
    assert summary(counts, np.full(6, 50))["middle"] is None
    nobody = summary(counts * (np.arange(6) < 4), np.array([500, 101, 100, 20, 19, 5]))
    assert nobody["tail"] is None and nobody["head"] is not None


def test_what_is_undefined_is_none():
    assert set(summary(np.zeros((3, 4), int)).values()) == {None}
    assert summary(np.ones((3, 5), int))["top5"] is None


def test_counting_is_one_program():
    logits, labels = scores()
    valid = jnp.ones(len(labels), bool)
    jitted = jax.jit(count_right)(jnp.asarray(logits), jnp.asarray(labels), valid)
    np.testing.assert_array_equal(jitted, counted(logits, labels))
