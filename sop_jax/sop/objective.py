"""SOP as the train step sees it: the one place that knows memories, targets, losses and health.

Another objective stands beside this one by offering the same functions.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Bool, Float, Int, Key

from sop_jax.sop import health
from sop_jax.sop.assignment import log_assignment
from sop_jax.sop.losses import Temperature, cls_loss, mim_loss
from sop_jax.sop.memory import Memory, init_memory, push
from sop_jax.sop.prototypes import SOPs, build_sops, draw_anchors, find_supports

ANCHORS = ("random", "fixed_slots", "frozen_rows")


class Embeddings(NamedTuple):
    """Unit embeddings of one network: [CLS] of V views, patches of the global ones."""

    cls: Float[Array, "V B d"]
    patches: Float[Array, "Q B L d"]


class Temperatures(NamedTuple):
    """Of the softmax over SOPs."""

    student: Temperature
    teacher: Temperature


class Objective(NamedTuple):
    """What the train step asks of a method.

    Attributes:
        init: key -> memories.
        prototypes: (memories, key) -> the prototypes of this step.
        targets: (prototypes, teacher embeddings, temperatures) -> the teacher's assignments.
        loss: (prototypes, targets, student, teacher, mask, temperatures) -> loss and its terms.
        remember: (memories, teacher, index, key) -> memories.
        measure: (memories, prototypes, targets, student, teacher) -> signs of health.
        verdict: logged rows -> words for a person when it is going wrong, else None.
    """

    init: Callable[..., Any]
    prototypes: Callable[..., Any]
    targets: Callable[..., Any]
    loss: Callable[..., tuple[Array, dict[str, Array]]]
    remember: Callable[..., Any]
    measure: Callable[..., dict[str, Array]]
    verdict: Callable[..., str | None]


def draw_sops(
    rows: Float[Array, "N d"],
    level: ml_collections.ConfigDict,
    config: ml_collections.ConfigDict,
    key: Key[Array, ""],
    frozen: Float[Array, "K d"] | None,
) -> SOPs:
    """The SOPs of one task.

    Args:
        rows: of the memory.
        level: `config.cls` or `config.patch`.
        config: the run's `sop`.
        key: draws the anchors.
        frozen: anchors to use in their place.
    """
    if frozen is None:
        anchors = draw_anchors(key, level.memory, level.anchors)
    else:
        rows, anchors = jnp.concatenate([frozen, rows]), jnp.arange(level.anchors)
    found = find_supports(
        rows, anchors, level.supports, pool=config.pool, precision=config.search_precision
    )
    return build_sops(rows, found, level.votes, config.smoothing)


def sop(config: ml_collections.ConfigDict, dim: int) -> Objective:
    """The paper's objective, as set in `config.sop`, on embeddings of `dim` numbers."""
    levels = {"cls": config.cls, "patch": config.patch}

    def init(key: Key[Array, ""]) -> dict[str, Any]:
        """E_C and E_P full of random rows, and the anchors of runs that keep them fixed."""
        keys = dict(zip(levels, jax.random.split(key, len(levels)), strict=True))
        memories: dict[str, Any] = {
            name: init_memory(keys[name], level.memory, dim) for name, level in levels.items()
        }
        if config.anchors == "frozen_rows":
            memories["frozen"] = {
                name: jnp.stack(
                    [
                        memories[name].rows[draw_anchors(task, level.memory, level.anchors)]
                        for task in jax.random.split(keys[name], level.tasks)
                    ]
                )
                for name, level in levels.items()
                if level.tasks
            }
        return memories

    def prototypes(memories: dict[str, Any], key: Key[Array, ""]) -> dict[str, SOPs]:
        """SOPs of every task, stacked [tasks, ...], drawn anew from both memories."""
        if config.anchors == "fixed_slots":
            key = jax.random.key(0)  # the same slots at every step
        drawn = {}
        for name, level_key in zip(levels, jax.random.split(key, len(levels)), strict=True):
            level = levels[name]
            if level.tasks == 0:
                continue
            draw = functools.partial(draw_sops, memories[name].rows, level, config)
            frozen = memories["frozen"][name] if config.anchors == "frozen_rows" else None
            # One task after another: batched, the top-k would leave XLA's fast path on CPUs.
            drawn[name] = jax.lax.map(
                lambda task, draw=draw: draw(*task),
                (jax.random.split(level_key, level.tasks), frozen),
            )
        return drawn

    def targets(
        sops: dict[str, SOPs], teacher: Embeddings, temperatures: Temperatures
    ) -> Float[Array, "tasks Q B K"]:
        """The teacher's assignments of the global views' [CLS]."""
        log_p = jax.vmap(lambda task: log_assignment(teacher.cls, task, temperatures.teacher))
        return jnp.exp(log_p(sops["cls"]))

    def loss(
        sops: dict[str, SOPs],
        targets: Float[Array, "tasks Q B K"],
        student: Embeddings,
        teacher: Embeddings,
        mask: Bool[Array, "Q B L"],
        temperatures: Temperatures,
    ) -> tuple[Array, dict[str, Array]]:
        """λ1 times equation 2 plus λ2 times equation 4, each the mean of its tasks."""

        def cls(task: SOPs, target: Array) -> Array:
            return cls_loss(student.cls, target, task, temperatures.student)

        def mim(task: SOPs) -> Array:
            return mim_loss(student.patches, teacher.patches, mask, task, *temperatures)

        terms = {"cls": jax.vmap(cls)(sops["cls"], targets).mean()}
        total = config.cls.weight * terms["cls"]
        if "patch" in sops:
            terms["mim"] = jax.vmap(mim)(sops["patch"]).mean()
            total += config.patch.weight * terms["mim"]
        return total, terms

    def remember(
        memories: dict[str, Any], teacher: Embeddings, index: Int[Array, " B"], key: Key[Array, ""]
    ) -> dict[str, Any]:
        """Both memories after the second global view: every [CLS], one random patch an image."""
        cls, patches = teacher.cls[1], teacher.patches[1]
        pick = jax.random.randint(key, (len(patches), 1, 1), 0, patches.shape[1])
        patch = jnp.take_along_axis(patches, pick, axis=1)[:, 0]
        return memories | {
            "cls": push(memories["cls"], cls, index),
            "patch": push(memories["patch"], patch, index),
        }

    def measure(
        memories: dict[str, Memory],
        sops: dict[str, SOPs],
        targets: Float[Array, "tasks Q B K"],
        student: Embeddings,
        teacher: Embeddings,
    ) -> dict[str, Array]:
        return health.measure(student.cls, teacher.cls, targets, sops["cls"], memories["cls"])

    return Objective(init, prototypes, targets, loss, remember, measure, health.verdict)
