"""Scores of segmentation from areas: which pixels and which classes count."""

import numpy as np
import pytest

from sop_jax.evaluation.areas import areas, scores


def test_ignored_pixels_count_nowhere():
    label = np.array([[0, 1, 255], [1, 255, 255]], np.uint8)
    prediction = np.array([[0, 0, 1], [1, 2, 0]], np.uint8)
    both, union, predicted, labelled = areas(prediction, label, 3)
    assert both.tolist() == [1, 1, 0]
    assert union.tolist() == [2, 2, 0]
    assert predicted.tolist() == [2, 1, 0]
    assert labelled.tolist() == [1, 2, 0]


def test_a_class_that_is_only_predicted_lowers_mIoU_but_not_mAcc():
    total = areas(np.array([[0, 0, 2]]), np.array([[0, 0, 0]]), 4)
    found = scores(total)
    assert found["aAcc"] == found["mAcc"] == pytest.approx(2 / 3)
    assert found["mIoU"] == pytest.approx((2 / 3 + 0) / 2)


def test_areas_of_images_are_summed_before_scores_are_computed():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 5, (2, 6, 8)), rng.integers(0, 5, (2, 6, 8))
    apart = sum(areas(p, x, 5) for p, x in zip(predictions, labels, strict=True))
    together = areas(predictions.reshape(12, 8), labels.reshape(12, 8), 5)
    np.testing.assert_array_equal(apart, together)


def test_nothing_labelled_has_no_scores():
    total = areas(np.zeros((2, 2), int), np.full((2, 2), 255), 3)
    assert scores(total) == {"aAcc": None, "mAcc": None, "mIoU": None}
