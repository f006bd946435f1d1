"""DINO (Caron et al., 2021): views predict each other's assignments, whose logits are centered."""

import ml_collections
from jax.sharding import Mesh

from sop_jax.objectives.objective import Method, Objective
from sop_jax.objectives.prototypical import settings as shared
from sop_jax.objectives.prototypical.objective import prototypical
from sop_jax.schedules import Length


def build(
    config: ml_collections.ConfigDict,
    dim: int,
    mesh: Mesh,
    length: Length,
    grid: tuple[int, int],
) -> Objective:
    """Returns the objective of a run, see `objective.Build`."""
    del grid
    return prototypical(config, dim, mesh, length)


DINO = Method(
    settings=shared.settings,
    build=build,
    rules=shared.rules("dino"),
    check=shared.check,
    without_use=shared.without_use,
    batch_limit=lambda config: None,
    any_batch={},
    cls_only={},
    warmups=shared.warmups("dino"),
    scopes=(),
    files=shared.files,
)
