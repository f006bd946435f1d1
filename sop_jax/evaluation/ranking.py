"""How well a ranked database answers queries, by the rules of the revisited Oxford and Paris sets.

Radenović et al., "Revisiting Oxford and Paris", CVPR 2018; https://github.com/filipradenovic/revisitop
(`compute_map`). Three protocols differ in which images count as right, and which are ignored, as
if they were not in the database.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from sop_jax.data.revisited import Truth

# The images that are right, and those that are ignored.
PROTOCOLS = {
    "E": (("easy",), ("hard", "junk")),
    "M": (("easy", "hard"), ("junk",)),
    "H": (("hard",), ("easy", "junk")),
}
CUTOFFS = (1, 5, 10)  # k of the precision at k


class Scores(NamedTuple):
    """How well Q queries were answered.

    Attributes:
        mean_ap: the mean of `ap` over the queries that have right images; NaN without any.
        ap: the average precision of each query; NaN for a query without right images.
        mean_precision: the mean of `precision`, as above.
        precision: the precision of each query at each of the K cutoffs.
    """

    mean_ap: float
    ap: Float[np.ndarray, " Q"]
    mean_precision: Float[np.ndarray, " K"]
    precision: Float[np.ndarray, "Q K"]


def rank(similarity: Shaped[np.ndarray, "N Q"]) -> Int[np.ndarray, "N Q"]:
    """Returns the database by descending similarity for each query; ties are ordered by index."""
    return np.argsort(-similarity, axis=0, kind="stable")


def evaluate(
    ranks: Int[np.ndarray, "N Q"],
    truth: Sequence[Truth],
    protocol: str,
    cutoffs: Sequence[int] = CUTOFFS,
) -> Scores:
    """Returns the scores of ranked databases.

    Args:
        ranks: the indices of all N images of the database, the most similar first, for Q queries.
        truth: which images are right, for each query.
        protocol: "E", "M" or "H", a key of PROTOCOLS.
        cutoffs: the numbers of images k at which the precision is measured.
    """
    right, ignored = PROTOCOLS[protocol]
    ap = np.full(len(truth), np.nan)
    precision = np.full((len(truth), len(cutoffs)), np.nan)
    for query, known in enumerate(truth):
        positives = np.concatenate([getattr(known, kind) for kind in right])
        if not len(positives):
            continue
        found = ranks[:, query]
        kept = found[~np.isin(found, np.concatenate([getattr(known, kind) for kind in ignored]))]
        positions = np.flatnonzero(np.isin(kept, positives))
        ap[query] = average_precision(positions, len(positives))
        precision[query] = [precision_at(positions, cutoff) for cutoff in cutoffs]
    answered = ~np.isnan(ap)
    if not answered.any():
        return Scores(np.nan, ap, np.full(len(cutoffs), np.nan), precision)
    return Scores(float(ap[answered].mean()), ap, precision[answered].mean(axis=0), precision)


def average_precision(positions: Int[np.ndarray, " n"], positives: int) -> float:
    """Returns the area under the precision-recall curve, by the trapezoid rule.

    Args:
        positions: where the right images are in the ranking, from 0, ascending.
        positives: the number of right images that there are.
    """
    found = np.arange(len(positions))
    before = np.divide(found, positions, out=np.ones(len(positions)), where=positions > 0)
    after = (found + 1) / (positions + 1)
    return float((before + after).sum() / (2 * positives))


def precision_at(positions: Int[np.ndarray, " n"], cutoff: int) -> float:
    """Returns the share of right images among the first k, as the official code defines it.

    k is `cutoff`, or the rank of the last right image if that is smaller, so that a query with few
    right images can still reach 1.

    Args:
        positions: where the right images are in the ranking, from 0, ascending; at least one.
        cutoff: the k that is asked for.
    """
    k = min(int(positions[-1]) + 1, cutoff)
    return float(np.count_nonzero(positions < k) / k)
