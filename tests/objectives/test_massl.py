"""MaSSL is SOP without supports; its memory takes the second view after the blocks are drawn."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from small import small_config

from sop_jax.check import check_config
from sop_jax.errors import UserError
from sop_jax.models.head import unit
from sop_jax.objectives import massl
from sop_jax.objectives.losses import cls_loss
from sop_jax.objectives.memory import flat_rows
from sop_jax.objectives.objective import Outputs
from sop_jax.objectives.prototypical.blocks import random_blocks
from sop_jax.objectives.sop.assignment import log_assignment
from sop_jax.objectives.sop.prototypes import SOPs, cast_votes
from sop_jax.parallel.mesh import make_mesh
from sop_jax.schedules import Length


def make_config(**changes: Any) -> ml_collections.ConfigDict:
    section = dict(memory=20, block=6) | changes
    return small_config(method="massl", batch_size=8, augment=dict(local_crops=2), massl=section)


@pytest.mark.medium
def test_massl_is_sop_without_supports() -> None:
    """Its prototypes are anchors with one-hot votes, and the blocks of a permutation are tasks."""
    rows, student, teacher = (
        unit(jax.random.normal(jax.random.key(i), shape))
        for i, shape in enumerate([(32, 8), (5, 4, 8), (5, 2, 8)])
    )
    blocks = rows[random_blocks(jax.random.key(3), 32, 8)]

    def of_blocks(student: jax.Array) -> jax.Array:
        drawn = blocks.reshape(-1, 8)
        targets = jnp.exp(massl.log_assignment(teacher, drawn, 8, 0.04))
        return cls_loss(student, targets, lambda _, u: massl.log_assignment(u, drawn, 8, 0.1)) / 4

    def task(student: jax.Array, anchors: jax.Array) -> jax.Array:
        sops = SOPs(anchors[None], cast_votes(anchors[None], "one_hot", 0.1))
        targets = jnp.exp(log_assignment(teacher, sops, 0.04))
        return cls_loss(student, targets, lambda _, u: log_assignment(u, sops, 0.1))

    def of_tasks(student: jax.Array) -> jax.Array:
        return jnp.stack([task(student, anchors) for anchors in blocks]).mean()

    found, expected = (jax.value_and_grad(loss)(student) for loss in (of_blocks, of_tasks))
    assert float(expected[0]) > 0.1
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5 * np.abs(expected[1]).max())


@pytest.mark.medium
def test_the_memory_takes_the_second_view_after_the_blocks_are_drawn() -> None:
    config = make_config()
    objective = massl.massl(config, 4, make_mesh(1), Length(10, 1.0))
    _, memory = objective.init(jax.random.key(0))
    cls = unit(jax.random.normal(jax.random.key(1), (8, 2, 4)))
    none = jnp.zeros((8, 2, 0, 4))
    teacher, masked = Outputs(cls, none, cls, none), jnp.zeros((8, 2, 0), bool)
    given = ({}, {}, memory, teacher, masked, jnp.arange(8), {}, jax.random.key(2))
    rows, targets, after = objective.teach(*given)
    before = {tuple(row) for row in np.asarray(flat_rows(memory))}
    assert rows.shape == (18, 4)  # three blocks, and two rows are left over
    assert len({tuple(row) for row in np.asarray(rows)} & before) == 18
    np.testing.assert_array_equal(targets, cls)
    np.testing.assert_array_equal(after.rows[:, 0], cls[:, 1])
    assert after.image[:, 0].tolist() == list(range(8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(block=21), "massl.block is 21, but massl.memory is 20; expected a block of 2 to 20"),
        (dict(block=1), "massl.block is 1"),
        (dict(memory=7), "batch_size 8 does not fit massl.memory 7"),
    ],
    ids=str,
)
def test_bad_sizes_are_named(changes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_config(make_config(**changes))
