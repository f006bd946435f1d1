"""Soft assignment of embeddings to SOPs: P(u) = softmax(u Dᵀ / τ) Y (section 2.2.1)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sop_jax.objectives.sop.prototypes import SOPs


def log_assignment(
    u: Float[Array, "*B d"], sops: SOPs, temperature: Float[Array, ""] | float
) -> Float[Array, "*B K"]:
    """Returns log P(u), in float32 and finite for every finite u.

    Y [K(k+1), K] is never built. A row of Y has the vote w of a support for its own SOP and
    (1-w)/(K-1) for every other SOP. P_i is therefore the votes of SOP i's own supports plus the
    remainders that the supports of all other SOPs spread. Both are sums of exponentials, computed
    relative to the largest logit of each SOP, and each exponential is computed once.

    Args:
        u: unit embeddings.
        sops: the SOPs of one task.
        temperature: τ.
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
    # Relative to the largest logit, so that float32 is most exact where the probability is high.
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
    # The remainders of the other SOPs are the sum of all minus a SOP's own. For the SOP with the
    # largest, which may be nearly the whole sum, the difference would be mostly rounding error, so
    # the others are summed directly.
    largest = jnp.arange(count) == own.argmax(-1, keepdims=True)
    without = jnp.where(largest, 0, own).sum(-1, keepdims=True)
    others = jnp.where(largest, without, everything - own)
    return jnp.logaddexp(votes, log_positive(others)) - total


def log_positive(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Returns log x, or -inf with a zero gradient where x is 0."""
    positive = x > 0
    return jnp.where(positive, jnp.log(jnp.where(positive, x, 1)), -jnp.inf)
