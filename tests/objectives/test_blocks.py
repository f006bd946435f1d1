"""Random blocks are disjoint and uniform; MaSSL is SOP without supports; CARP's terms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sop_jax.models.head import unit
from sop_jax.objectives.carp import consistency, inequality
from sop_jax.objectives.losses import cls_loss
from sop_jax.objectives.massl import block_assignment
from sop_jax.objectives.prototypical.blocks import block_log_softmax, random_blocks
from sop_jax.objectives.sop.assignment import log_assignment
from sop_jax.objectives.sop.prototypes import SOPs, cast_votes


@pytest.mark.parametrize(("count", "size"), [(12, 4), (13, 4), (4, 4), (7, 1)])
def test_blocks_are_disjoint(count: int, size: int) -> None:
    blocks = random_blocks(jax.random.key(0), count, size)
    assert blocks.shape == (count // size, size)
    assert len(np.unique(blocks)) == blocks.size
    assert blocks.min() >= 0
    assert blocks.max() < count


def test_each_draw_leaves_other_prototypes_out() -> None:
    draws = [np.asarray(random_blocks(jax.random.key(i), 10, 4)) for i in range(20)]
    assert {i for draw in draws for i in range(10) if i not in draw} == set(range(10))


def test_each_block_has_a_softmax_of_its_own() -> None:
    logits = jax.random.normal(jax.random.key(0), (3, 11))
    blocks = random_blocks(jax.random.key(1), 11, 4)
    found = block_log_softmax(logits, blocks)
    for t, block in enumerate(np.asarray(blocks)):
        np.testing.assert_allclose(found[:, t], jax.nn.log_softmax(logits[:, block]), atol=1e-6)


@pytest.mark.medium
def test_massl_is_sop_without_supports() -> None:
    """Its prototypes are anchors with one-hot votes, and the blocks of a permutation are tasks."""
    rows, student, teacher = (
        unit(jax.random.normal(jax.random.key(i), shape))
        for i, shape in enumerate([(32, 8), (5, 4, 8), (5, 2, 8)])
    )
    prototypes = rows[random_blocks(jax.random.key(3), 32, 8)]

    def massl(student: jax.Array) -> jax.Array:
        targets = jnp.exp(block_assignment(teacher, prototypes, 0.04))
        return cls_loss(student, targets, lambda _, u: block_assignment(u, prototypes, 0.1)) / 4

    def task(student: jax.Array, anchors: jax.Array) -> jax.Array:
        sops = SOPs(anchors[None], cast_votes(anchors[None], "one_hot", 0.1))
        targets = jnp.exp(log_assignment(teacher, sops, 0.04))
        return cls_loss(student, targets, lambda _, u: log_assignment(u, sops, 0.1))

    def sop(student: jax.Array) -> jax.Array:
        return jnp.stack([task(student, anchors) for anchors in prototypes]).mean()

    found, expected = (jax.value_and_grad(loss)(student) for loss in (massl, sop))
    assert float(expected[0]) > 0.1
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5 * np.abs(expected[1]).max())


def test_consistency_is_least_for_the_same_one_hot_distribution() -> None:
    one_hot = jnp.log(jnp.array([[1 - 3e-7, 1e-7, 1e-7, 1e-7]]))
    uniform = jnp.full((1, 4), -jnp.log(4.0))
    assert consistency(one_hot, one_hot) == pytest.approx(0, abs=1e-6)
    assert consistency(uniform, uniform) == pytest.approx(np.log(4), rel=1e-5)
    assert consistency(one_hot, jnp.roll(one_hot, 1)) > 10


def test_inequality_is_zero_only_for_equal_use() -> None:
    assert inequality(jnp.full((3, 4), 0.25)) == pytest.approx(0, abs=1e-6)
    assert inequality(jnp.eye(4)[:2]) == pytest.approx(np.log(4), rel=1e-5)
