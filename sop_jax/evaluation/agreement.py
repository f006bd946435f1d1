"""How well a clustering agrees with classes.

The information-theoretic and pair-counting scores are scikit-learn's. The accuracy of iBOT's
`unsupervised/unsup_cls.py` shifts the assignments to begin at 0 and cuts its table to the number of
classes, so that an unused cluster or class makes it wrong; it is not reproduced. Here clusters can
have any numbers, and can outnumber the classes.
"""

import numpy as np
from jaxtyping import Integer
from scipy.optimize import linear_sum_assignment


def agreement(
    labels: Integer[np.ndarray, " n"], assignments: Integer[np.ndarray, " n"]
) -> dict[str, float]:
    """Returns the scores of a clustering, each at most 1.

    Args:
        labels: the classes, any numbers.
        assignments: the clusters, any numbers.

    Returns:
        `nmi`, the mutual information normalized by the arithmetic mean of the entropies; `ami`, the
        same adjusted for chance; `ari`, the adjusted Rand index; `fowlkes_mallows`; `accuracy`, the
        share of images that are right if each cluster stands for one class and each class for one
        cluster, matched as well as possible, where surplus clusters count as wrong; and
        `accuracy_majority`, the same if each cluster stands for its most frequent class, so that
        several clusters can share a class. The last one grows with the number of clusters.
    """
    from sklearn import metrics  # takes a second, which the start of a training saves

    table = contingency(labels, assignments)
    matched = table[linear_sum_assignment(table, maximize=True)].sum()
    return {
        "nmi": float(metrics.normalized_mutual_info_score(labels, assignments)),
        "ami": float(metrics.adjusted_mutual_info_score(labels, assignments)),
        "ari": float(metrics.adjusted_rand_score(labels, assignments)),
        "fowlkes_mallows": float(metrics.fowlkes_mallows_score(labels, assignments)),
        "accuracy": float(matched / len(labels)),
        "accuracy_majority": float(table.max(axis=1).sum() / len(labels)),
    }


def contingency(
    labels: Integer[np.ndarray, " n"], assignments: Integer[np.ndarray, " n"]
) -> Integer[np.ndarray, "clusters classes"]:
    """Returns the number of images of each class in each cluster; only those that occur."""
    clusters, rows = np.unique(assignments, return_inverse=True)
    classes, columns = np.unique(labels, return_inverse=True)
    table = np.zeros((len(clusters), len(classes)), np.int64)
    np.add.at(table, (rows, columns), 1)
    return table
