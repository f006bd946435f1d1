"""Both losses against explicit loops over views and images, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sop_jax.models.head import unit
from sop_jax.sop.assignment import log_assignment
from sop_jax.sop.losses import cls_loss, cross_entropy, mim_loss
from sop_jax.sop.prototypes import SOPs, cast_votes

BATCH, PATCHES, COUNT, DIM = 3, 4, 6, 5
STUDENT, TEACHER = 0.1, 0.04  # temperatures

cls = jax.jit(cls_loss)
mim = jax.jit(jax.value_and_grad(mim_loss))
assign = jax.jit(log_assignment)


def random_units(seed: int, *shape: int) -> jax.Array:
    return unit(jax.random.normal(jax.random.key(seed), shape))


def random_sops(size: int) -> SOPs:
    embeddings = random_units(0, size, COUNT, DIM)
    return SOPs(embeddings, cast_votes(embeddings, "similarity", 0.1))


def assignment(u: jax.Array, sops: SOPs, temperature: float) -> np.ndarray:
    return np.exp(np.asarray(assign(u, sops, temperature), float))


@pytest.mark.parametrize("views", [2, 5])
def test_cls_loss_is_the_mean_over_pairs_of_different_views(views: int) -> None:
    sops = random_sops(3)
    student, teacher = random_units(1, views, BATCH, DIM), random_units(2, 2, BATCH, DIM)
    targets, p = assignment(teacher, sops, TEACHER), assignment(student, sops, STUDENT)
    terms = [
        -(targets[q, b] * np.log(p[v, b])).sum()
        for q in range(2)
        for v in range(views)
        for b in range(BATCH)
        if v != q
    ]
    assert len(terms) == 2 * (views - 1) * BATCH
    loss = cls(student, jnp.asarray(targets, jnp.float32), sops, STUDENT)
    assert loss == pytest.approx(np.mean(terms), rel=1e-5)


def test_a_view_learns_from_other_views_alone() -> None:
    """Of two views, the first learns only from the second one's target."""
    sops, student = random_sops(2), random_units(1, 2, BATCH, DIM)
    targets = jnp.asarray(assignment(random_units(2, 2, BATCH, DIM), sops, TEACHER), jnp.float32)
    gradient = jax.jit(jax.grad(cls_loss))
    before = gradient(student, targets, sops, STUDENT)
    after = gradient(student, targets.at[0].set(1 / COUNT), sops, STUDENT)
    np.testing.assert_array_equal(before[0], after[0])
    assert jnp.abs(before[1] - after[1]).max() > 1e-3


def test_mim_loss_is_the_mean_over_images_of_their_masked_patches() -> None:
    sops, shape = random_sops(1), (2, BATCH, PATCHES)
    student, teacher = random_units(1, *shape, DIM), random_units(2, *shape, DIM)
    mask = np.random.default_rng(0).random(shape) < 0.5
    mask[0, 1] = False
    mask[1, 0] = True
    p, targets = assignment(student, sops, STUDENT), assignment(teacher, sops, TEACHER)
    images = []
    for view in range(2):
        for image in range(BATCH):
            terms = [
                -(targets[view, image, i] * np.log(p[view, image, i])).sum()
                for i in np.flatnonzero(mask[view, image])
            ]
            images.append(np.mean(terms) if terms else 0.0)
    assert 0.0 in images
    loss, gradient = mim(student, teacher, jnp.asarray(mask), sops, STUDENT, TEACHER)
    assert loss == pytest.approx(np.mean(images), rel=1e-5)
    assert (np.abs(gradient).max(-1) > 0).tolist() == mask.tolist()


def test_mim_loss_without_any_mask_is_zero_and_has_no_gradient() -> None:
    sops, patches = random_sops(1), random_units(1, 2, BATCH, PATCHES, DIM)
    mask = jnp.zeros((2, BATCH, PATCHES), bool)
    loss, gradient = mim(patches, patches, mask, sops, STUDENT, TEACHER)
    assert loss == 0
    assert jnp.abs(gradient).max() == 0


