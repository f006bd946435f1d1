"""The cross-entropies of views and of masked patches, for any way to assign them to prototypes.

With SOPs as prototypes these are equations 2 and 4 of the paper.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

LOGITS = 2**28  # bytes per device of the student's logits that are in memory at the same time


@runtime_checkable
class Assign(Protocol):
    """A function that softly assigns embeddings to K prototypes."""

    def __call__(self, learnt: Any, u: Float[Array, "*B d"]) -> Float[Array, "*B K"]:
        """Returns log probabilities in float32, differentiable with respect to both arguments.

        Args:
            learnt: parameters that learn by gradient, such as prototypes; () if there are none.
            u: unit embeddings.
        """


def cross_entropy(target: Float[Array, "*B K"], log_p: Float[Array, "*B K"]) -> Float[Array, "*B"]:
    """Returns the cross-entropy -sum(target * log_p) in nats."""
    return -(target * log_p).sum(-1)


def cls_loss(
    student: Float[Array, "B V d"],
    targets: Float[Array, "B Q K"],
    assign: Assign,
    learnt: Any = (),
    at_once: int = 1,
    pairs: Float[Array, "V Q"] | None = None,
) -> Float[Array, ""]:
    """Returns the loss of equation 2: each student view predicts the teacher's other views.

    The loss, in nats, is the mean over images and over all pairs of a student view and a different
    view of the teacher.

    Args:
        student: unit [CLS] embeddings of all V views, the global views first.
        targets: the teacher's assignments of the Q global views, as probabilities.
        assign: computes the student's assignments.
        learnt: parameters of `assign`, such as prototypes; they receive a gradient.
        at_once: the number of views whose logits are in memory at the same time.
        pairs: 1 for each pair of views that counts and 0 for others; by default both networks see
            the same global views, and a view does not predict itself.
    """
    (batch, views, _), globals_ = student.shape, targets.shape[1]
    if pairs is None:
        pairs = different_views(range(views), range(globals_))

    def view(learnt: Any, student: Array, partners: Array) -> Array:
        target = jnp.einsum("q,bqk->bk", partners, targets, precision=jax.lax.Precision.HIGHEST)
        return cross_entropy(target, assign(learnt, student)).sum()

    total = sum_over_views(view, at_once, learnt, by_view(student), pairs)
    return total / (pairs.sum() * batch)


def mim_loss(
    student: Float[Array, "B Q M d"],
    teacher: Float[Array, "B Q M d"],
    mask: Bool[Array, "B Q M"],
    assign: Assign,
    assign_teacher: Callable[[Float[Array, "*B d"]], Float[Array, "*B K"]],
    learnt: Any = (),
    at_once: int = 1,
) -> Float[Array, ""]:
    """Returns the loss of equation 4: masked patches predict the teacher's, within each view.

    The loss, in nats, is the mean over the masked patches of a view, then over images and views.
    A view without a masked patch counts as zero.

    Args:
        student: unit embeddings of M patches of each of the Q global views.
        teacher: unit embeddings of the same patches by the teacher, which sees no mask.
        mask: which of the patches are masked; only they count.
        assign: computes the student's assignments.
        assign_teacher: computes the logarithm of the targets; it receives no gradient.
        learnt: parameters of `assign`, such as prototypes; they receive a gradient.
        at_once: the number of views whose logits are in memory at the same time.
    """

    def view(learnt: Any, student: Array, teacher: Array, mask: Array) -> Array:
        loss = cross_entropy(jnp.exp(assign_teacher(teacher)), assign(learnt, student))
        count = jnp.maximum(mask.sum(-1), 1).astype(loss.dtype)
        per_image = (loss * mask.astype(loss.dtype)).sum(-1) / count
        return per_image.mean()

    total = sum_over_views(view, at_once, learnt, *map(by_view, (student, teacher, mask)))
    return total / student.shape[1]


def different_views(student: Sequence[int], teacher: Sequence[int]) -> Float[Array, "V Q"]:
    """Returns 1 for each pair of different views, and 0 for pairs of the same view.

    Args:
        student: the numbers of the views that the student sees.
        teacher: those that the teacher sees.
    """
    return (jnp.array(student)[:, None] != jnp.array(teacher)).astype(jnp.float32)


def views_at_once(student: Float[Array, "B V ..."], logits: int, mesh: Mesh) -> int:
    """Returns the number of views whose logits take at most LOGITS bytes per device, at least 1.

    Args:
        student: the embeddings of a microbatch, split over the devices by image.
        logits: the number of logits of an embedding.
        mesh: the devices.
    """
    views = student.shape[1]
    rows = student.size // student.shape[-1] / views / mesh.devices.size
    return max(1, min(views, int(LOGITS / (4 * rows * logits))))


def by_view(x: Array) -> Array:
    """Moves the axis of views of an array [B V ...] to the front: [V B ...]."""
    return jnp.moveaxis(x, 1, 0)


def sum_over_views(
    term: Callable[..., Float[Array, ""]],
    at_once: int,
    learnt: Any,
    student: Float[Array, "V ..."],
    *others: Array,
) -> Float[Array, ""]:
    """Returns the sum of `term(learnt, student, *others)` over views.

    The logits (B x K(k+1) per view) are the largest arrays of the method. Gradients are computed
    along with the terms, `at_once` views at a time, so that no logits are kept for the backward
    pass and none are computed twice. The gradient of `learnt` is summed on the way, so that only
    one copy of it exists.

    Args:
        term: the loss of one view, summed over its images.
        at_once: the number of views whose logits are in memory at the same time.
        learnt: the first argument of `term`, the same for all views; differentiable.
        student: the second argument, one entry per view; differentiable.
        *others: further arguments, one entry per view; they receive no gradient.
    """
    fixed, inputs = jax.lax.stop_gradient((learnt, (student, *others)))

    def some(inputs: tuple[Array, ...]) -> tuple[Array, tuple[Any, Array]]:
        """Returns the sum over some views, and its gradients."""

        def total(learnt: Any, student: Array) -> Array:
            return jax.vmap(lambda *view: term(learnt, *view))(student, *inputs[1:]).sum()

        return jax.value_and_grad(total, argnums=(0, 1))(fixed, inputs[0])

    def add(carry: Any, inputs: tuple[Array, ...]) -> tuple[Any, Array]:
        value, (by_learnt, by_student) = some(inputs)
        return jax.tree.map(jnp.add, carry, (value, by_learnt)), by_student

    carry, whole = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, fixed)), len(student) // at_once
    chunks = [x[: whole * at_once].reshape(whole, at_once, *x.shape[1:]) for x in inputs]
    carry, by_student = jax.lax.scan(add, carry, tuple(chunks))
    by_student = by_student.reshape(-1, *student.shape[1:])
    if len(by_student) < len(student):
        carry, last = add(carry, tuple(x[whole * at_once :] for x in inputs))
        by_student = jnp.concatenate([by_student, last])
    value, by_learnt = carry
    return (
        value
        + zero_with_gradient(learnt, fixed, by_learnt)
        + zero_with_gradient(student, inputs[0], by_student)
    )


def zero_with_gradient(variables: Any, fixed: Any, gradients: Any) -> Array:
    """Returns zero, with `gradients` as its gradient with respect to `variables`.

    `fixed` has the values of `variables`, without their gradient.
    """
    products = jax.tree.map(lambda x, x0, g: ((x - x0) * g).sum(), variables, fixed, gradients)
    return sum(jax.tree.leaves(products), start=jnp.zeros(()))
