"""The diagnosis of partial collapse: all numbers about a set of prototypes, and data, as JSON."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sop_jax.diagnosis.distribution import (
    Distribution,
    by_redundancy,
    check_features,
    distribute,
    entropy_of,
)
from sop_jax.diagnosis.spread import spread_of
from sop_jax.diagnosis.uniqueness import EPS, Cover, check_eps, covers, lengths_of
from sop_jax.errors import UserError

TEMPERATURE = 0.1  # of the student in all methods with prototypes

Result = dict[str, Any]


def diagnose(
    prototypes: Float[np.ndarray, "K d"],
    features: Float[np.ndarray, "N D"] | None = None,
    eps: Sequence[float] = EPS,
    temperature: float = TEMPERATURE,
    images: Int[np.ndarray, " I"] | None = None,
) -> Result:
    """Measures how far prototypes have collapsed, and how they share the data.

    Args:
        prototypes: vectors of any length; only directions count.
        features: what the network compares with the prototypes, of N images, vectors of any length;
            a memory map if they are large. None if there is no data.
        eps: the distances 1 - cos for which unique prototypes are counted, in any order.
        temperature: of the assignment of features, for cosines.
        images: for rows of a memory, the image that each shows, any numbers. Rows of one image are
            alike for a good reason, and are counted apart.

    Returns:
        Numbers, lists and None, as JSON can hold them. Shares are from 0 to 1, entropies in nats.
        Values that need features are None without them; so are undefined ones.

        - `prototypes`, `dimensions`, `images`: K, d and N.
        - `temperature`: as given, with features.
        - `uniformity`, `uniformity_rows`, `effective_rank`, `effective_rank_centred`,
          `effective_rank_covariance`, `mean_direction_norm`: of the prototypes, see
          `spread.Spread`.
        - `features`: these six of the features.
        - `marginal`: the mean assignment of the data to each prototype, [K], which the
          partial-collapse paper calls MLCD; `marginal_entropy`, its entropy;
          `marginal_kl_uniform`, its divergence from the uniform distribution, KL(marginal ||
          uniform); `marginal_perplexity`, the exponential of its entropy, from 1 to K.
        - `sample_entropy`: the mean over images of the entropy of the assignment.
        - `images_per_class`: the number of images of each latent class that has some, descending.
          The latent class of an image is its nearest prototype.
        - `dead`: the number of prototypes that are the nearest of no image.
        - `eps`: for each distance, in the given order,
            - `eps`: the distance;
            - `unique`, `share`: the number M of unique prototypes, and M / K;
            - `same_image`: of the K - M redundant prototypes, the number of those whose
              representative is of the same image; None without `images`;
            - `factors`: the redundancy factors that occur, [F] ascending; a prototype and all that
              it represents are its redundancy factor;
            - `representatives`: the number of unique prototypes with each factor, [F];
            - `share_total`, `share_total_soft`: the share of the data of all unique prototypes with
              each factor, [F], if it is assigned to unique prototypes alone: each image to the
              nearest one, or softly;
            - `share_mean`, `share_mean_soft`: these divided by `representatives`, the average share
              of one such prototype, as in Figure 1 of the paper;
            - `images_per_class`, `dead`: as above, for the unique prototypes alone.

    Raises:
        UserError: a distance or the temperature is out of range; the prototypes or features are
            none, not finite or of length 0; or their sizes differ. It is raised before long work.
    """
    check_eps(eps)
    lengths_of(prototypes, "prototypes")
    if features is not None:
        check_features(features, prototypes, temperature)
        lengths_of(features, "features")
    if images is not None and len(images) != len(prototypes):
        raise UserError(
            f"there are {len(prototypes)} rows, but the images of {len(images)}. Expected one "
            "image for each row. Give those of all rows, in their order"
        )
    found = covers(prototypes, eps)
    subsets = [np.arange(len(prototypes)), *(cover.representatives for cover in found)]
    distributed: Sequence[Distribution | None] = [None] * len(subsets)
    if features is not None:
        distributed = distribute(features, prototypes, subsets, temperature)
    everything, *reassigned = distributed
    return {
        "prototypes": len(prototypes),
        "dimensions": prototypes.shape[1],
        "images": None if features is None else len(features),
        "temperature": None if features is None else float(temperature),
        **spread_of(prototypes, "prototypes")._asdict(),
        "features": None if features is None else spread_of(features, "features")._asdict(),
        **_marginal(everything),
        **_classes(everything),
        "eps": [_of_eps(cover, own, images) for cover, own in zip(found, reassigned, strict=True)],
    }


def _marginal(found: Distribution | None) -> Result:
    """Returns the marginal distribution and what follows from it; see `diagnose`."""
    if found is None:
        names = ("marginal", "marginal_entropy", "marginal_kl_uniform", "marginal_perplexity")
        return dict.fromkeys((*names, "sample_entropy"))
    entropy = entropy_of(found.marginal)
    return {
        "marginal": found.marginal.tolist(),
        "marginal_entropy": entropy,
        "marginal_kl_uniform": math.log(len(found.marginal)) - entropy,
        "marginal_perplexity": math.exp(entropy),
        "sample_entropy": found.sample_entropy,
    }


def _classes(found: Distribution | None) -> Result:
    """Returns the latent classes with and without images; see `diagnose`."""
    if found is None:
        return {"images_per_class": None, "dead": None}
    used = found.images[found.images > 0]
    return {
        "images_per_class": np.sort(used)[::-1].tolist(),
        "dead": len(found.images) - len(used),
    }


def _of_eps(
    cover: Cover, reassigned: Distribution | None, images: Int[np.ndarray, " K"] | None
) -> Result:
    """Returns the entry of one distance; see `diagnose`."""
    unique, count = len(cover.representatives), len(cover.of)
    same_image = None
    if images is not None:
        same_image = int(np.sum(images == images[cover.of])) - unique
    factors, representatives = np.unique(cover.redundancy, return_counts=True)
    shares: Result = dict.fromkeys(
        ("share_total", "share_total_soft", "share_mean", "share_mean_soft")
    )
    if reassigned is not None:
        hard = by_redundancy(cover, reassigned.images / reassigned.images.sum())
        soft = by_redundancy(cover, reassigned.marginal)
        shares = {
            "share_total": hard.tolist(),
            "share_total_soft": soft.tolist(),
            "share_mean": (hard / representatives).tolist(),
            "share_mean_soft": (soft / representatives).tolist(),
        }
    return {
        "eps": cover.eps,
        "unique": unique,
        "share": unique / count,
        "same_image": same_image,
        "factors": factors.tolist(),
        "representatives": representatives.tolist(),
        **shares,
        **_classes(reassigned),
    }
