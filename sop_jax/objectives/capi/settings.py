"""CAPI's settings: their valid values and combinations, and which have no effect."""

import ml_collections
from jax.sharding import Mesh

from sop_jax.data.masks import most_masked
from sop_jax.errors import UserError
from sop_jax.models import token_side
from sop_jax.objectives.capi.objective import capi
from sop_jax.objectives.checks import check_masked
from sop_jax.objectives.objective import Method, Objective
from sop_jax.rules import COUNT, NOT_NEGATIVE, POSITIVE, positive
from sop_jax.schedules import Length

# In the order of `settings`.
RULES = {
    "capi.prototypes": COUNT,
    "capi.predictor_depth": COUNT,
    "capi.predicted": positive(1),
    "capi.target_temperature": POSITIVE,
    "capi.clustering_temperature": POSITIVE,
    "capi.student_temperature": POSITIVE,
    "capi.lr": NOT_NEGATIVE,
}


def settings() -> ml_collections.ConfigDict:
    """Returns the settings of the authors' ViT-L/14."""
    return ml_collections.ConfigDict(
        dict(
            prototypes=16384,  # K, the clusters
            predictor_depth=12,
            predicted=0.05,  # the share of the hidden patches that are predicted
            target_temperature=0.06,  # of the balanced assignments
            clustering_temperature=0.12,  # of the clustering's own prediction
            student_temperature=0.12,
            lr=5e-4,  # of the clustering, for any batch size
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
    del dim  # the head is not used
    return capi(config, mesh, length, grid)


def check(config: ml_collections.ConfigDict) -> None:
    """Checks that patches can be hidden, that some stay visible, and that there is a batch.

    Raises:
        UserError: one of these does not hold.
    """
    if config.model.family != "vit":
        raise UserError(
            f"method is capi, but model.family is {config.model.family}: only a ViT can leave the "
            "hidden patches out of its encoder; choose model.family=vit, or another method"
        )
    if config.augment.local_crops:
        raise UserError(
            f"augment.local_crops is {config.augment.local_crops}, but capi does not see local "
            "views; set --config.augment.local_crops=0"
        )
    check_masked(
        config,
        "capi learns from hidden patches only",
        "--config.mask.none=0 --config.mask.ratio=0.65,0.65",
    )
    if config.mask.start_steps or (config.mask.start_steps is None and config.mask.start_epochs):
        raise UserError(
            "masks start after the first step, and until then the encoder of capi would not learn, "
            "because it learns from hidden patches only; set --config.mask.start_steps=0"
        )
    side = config.augment.global_size // token_side(config.model)
    patches, hidden = side * side, most_masked((side, side), config.mask)
    if hidden >= patches:
        raise UserError(
            f"mask.ratio {tuple(config.mask.ratio)} can hide {hidden} of {patches} patches; "
            "expected one or more to stay visible to the encoder; for example, set "
            "--config.mask.ratio=0.65,0.65"
        )
    if config.capi.prototypes < 2:
        raise UserError(
            f"capi.prototypes is {config.capi.prototypes}; expected 2 or more, because targets "
            "over one cluster are all the same; for example, set --config.capi.prototypes=1024"
        )
    if config.batch_size < 2:
        raise UserError(
            "batch_size is 1, but Sinkhorn-Knopp balances each position over the images of a "
            "batch, and cannot do so with one; use a larger --config.batch_size"
        )


def without_use(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Returns the settings that have no effect with CAPI, and the reason for each."""
    return {f"head.{name}": "method is capi, which does not use the head" for name in config.head}


CAPI = Method(
    settings=settings,
    build=build,
    rules=RULES,
    check=check,
    without_use=without_use,
    batch_limit=lambda config: None,
    any_batch={},
    cls_only={},
    warmups={},
    scopes=("clustering", "predictor"),
)
