"""What the objective draws, stores and sums up, in addition to its parts."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sop_jax import config as config_lib
from sop_jax.models.head import unit
from sop_jax.objectives.memory import Memory, flat_rows
from sop_jax.objectives.objective import Objective, Outputs
from sop_jax.objectives.patches import masked_first
from sop_jax.objectives.sop.objective import (
    ANCHORS,
    assign_views,
    draw_patches,
    sop,
)
from sop_jax.objectives.sop.prototypes import SOPs
from sop_jax.parallel.mesh import make_mesh
from sop_jax.schedules import Length

BATCH, VIEWS, PATCHES, DIM = 8, 3, 4, 8
INDEX = np.arange(BATCH, dtype=np.int32)
NOW = {"student_temperature": 0.1, "teacher_temperature": 0.04}


def objective(seed: int = 0, **changed: object) -> Objective:
    config = config_lib.paper()
    config.seed = seed
    config.batch_size = BATCH
    config.sop.cls.update(dict(memory=32, anchors=4, supports=2, tasks=2))
    config.sop.patch.update(dict(memory=16, anchors=3))
    for key, value in changed.items():
        config.sop.update_from_flattened_dict({key.replace("__", "."): value})
    return sop(config, DIM, make_mesh(1), Length(steps=10, epoch=1.0))


def random_units(seed: int, *shape: int) -> jax.Array:
    return unit(jax.random.normal(jax.random.key(seed), shape))


def outputs(seed: int, views: int = 2, patches: int = PATCHES) -> Outputs:
    cls, patch = (
        random_units(seed, BATCH, views, DIM),
        random_units(seed + 1, BATCH, 2, patches, DIM),
    )
    return Outputs(cls, patch, cls, patch)


def teach(
    method: Objective,
    memories: dict,
    teacher: Outputs,
    key: jax.Array,
    index: jax.Array = INDEX,
) -> Any:
    masked = jnp.zeros((BATCH, 2, PATCHES), bool)
    return jax.jit(method.teach)({}, {}, memories, teacher, masked, index, NOW, key)


def first_memories(method: Objective, seed: int = 0) -> dict:
    return method.init(jax.random.key(seed))[1]


def draw(method: Objective, memories: dict, seed: int) -> dict[str, SOPs]:
    """Returns the SOPs of a step."""
    return teach(method, memories, outputs(0), jax.random.key(seed))[0]


def turned_over(method: Objective, memories: dict, seed: int = 100) -> dict:
    """Returns the memories after enough batches to replace every row."""
    for i in range(seed, seed + 6):
        memories = teach(method, memories, outputs(i), jax.random.key(0))[2]
    return memories


def slots(sops: SOPs, memory: Memory) -> list[list[int]]:
    """Returns the rows of the memory that are anchors, for each task."""
    cosine = jnp.einsum("tkd,nd->tkn", sops.embeddings[:, 0], flat_rows(memory))
    np.testing.assert_allclose(cosine.max(-1), 1, atol=1e-5)
    return cosine.argmax(-1).tolist()


def anchors(sops: SOPs) -> np.ndarray:
    return np.asarray(sops.embeddings[:, 0])


@pytest.fixture(scope="module")
def method() -> Objective:
    return objective()


def test_random_anchors_differ_between_steps_and_tasks(method: Objective) -> None:
    memories = first_memories(method)
    first, second = (draw(method, memories, seed) for seed in range(2))
    picked = slots(first["cls"], memories["cls"])
    assert first["cls"].embeddings.shape == (2, 3, 4, DIM)
    assert first["patch"].embeddings.shape == (1, 1, 3, DIM)
    assert set(picked[0]) != set(picked[1])
    assert picked != slots(second["cls"], memories["cls"])
    assert not np.array_equal(anchors(first["patch"]), anchors(second["patch"]))
    again = draw(method, memories, 0)
    chex.assert_trees_all_equal(first, again)


def test_fixed_slots_stay_while_their_rows_change() -> None:
    method = objective(anchors="fixed_slots")
    before = first_memories(method)
    after = turned_over(method, before)
    first, second = draw(method, before, 1), draw(method, after, 2)
    for name in ("cls", "patch"):
        kept = slots(first[name], before[name])
        assert kept == slots(second[name], after[name])
        assert not np.isin(anchors(first[name]), anchors(second[name])).any()
    assert len({tuple(task) for task in slots(first["cls"], before["cls"])}) == 2


def test_fixed_slots_follow_the_seed() -> None:
    def fixed(seed: int) -> list[list[int]]:
        method = objective(seed, anchors="fixed_slots")
        memories = first_memories(method)
        return slots(draw(method, memories, 1)["cls"], memories["cls"])

    assert fixed(1) == fixed(1)
    assert fixed(1) != fixed(2)


@pytest.mark.parametrize("kept", ANCHORS)
def test_no_key_is_drawn_from_twice(kept: str) -> None:
    method = objective(anchors=kept)
    with jax.debug_key_reuse(True):
        _, memories = jax.jit(method.init)(jax.random.key(0))
        draw(method, memories, 1)


def test_frozen_rows_stay_while_the_memory_and_their_supports_change() -> None:
    method = objective(anchors="frozen_rows")
    before = first_memories(method)
    after = turned_over(method, before)
    first, second = draw(method, before, 1), draw(method, after, 2)
    for name in ("cls", "patch"):
        np.testing.assert_array_equal(anchors(first[name]), anchors(second[name]))
    supports = np.asarray(second["cls"].embeddings[:, 1:])
    assert not np.isin(supports, np.asarray(first["cls"].embeddings[:, 1:])).any()
    cosine = jnp.einsum("tkjd,nd->tkjn", supports, flat_rows(after["cls"]))
    np.testing.assert_allclose(cosine.max(-1), 1, atol=1e-5)
    assert not np.array_equal(*anchors(first["cls"]))


def loss_of(method: Objective) -> tuple[jax.Array, dict[str, jax.Array]]:
    student, teacher = outputs(0, VIEWS), outputs(10, patches=PATCHES + 1)
    sops, targets, _ = teach(method, first_memories(method), teacher, jax.random.key(1))
    mask = jnp.ones((BATCH, 2, PATCHES), bool)
    return method.loss({}, sops, targets, student, mask, NOW)


def test_loss_is_the_weighted_sum_of_its_terms() -> None:
    loss, terms = jax.jit(lambda: loss_of(objective(cls__weight=0.5, patch__weight=2.0)))()
    assert terms.keys() == {"cls", "mim"}
    assert loss == pytest.approx(float(0.5 * terms["cls"] + 2 * terms["mim"]), rel=1e-6)


@pytest.mark.parametrize("kept", ANCHORS)
def test_no_patch_tasks_means_no_masked_image_modelling(kept: str) -> None:
    _, terms = jax.eval_shape(lambda: loss_of(objective(patch__tasks=0, anchors=kept)))
    assert terms.keys() == {"cls"}


def test_targets_are_assignments_of_both_global_views_for_each_task(method: Objective) -> None:
    sops = draw(method, first_memories(method), 1)
    p, sharper = (assign_views(sops["cls"], outputs(0).cls, t) for t in (0.04, 0.02))
    assert p.shape == (2, BATCH, 2, 4)
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-5)
    assert sharper.max(-1).mean() > p.max(-1).mean()


def test_remembers_the_second_view_with_the_images_indices(method: Objective) -> None:
    teacher, index = outputs(0), jnp.arange(50, 50 + BATCH, dtype=jnp.int32)
    before = first_memories(method)
    _, targets, memories = teach(method, before, teacher, jax.random.key(0), index)
    np.testing.assert_array_equal(memories["cls"].rows[:, 0], teacher.cls[:, 1])
    np.testing.assert_array_equal(memories["patch"].rows[:, 0], teacher.patches[:, 1, -1])
    np.testing.assert_array_equal(targets["patch"], teacher.patches[:, :, :-1])
    np.testing.assert_array_equal(memories["cls"].rows[:, 1:], before["cls"].rows[:, 1:])
    for name in ("cls", "patch"):
        assert memories[name].image[:, 0].tolist() == index.tolist()
        assert memories[name].filled == BATCH


def test_first_memories_differ_and_follow_the_key(method: Objective) -> None:
    memories, again = first_memories(method), first_memories(method)
    other = first_memories(method, 1)
    chex.assert_trees_all_equal(memories, again)
    assert not np.array_equal(memories["cls"].rows[:, :2], memories["patch"].rows)
    assert not np.array_equal(memories["cls"].rows, other["cls"].rows)


def test_masked_patches_come_first() -> None:
    mask = jnp.array([[[[0, 1], [1, 0]], [[0, 0], [0, 0]]], [[[1, 1], [1, 1]], [[0, 0], [0, 1]]]])
    indices, masked = masked_first(mask.astype(bool), 2)
    assert indices.tolist() == [[[1, 2], [0, 1]], [[0, 1], [3, 0]]]
    assert masked.tolist() == [[[True, True], [False, False]], [[True, True], [True, False]]]
    assert masked_first(mask.astype(bool), None)[0].shape == (2, 2, 4)


def test_patches_are_drawn_evenly_and_for_each_image_apart() -> None:
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = np.asarray(draw_patches(keys, 2, 9))
    assert drawn.shape == (2000, 2, 1)
    np.testing.assert_array_equal(drawn[:, 0], drawn[:, 1])
    counts = np.bincount(drawn[:, 1, 0], minlength=9)
    assert len(counts) == 9 and counts.min() > 0.8 * counts.mean()
    np.testing.assert_array_equal(drawn[7:8], draw_patches(keys[7:8], 2, 9))
