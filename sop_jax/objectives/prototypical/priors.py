"""Regularizers that match the student's mean assignment to a prior over prototypes.

MSN prefers the uniform prior (ME-MAX, Assran et al., 2022), PMSN a power law (Assran et al., 2023).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sop_jax.errors import UserError

TINY = np.finfo(np.float32).tiny


def memax(mean: Float[Array, " K"]) -> Float[Array, ""]:
    """Returns ln K minus the entropy of the mean assignment, in nats; 0 if it is uniform.

    Args:
        mean: the mean of the assignments over all images and views, in float32.
    """
    return mean_to_prior(mean, jnp.full(mean.shape, 1 / len(mean)))


def mean_to_prior(mean: Float[Array, " K"], prior: Float[Array, " K"]) -> Float[Array, ""]:
    """Returns KL(mean || prior), in nats.

    This is PMSN's regularizer as Govindarajan et al. (2024) write it. The value and its gradient
    are finite where the mean assignment is 0.

    Args:
        mean: the mean of the assignments over all images and views, in float32.
        prior: positive shares that sum to 1.
    """
    return (mean * (jnp.log(jnp.maximum(mean, TINY)) - jnp.log(prior))).sum()


def prior_to_mean(mean: Float[Array, " K"], prior: Float[Array, " K"]) -> Float[Array, ""]:
    """Returns KL(prior || mean), in nats, the reverse of `mean_to_prior`.

    The code of lightly computes this. The value and its gradient are finite where the mean
    assignment is 0.

    Args:
        mean: the mean of the assignments over all images and views, in float32.
        prior: positive shares that sum to 1.
    """
    return (prior * (jnp.log(prior) - jnp.log(jnp.maximum(mean, TINY)))).sum()


def power_law(count: int, exponent: float) -> Float[np.ndarray, "{count}"]:
    """Returns the shares of `count` prototypes that are proportional to k^-exponent, k = 1, 2, ...

    PMSN's exponent is 0.25; with 0 the shares are equal.
    """
    shares = np.arange(1, count + 1) ** -float(exponent)
    return shares / shares.sum()


def check_prior(prior: np.ndarray, prototypes: int, setting: str) -> None:
    """Checks that a prior is a distribution over all prototypes.

    Args:
        prior: the share of each prototype.
        prototypes: K, the number of prototypes.
        setting: the name of the setting that has the prior, for messages.

    Raises:
        UserError: the shares are not K numbers, one is not positive in float32, or their sum is
            not 1.
    """
    if prior.dtype.kind not in "fiu" or prior.ndim != 1:
        raise UserError(
            f"{setting} is an array of {prior.dtype} with shape {prior.shape}; expected "
            f"{prototypes} real numbers in one dimension, the share of each prototype"
        )
    if len(prior) != prototypes:
        raise UserError(
            f"{setting} has {len(prior)} entries; expected one for each of the {prototypes} "
            "prototypes; change one of the two"
        )
    shares = prior.astype(np.float64)
    wrong = np.flatnonzero(~(shares.astype(np.float32) >= TINY))
    if len(wrong):
        raise UserError(
            f"entry {wrong[0]} of {setting} is {shares[wrong[0]]:g}; expected a share greater than "
            "0 in float32, because the divergence from a prior with zeros is infinite; give rare "
            "prototypes a small share"
        )
    if not abs(shares.sum() - 1) <= 1e-5:
        raise UserError(
            f"{setting} sums to {shares.sum():.6g}; expected 1; divide its entries by their sum"
        )
