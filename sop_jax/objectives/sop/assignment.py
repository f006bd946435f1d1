"""Soft assignment of embeddings to SOPs: P(u) = softmax(u Dᵀ / τ) Y (section 2.2.1)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sop_jax.objectives.sop.prototypes import SOPs


def log_assignment(
    u: Float[Array, "*B d"], sops: SOPs, temperature: Float[Array, ""] | float
) -> Float[Array, "*B K"]:
    """Log P(u), in float32 and finite for every finite u.

    Y [K(k+1), K] is never built. A row of Y is one vote w for its own SOP and (1-w)/(K-1) for
    every other, so that P_i is the support's own votes plus what the supports of all other SOPs
    leave over. Both are sums of exponentials, taken relative to the largest logit of each SOP.
    Every logit is raised once.
    """
    count = sops.votes.shape[-1]
    logits = (
        jnp.einsum(
            "...d,skd->...sk",
            u.astype(jnp.float32),
            sops.embeddings,
            precision=jax.lax.Precision.HIGHEST,
        )
        / temperature
    )
    # Relative to the largest of all, so that float32 is exact where the probability is.
    logits -= jax.lax.stop_gradient(logits.max(axis=(-2, -1), keepdims=True))
    peaks = jax.lax.stop_gradient(logits.max(axis=-2, keepdims=True))  # [..., 1, K]
    terms = jnp.exp(logits - peaks)
    peaks = peaks.squeeze(-2)
    heights = jnp.exp(peaks)
    total = jnp.log((terms.sum(-2) * heights).sum(-1, keepdims=True))
    tiny = jnp.finfo(jnp.float32).tiny
    votes = peaks + jnp.log(jnp.maximum((terms * sops.votes).sum(-2), tiny))
    rests = (1 - sops.votes) / max(count - 1, 1)
    own = (terms * rests).sum(-2) * heights
    everything = own.sum(-1, keepdims=True)
    # The one SOP that may hold nearly everything gets a sum of its own: the difference would be
    # all rounding there, and is exact to float32 elsewhere.
    largest = jnp.arange(count) == own.argmax(-1, keepdims=True)
    without = jnp.where(largest, 0, own).sum(-1, keepdims=True)
    others = jnp.where(largest, without, everything - own)
    return jnp.logaddexp(votes, log_positive(others)) - total


def log_positive(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Log x, and -inf with a zero gradient where x is 0."""
    positive = x > 0
    return jnp.where(positive, jnp.log(jnp.where(positive, x, 1)), -jnp.inf)
