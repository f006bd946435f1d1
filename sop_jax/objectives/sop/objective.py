"""SOP as a training objective (section 2 of the paper)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from sop_jax.objectives.losses import cls_loss, mim_loss, views_at_once
from sop_jax.objectives.memory import (
    Memory,
    by_age,
    flat_rows,
    init_memory,
    live,
    newest_first,
    push,
)
from sop_jax.objectives.objective import (
    Bank,
    Now,
    Objective,
    Outputs,
    Params,
    PatchIndices,
    Selection,
    Supports,
)
from sop_jax.objectives.patches import masked_first
from sop_jax.objectives.sop import health
from sop_jax.objectives.sop.assignment import log_assignment
from sop_jax.objectives.sop.prototypes import (
    SOPs,
    build_sops,
    cast_votes,
    draw_anchors,
    find_supports,
)
from sop_jax.objectives.temperatures import temperatures
from sop_jax.parallel.search import nearest, take
from sop_jax.schedules import Length

SLOTS = 2**31  # folded into the seed's key to draw fixed slots; nothing else folds in this value

ANCHORS = ("random", "fixed_slots", "frozen_rows")

COMPARED_WITH = {"cls": "cls", "patch": "patches"}  # what the SOPs of each level are compared with


def assign_views(
    sops: SOPs, cls: Float[Array, "B Q d"], temperature: Float[Array, ""] | float
) -> Float[Array, "tasks B Q K"]:
    """Returns the assignments of the views' [CLS] embeddings to the SOPs of every task."""
    return jnp.exp(jax.vmap(lambda task: log_assignment(cls, task, temperature))(sops))


def draw_patches(keys: Key[Array, " B"], views: int, patches: int) -> Int[Array, "B {views} 1"]:
    """Returns the position of one random patch of each image, the same for all of its views."""
    drawn = jax.vmap(lambda key: jax.random.randint(key, (1, 1), 0, patches))(keys)
    return jnp.broadcast_to(drawn, (len(keys), views, 1))


def draw_sops(
    memory: Memory,
    level: ml_collections.ConfigDict,
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    key: Key[Array, ""],
    frozen: Float[Array, "K d"] | None,
) -> tuple[SOPs, Int[Array, "S K"]]:
    """Returns the SOPs of one task, and the index in `flat_rows` of each of their rows.

    Args:
        memory: the memory of [CLS] or of patches.
        level: `config.cls` or `config.patch` accordingly.
        config: `config.sop` of the run.
        mesh: the devices that the memory is split over.
        key: draws the anchors.
        frozen: the embeddings of anchors that never change, in place of drawn ones; their index
            is -1.
    """
    rows, alive = flat_rows(memory), live(memory, level.memory)
    if frozen is not None:
        embeddings, found = frozen[None], jnp.full((1, len(frozen)), -1)
        if level.supports:
            _, nearest_rows = nearest(
                *(frozen, rows, level.supports, mesh),
                allowed=alive,
                precision=config.search_precision,
            )
            embeddings = jnp.concatenate([embeddings, take(rows, nearest_rows.T, mesh)])
            found = jnp.concatenate([found, nearest_rows.T])
        return SOPs(embeddings, cast_votes(embeddings, level.votes, config.smoothing)), found
    anchors = draw_anchors(key, level.memory, level.anchors)
    if config.anchors != "fixed_slots":
        anchors = by_age(memory, level.memory, anchors)
    found = find_supports(
        *(rows, anchors, level.supports, mesh),
        pool=config.pool,
        live=alive,
        precision=config.search_precision,
    )
    return build_sops(rows, found, level.votes, config.smoothing, mesh), found


