"""Prototypes as the means of a Gaussian mixture, which online EM fits to the teacher's features.

Prototypes that learn by the loss of the encoder become equal to each other in all known methods
(partial prototype collapse). Here they are decoupled from that loss: each step first updates the
mixture with the features of its batch, and the encoder then learns with the new means.

The mixture has diagonal covariances. The authors of decoupled prototypes publish the ingredients
(sufficient statistics, forgetting weighted by responsibility, annealed responsibilities), but
neither formulas nor constants; what follows is the standard form of online EM.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sop_jax.models.head import unit

FORGETTING = ("mass", "plain")

TINY = float(jnp.finfo(jnp.float32).tiny)


class Mixture(NamedTuple):
    """The sufficient statistics of K components, in float32.

    Attributes:
        mass: S0, the sum of responsibilities r for the features seen, older ones decayed.
        total: S1, the likewise decayed sum of r h over features h.
        square: S2, the likewise decayed sum of r h².
    """

    mass: Float[Array, " K"]
    total: Float[Array, "K d"]
    square: Float[Array, "K d"]


class Components(NamedTuple):
    """The parameters of the mixture.

    Attributes:
        log_weights: ln π.
        means: μ.
        variances: the diagonals v of the covariances.
    """

    log_weights: Float[Array, " K"]
    means: Float[Array, "K d"]
    variances: Float[Array, "K d"]


def init_mixture(
    means: Float[Array, "K d"], mass: float | Array, variance: float | Array
) -> Mixture:
    """Returns a mixture of components with equal masses and equal variances.

    Args:
        means: the means μ, in float32.
        mass: S0 of every component, the number of features that the start counts for.
        variance: the variance of every component in every direction.
    """
    return Mixture(
        mass=jnp.full(len(means), mass, jnp.float32),
        total=mass * means,
        square=mass * (means**2 + variance),
    )


def start_at(
    h: Float[Array, "n d"],
    key: Key[Array, ""],
    count: int,
    mass: float | Array,
    variance: float | Array,
) -> Mixture:
    """Returns a mixture whose means are features, taken in turn, plus noise.

    Means that start elsewhere are rarely reached if all features are near each other, as those of
    an untrained network are.

    Args:
        h: the features, in float32.
        key: draws the noise.
        count: K; features serve for several components if there are fewer.
        mass: see `init_mixture`.
        variance: see `init_mixture`; also that of the noise.
    """
    noise = jax.random.normal(key, (count, h.shape[1]))
    means = h[jnp.arange(count) % len(h)] + jnp.sqrt(variance) * noise
    return init_mixture(means, mass, variance)


def components(mixture: Mixture, floor: float | Array) -> Components:
    """Returns the M-step: π = S0 / ΣS0, μ = S1 / S0 and v = max(S2 / S0 - μ², floor).

    A component without mass has the mean zero, the smallest variance, and a negligible weight. The
    difference cancels where μ² is much larger than v, so features should be of about unit norm.

    Args:
        mixture: the statistics.
        floor: the smallest variance; scikit-learn adds a constant instead.
    """
    mass = jnp.maximum(mixture.mass, TINY)
    means = mixture.total / mass[:, None]
    return Components(
        log_weights=jnp.log(mass) - jnp.log(mass.sum()),
        means=means,
        variances=jnp.maximum(mixture.square / mass[:, None] - means**2, floor),
    )


def prototypes(mixture: Mixture) -> Float[Array, "K d"]:
    """Returns the means of the mixture as unit rows."""
    return unit(mixture.total / jnp.maximum(mixture.mass, TINY)[:, None])


def log_joint(h: Float[Array, "n d"], parts: Components) -> Float[Array, "n K"]:
    """Returns ln π + ln N(h; μ, v) of every feature and component.

    The squared distances are expanded into matrix products, so that no array has n x K x d numbers.
    """
    precise = 1 / parts.variances
    products = [
        jnp.einsum("nd,kd->nk", *pair, precision=jax.lax.Precision.HIGHEST)
        for pair in ((h**2, precise), (h, -2 * parts.means * precise))
    ]
    distances = products[0] + products[1] + (parts.means**2 * precise).sum(-1)
    log_volume = jnp.log(parts.variances).sum(-1) + h.shape[-1] * math.log(2 * math.pi)
    return parts.log_weights - 0.5 * (log_volume + distances)


def responsibilities(
    h: Float[Array, "n d"], parts: Components, beta: float | Array
) -> Float[Array, "n K"]:
    """Returns the E-step: softmax over components of β (ln π + ln N(h; μ, v)).

    Args:
        h: the features, in float32.
        parts: the components.
        beta: β, the inverse temperature of deterministic annealing; 1 is the posterior, and smaller
            values assign more softly.
    """
    return jax.nn.softmax(beta * log_joint(h, parts), axis=-1)


def accumulate(
    mixture: Mixture,
    h: Float[Array, "n d"],
    r: Float[Array, "n K"],
    eta: float | Array,
    forgetting: str = "mass",
) -> Mixture:
    """Returns the statistics with those of a batch added, after the old ones are decayed.

    Args:
        mixture: the statistics of earlier batches.
        h: the features of the batch.
        r: their responsibilities.
        eta: η, the share that is forgotten; 0 forgets nothing.
        forgetting: one of FORGETTING. `mass` keeps (1 - η)^Σr, so that a component forgets as much
            as it receives, and one without features stays as it is; `plain` keeps 1 - η of all
            components at every batch.
    """
    received = r.sum(0)
    keep = (1 - eta) ** received if forgetting == "mass" else jnp.full_like(received, 1 - eta)
    sums = (jnp.einsum("nk,nd->kd", r, x, precision=jax.lax.Precision.HIGHEST) for x in (h, h**2))
    total, square = (
        keep[:, None] * old + new
        for old, new in zip((mixture.total, mixture.square), sums, strict=True)
    )
    return Mixture(keep * mixture.mass + received, total, square)


def update(
    mixture: Mixture,
    h: Float[Array, "n d"],
    beta: float | Array,
    eta: float | Array,
    floor: float | Array,
    forgetting: str = "mass",
) -> Mixture:
    """Returns the mixture after one step of online EM on the features of a batch.

    The sums run over all features given, on all devices. See `responsibilities`, `components` and
    `accumulate` for the arguments.
    """
    r = responsibilities(h, components(mixture, floor), beta)
    return accumulate(mixture, h, r, eta, forgetting)
