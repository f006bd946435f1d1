"""What the objective draws, stores and adds up, beyond its parts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sop_jax import config as config_lib
from sop_jax.mesh import make_mesh
from sop_jax.models.head import unit
from sop_jax.sop.memory import Memory, flat_rows
from sop_jax.sop.objective import (
    ANCHORS,
    Embeddings,
    Objective,
    Temperatures,
    assign_views,
    sop,
)
from sop_jax.sop.prototypes import SOPs

BATCH, VIEWS, PATCHES, DIM = 8, 3, 4, 8


def objective(seed: int = 0, **changed: object) -> Objective:
    config = config_lib.paper()
    config.seed = seed
    config.batch_size = BATCH
    config.sop.cls.update(dict(memory=32, anchors=4, supports=2, tasks=2))
    config.sop.patch.update(dict(memory=16, anchors=3))
    for key, value in changed.items():
        config.sop.update_from_flattened_dict({key.replace("__", "."): value})
    return sop(config, DIM, make_mesh(1))


def random_units(seed: int, *shape: int) -> jax.Array:
    return unit(jax.random.normal(jax.random.key(seed), shape))


def embeddings(seed: int, views: int = 2) -> Embeddings:
    return Embeddings(
        random_units(seed, views, BATCH, DIM), random_units(seed + 1, 2, BATCH, PATCHES, DIM)
    )


def turned_over(method: Objective, memories: dict, seed: int = 100) -> dict:
    """The memories after enough batches to replace every row."""
    remember = jax.jit(method.remember)
    for i in range(seed, seed + 6):
        kept = method.keep(embeddings(i))
        memories = remember(memories, kept, jnp.arange(BATCH, dtype=jnp.int32))
    return memories


def slots(sops: SOPs, memory: Memory) -> list[list[int]]:
    """The rows of the memory that are anchors, for each task."""
    cosine = jnp.einsum("tkd,nd->tkn", sops.embeddings[:, 0], flat_rows(memory))
    np.testing.assert_allclose(cosine.max(-1), 1, atol=1e-5)
    return cosine.argmax(-1).tolist()


def anchors(sops: SOPs) -> np.ndarray:
    return np.asarray(sops.embeddings[:, 0])


@pytest.fixture(scope="module")
def method() -> Objective:
    return objective()


def test_random_anchors_differ_between_steps_and_tasks(method: Objective) -> None:
    memories = method.init(jax.random.key(0))
    draw = jax.jit(method.prototypes)
    first, second = (draw(memories, jax.random.key(i)) for i in range(2))
    picked = slots(first["cls"], memories["cls"])
    assert first["cls"].embeddings.shape == (2, 3, 4, DIM)
    assert first["patch"].embeddings.shape == (1, 1, 3, DIM)
    assert set(picked[0]) != set(picked[1])
    assert picked != slots(second["cls"], memories["cls"])
    assert not np.array_equal(anchors(first["patch"]), anchors(second["patch"]))
    again = draw(memories, jax.random.key(0))
    chex.assert_trees_all_equal(first, again)


def test_fixed_slots_stay_while_their_rows_change() -> None:
    method = objective(anchors="fixed_slots")
    before = method.init(jax.random.key(0))
    after = turned_over(method, before)
    draw = jax.jit(method.prototypes)
    first, second = draw(before, jax.random.key(1)), draw(after, jax.random.key(2))
    for name in ("cls", "patch"):
        kept = slots(first[name], before[name])
        assert kept == slots(second[name], after[name])
        assert not np.isin(anchors(first[name]), anchors(second[name])).any()
    assert len({tuple(task) for task in slots(first["cls"], before["cls"])}) == 2


def test_fixed_slots_follow_the_seed() -> None:
    def fixed(seed: int) -> list[list[int]]:
        method = objective(seed, anchors="fixed_slots")
        memories = method.init(jax.random.key(0))
        return slots(method.prototypes(memories, jax.random.key(1))["cls"], memories["cls"])

    assert fixed(1) == fixed(1)
    assert fixed(1) != fixed(2)


@pytest.mark.parametrize("kept", ANCHORS)
def test_no_key_is_drawn_from_twice(kept: str) -> None:
    method = objective(anchors=kept)
    with jax.debug_key_reuse(True):
        memories = jax.jit(method.init)(jax.random.key(0))
        jax.jit(method.prototypes)(memories, jax.random.key(1))


def test_frozen_rows_stay_while_the_memory_and_their_supports_change() -> None:
    method = objective(anchors="frozen_rows")
    before = method.init(jax.random.key(0))
    after = turned_over(method, before)
    draw = jax.jit(method.prototypes)
    first, second = draw(before, jax.random.key(1)), draw(after, jax.random.key(2))
    for name in ("cls", "patch"):
        np.testing.assert_array_equal(anchors(first[name]), anchors(second[name]))
    supports = np.asarray(second["cls"].embeddings[:, 1:])
    assert not np.isin(supports, np.asarray(first["cls"].embeddings[:, 1:])).any()
    cosine = jnp.einsum("tkjd,nd->tkjn", supports, flat_rows(after["cls"]))
    np.testing.assert_allclose(cosine.max(-1), 1, atol=1e-5)
    assert not np.array_equal(*anchors(first["cls"]))


def loss_of(method: Objective) -> tuple[jax.Array, dict[str, jax.Array]]:
    student, teacher, temperatures = embeddings(0, VIEWS), embeddings(10), Temperatures(0.1, 0.04)
    sops = method.prototypes(method.init(jax.random.key(0)), jax.random.key(1))
    mask = jnp.ones((2, BATCH, PATCHES), bool)
    return method.loss(sops, student, teacher, mask, temperatures)


def test_loss_is_the_weighted_sum_of_its_terms() -> None:
    loss, terms = jax.jit(lambda: loss_of(objective(cls__weight=0.5, patch__weight=2.0)))()
    assert terms.keys() == {"cls", "mim"}
    assert loss == pytest.approx(float(0.5 * terms["cls"] + 2 * terms["mim"]), rel=1e-6)


@pytest.mark.parametrize("kept", ANCHORS)
def test_no_patch_tasks_means_no_masked_image_modelling(kept: str) -> None:
    _, terms = jax.eval_shape(lambda: loss_of(objective(patch__tasks=0, anchors=kept)))
    assert terms.keys() == {"cls"}


def test_targets_are_assignments_of_both_global_views_for_each_task(method: Objective) -> None:
    sops = method.prototypes(method.init(jax.random.key(0)), jax.random.key(1))
    p, sharper = (assign_views(sops["cls"], embeddings(0).cls, t) for t in (0.04, 0.02))
    assert p.shape == (2, 2, BATCH, 4)
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-5)
    assert sharper.max(-1).mean() > p.max(-1).mean()


def test_remembers_the_second_view_with_the_images_indices(method: Objective) -> None:
    teacher, index = embeddings(0), jnp.arange(50, 50 + BATCH, dtype=jnp.int32)
    before = method.init(jax.random.key(0))
    kept = method.keep(teacher)
    memories = method.remember(before, kept, index)
    np.testing.assert_array_equal(memories["cls"].rows[:, 0], teacher.cls[1])
    np.testing.assert_array_equal(memories["patch"].rows[:, 0], teacher.patches[1, :, -1])
    np.testing.assert_array_equal(memories["cls"].rows[:, 1:], before["cls"].rows[:, 1:])
    for name in ("cls", "patch"):
        assert memories[name].image[:, 0].tolist() == index.tolist()
        assert memories[name].filled == BATCH


def test_first_memories_differ_and_follow_the_key(method: Objective) -> None:
    memories, again = method.init(jax.random.key(0)), method.init(jax.random.key(0))
    other = method.init(jax.random.key(1))
    chex.assert_trees_all_equal(memories, again)
    assert not np.array_equal(memories["cls"].rows[:, :2], memories["patch"].rows)
    assert not np.array_equal(memories["cls"].rows, other["cls"].rows)