def sop(
    run_config: ml_collections.ConfigDict,
    dim: int,
    mesh: Mesh,
    length: Length,
    most_masked: int | None = None,
) -> Objective:
    """Returns the paper's objective, as set in `config.sop`.

    Both memories have a lane for each image of a batch, split over the devices of `mesh`. If
    `config.sop.patch.memory` is 0, there is no memory of patches and no loss of masked patches.

    Args:
        run_config: the config of the run.
        dim: d, the numbers in an embedding.
        mesh: the devices.
        length: the length of the run.
        most_masked: the largest number of masked patches in a view, which is the number of patches
            per view that the head embeds; all by default.
    """
    config, lanes = run_config.sop, run_config.batch_size
    levels = {name: config[name] for name in ("cls", "patch") if config[name].memory}
    takes_patches = "patch" in levels

    def init(key: Key[Array, ""]) -> tuple[Params, dict[str, Any]]:
        """Returns no parameters, and E_C and E_P full of random rows, with any frozen anchors."""
        # The first keys of a split do not depend on the number of keys.
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
        return {}, memories

    def freeze(
        memory: Memory, level: ml_collections.ConfigDict, keys: Key[Array, " tasks"]
    ) -> Float[Array, "tasks K d"]:
        drawn = [draw_anchors(key, level.memory, level.anchors) for key in keys]
        rows = by_age(memory, level.memory, jnp.stack(drawn))
        return take(flat_rows(memory), rows, mesh)

    def select(mask: Bool[Array, "B Q h w"], keys: Key[Array, " B"]) -> Selection:
        """Selects the masked patches and, for the teacher, a last one drawn for each image."""
        masked, is_masked = masked_first(mask, most_masked if takes_patches else 0)
        taken = masked
        if takes_patches:
            drawn = draw_patches(keys, mask.shape[1], mask[0, 0].size)
            taken = jnp.concatenate([masked, drawn], axis=-1)
        return Selection(PatchIndices(masked), PatchIndices(taken), is_masked)

    def keys_of_levels(key: Key[Array, ""]) -> dict[str, Key[Array, ""]]:
        """Returns the key with which each level draws its anchors."""
        if config.anchors == "fixed_slots":
            # A key that does not depend on the step draws the same slots at every step.
            key = jax.random.fold_in(jax.random.key(run_config.seed), SLOTS)
        return dict(zip(levels, jax.random.split(key, len(levels)), strict=True))

    def prototypes(memories: dict[str, Any], key: Key[Array, ""]) -> dict[str, SOPs]:
        """Returns the SOPs of every task, stacked [tasks, ...], drawn anew from both memories."""
        drawn = {}
        for name, level_key in keys_of_levels(key).items():
            level = levels[name]
            if level.tasks == 0:
                continue
            draw = functools.partial(draw_sops, memories[name], level, config, mesh)
            frozen = memories["frozen"][name] if config.anchors == "frozen_rows" else None
            # One task at a time: if batched, the top-k would leave XLA's fast path on CPUs.
            drawn[name] = jax.lax.map(
                lambda task, draw=draw: draw(*task)[0],
                (jax.random.split(level_key, level.tasks), frozen),
            )
        return drawn

    def teach(
        student_params: Params,
        teacher_params: Params,
        carried: dict[str, Any],
        teacher: Outputs,
        masked: Bool[Array, "B Q M"],
        index: Int[Array, " B"],
        now: Now,
        key: Key[Array, ""],
    ) -> tuple[dict[str, SOPs], dict[str, Array], dict[str, Any]]:
        """Returns the SOPs, the teacher's embeddings as targets, and the updated memories.

        The SOPs are drawn before the memories take the embeddings of this step: the [CLS] and the
        random patch of the second global view (appendix A).
        """
        del student_params, teacher_params, masked, now
        with jax.named_scope("prototypes"):
            sops = prototypes(carried, key)
        targets, rows = {"cls": teacher.cls}, {"cls": teacher.cls[:, 1]}
        if takes_patches:
            targets["patch"] = teacher.patches[:, :, :-1]
            rows["patch"] = teacher.patches[:, 1, -1]
        with jax.named_scope("memories"):
            pushed = {name: push(carried[name], rows[name], index) for name in levels}
        return sops, targets, carried | pushed

    def loss(
        params: Params,
        shared: dict[str, SOPs],
        targets: dict[str, Array],
        student: Outputs,
        masked: Bool[Array, "b Q M"],
        now: Now,
    ) -> tuple[Array, dict[str, Array]]:
        """Returns λ1 times equation 2 plus λ2 times equation 4, each the mean over its tasks."""
        del params
        warm, sharp = now["student_temperature"], now["teacher_temperature"]

        def cls(task: SOPs) -> Array:
            expected = jnp.exp(log_assignment(targets["cls"], task, sharp))
            at_once = views_at_once(student.cls, task.votes.size, mesh)
            return cls_loss(
                *(student.cls, expected, lambda _, u: log_assignment(u, task, warm)),
                at_once=at_once,
            )

        def mim(task: SOPs) -> Array:
            at_once = views_at_once(student.patches, task.votes.size, mesh)
            return mim_loss(
                *(student.patches, targets["patch"], masked),
                assign=lambda _, u: log_assignment(u, task, warm),
                assign_teacher=lambda u: log_assignment(u, task, sharp),
                at_once=at_once,
            )

        # One task at a time: a vmap is no faster and needs more memory, see docs/performance.md.
        terms = {"cls": jax.lax.map(cls, shared["cls"]).mean()}
        total = config.cls.weight * terms["cls"]
        if "patch" in shared:
            terms["mim"] = jax.lax.map(mim, shared["patch"]).mean()
            total += config.patch.weight * terms["mim"]
        return total, terms

    def measure(
        carried: dict[str, Any],
        shared: dict[str, SOPs],
        targets: dict[str, Array],
        student_cls: Float[Array, "B V d"],
        now: Now,
    ) -> dict[str, Array]:
        filled = jnp.minimum(carried["cls"].filled / config.cls.memory, 1)
        assigned = assign_views(shared["cls"], targets["cls"], now["teacher_temperature"])
        return health.measure(student_cls, targets["cls"], assigned, shared["cls"], filled)

    def anchors(memories: dict[str, Any], name: str, key: Key[Array, ""]) -> Bank:
        """Returns the anchors of the first task of a level."""
        level, memory, compared = levels[name], memories[name], COMPARED_WITH[name]
        if config.anchors == "frozen_rows":
            return Bank(memories["frozen"][name][0], None, compared)
        drawn = draw_anchors(jax.random.split(key, level.tasks)[0], level.memory, level.anchors)
        if config.anchors != "fixed_slots":
            drawn = by_age(memory, level.memory, drawn)
        return Bank(flat_rows(memory)[drawn], memory.image.reshape(-1)[drawn], compared)

    def banks(
        student_params: Params,
        teacher_params: Params,
        carried: dict[str, Any],
        key: Key[Array, ""],
        taught: bool,
    ) -> dict[str, Bank]:
        """Returns the anchors of one task, and the memories, which both networks share."""
        del student_params, teacher_params, taught
        found = {
            f"{name}_anchors": anchors(carried, name, level_key)
            for name, level_key in keys_of_levels(key).items()
            if levels[name].tasks
        }
        for name, level in levels.items():
            rows, images = newest_first(carried[name], level.memory)
            found[f"{name}_memory"] = Bank(rows, images, COMPARED_WITH[name])
        return found

    def supports(carried: dict[str, Any], key: Key[Array, ""]) -> dict[str, Supports]:
        """Returns the SOPs of the first task of each level that has tasks."""
        shown = {}
        for name, level_key in keys_of_levels(key).items():
            level, memory = levels[name], carried[name]
            if level.tasks == 0:
                continue
            frozen = carried["frozen"][name][0] if config.anchors == "frozen_rows" else None
            task_key = jax.random.split(level_key, level.tasks)[0]
            sops, found = draw_sops(memory, level, config, mesh, task_key, frozen)
            images = jnp.where(found < 0, -1, memory.image.reshape(-1)[found])
            shown[name] = Supports(sops.embeddings, images, sops.votes)
        return shown

    globals_, locals_ = run_config.augment.global_crops, run_config.augment.local_crops
    return Objective(
        student_views=tuple(range(globals_ + locals_)),
        teacher_views=tuple(range(globals_)),
        schedules=temperatures(config, length),
        optimizers={},
        terms=("cls", "mim") if takes_patches and config.patch.tasks else ("cls",),
        init=init,
        select=select,
        teach=teach,
        loss=loss,
        measure=measure,
        verdict=health.verdict,
        banks=banks,
        supports=supports,
    )
