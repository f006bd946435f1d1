"""Both losses, compared with explicit loops over views and images in float64."""

import chex
import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest

from sop_jax.models.head import unit
from sop_jax.objectives.losses import cls_loss, cross_entropy, mim_loss
from sop_jax.objectives.sop.assignment import log_assignment
from sop_jax.objectives.sop.prototypes import SOPs, cast_votes

BATCH, PATCHES, COUNT, DIM = 3, 4, 6, 5
STUDENT, TEACHER = 0.1, 0.04  # temperatures

assign = jax.jit(log_assignment)


def cls_of_sops(
    student: jax.Array, targets: jax.Array, sops: SOPs, temperature: float, at_once: int = 1
) -> jax.Array:
    return cls_loss(
        student, targets, lambda _, u: log_assignment(u, sops, temperature), at_once=at_once
    )


def mim_of_sops(
    student: jax.Array, teacher: jax.Array, mask: jax.Array, sops: SOPs, at_once: int = 1
) -> jax.Array:
    return mim_loss(
        student,
        teacher,
        mask,
        assign=lambda _, u: log_assignment(u, sops, STUDENT),
        assign_teacher=lambda u: log_assignment(u, sops, TEACHER),
        at_once=at_once,
    )


cls = jax.jit(cls_of_sops)
mim = jax.jit(jax.value_and_grad(mim_of_sops))


def random_units(seed: int, *shape: int) -> jax.Array:
    return unit(jax.random.normal(jax.random.key(seed), shape))


def random_sops(size: int) -> SOPs:
    embeddings = random_units(0, size, COUNT, DIM)
    return SOPs(embeddings, cast_votes(embeddings, "similarity", 0.1))


def assignment(u: jax.Array, sops: SOPs, temperature: float) -> np.ndarray:
    return np.exp(np.asarray(assign(u, sops, temperature), float))


def assert_same_gradient(found: jax.Array, expected: jax.Array) -> None:
    """Compares gradients [..., D], whose errors are relative to the length of the longest.

    Any element may be a small difference of large terms, whose rounding depends on the processor.
    """
    longest = np.linalg.norm(expected, axis=-1).max()
    assert np.abs(found - expected).max() <= 1e-6 * longest


@pytest.mark.parametrize(("views", "globals_"), [(2, 2), (5, 2), (5, 3)])
def test_cls_loss_is_the_mean_over_pairs_of_different_views(views: int, globals_: int) -> None:
    sops = random_sops(3)
    student, teacher = random_units(1, BATCH, views, DIM), random_units(2, BATCH, globals_, DIM)
    targets, p = assignment(teacher, sops, TEACHER), assignment(student, sops, STUDENT)
    terms = [
        -(targets[b, q] * np.log(p[b, v])).sum()
        for q in range(globals_)
        for v in range(views)
        for b in range(BATCH)
        if v != q
    ]
    assert len(terms) == globals_ * (views - 1) * BATCH
    loss = cls(student, jnp.asarray(targets, jnp.float32), sops, STUDENT)
    assert loss == pytest.approx(np.mean(terms), rel=1e-5)


def test_a_view_learns_only_from_other_views() -> None:
    """With two views, the first learns only from the target of the second."""
    sops, student = random_sops(2), random_units(1, BATCH, 2, DIM)
    targets = jnp.asarray(assignment(random_units(2, BATCH, 2, DIM), sops, TEACHER), jnp.float32)
    gradient = jax.jit(jax.grad(cls_of_sops))
    before = gradient(student, targets, sops, STUDENT)
    after = gradient(student, targets.at[:, 0].set(1 / COUNT), sops, STUDENT)
    np.testing.assert_array_equal(before[:, 0], after[:, 0])
    assert jnp.abs(before[:, 1] - after[:, 1]).max() > 1e-3


def test_mim_loss_is_the_mean_over_images_of_their_masked_patches() -> None:
    sops, shape = random_sops(1), (BATCH, 2, PATCHES)
    student, teacher = random_units(1, *shape, DIM), random_units(2, *shape, DIM)
    mask = np.random.default_rng(0).random(shape) < 0.5
    mask[1, 0] = False
    mask[0, 1] = True
    p, targets = assignment(student, sops, STUDENT), assignment(teacher, sops, TEACHER)
    images = []
    for view in range(2):
        for image in range(BATCH):
            terms = [
                -(targets[image, view, i] * np.log(p[image, view, i])).sum()
                for i in np.flatnonzero(mask[image, view])
            ]
            images.append(np.mean(terms) if terms else 0.0)
    assert 0.0 in images
    loss, gradient = mim(student, teacher, jnp.asarray(mask), sops)
    assert loss == pytest.approx(np.mean(images), rel=1e-5)
    assert (np.abs(gradient).max(-1) > 0).tolist() == mask.tolist()


def test_mim_loss_without_any_mask_is_zero_and_has_no_gradient() -> None:
    sops, patches = random_sops(1), random_units(1, BATCH, 2, PATCHES, DIM)
    mask = jnp.zeros((BATCH, 2, PATCHES), bool)
    loss, gradient = mim(patches, patches, mask, sops)
    assert loss == 0
    assert jnp.abs(gradient).max() == 0


