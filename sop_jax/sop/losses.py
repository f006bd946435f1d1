"""The two losses of SOP: agreement of views, and masked image modelling (equations 2 and 4)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sop_jax.sop.assignment import log_assignment
from sop_jax.sop.prototypes import SOPs

Temperature = Float[Array, ""] | float


def cross_entropy(target: Float[Array, "*B K"], log_p: Float[Array, "*B K"]) -> Float[Array, "*B"]:
    """-sum target log p."""
    return -(target * log_p).sum(-1)


def cls_loss(
    student: Float[Array, "V B d"],
    targets: Float[Array, "Q B K"],
    sops: SOPs,
    temperature: Temperature,
) -> Float[Array, ""]:
    """Equation 2 over all pairs of different views, mean over pairs and images.

    Args:
        student: unit [CLS] embeddings of all views, global ones first.
        targets: the teacher's assignments of the global views.
        sops: the prototypes that both are assigned to.
        temperature: the student's.
    """
    views, globals_, batch = len(student), len(targets), student.shape[1]
    pairs = 1.0 - jnp.eye(views, globals_)  # a view never predicts itself

    # One view at a time, recomputed in the backward pass: the logits of a single view
    # (B x K(k+1)) are the largest array of the method.
    @jax.checkpoint
    def view(total: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
        embedding, partners = inputs
        target = jnp.tensordot(partners, targets, 1, precision=jax.lax.Precision.HIGHEST)
        log_p = log_assignment(embedding, sops, temperature)
        return total + cross_entropy(target, log_p).sum(), None

    total, _ = jax.lax.scan(view, jnp.zeros(()), (student, pairs))
    return total / (pairs.sum() * batch)


def mim_loss(
    student: Float[Array, "V B L d"],
    teacher: Float[Array, "V B L d"],
    mask: Bool[Array, "V B L"],
    sops: SOPs,
    student_temperature: Temperature,
    teacher_temperature: Temperature,
) -> Float[Array, ""]:
    """Equation 4: same view, masked patches; mean over an image's patches, then images and views.

    An image without a masked patch counts as zero.
    """

    @jax.checkpoint
    def view(total: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        student, teacher, mask = inputs
        target = jnp.exp(log_assignment(teacher, sops, teacher_temperature))
        loss = cross_entropy(target, log_assignment(student, sops, student_temperature))
        per_image = (loss * mask).sum(-1) / jnp.maximum(mask.sum(-1), 1)
        return total + per_image.mean(), None

    total, _ = jax.lax.scan(view, jnp.zeros(()), (student, teacher, mask))
    return total / len(student)
