"""The signs of health of methods with prototypes, and the verdict on whether a run collapses."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sop_jax.models.head import unit
from sop_jax.objectives.health import agreement, effective_rank, embedding_std, entropy

PATIENCE = 3  # logged steps in a row that look collapsed before a run is called collapsing


def measure(
    student_cls: Float[Array, "B V d"],
    teacher_cls: Float[Array, "B Q d"],
    targets: Float[Array, "B Q K"],
    pairs: Float[Array, "V Q"],
) -> dict[str, Array]:
    """Returns the signs of health of one step, by name.

    Args:
        student_cls: the student's [CLS] embeddings of its V views, of any norm.
        teacher_cls: the teacher's [CLS] embeddings of its Q views.
        targets: the teacher's assignments to K prototypes.
        pairs: 1 for each pair of different views and 0 for others.

    Returns:
        log_k: ln K, the largest value of the next two.
        entropy: the mean entropy of the targets, in nats; ln K if they are uniform.
        entropy_of_mean: the entropy of their mean over the batch, in nats; low if all images share
            a few prototypes.
        winning_prototypes: the share of the K prototypes that are the first choice of some view,
            in [0, 1]; a batch of B images reaches at most QB / K.
        embedding_std: `embedding_std` of the teacher's embeddings.
        effective_rank: `effective_rank` of the teacher's embeddings.
        agreement: `agreement` of student and teacher.
    """
    student_cls, teacher_cls = unit(student_cls), unit(teacher_cls)
    assigned, rows = (x.reshape(-1, x.shape[-1]) for x in (targets, teacher_cls))
    return assignment_signs(assigned, rows) | {
        "agreement": agreement(student_cls, teacher_cls, pairs)
    }


def assignment_signs(
    assigned: Float[Array, "N K"], embeddings: Float[Array, "N d"]
) -> dict[str, Array]:
    """Returns the signs of health that need no pairs of views, see `measure`.

    Args:
        assigned: the assignments of N tokens to K prototypes.
        embeddings: the teacher's unit embeddings of these tokens.
    """
    count = assigned.shape[-1]
    winners = jnp.zeros(count).at[assigned.argmax(-1)].set(1)
    return {
        "log_k": jnp.log(jnp.float32(count)),
        "entropy": entropy(assigned).mean(),
        "entropy_of_mean": entropy(assigned.mean(0)),
        "winning_prototypes": winners.mean(),
        "embedding_std": embedding_std(embeddings),
        "effective_rank": effective_rank(embeddings),
    }


def verdict(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns a warning that names the cause and remedies if a run is collapsing, else None.

    A run is collapsing if, at its last `PATIENCE` logged steps, all images share a few prototypes,
    or the targets are nearly uniform while the embeddings are nearly at one point.

    Args:
        rows: logged steps with the signs of `measure`, the newest last.
    """
    if len(rows) < PATIENCE or not all(is_collapsing(row) for row in rows[-PATIENCE:]):
        return None
    row = rows[-1]
    if shares_few_prototypes(row):
        cause = f"all images share a few prototypes (entropy_of_mean {row['entropy_of_mean']:.2f})"
    else:
        cause = (
            f"the targets are uniform (entropy {row['entropy']:.2f} of {row['log_k']:.2f}) and the "
            f"spread of the embeddings (embedding_std) is {row['embedding_std']:.2f} of 1"
        )
    return (
        f"collapsing: {cause}. Try a lower teacher_temperature, milder crops (larger "
        "augment.global_scale and augment.local_scale), a larger batch_size, a smaller optim.lr, "
        "and for small networks a larger model.init_std and model.position_std"
    )


def is_collapsing(row: Mapping[str, Any]) -> bool:
    """Whether one logged step looks collapsed; see `verdict`."""
    if any(row[name] is None for name in ("entropy", "entropy_of_mean", "embedding_std")):
        return False  # the sign was not finite, which is reported elsewhere
    uniform = row["entropy"] > 0.97 * row["log_k"]
    return shares_few_prototypes(row) or (uniform and row["embedding_std"] < 0.25)


def shares_few_prototypes(row: Mapping[str, Any]) -> bool:
    """Whether all images of a batch together choose only a few prototypes."""
    return row["entropy_of_mean"] < 0.25 * row["log_k"]