def test_prototypes_that_are_all_alike_give_ln_k() -> None:
    embeddings = jnp.broadcast_to(random_units(0, DIM), (2, COUNT, DIM))
    sops = SOPs(embeddings, jnp.full((2, COUNT), 0.9))
    student = random_units(1, BATCH, 3, DIM)
    targets = jnp.asarray(assignment(student[:, :2], sops, TEACHER), jnp.float32)
    loss = cls(student, targets, sops, STUDENT)
    assert loss == pytest.approx(np.log(COUNT), rel=1e-5)
    patches = random_units(2, BATCH, 2, PATCHES, DIM)
    mask = jnp.ones((BATCH, 2, PATCHES), bool)
    loss, _ = mim(patches, patches, mask, sops)
    assert loss == pytest.approx(np.log(COUNT), rel=1e-5)


def test_losses_rise_when_the_student_disagrees() -> None:
    sops, teacher = random_sops(2), jnp.tile(random_units(1, BATCH, 1, DIM), (1, 2, 1))
    targets = jnp.asarray(assignment(teacher, sops, STUDENT), jnp.float32)
    agreeing = cls(teacher, targets, sops, STUDENT)
    opposed = cls(-teacher, targets, sops, STUDENT)
    assert opposed > agreeing + 0.5


def test_cross_entropy_by_hand() -> None:
    target, p = jnp.array([[0.5, 0.5], [1.0, 0.0]]), jnp.array([[0.25, 0.75], [0.5, 0.5]])
    expected = [-0.5 * np.log(0.25 * 0.75), np.log(2)]
    np.testing.assert_allclose(cross_entropy(target, jnp.log(p)), expected, rtol=1e-6)


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 8])
def test_views_at_once_change_neither_loss_nor_gradient(at_once: int) -> None:
    """Compared with all logits at once, differentiated by JAX."""
    sops, student = random_sops(3), random_units(1, BATCH, 5, DIM)
    targets = jnp.asarray(assignment(random_units(2, BATCH, 2, DIM), sops, TEACHER), jnp.float32)

    def plain(student: jax.Array) -> jax.Array:
        terms = -jnp.einsum("bqk,bvk->qvb", targets, log_assignment(student, sops, STUDENT))
        return sum(terms[q, v].mean() for q in range(2) for v in range(5) if q != v) / 8

    loss, gradient = jax.jit(jax.value_and_grad(cls_of_sops), static_argnums=4)(
        student, targets, sops, STUDENT, at_once
    )
    expected, expected_gradient = jax.jit(jax.value_and_grad(plain))(student)
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert_same_gradient(gradient, expected_gradient)


@pytest.mark.parametrize("at_once", [1, 2])
def test_patches_that_are_not_masked_need_not_be_given(at_once: int) -> None:
    """Only the masked patches, in any order and padded, give the same loss and gradient."""
    sops, shape = random_sops(1), (BATCH, 2, PATCHES)
    student, teacher = random_units(1, *shape, DIM), random_units(2, *shape, DIM)
    mask = jnp.asarray(np.random.default_rng(3).random(shape) < 0.4)
    indices = jnp.argsort(~mask, axis=-1)[..., : int(mask.sum(-1).max()) + 1]

    def some(student: jax.Array) -> jax.Array:
        chosen = [jnp.take_along_axis(x, indices[..., None], axis=2) for x in (student, teacher)]
        masked = jnp.take_along_axis(mask, indices, axis=-1)
        return mim_of_sops(*chosen, masked, sops, at_once)

    loss, gradient = jax.jit(jax.value_and_grad(some))(student)
    expected, expected_gradient = mim(student, teacher, mask, sops)
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert_same_gradient(gradient, expected_gradient)


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_learnt_prototypes_get_the_gradient_of_the_plain_loss(at_once: int) -> None:
    student, targets = random_units(1, BATCH, 5, DIM), jnp.full((BATCH, 2, COUNT), 1 / COUNT)

    def assign_learnt(learnt: jax.Array, u: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(u @ learnt / STUDENT)

    def made_along(learnt: jax.Array, student: jax.Array) -> jax.Array:
        return cls_loss(student, targets, assign_learnt, learnt, at_once)

    def plain(learnt: jax.Array, student: jax.Array) -> jax.Array:
        terms = -jnp.einsum("bqk,bvk->qvb", targets, assign_learnt(learnt, student))
        return sum(terms[q, v].mean() for q in range(2) for v in range(5) if q != v) / 8

    learnt = random_units(3, DIM, COUNT)
    found = jax.jit(jax.value_and_grad(made_along, argnums=(0, 1)))(learnt, student)
    expected = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(learnt, student)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)
    assert all(jnp.abs(gradient).max() > 1e-3 for gradient in found[1])


def test_the_gradient_of_learnt_prototypes_takes_no_more_memory_than_the_plain_loss() -> None:
    """There is one copy of it, not one per view."""
    views, count, dim = 12, 4096, 64
    student = jax.ShapeDtypeStruct((8, views, dim), jnp.float32)
    targets = jax.ShapeDtypeStruct((8, 2, count), jnp.float32)
    learnt = jax.ShapeDtypeStruct((dim, count), jnp.float32)

    def assign_learnt(learnt: jax.Array, u: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(u @ learnt)

    def made_along(learnt: jax.Array, student: jax.Array, targets: jax.Array) -> jax.Array:
        return cls_loss(student, targets, assign_learnt, learnt)

    def plain(learnt: jax.Array, student: jax.Array, targets: jax.Array) -> jax.Array:
        terms = jnp.einsum("bqk,bvk->bqv", targets, assign_learnt(learnt, student))
        return -(terms * (1 - jnp.eye(2, views))).sum()

    with layouts.usual_passes():
        taken = [
            jax.jit(jax.grad(loss, argnums=(0, 1)))
            .lower(learnt, student, targets)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
            for loss in (made_along, plain)
        ]
    assert taken[0] <= taken[1]
    assert taken[0] < 4 * 4 * dim * count