def test_prototypes_that_are_all_alike_give_ln_k() -> None:
    embeddings = jnp.broadcast_to(random_units(0, DIM), (2, COUNT, DIM))
    sops = SOPs(embeddings, jnp.full((2, COUNT), 0.9))
    student = random_units(1, 3, BATCH, DIM)
    targets = jnp.asarray(assignment(student[:2], sops, TEACHER), jnp.float32)
    loss = cls(student, targets, sops, STUDENT)
    assert loss == pytest.approx(np.log(COUNT), rel=1e-5)
    patches = random_units(2, 2, BATCH, PATCHES, DIM)
    mask = jnp.ones((2, BATCH, PATCHES), bool)
    loss, _ = mim(patches, patches, mask, sops, STUDENT, TEACHER)
    assert loss == pytest.approx(np.log(COUNT), rel=1e-5)


def test_losses_rise_when_the_student_disagrees() -> None:
    sops, teacher = random_sops(2), random_units(1, 1, BATCH, DIM)
    targets = jnp.asarray(assignment(jnp.tile(teacher, (2, 1, 1)), sops, STUDENT), jnp.float32)
    agreeing = cls(jnp.tile(teacher, (2, 1, 1)), targets, sops, STUDENT)
    opposed = cls(-jnp.tile(teacher, (2, 1, 1)), targets, sops, STUDENT)
    assert opposed > agreeing + 0.5


def test_cross_entropy_by_hand() -> None:
    target, p = jnp.array([[0.5, 0.5], [1.0, 0.0]]), jnp.array([[0.25, 0.75], [0.5, 0.5]])
    expected = [-0.5 * np.log(0.25 * 0.75), np.log(2)]
    np.testing.assert_allclose(cross_entropy(target, jnp.log(p)), expected, rtol=1e-6)


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 8])
def test_views_at_once_change_neither_loss_nor_gradient(at_once: int) -> None:
    """Compared with all logits at once, differentiated as they stand."""
    sops, student = random_sops(3), random_units(1, 5, BATCH, DIM)
    targets = jnp.asarray(assignment(random_units(2, 2, BATCH, DIM), sops, TEACHER), jnp.float32)

    def plain(student: jax.Array) -> jax.Array:
        terms = -jnp.einsum("qbk,vbk->qvb", targets, log_assignment(student, sops, STUDENT))
        return sum(terms[q, v].mean() for q in range(2) for v in range(5) if q != v) / 8

    loss, gradient = jax.jit(jax.value_and_grad(cls_loss), static_argnums=4)(
        student, targets, sops, STUDENT, at_once
    )
    expected, expected_gradient = jax.jit(jax.value_and_grad(plain))(student)
    assert loss == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("at_once", [1, 2])
def test_patches_that_are_not_masked_need_not_be_given(at_once: int) -> None:
    """The masked ones alone, in any order and padded, give the same loss and gradient."""
    sops, shape = random_sops(1), (2, BATCH, PATCHES)
    student, teacher = random_units(1, *shape, DIM), random_units(2, *shape, DIM)
    mask = jnp.asarray(np.random.default_rng(3).random(shape) < 0.4)
    places = jnp.argsort(~mask, axis=-1)[..., : int(mask.sum(-1).max()) + 1]

    def some(student: jax.Array) -> jax.Array:
        chosen = [jnp.take_along_axis(x, places[..., None], axis=2) for x in (student, teacher)]
        masked = jnp.take_along_axis(mask, places, axis=-1)
        return mim_loss(*chosen, masked, sops, STUDENT, TEACHER, at_once)

    loss, gradient = jax.jit(jax.value_and_grad(some))(student)
    expected, expected_gradient = mim(student, teacher, mask, sops, STUDENT, TEACHER)
    assert loss == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-7)
