"""How data is distributed over prototypes: latent classes, and shares by redundancy.

An image is assigned to prototypes by softmax(cos / temperature); its latent class is the prototype
with the largest cosine, the first of those with equal ones. To compare prototypes by redundancy,
the data is reassigned to the representatives alone (Figure 1 of the partial-collapse paper). The
paper does not say whether its shares are of hard or of soft assignments, so that both are measured.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Float64, Int
from scipy.special import entr

from sop_jax.diagnosis.uniqueness import Cover, lengths_of, unit
from sop_jax.errors import UserError

SCORES = 2**23  # cosines in memory at a time


class Distribution(NamedTuple):
    """How data is distributed over some prototypes, in their order.

    Attributes:
        images: the number of images of each latent class; they sum to N.
        marginal: the mean of the assignments, which sums to 1. The paper calls it MLCD, for
            marginal latent class distribution.
        sample_entropy: the mean entropy of the assignments, in nats.
    """

    images: Int[np.ndarray, " M"]
    marginal: Float64[np.ndarray, " M"]
    sample_entropy: float


def distribute(
    features: Float[np.ndarray, "N D"],
    prototypes: Float[np.ndarray, "K d"],
    subsets: Sequence[Int[np.ndarray, "_"]],
    temperature: float,
) -> list[Distribution]:
    """Assigns features to several subsets of the prototypes in one pass.

    At most SCORES cosines are in memory at a time, and features are read in parts, so that they can
    be a memory map.

    Args:
        features: vectors of any length.
        prototypes: vectors of any length.
        subsets: indices of prototypes, those of all or of some representatives, at least one each.
        temperature: of the assignment, for cosines.

    Returns:
        The distribution over each subset.

    Raises:
        UserError: see `check_features` and `lengths_of`.
    """
    check_features(features, prototypes, temperature)
    lengths = lengths_of(features, "features")
    rows = unit(prototypes, lengths_of(prototypes, "prototypes"))
    count = len(features)
    # Without collapse, subsets for several distances are the same, and are measured once.
    distinct = {subset.tobytes(): subset for subset in subsets}
    images = {key: np.zeros(len(subset), np.int64) for key, subset in distinct.items()}
    sums = {key: np.zeros(len(subset)) for key, subset in distinct.items()}
    entropies = dict.fromkeys(distinct, 0.0)
    step = max(1, SCORES // len(rows))
    for start in range(0, count, step):
        part = slice(start, start + step)
        cosines = unit(features[part], lengths[part]) @ rows.T
        for key, subset in distinct.items():
            own = cosines if len(subset) == len(rows) else cosines[:, subset]
            nearest, assigned, entropy = _assign(own, temperature)
            images[key] += np.bincount(nearest, minlength=len(subset))
            sums[key] += assigned.sum(axis=0, dtype=np.float64)
            entropies[key] += float(entropy.sum(dtype=np.float64))
    keys = [subset.tobytes() for subset in subsets]
    return [Distribution(images[k], sums[k] / count, entropies[k] / count) for k in keys]


def _assign(
    cosines: Float32[np.ndarray, "n M"], temperature: float
) -> tuple[Int[np.ndarray, " n"], Float32[np.ndarray, "n M"], Float32[np.ndarray, " n"]]:
    """Returns the latent classes, the assignments, and their entropies in nats."""
    nearest = cosines.argmax(axis=1)
    logits = cosines - np.take_along_axis(cosines, nearest[:, None], axis=1)
    logits /= np.float32(temperature)
    weights = np.exp(logits)
    total = weights.sum(axis=1)
    weights /= total[:, None]
    return nearest, weights, np.log(total) - np.einsum("nm,nm->n", weights, logits)


def check_features(
    features: Float[np.ndarray, "N D"],
    prototypes: Float[np.ndarray, "K d"],
    temperature: float,
) -> None:
    """Raises UserError if features and prototypes have different sizes, or no temperature fits."""
    if features.shape[1] != prototypes.shape[1]:
        raise UserError(
            f"the features have {features.shape[1]} dimensions and the prototypes "
            f"{prototypes.shape[1]}. Expected what is compared with prototypes, which are the "
            "features in front of their layer. Take the output of the head of the same network"
        )
    if not 0 < temperature < math.inf:
        raise UserError(
            f"the temperature is {temperature:g}. Expected a positive number, which divides cosines"
            ", such as 0.1. Choose one"
        )


def by_redundancy(cover: Cover, shares: Float64[np.ndarray, " M"]) -> Float64[np.ndarray, " F"]:
    """Returns shares of the data, summed over the representatives of each redundancy factor.

    The factors are those that occur, ascending. Divided by the number of representatives with each
    factor, the sums are what Figure 1 of the partial-collapse paper shows.

    Args:
        cover: the sets of redundant prototypes.
        shares: the share of each representative.
    """
    _, place = np.unique(cover.redundancy, return_inverse=True)
    return np.bincount(place, shares)


def entropy_of(marginal: Float64[np.ndarray, " K"]) -> float:
    """Returns the entropy of a distribution, in nats."""
    return float(entr(marginal).sum())
