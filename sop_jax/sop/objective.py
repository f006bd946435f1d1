"""SOP as the train step sees it: the one place that knows memories, targets, losses and health.

Another objective stands beside this one by offering the same functions.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from sop_jax.search import nearest, take
from sop_jax.sop import health
from sop_jax.sop.assignment import log_assignment
from sop_jax.sop.losses import Temperature, cls_loss, mim_loss
from sop_jax.sop.memory import Memory, by_age, flat_rows, init_memory, live, push
from sop_jax.sop.prototypes import SOPs, build_sops, cast_votes, draw_anchors, find_supports

SLOTS = 2**31  # folded into the seed's key for fixed slots; nothing else of a run is

LOGITS = 2**28  # bytes of the logits of a device's student views at a time

ANCHORS = ("random", "fixed_slots", "frozen_rows")


class Embeddings(NamedTuple):
    """Unit embeddings of one network: [CLS] of V views, some patches of the global ones."""

    cls: Float[Array, "V B d"]
    patches: Float[Array, "Q B M d"]


class Temperatures(NamedTuple):
    """Of the softmax over SOPs."""

    student: Temperature
    teacher: Temperature


class Objective(NamedTuple):
    """What the train step asks of a method.

    Attributes:
        init: key -> memories.
        prototypes: (memories, key) -> the prototypes of this step.
        loss: (prototypes, student, teacher, mask, temperatures) -> loss and its terms, each a mean
            over images.
        patches: whether it takes patches at all; the head does not see them otherwise.
        keep: teacher, the last of whose patches is drawn at random -> what the memories take of
            each image, leading axis B.
        remember: (memories, kept, index) -> memories.
        measure: (memories, prototypes, student [CLS], teacher [CLS], temperatures) -> signs of
            health.
        verdict: logged rows -> words for a person when it is going wrong, else None.
    """

    init: Callable[..., Any]
    prototypes: Callable[..., Any]
    loss: Callable[..., tuple[Array, dict[str, Array]]]
    patches: bool
    keep: Callable[..., Any]
    remember: Callable[..., Any]
    measure: Callable[..., dict[str, Array]]
    verdict: Callable[..., str | None]


def assign_views(
    sops: SOPs, cls: Float[Array, "Q B d"], temperature: Temperature
) -> Float[Array, "tasks Q B K"]:
    """Assignments of the views' [CLS] to the SOPs of every task."""
    return jnp.exp(jax.vmap(lambda task: log_assignment(cls, task, temperature))(sops))


def views_at_once(student: Float[Array, "V B ..."], sops: SOPs, mesh: Mesh) -> int:
    """So many views of a device's images that their logits take at most LOGITS bytes."""
    rows = student[0].size // student.shape[-1] / mesh.devices.size
    size = 4 * rows * sops.votes.size
    return max(1, min(len(student), int(LOGITS / size)))


def draw_sops(
    memory: Memory,
    level: ml_collections.ConfigDict,
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    key: Key[Array, ""],
    frozen: Float[Array, "K d"] | None,
) -> SOPs:
    """The SOPs of one task.

    Args:
        memory: of this level.
        level: `config.cls` or `config.patch`.
        config: the run's `sop`.
        mesh: the devices that the memory is split over.
        key: draws the anchors.
        frozen: anchors to use in their place.
    """
    rows, alive = flat_rows(memory), live(memory, level.memory)
    if frozen is not None:
        embeddings = frozen[None]
        if level.supports:
            _, found = nearest(
                *(frozen, rows, level.supports, mesh),
                allowed=alive,
                precision=config.search_precision,
            )
            embeddings = jnp.concatenate([embeddings, take(rows, found.T, mesh)])
        return SOPs(embeddings, cast_votes(embeddings, level.votes, config.smoothing))
    anchors = draw_anchors(key, level.memory, level.anchors)
    if config.anchors != "fixed_slots":
        anchors = by_age(memory, level.memory, anchors)
    found = find_supports(
        *(rows, anchors, level.supports, mesh),
        pool=config.pool,
        live=alive,
        precision=config.search_precision,
    )
    return build_sops(rows, found, level.votes, config.smoothing, mesh)


