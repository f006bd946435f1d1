"""The verdict on whether a run of CAPI is collapsing."""

from collections.abc import Mapping, Sequence
from typing import Any

from sop_jax.objectives.prototypical.health import PATIENCE, is_collapsing


def verdict(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns a warning that names the cause and remedies if a run is collapsing, else None.

    The rule is that of all methods with prototypes, see `prototypical.health.verdict`. Since the
    iterations balance the clusters, the usual sign is that the assignments are uniform.

    Args:
        rows: logged steps with the signs of `assignment_signs`, the newest last.
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
