"""MaSSL (Silva et al., 2024): views predict each other's assignments to blocks of a memory.

It is SOP whose prototypes have no supports, whose votes are one-hot, and whose tasks are the blocks
of one random permutation of the memory.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from sop_jax.errors import UserError
from sop_jax.models.head import check_unit
from sop_jax.objectives import temperatures
from sop_jax.objectives.blocks import block_log_softmax, check_block, random_blocks
from sop_jax.objectives.checks import check_memory, check_views, no_masks
from sop_jax.objectives.losses import cls_loss, different_views, views_at_once
from sop_jax.objectives.memory import by_age, flat_rows, init_memory, newest_first, push
from sop_jax.objectives.objective import (
    Bank,
    Method,
    Now,
    Objective,
    Outputs,
    Params,
    PatchIndices,
    Selection,
)
from sop_jax.objectives.patches import masked_first
from sop_jax.objectives.prototypical import health
from sop_jax.parallel.search import take
from sop_jax.rules import COUNT
from sop_jax.schedules import Length

RULES = {
    "massl.memory": COUNT,
    "massl.block": COUNT,
    **{f"massl.{key}": rule for key, rule in temperatures.RULES.items()},
    **{f"massl.{key}": rule for key, rule in temperatures.BY_EPOCH.items()},
}


def settings() -> ml_collections.ConfigDict:
    """Returns the settings of the authors' command for ViT-S/16."""
    return ml_collections.ConfigDict(
        dict(
            memory=131072,  # rows
            block=16384,  # rows in each block
            **temperatures.settings(temperature_by_epoch=False),
        )
    )


def log_assignment(
    u: Float[Array, "*B d"],
    rows: Float[Array, "TS d"],
    size: int,
    temperature: Float[Array, ""] | float,
) -> Float[Array, "*B TS"]:
    """Returns the log probabilities of softmax(<u, row> / τ) within each block, block by block.

    The probabilities of each block sum to 1, so that a cross-entropy of all entries is the sum of
    the T cross-entropies of the blocks.

    Args:
        u: unit embeddings.
        rows: the rows of the memory in T blocks, block by block.
        size: S, the number of rows in each block.
        temperature: τ.
    """
    products = jnp.einsum(
        "...d,kd->...k", u.astype(jnp.float32), rows, precision=jax.lax.Precision.HIGHEST
    )
    return block_log_softmax(products / temperature, size).reshape(products.shape)


def massl(config: ml_collections.ConfigDict, dim: int, mesh: Mesh, length: Length) -> Objective:
    """Returns MaSSL's objective, as set in `config.massl`.

    The memory has a lane for each image of a batch, split over the devices of `mesh`.

    Args:
        config: the config of the run.
        dim: d, the numbers in an embedding.
        mesh: the devices.
        length: the length of the run.

    Raises:
        UserError: the memory does not fit the devices.
    """
    section, size = config.massl, config.massl.block
    check_memory(config, {"massl.memory": section.memory}, dim, mesh)
    globals_, locals_ = config.augment.global_crops, config.augment.local_crops
    student_views, teacher_views = tuple(range(globals_ + locals_)), tuple(range(globals_))
    pairs = different_views(student_views, teacher_views)

    def init(key: Key[Array, ""]) -> tuple[Params, Any]:
        return {}, init_memory(key, section.memory, dim, config.batch_size)

    def select(mask: Bool[Array, "B Q h w"], keys: Key[Array, " B"]) -> Selection:
        """Selects no patches."""
        del keys
        none, is_masked = masked_first(mask, 0)
        return Selection(PatchIndices(none), PatchIndices(none), is_masked)

    def teach(
        student_params: Params,
        teacher_params: Params,
        carried: Any,
        teacher: Outputs,
        masked: Bool[Array, "B Q M"],
        index: Int[Array, " B"],
        now: Now,
        key: Key[Array, ""],
    ) -> tuple[Array, Array, Any]:
        """Returns the rows of all blocks, the teacher's embeddings, and the updated memory.

        The blocks are drawn before the memory takes the second global view of this step.
        """
        del student_params, teacher_params, masked, now
        blocks = random_blocks(key, section.memory, size)
        rows = by_age(carried, section.memory, blocks.reshape(-1))
        drawn = take(flat_rows(carried), rows, mesh)
        return drawn, teacher.cls, push(carried, teacher.cls[:, 1], index)

    def loss(
        params: Params,
        shared: Float[Array, "TS d"],
        targets: Float[Array, "b Q d"],
        student: Outputs,
        masked: Bool[Array, "b Q M"],
        now: Now,
    ) -> tuple[Array, dict[str, Array]]:
        del params, masked
        warm, sharp = now["student_temperature"], now["teacher_temperature"]
        summed = cls_loss(
            student.cls,
            jnp.exp(log_assignment(targets, shared, size, sharp)),
            lambda _, u: log_assignment(u, shared, size, warm),
            at_once=views_at_once(student.cls, len(shared), mesh),
        )
        mean = summed / (len(shared) // size)
        return mean, {"cls": mean}

    def measure(
        carried: Any,
        shared: Float[Array, "TS d"],
        targets: Float[Array, "B Q d"],
        student_cls: Float[Array, "B V d"],
        now: Now,
    ) -> dict[str, Array]:
        """Measures the assignments to all blocks together."""
        del carried
        sharp = now["teacher_temperature"]
        assigned = jnp.exp(log_assignment(targets, shared, len(shared), sharp))
        return health.measure(student_cls, targets, assigned, pairs)

    def banks(
        student_params: Params,
        teacher_params: Params,
        carried: Any,
        key: Key[Array, ""],
        taught: bool,
    ) -> dict[str, Bank]:
        """Returns the memory, whose rows are the prototypes of both networks."""
        del student_params, teacher_params, key, taught
        return {"memory": Bank(*newest_first(carried, section.memory), "cls")}

    return Objective(
        student_views=student_views,
        teacher_views=teacher_views,
        schedules=temperatures.temperatures(section, length),
        optimizers={},
        terms=("cls",),
        init=init,
        select=select,
        teach=teach,
        loss=loss,
        measure=measure,
        verdict=health.verdict,
        masks=False,
        banks=banks,
    )


def build(
    config: ml_collections.ConfigDict,
    dim: int,
    mesh: Mesh,
    length: Length,
    grid: tuple[int, int],
) -> Objective:
    """Returns the objective of a run, see `objective.Build`."""
    del grid
    return massl(config, dim, mesh, length)


def check(config: ml_collections.ConfigDict) -> None:
    """Checks the number of global views, and the sizes of the memory and of its blocks.

    Raises:
        UserError: embeddings are not of unit norm, there are fewer than two global views, the
            memory cannot hold a batch, or a block does not fit the memory.
    """
    check_unit(config)
    check_views(config)
    memory, batch = config.massl.memory, config.batch_size
    if batch > memory:
        raise UserError(
            f"batch_size {batch} does not fit massl.memory {memory}: every image of a batch stores "
            f"a row; use a batch of at most {memory} or a larger memory"
        )
    check_block("massl", config.massl.block, "memory", memory)


MASSL = Method(
    settings=settings,
    build=build,
    rules=RULES,
    check=check,
    without_use=no_masks,
    batch_limit=lambda config: (config.massl.memory, "massl.memory"),
    any_batch={},
    cls_only={},
    warmups=temperatures.warmups("massl"),
    scopes=(),
)
