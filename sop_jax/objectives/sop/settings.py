"""SOP's settings: their valid values and combinations, and which of them have no effect."""

import ml_collections
from jax.sharding import Mesh

from sop_jax.data.masks import most_masked
from sop_jax.errors import UserError
from sop_jax.models.head import check_unit
from sop_jax.objectives import temperatures
from sop_jax.objectives.checks import check_masked, check_views
from sop_jax.objectives.objective import Method, Objective
from sop_jax.objectives.sop.objective import ANCHORS, sop
from sop_jax.objectives.sop.prototypes import POOLS, VOTES
from sop_jax.parallel.search import PRECISIONS
from sop_jax.rules import (
    COUNT,
    COUNT_OR_ZERO,
    NOT_NEGATIVE,
    SHARE,
    one_of,
)
from sop_jax.schedules import Length

# In the order of `settings`.
RULES = {
    "sop.cls.memory": COUNT,
    "sop.cls.anchors": COUNT,
    "sop.cls.supports": COUNT_OR_ZERO,
    "sop.cls.tasks": COUNT,
    "sop.cls.votes": one_of(VOTES),
    "sop.cls.weight": NOT_NEGATIVE,
    "sop.patch.memory": COUNT_OR_ZERO,
    "sop.patch.anchors": COUNT,
    "sop.patch.supports": COUNT_OR_ZERO,
    "sop.patch.tasks": COUNT_OR_ZERO,
    "sop.patch.votes": one_of(VOTES),
    "sop.patch.weight": NOT_NEGATIVE,
    "sop.pool": one_of(POOLS),
    "sop.smoothing": SHARE,
    "sop.anchors": one_of(ANCHORS),
    "sop.search_precision": one_of(PRECISIONS),
    **{f"sop.{key}": rule for key, rule in temperatures.RULES.items()},
}


def settings() -> ml_collections.ConfigDict:
    """Returns the paper's settings."""
    return ml_collections.ConfigDict(
        dict(
            # E_C and E_P: rows of the memory, SOPs per task, supports besides the anchor, tasks,
            # votes, lambda.
            cls=dict(
                memory=65536, anchors=4096, supports=8, tasks=2, votes="similarity", weight=1.0
            ),
            patch=dict(memory=8192, anchors=512, supports=0, tasks=1, votes="smoothed", weight=1.0),
            pool="non_anchors",  # non_anchors | all
            smoothing=0.1,
            anchors="random",  # random | fixed_slots | frozen_rows (the last two: table C.7)
            search_precision="float32",  # float32 | high | bfloat16
            **temperatures.settings(),
        )
    )


def build(
    config: ml_collections.ConfigDict,
    dim: int,
    mesh: Mesh,
    length: Length,
    grid: tuple[int, int],
) -> Objective:
    """Returns the objective of a run, see `objective.Build`."""
    most = most_masked(grid, config.mask) if config.sop.patch.tasks else 0
    return sop(config, dim, mesh, length, most)


def check(config: ml_collections.ConfigDict) -> None:
    """Checks the head, the number of global views, the sizes of both memories, and the masks.

    Embeddings must have unit norm. A view predicts the other global views, so there must be two.
    A memory holds a batch, the anchors of a draw, and their supports. A loss of masked patches
    needs some.

    Raises:
        UserError: one of these does not hold.
    """
    check_unit(config)
    check_views(config)
    for name in ("cls", "patch"):
        check_memory(name, config)
    if config.sop.patch.tasks and config.sop.patch.weight:
        check_masked(
            config,
            f"sop.patch.tasks is {config.sop.patch.tasks}, for a loss of masked patches",
            "--config.mask.none=0 --config.mask.ratio=0.3,0.3, or --config.sop.patch.tasks=0",
        )


def check_memory(name: str, config: ml_collections.ConfigDict) -> None:
    """Checks the memory of one level, `cls` or `patch`.

    Raises:
        UserError: it cannot hold a batch, the anchors of a draw, or their supports.
    """
    level, batch = config.sop[name], config.batch_size
    if level.memory == 0 and level.tasks == 0:
        return
    if level.memory == 0:
        raise UserError(
            f"sop.{name}.memory is 0, but sop.{name}.tasks is {level.tasks}; set "
            f"--config.sop.{name}.tasks=0 as well, or use a memory of at least {batch} rows, the "
            "batch_size"
        )
    if batch > level.memory:
        raise UserError(
            f"batch_size {batch} does not fit sop.{name}.memory {level.memory}: every image of a "
            f"batch stores a row; use a batch of at most {level.memory} or a larger memory"
        )
    if config.sop.anchors == "fixed_slots" and level.memory % batch:
        raise UserError(
            f"batch_size {batch} does not divide sop.{name}.memory {level.memory}, which "
            "sop.anchors=fixed_slots requires, so that the slots of the memory stay the same; "
            "change one of the sizes"
        )
    if level.tasks == 0:
        return
    if not 2 <= level.anchors <= level.memory:
        raise UserError(
            f"sop.{name}.anchors {level.anchors} cannot be drawn from sop.{name}.memory "
            f"{level.memory}; expected 2 to {level.memory}; change one of them"
        )
    others = level.memory - (level.anchors if config.sop.pool == "non_anchors" else 1)
    if not 0 <= level.supports <= others:
        raise UserError(
            f"sop.{name}.supports {level.supports} cannot be found among the {others} rows that "
            f"sop.pool={config.sop.pool} leaves in sop.{name}.memory {level.memory} next to "
            f"{level.anchors} anchors; use fewer supports or anchors, or a larger memory"
        )


def without_use(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Returns SOP's settings that have no effect because of others, and the reason for each."""
    if config.sop.patch.tasks:
        return {}
    names = ("anchors", "supports", "votes", "weight")
    return {f"sop.patch.{name}": "sop.patch.tasks is 0" for name in names}


def batch_limit(config: ml_collections.ConfigDict) -> tuple[int, str]:
    """Returns the rows of the smaller memory, since every image stores one, and its setting."""
    rows = [(config.sop[name].memory, f"sop.{name}.memory") for name in ("cls", "patch")]
    return min(row for row in rows if row[0])


SOP = Method(
    settings=settings,
    build=build,
    rules=RULES,
    check=check,
    without_use=without_use,
    batch_limit=batch_limit,
    any_batch={"sop.anchors": "random"},  # fixed slots need a batch that divides the memory
    cls_only={"sop.patch.tasks": 0, "sop.patch.memory": 0, "mask.none": 1.0},
    warmups=temperatures.warmups("sop"),
    scopes=("prototypes", "memories"),
)
