"""Signs of health: they tell learning from collapse long before the k-NN accuracy does."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sop_jax.objectives.sop.prototypes import SOPs

PATIENCE = 3  # logged steps in a row that look collapsed before a run is called collapsing


def entropy(p: Float[Array, "*B K"]) -> Float[Array, "*B"]:
    """Returns the entropy of each distribution, in nats."""
    return -jax.scipy.special.xlogy(p, p).sum(-1)


def agreement(student: Float[Array, "B V d"], teacher: Float[Array, "B Q d"]) -> Float[Array, ""]:
    """Returns the correlation over images of student views with the teacher's other views.

    Embeddings are centred over the batch, and the mean is over all pairs of different views, in
    [-1, 1]. A direction of the embedding grows only if its agreement exceeds the ratio of the
    teacher's temperature to the student's, and shrinks otherwise: the linearised [CLS] loss moves
    the deviation from the mean along teacher / tau_t - student / tau_s.

    Args:
        student: embeddings of all V views, the global ones first.
        teacher: embeddings of the Q global views.
    """
    student = student - student.mean(0)
    teacher = teacher - teacher.mean(0)
    products = jnp.einsum("bvd,bqd->vq", student, teacher, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.sqrt((student**2).sum((0, 2))[:, None] * (teacher**2).sum((0, 2)))
    pairs = 1.0 - jnp.eye(student.shape[1], teacher.shape[1])
    return (pairs * products / jnp.maximum(norms, 1e-12)).sum() / pairs.sum()


def effective_rank(x: Float[Array, "B d"]) -> Float[Array, ""]:
    """Returns the effective rank of the centred rows, from 1 to d (Roy & Vetterli, 2007).

    This is the exponential of the entropy of the singular values, normalised to sum to 1.
    """
    x = x - x.mean(0)
    sums = "bi,bj->ij" if len(x) > x.shape[1] else "ij,kj->ik"  # the smaller of the two products
    gram = jnp.einsum(sums, x, x, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.linalg.eigvalsh(gram)
    # Singular values that are only rounding error do not count.
    values = jnp.sqrt(jnp.where(squares > 1e-6 * squares.max(), squares, 0))
    return jnp.exp(entropy(values / jnp.maximum(values.sum(), 1e-12)))


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
        embedding_std: the standard deviation of the teacher's embeddings over the batch, times
            sqrt(d): 1 if they fill the sphere, 0 if all are the same point.
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
        "embedding_std": jnp.sqrt(rows.var(0).mean() * rows.shape[1]),
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
