"""SOP's signs of health, and the verdict on whether a run is collapsing."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sop_jax.objectives.health import agreement, effective_rank, embedding_std, entropy
from sop_jax.objectives.sop.prototypes import SOPs

PATIENCE = 3  # logged steps in a row that look collapsed before a run is called collapsing


def measure(
    student_cls: Float[Array, "B V d"],
    teacher_cls: Float[Array, "B Q d"],
    targets: Float[Array, "tasks B Q K"],
    sops: SOPs,
    memory_filled: Float[Array, ""],
) -> dict[str, Array]:
    """Returns the signs of health of one step, by name.

    Args:
        student_cls: the student's [CLS] embeddings of all V views, the global ones first.
        teacher_cls: the teacher's [CLS] embeddings of the Q global views.
        targets: the teacher's assignments to the K SOPs of every task.
        sops: the SOPs of every task.
        memory_filled: the share of the memory of [CLS] that came from images, in [0, 1].

    Returns:
        log_k: ln K, the largest value of the next two.
        entropy: the mean entropy of the teacher's assignments, in nats; ln K if they are uniform.
        entropy_of_mean: the entropy of the mean assignment over the batch, in nats; low if all
            images share a few SOPs.
        winning_sops: the share of the K SOPs that are the first choice of some view, in [0, 1]; a
            batch of B images reaches at most QB / K.
        support_cosine: the mean cosine of supports to their anchor; 1 if there are no supports.
        embedding_std: `embedding_std` of the teacher's embeddings.
        effective_rank: `effective_rank` of the teacher's embeddings.
        agreement: `agreement` of student and teacher.
        memory_filled: as given.
    """
    tasks, _, _, count = targets.shape
    first_choices = targets.argmax(-1).reshape(tasks, -1)
    winners = jax.vmap(lambda sops: jnp.zeros(count).at[sops].set(1).mean())(first_choices)
    anchors, supports = sops.embeddings[:, :1], sops.embeddings[:, 1:]
    cosine = (anchors * supports).sum(-1).mean() if supports.shape[1] else jnp.ones(())
    rows = teacher_cls.reshape(-1, teacher_cls.shape[-1])
    return {
        "log_k": jnp.log(jnp.float32(count)),
        "entropy": entropy(targets).mean(),
        "entropy_of_mean": entropy(targets.mean((1, 2))).mean(),
        "winning_sops": winners.mean(),
        "support_cosine": cosine,
        "embedding_std": embedding_std(rows),
        "effective_rank": effective_rank(rows),
        "agreement": agreement(student_cls, teacher_cls),
        "memory_filled": memory_filled,
    }


def verdict(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns a warning that names the cause and remedies if a run is collapsing, else None.

    A run is collapsing if its last `PATIENCE` logged steps all look collapsed, as some of the
    first steps of a healthy run do. A step looks collapsed if all images share a few SOPs, or if
    the embeddings are nearly at one point and either the assignments are nearly uniform or the
    views agree less than the ratio of the temperatures requires; see `agreement`.

    Args:
        rows: logged steps with the signs of `measure` and both temperatures, the newest last.
    """
    if len(rows) < PATIENCE or not all(is_collapsing(row) for row in rows[-PATIENCE:]):
        return None
    row = rows[-1]
    ratio = row["teacher_temperature"] / row["student_temperature"]
    cause = f"the spread of the embeddings (embedding_std) is {row['embedding_std']:.2f} of 1"
    if shares_few_sops(row):
        cause = f"all images share a few SOPs (entropy_of_mean {row['entropy_of_mean']:.2f})"
    if row["agreement"] < ratio:
        cause += (
            f", and the agreement of views is {row['agreement']:.2f}, below the ratio of the "
            f"temperatures, {ratio:.2f}"
        )
    return (
        f"collapsing: {cause}. Try a lower sop.teacher_temperature, milder crops (larger "
        "augment.global_scale and augment.local_scale), a larger batch_size, and for small "
        "networks a larger model.init_std and model.position_std"
    )


def is_collapsing(row: Mapping[str, Any]) -> bool:
    """Whether one logged step looks collapsed; see `verdict`."""
    if any(row[name] is None for name in ("entropy", "embedding_std", "agreement")):
        return False  # the sign was not finite, which is reported elsewhere
    ratio = row["teacher_temperature"] / row["student_temperature"]
    uniform = row["entropy"] > 0.97 * row["log_k"]
    one_point = row["embedding_std"] < 0.25
    return shares_few_sops(row) or (one_point and (uniform or row["agreement"] < ratio))


def shares_few_sops(row: Mapping[str, Any]) -> bool:
    """Whether all images of a batch together choose only a few SOPs."""
    return row["entropy_of_mean"] < 0.25 * row["log_k"]
