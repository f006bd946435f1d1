"""DINO-vMF: prototypes as von Mises-Fisher distributions (Govindarajan et al., 2023).

A prototype w is a distribution on the unit sphere with mean direction w / |w| and concentration
κ = |w| / τ. Its logit for an embedding y is the log density <w, y> / τ + log C_p(κ), so that long
prototypes are narrow, instead of winning everywhere.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


def log_c(kappa: Float[Array, "*K"], p: int) -> Float[Array, "*K"]:
    """Returns log C_p(κ), the log normalizer of von Mises-Fisher densities, in float32.

    C_p(κ) = κ^ν / ((2π)^(p/2) I_ν(κ)) with ν = p/2 - 1. The Bessel function I_ν is replaced by its
    uniform expansion for large orders with one correction (DLMF 10.41.3), which is off by less
    than 4e-5 for p of 64 or more at any κ. The gradient is that of the expansion, and 0 at κ = 0.

    Args:
        kappa: concentrations of 0 or more.
        p: the dimension of the space that contains the sphere, at least 3.

    Raises:
        ValueError: p is less than 3.
    """
    if p < 3:
        raise ValueError(f"p is {p}; expected 3 or more, because the expansion divides by p/2 - 1")
    order = p / 2 - 1

    def correction(t: Float[Array, "*K"] | float) -> Float[Array, "*K"]:
        return jnp.log1p((3 * t - 5 * t**3) / (24 * order))

    # Relative to the limit at 0, which is known exactly, so that float32 is exact for small κ.
    at_zero = math.lgamma(p / 2) + order * math.log(2) - p / 2 * math.log(2 * math.pi)
    z = kappa.astype(jnp.float32) / order
    s = jnp.sqrt(1 + z**2)
    excess = z**2 / (1 + s)  # s - 1
    change = order * (jnp.log1p(excess / 2) - excess) + jnp.log(s) / 2
    return at_zero + change - correction(1 / s) + correction(1.0)


def vmf_logits(
    y: Float[Array, "*B p"], weight: Float[Array, "K p"], temperature: Float[Array, ""] | float
) -> Float[Array, "*B K"]:
    """Returns the log densities <w, y> / τ + log C_p(|w| / τ) of the prototypes, in float32.

    Student and teacher each use their own temperature, for the concentrations too. Gradients flow
    through C_p.

    Args:
        y: unit embeddings.
        weight: the prototypes w, of any length.
        temperature: τ.
    """
    y, weight = y.astype(jnp.float32), weight.astype(jnp.float32)
    products = jnp.einsum("...p,kp->...k", y, weight, precision=jax.lax.Precision.HIGHEST)
    lengths = optax.safe_norm(weight, 1e-12, axis=-1)  # zero rows have a finite gradient
    return products / temperature + log_c(lengths / temperature, weight.shape[-1])
