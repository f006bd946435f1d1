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
from sop_jax.objectives.memory import flat_rows, init_memory
from sop_jax.objectives.methods import METHODS
from sop_jax.objectives.objective import Outputs
from sop_jax.parallel.mesh import make_mesh
from sop_jax.schedules import Length

BATCH, DIM = 8, 4


def outputs(cls: jax.Array) -> Outputs:
    """Returns the outputs of a network for embeddings [B V d], without patches."""
    none = jnp.zeros((len(cls), 2, 0, DIM))
    return Outputs(cls, none, cls, none)


def make_config(**changes: Any) -> ml_collections.ConfigDict:
    section = dict(memory=20, block=6) | changes
    return small_config(
        method="massl", batch_size=BATCH, augment=dict(local_crops=2), massl=section
    )


def as_sop(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns settings of SOP without supports and patches, with MaSSL's memory and temperatures.

    Anchors are the rows that the objective carries as frozen, one set for each of its tasks.
    """
    own, config = config.massl, config.copy_and_resolve_references()
    config.method = "sop"
    config.sop.cls.update(dict(memory=own.memory, supports=0, votes="one_hot"))
    config.sop.cls.update(dict(anchors=own.block, tasks=own.memory // own.block))
    config.sop.patch.update(dict(memory=0, tasks=0))
    config.sop.anchors = "frozen_rows"
    for name in ("student_temperature", "teacher_temperature", "temperature_warmup_steps"):
        config.sop[name] = own[name]
    return config


class Step:
    """One step of an objective on given embeddings, from what it carries."""

    def __init__(self, config: ml_collections.ConfigDict, carried: Any, step: int) -> None:
        check_config(config)
        own = METHODS[config.method].build(config, DIM, make_mesh(1), Length(9, 1.0), (2, 2))
        teacher, student = (
            outputs(unit(jax.random.normal(jax.random.key(count), (BATCH, count, DIM))))
            for count in (2, 4)
        )
        now = {name: schedule(step) for name, schedule in own.schedules.items()}
        masked, index = jnp.zeros((BATCH, 2, 0), bool), jnp.arange(BATCH)
        given = {}, {}, carried, teacher, masked, index, now, jax.random.key(2)
        self.shared, targets, self.carried = own.teach(*given)

        def loss(cls: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            return own.loss({}, self.shared, targets, outputs(cls), masked, now)

        found = jax.value_and_grad(loss, has_aux=True)(student.cls)
        (self.loss, self.terms), self.gradient = found


@pytest.mark.medium
@pytest.mark.parametrize("step", [0, 3])
def test_massl_is_sop_without_supports(step: int) -> None:
    """Its prototypes are anchors with one-hot votes, and the blocks of a permutation are tasks."""
    config = make_config(temperature_warmup_steps=6)
    memory = init_memory(jax.random.key(0), config.massl.memory, DIM, BATCH)
    found = Step(config, memory, step)
    blocks = found.shared.reshape(-1, config.massl.block, DIM)
    expected = Step(as_sop(config), {"cls": memory, "frozen": {"cls": blocks}}, step)
    assert expected.shared["cls"].embeddings.shape == (3, 1, 6, DIM)
    assert float(expected.loss) > 0.1
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
    np.testing.assert_allclose(found.terms["cls"], expected.terms["cls"], rtol=1e-5)
    scale = np.abs(expected.gradient).max()
    np.testing.assert_allclose(found.gradient, expected.gradient, atol=1e-5 * scale)
    for own, other in zip(found.carried, expected.carried["cls"], strict=True):
        np.testing.assert_array_equal(own, other)


@pytest.mark.medium
def test_the_memory_takes_the_second_view_after_the_blocks_are_drawn() -> None:
    config = make_config()
    objective = massl.massl(config, DIM, make_mesh(1), Length(10, 1.0))
    _, memory = objective.init(jax.random.key(0))
    cls = unit(jax.random.normal(jax.random.key(1), (BATCH, 2, DIM)))
    teacher, masked = outputs(cls), jnp.zeros((BATCH, 2, 0), bool)
    given = ({}, {}, memory, teacher, masked, jnp.arange(BATCH), {}, jax.random.key(2))
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
