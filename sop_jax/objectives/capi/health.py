"""CAPI's signs of health, and the verdict on whether a run is collapsing."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sop_jax.objectives.health import effective_rank, embedding_std, entropy
from sop_jax.objectives.prototypical.health import PATIENCE, is_collapsing


def measure(assigned: Float[Array, "N K"], features: Float[Array, "N D"]) -> dict[str, Array]:
    """Returns the signs of health of one step, by name.

    Args:
        assigned: the assignments of N patches to K clusters.
        features: the teacher's unit features of these patches.

    Returns:
        log_k: ln K, the largest value of the next two.
        entropy: the mean entropy of the assignments, in nats; ln K if they are uniform.
        entropy_of_mean: the entropy of their mean, in nats.
        winning_prototypes: the share of the K clusters that are the first choice of some patch.
        embedding_std: `embedding_std` of the features.
        effective_rank: `effective_rank` of the features.
    """
    count = assigned.shape[-1]
    winners = jnp.zeros(count).at[assigned.argmax(-1)].set(1)
    return {
        "log_k": jnp.log(jnp.float32(count)),
        "entropy": entropy(assigned).mean(),
        "entropy_of_mean": entropy(assigned.mean(0)),
        "winning_prototypes": winners.mean(),
        "embedding_std": embedding_std(features),
        "effective_rank": effective_rank(features),
    }


def verdict(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns a warning that names the cause and remedies if a run is collapsing, else None.

    The rule is that of all methods with prototypes, see `prototypical.health.verdict`. Since the
    iterations balance the clusters, the usual sign is that the assignments are uniform.

    Args:
        rows: logged steps with the signs of `measure`, the newest last.
    """
    if len(rows) < PATIENCE or not all(is_collapsing(row) for row in rows[-PATIENCE:]):
        return None
    row = rows[-1]
    return (
        f"collapsing: the entropy of the clusters of patches is {row['entropy']:.2f}, and that of "
        f"their mean {row['entropy_of_mean']:.2f}, of {row['log_k']:.2f}; the spread of the "
        f"features (embedding_std) is {row['embedding_std']:.2f} of 1. Try a smaller optim.lr, a "
        "larger capi.lr, a larger batch_size, a smaller mask.ratio, and for small networks a "
        "larger model.init_std and model.position_std"
    )
