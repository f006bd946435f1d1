"""Scores of clusterings whose values are known, for any numbers and any number of clusters."""

import numpy as np
import pytest

from sop_jax.evaluation.agreement import agreement


def test_a_perfect_clustering_whatever_its_numbers_are():
    labels = np.array([3, 3, 7, 7, 9])
    scores = agreement(labels, np.array([40, 40, 2, 2, -5]))
    assert scores == pytest.approx(dict.fromkeys(scores, 1.0))


def test_one_cluster_stands_for_one_class():
    labels, assignments = np.array([0, 0, 0, 1, 1, 1]), np.zeros(6, int)
    scores = agreement(labels, assignments)
    assert scores["accuracy"] == scores["accuracy_majority"] == 0.5
    assert scores["nmi"] == scores["ari"] == 0


def test_surplus_clusters_are_wrong_unless_classes_can_be_shared():
    labels = np.array([0, 0, 0, 0, 1, 1])
    scores = agreement(labels, np.array([0, 0, 1, 2, 3, 3]))
    assert scores["accuracy"] == pytest.approx(4 / 6)  # two of the four clusters are matched
    assert scores["accuracy_majority"] == 1


def test_matching_is_optimal_rather_than_greedy():
    labels = np.array([0] * 5 + [1] * 4 + [0] * 4)
    assignments = np.array([0] * 9 + [1] * 4)  # cluster 0 has most of class 0, as does cluster 1
    assert agreement(labels, assignments)["accuracy"] == pytest.approx(8 / 13)
