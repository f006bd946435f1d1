"""iBOT (Zhou et al., 2022): DINO, and masked patches predict the teacher's assignments of them."""

from typing import Any

import ml_collections
from jax.sharding import Mesh

from sop_jax.data.masks import most_masked
from sop_jax.objectives.objective import Method, Objective
from sop_jax.objectives.prototypical import settings as shared
from sop_jax.objectives.prototypical.objective import prototypical
from sop_jax.rules import COUNT_OR_ZERO, NOT_NEGATIVE, POSITIVE, each
from sop_jax.schedules import Length

PATCH_RULES = {
    "patch_prototypes": COUNT_OR_ZERO,
    "patch_teacher_temperature": each(POSITIVE, 2),
    "patch_weight": NOT_NEGATIVE,
}


def settings() -> ml_collections.ConfigDict:
    """Returns the settings of iBOT's recipe for ViT-S/16."""
    return shared.settings(
        prototypes=8192,
        patch_prototypes=0,  # 0 for those of [CLS]
        patch_teacher_temperature=(0.04, 0.07),
        patch_weight=1.0,  # 0 for no loss of patches
    )


def build(
    config: ml_collections.ConfigDict,
    dim: int,
    mesh: Mesh,
    length: Length,
    grid: tuple[int, int],
) -> Objective:
    """Returns the objective of a run, see `objective.Build`."""
    most = most_masked(grid, config.mask) if config.ibot.patch_weight else 0
    return prototypical(config, dim, mesh, length, most_masked=most)


def check(config: ml_collections.ConfigDict) -> None:
    """Checks the settings that methods with prototypes share, and that patches are masked.

    Raises:
        UserError: they do not fit each other or those of the run.
    """
    shared.check(config, patches=bool(config.ibot.patch_weight))


def without_use(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns iBOT's settings that have no effect because of others, and the reason for each."""
    reasons = shared.without_use(config, patches=bool(config.ibot.patch_weight))
    if not config.ibot.patch_weight:
        for name in ("patch_prototypes", "patch_teacher_temperature"):
            reasons[f"ibot.{name}"] = "ibot.patch_weight is 0"
    return reasons


IBOT = Method(
    settings=settings,
    build=build,
    rules=shared.rules("ibot", **PATCH_RULES),
    check=check,
    without_use=without_use,
    batch_limit=lambda config: None,
    any_batch={},
    cls_only={"ibot.patch_weight": 0.0},
    warmups=shared.warmups("ibot", "patch_teacher_temperature"),
    scopes=(),
    files=shared.files,
)
