"""The two losses of SOP: agreement of views, and masked image modelling (equations 2 and 4)."""

from collections.abc import Callable

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
    at_once: int = 1,
) -> Float[Array, ""]:
    """Equation 2 over all pairs of different views, mean over pairs and images.

    Args:
        student: unit [CLS] embeddings of all views, global ones first.
        targets: the teacher's assignments of the global views.
        sops: the prototypes that both are assigned to.
        temperature: the student's.
        at_once: views whose logits exist together.
    """
    views, globals_, batch = len(student), len(targets), student.shape[1]
    pairs = 1.0 - jnp.eye(views, globals_)  # a view never predicts itself

    def view(student: Array, partners: Array) -> Array:
        target = jnp.tensordot(partners, targets, 1, precision=jax.lax.Precision.HIGHEST)
        return cross_entropy(target, log_assignment(student, sops, temperature)).sum()

    return sum_over_views(view, at_once, student, pairs) / (pairs.sum() * batch)


def mim_loss(
    student: Float[Array, "V B M d"],
    teacher: Float[Array, "V B M d"],
    mask: Bool[Array, "V B M"],
    sops: SOPs,
    student_temperature: Temperature,
    teacher_temperature: Temperature,
    at_once: int = 1,
) -> Float[Array, ""]:
    """Equation 4: same view, masked patches; mean over an image's patches, then images and views.

    An image without a masked patch counts as zero.
    """

    def view(student: Array, teacher: Array, mask: Array) -> Array:
        target = jnp.exp(log_assignment(teacher, sops, teacher_temperature))
        loss = cross_entropy(target, log_assignment(student, sops, student_temperature))
        per_image = (loss * mask).sum(-1) / jnp.maximum(mask.sum(-1), 1)
        return per_image.mean()

    return sum_over_views(view, at_once, student, teacher, mask) / len(student)


def sum_over_views(
    term: Callable[..., Array], at_once: int, student: Float[Array, "V ..."], *others: Array
) -> Float[Array, ""]:
    """The sum of term(student, *others) over views, differentiable by `student` alone.

    Logits (a view's B x K(k+1)) are the largest arrays of the method. A view's gradient is made
    along with its term, `at_once` views at a time, so that none wait for the backward pass and none
    are computed twice.
    """
    fixed = jax.lax.stop_gradient(student)
    terms, gradient = jax.lax.map(
        lambda view: jax.value_and_grad(term)(*view), (fixed, *others), batch_size=at_once
    )
    return terms.sum() + ((student - fixed) * gradient).sum()  # adds 0, and its gradient
