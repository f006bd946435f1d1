"""MSN (Assran et al., 2022) and PMSN (Assran et al., 2023): Masked Siamese Networks.

The teacher sees one view, the target; the student sees all others, the anchors. Some patches of the
large anchors are dropped, and the small ones are focal crops. Anchors predict the target's
assignment to prototypes that both networks share, and the mean assignment of all anchors is matched
to a prior: the uniform one in MSN (ME-MAX), a power law in PMSN. As in MSN's code, the gradients of
prototypes are neither clipped nor decayed.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Key

from sop_jax.errors import UserError
from sop_jax.models import FAMILIES
from sop_jax.objectives.objective import Method, Objective, PatchIndices, Select, Selection
from sop_jax.objectives.prototypical import settings as shared
from sop_jax.objectives.prototypical.objective import counts_of, learnt, prototypical
from sop_jax.rules import less_than
from sop_jax.schedules import Length


def settings(**own: Any) -> ml_collections.ConfigDict:
    """Returns the settings of MSN's released recipe for ViT-S/16.

    The temperatures and Sinkhorn-Knopp are those of its code: probabilities at 0.1 are sharpened
    with T = 0.25, which is the softmax at 0.025, and then balanced.

    Args:
        **own: defaults that differ.
    """
    defaults: dict[str, Any] = dict(
        prototypes=1024,
        layer="unit",
        freeze_epochs=0.0,
        marginal="sinkhorn_probabilities",
        teacher_temperature=(0.025, 0.025),
        temperature_warmup_epochs=0.0,
        temperature_by_epoch=False,
        prior="uniform",
        patch_drop=0.15,  # the share of patches that the large anchors lack
    )
    return shared.settings(**{**defaults, **own})


def dropping(share: float) -> Select:
    """Returns the selection of random patches that enter the student's encoder.

    The head embeds no patches. The number kept is rounded down, as in MSN's code, which drops the
    same patches of all images of a batch; here each view of each image has its own.

    Args:
        share: the share of patches to drop, less than 1.
    """

    def select(mask: Bool[Array, "B Q h w"], keys: Key[Array, " B"]) -> Selection:
        views, patches = mask.shape[1], mask.shape[2] * mask.shape[3]
        count = max(1, int(patches * (1 - share)))
        order = jax.vmap(lambda key: jax.random.uniform(key, (views, patches)))(keys).argsort(-1)
        embedded = jnp.zeros((*mask.shape[:2], 0), jnp.int32)
        kept = order[..., :count] if share else None
        student = PatchIndices(embedded, kept)
        return Selection(student, PatchIndices(embedded), jnp.zeros(embedded.shape, bool))

    return select


def build(
    config: ml_collections.ConfigDict,
    dim: int,
    mesh: Mesh,
    length: Length,
    grid: tuple[int, int],
) -> Objective:
    """Returns the objective of a run, see `objective.Build`."""
    del grid
    views = config.augment.global_crops + config.augment.local_crops
    counts = counts_of(config[config.method])
    objective = prototypical(
        *(config, dim, mesh, length),
        source=learnt(config, dim, length, counts, average=False, plain=True),
        student_views=range(1, views),
        teacher_views=(0,),
    )
    return objective._replace(select=dropping(config[config.method].patch_drop))


def check(config: ml_collections.ConfigDict) -> None:
    """Checks the settings, and that the network can drop patches.

    Raises:
        UserError: one of these does not hold.
    """
    shared.check(config)
    name, family = config.method, config.model.family
    drop = config[name].patch_drop
    if drop and not FAMILIES[family].drops_patches:
        raise UserError(
            f"{name}.patch_drop is {drop}, but only a ViT can drop patches, and model.family is "
            f"{family}; set --config.{name}.patch_drop=0"
        )


def method(name: str, settings: Callable[[], ml_collections.ConfigDict]) -> Method:
    """Returns MSN under a name, with its defaults."""
    return Method(
        settings=settings,
        build=build,
        rules=shared.rules(name, patch_drop=less_than(1)),
        check=check,
        without_use=shared.without_use,
        batch_limit=lambda config: None,
        any_batch={},
        cls_only={f"{name}.patch_drop": 0.0},
        warmups=shared.warmups(name),
        scopes=(),
        files=shared.files,
    )


MSN = method("msn", settings)
PMSN = method("pmsn", functools.partial(settings, prior="power", prior_weight=5.0))