def sop(run_config: ml_collections.ConfigDict, dim: int, mesh: Mesh) -> Objective:
    """The paper's objective, as set in `config.sop`, on embeddings of `dim` numbers.

    A memory has a lane for each image of `config.batch_size`, split over the devices of `mesh`.
    Without rows for patches (`config.sop.patch.memory` 0) there is E_C alone.
    """
    config, lanes = run_config.sop, run_config.batch_size
    levels = {name: config[name] for name in ("cls", "patch") if config[name].memory}
    takes_patches = "patch" in levels

    def init(key: Key[Array, ""]) -> dict[str, Any]:
        """E_C and E_P full of random rows, and the anchors of runs that keep them fixed."""
        # The first keys of a split do not depend on how many there are.
        keys = jax.random.split(key, 2 * len(levels))
        of_rows, of_anchors = keys[: len(levels)], keys[len(levels) :]
        memories: dict[str, Any] = {
            name: init_memory(level_key, level.memory, dim, lanes)
            for (name, level), level_key in zip(levels.items(), of_rows, strict=True)
        }
        if config.anchors == "frozen_rows":
            memories["frozen"] = {
                name: freeze(memories[name], level, jax.random.split(level_key, level.tasks))
                for (name, level), level_key in zip(levels.items(), of_anchors, strict=True)
                if level.tasks
            }
        return memories

    def freeze(
        memory: Memory, level: ml_collections.ConfigDict, keys: Key[Array, " tasks"]
    ) -> Float[Array, "tasks K d"]:
        drawn = [draw_anchors(key, level.memory, level.anchors) for key in keys]
        rows = by_age(memory, level.memory, jnp.stack(drawn))
        return take(flat_rows(memory), rows, mesh)

    def prototypes(memories: dict[str, Any], key: Key[Array, ""]) -> dict[str, SOPs]:
        """SOPs of every task, stacked [tasks, ...], drawn anew from both memories."""
        if config.anchors == "fixed_slots":
            # The same slots at every step.
            key = jax.random.fold_in(jax.random.key(run_config.seed), SLOTS)
        drawn = {}
        for name, level_key in zip(levels, jax.random.split(key, len(levels)), strict=True):
            level = levels[name]
            if level.tasks == 0:
                continue
            draw = functools.partial(draw_sops, memories[name], level, config, mesh)
            frozen = memories["frozen"][name] if config.anchors == "frozen_rows" else None
            # One task after another: batched, the top-k would leave XLA's fast path on CPUs.
            drawn[name] = jax.lax.map(
                lambda task, draw=draw: draw(*task),
                (jax.random.split(level_key, level.tasks), frozen),
            )
        return drawn

    def loss(
        sops: dict[str, SOPs],
        student: Embeddings,
        teacher: Embeddings,
        mask: Bool[Array, "Q B M"],
        temperatures: Temperatures,
    ) -> tuple[Array, dict[str, Array]]:
        """λ1 times equation 2 plus λ2 times equation 4, each the mean of its tasks."""

        def cls(task: SOPs) -> Array:
            targets = jnp.exp(log_assignment(teacher.cls, task, temperatures.teacher))
            at_once = views_at_once(student.cls, task, mesh)
            return cls_loss(student.cls, targets, task, temperatures.student, at_once)

        def mim(task: SOPs) -> Array:
            at_once = views_at_once(student.patches, task, mesh)
            return mim_loss(student.patches, teacher.patches, mask, task, *temperatures, at_once)

        terms = {"cls": jax.lax.map(cls, sops["cls"]).mean()}
        total = config.cls.weight * terms["cls"]
        if "patch" in sops:
            terms["mim"] = jax.lax.map(mim, sops["patch"]).mean()
            total += config.patch.weight * terms["mim"]
        return total, terms

    def keep(teacher: Embeddings) -> dict[str, Float[Array, "B d"]]:
        """Of the second global view: its [CLS], and the random patch."""
        kept = {"cls": teacher.cls[1]}
        return kept | ({"patch": teacher.patches[1, :, -1]} if takes_patches else {})

    def remember(
        memories: dict[str, Any], kept: dict[str, Float[Array, "B d"]], index: Int[Array, " B"]
    ) -> dict[str, Any]:
        """The memories with a row more of every image."""
        return memories | {name: push(memories[name], kept[name], index) for name in levels}

    def measure(
        memories: dict[str, Memory],
        sops: dict[str, SOPs],
        student_cls: Float[Array, "V B d"],
        teacher_cls: Float[Array, "Q B d"],
        temperatures: Temperatures,
    ) -> dict[str, Array]:
        filled = jnp.minimum(memories["cls"].filled / config.cls.memory, 1)
        targets = assign_views(sops["cls"], teacher_cls, temperatures.teacher)
        return health.measure(student_cls, teacher_cls, targets, sops["cls"], filled)

    return Objective(init, prototypes, loss, takes_patches, keep, remember, measure, health.verdict)
