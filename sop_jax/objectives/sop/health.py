"""Signs of health: what tells learning from collapse long before the k-NN accuracy does."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sop_jax.objectives.sop.prototypes import SOPs

PATIENCE = 3  # logged steps


def entropy(p: Float[Array, "*B K"]) -> Float[Array, "*B"]:
    """The entropy of distributions, in nats."""
    return -jax.scipy.special.xlogy(p, p).sum(-1)


def agreement(student: Float[Array, "B V d"], teacher: Float[Array, "B Q d"]) -> Float[Array, ""]:
    """Correlation over images of a student view and another view of the teacher, mean of pairs.

    Both are centred over the batch. A direction of the embedding grows only where this exceeds
    the ratio of the teacher's to the student's temperature, and shrinks elsewhere: the linearised
    [CLS] loss moves the deviation from the mean along teacher / tau_t - student / tau_s.
    """
    student = student - student.mean(0)
    teacher = teacher - teacher.mean(0)
    products = jnp.einsum("bvd,bqd->vq", student, teacher, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.sqrt((student**2).sum((0, 2))[:, None] * (teacher**2).sum((0, 2)))
    pairs = 1.0 - jnp.eye(student.shape[1], teacher.shape[1])
    return (pairs * products / jnp.maximum(norms, 1e-12)).sum() / pairs.sum()


def effective_rank(x: Float[Array, "B d"]) -> Float[Array, ""]:
    """Exp of the entropy of the normalised singular values of the centred rows (Roy & Vetterli)."""
    x = x - x.mean(0)
    sums = "bi,bj->ij" if len(x) > x.shape[1] else "ij,kj->ik"  # the smaller of the two products
    gram = jnp.einsum(sums, x, x, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.linalg.eigvalsh(gram)
    values = jnp.sqrt(jnp.where(squares > 1e-6 * squares.max(), squares, 0))  # rounding is no rank
    return jnp.exp(entropy(values / jnp.maximum(values.sum(), 1e-12)))


def measure(
    student_cls: Float[Array, "B V d"],
    teacher_cls: Float[Array, "B Q d"],
    targets: Float[Array, "tasks B Q K"],
    sops: SOPs,
    memory_filled: Float[Array, ""],
) -> dict[str, Array]:
    """The signs of one step.

    Returns:
        log_k: ln K, what the next two are measured against.
        entropy: of the teacher's assignments, mean over images; ln K when they say nothing.
        entropy_of_mean: of their mean over the batch; low when all images share a few SOPs.
        winning_sops: share of the K SOPs that are some image's first choice; a batch of B images
            reaches at most 2B / K.
        support_cosine: mean cosine of supports to their anchor (1 where there are none).
        embedding_std: standard deviation over the batch times sqrt(d): 1 when embeddings fill the
            sphere, 0 when all are one point.
        effective_rank: of the teacher's embeddings.
        agreement: see `agreement`.
        memory_filled: share of the memory that came from images.
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
    """What a person should hear about a run: words when it is collapsing, else nothing.

    A run is collapsing when `PATIENCE` logged steps in a row have embeddings at nearly one point
    and either assignments that say nothing or views that agree less than the temperature ratio
    asks for; or when all images share a few SOPs. The first steps of a healthy run may look so.

    Args:
        rows: logged steps with the signs of `measure` and both temperatures, the newest last.
    """
    if len(rows) < PATIENCE or not all(is_collapsing(row) for row in rows[-PATIENCE:]):
        return None
    row = rows[-1]
    ratio = row["teacher_temperature"] / row["student_temperature"]
    cause = f"embeddings spread only {row['embedding_std']:.2f} of 1"
    if shares_few_sops(row):
        cause = f"all images share a few SOPs (entropy_of_mean {row['entropy_of_mean']:.2f})"
    if row["agreement"] < ratio:
        cause += (
            f", and views agree {row['agreement']:.2f}, below the temperature ratio {ratio:.2f}"
        )
    return (
        f"collapsing: {cause}. What helps: a lower sop.teacher_temperature, milder crops "
        "(larger augment.global_scale and augment.local_scale), a larger batch_size, and for small "
        "networks a larger model.init_std and model.position_std"
    )


def is_collapsing(row: Mapping[str, Any]) -> bool:
    """Whether one logged step looks collapsed, see `verdict`."""
    if any(row[name] is None for name in ("entropy", "embedding_std", "agreement")):
        return False  # not a number: that is another failure
    ratio = row["teacher_temperature"] / row["student_temperature"]
    says_nothing = row["entropy"] > 0.97 * row["log_k"]
    one_point = row["embedding_std"] < 0.25
    return shares_few_sops(row) or (one_point and (says_nothing or row["agreement"] < ratio))


def shares_few_sops(row: Mapping[str, Any]) -> bool:
    """Whether the images of a batch, all together, choose only a few SOPs."""
    return row["entropy_of_mean"] < 0.25 * row["log_k"]
