"""Decoupled prototypes (Arteaga et al., 2026): a mixture of the teacher's features, in any loss.

Each step first updates a Gaussian mixture with the teacher's embeddings of the whole batch. Then
the student learns, with the loss of another method, from prototypes that are the new means. The
paper does so for CARP. It leaves out what sharpens or centers targets, which here are settings.

The authors publish no constants. The defaults were chosen by the mixture alone, without training,
on random projections of scikit-learn's digits, see docs/method.md.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key
from ml_collections import config_dict

from sop_jax.data.masks import most_masked
from sop_jax.errors import UserError
from sop_jax.models import FAMILIES
from sop_jax.models.head import unit
from sop_jax.objectives import carp, ibot
from sop_jax.objectives.health import entropy
from sop_jax.objectives.objective import Method, Now, Objective, Outputs, Params, Warmup
from sop_jax.objectives.prototypical import settings as shared
from sop_jax.objectives.prototypical.mixture import (
    FORGETTING,
    Mixture,
    components,
    init_mixture,
    prototypes,
    start_at,
    update,
)
from sop_jax.objectives.prototypical.objective import (
    Levels,
    Source,
    counts_of,
    learnt,
    prototypical,
)
from sop_jax.rules import COUNT, NOT_NEGATIVE, POSITIVE, STEPS, each, less_than, one_of, unset_or
from sop_jax.schedules import Length, duration, ramp

START = 2**31 + 1  # folded into the seed's key to draw the first means; nothing else folds it in

LOSSES = ("carp", "dino", "ibot")

OWN_RULES = {
    "loss": one_of(LOSSES),
    "block": COUNT,
    **ibot.PATCH_RULES,
    "eta": less_than(1),
    "forgetting": one_of(FORGETTING),
    "beta": each(POSITIVE, 2),
    "beta_warmup_epochs": NOT_NEGATIVE,
    "beta_warmup_steps": unset_or(STEPS),
    "variance_floor": POSITIVE,
    "start_mass": POSITIVE,
    "start_variance": POSITIVE,
}


def settings() -> ml_collections.ConfigDict:
    """Returns CARP's settings, and those of the mixture."""
    own = dict(
        loss="carp",  # carp | dino | ibot, whose patches have prototypes that learn
        patch_prototypes=8192,
        patch_teacher_temperature=(0.04, 0.07),
        patch_weight=1.0,
        eta=0.05,  # the share that is forgotten
        forgetting="mass",  # mass: for each feature received | plain: at each step
        beta=(0.3, 0.3),  # annealing of responsibilities, linear during its warm-up
        beta_warmup_epochs=0.0,
        beta_warmup_steps=config_dict.placeholder(int),
        # Variances are given as multiples of 1 / d, that of random unit vectors.
        variance_floor=0.1,
        start_mass=1.0,  # the number of features that each first mean counts for
        start_variance=0.01,
    )
    return ml_collections.ConfigDict(carp.settings().to_dict() | own)


def takes_patches(section: ml_collections.ConfigDict) -> bool:
    """Whether there is a loss of masked patches."""
    return bool(section.loss == "ibot" and section.patch_weight)


def learning(section: ml_collections.ConfigDict) -> dict[str, int]:
    """Returns the number of prototypes of patches, which learn by gradient; {} if there are none.

    Patches may share the prototypes of [CLS], which are the means of the mixture.
    """
    counts = counts_of(section, takes_patches(section))
    return {name: count for name, count in counts.items() if name != "cls"}


def mixed(config: ml_collections.ConfigDict, dim: int, length: Length) -> Source:
    """Returns prototypes of [CLS] that are the means of a mixture of the teacher's embeddings.

    Means start at the features of the first step. Prototypes of patches, if any, learn by gradient.

    Args:
        config: the config of the run.
        dim: d, the numbers in an embedding.
        length: the length of the run.
    """
    section = config.decoupled
    counts = learning(section)
    patches = learnt(config, dim, length, counts)

    def init(key: Key[Array, ""]) -> tuple[Params, Mixture]:
        params = patches.init(key)[0] if counts else {}
        return params, init_mixture(jnp.zeros((section.prototypes, dim)), 0.0, 0.0)

    def start(features: Float[Array, "n d"]) -> Mixture:
        key = jax.random.fold_in(jax.random.key(config.seed), START)
        variance = jnp.float32(section.start_variance / dim)
        return start_at(features, key, section.prototypes, section.start_mass, variance)

    def levels(params: Params, mixture: Mixture) -> Levels:
        return {**params.get("prototypes", {}), "cls": {"direction": prototypes(mixture)}}

    def teach(
        student_params: Params,
        teacher_params: Params,
        carried: Mixture,
        teacher: Outputs,
        now: Now,
    ) -> tuple[Levels, Mixture]:
        del student_params
        features = unit(teacher.cls).reshape(-1, dim)
        has_begun = carried.mass.sum() > 0
        begun = jax.lax.cond(has_begun, lambda h: carried, start, features)
        mixture = update(
            *(begun, features, now["beta"], section.eta, section.variance_floor / dim),
            section.forgetting,
        )
        return levels(teacher_params, mixture), mixture

    def learn(params: Params, taught: Levels) -> Levels:
        return {**params.get("prototypes", {}), "cls": taught["cls"]}

    def read(
        student_params: Params, teacher_params: Params, carried: Mixture, taught: bool
    ) -> Levels:
        return levels(teacher_params if taught else student_params, carried)

    return Source(init, teach, learn, read, patches.optimizers if counts else {})


def build(
    config: ml_collections.ConfigDict,
    dim: int,
    mesh: Mesh,
    length: Length,
    grid: tuple[int, int],
) -> Objective:
    """Returns the objective of a run, see `objective.Build`."""
    section, source = config.decoupled, mixed(config, dim, length)
    if section.loss == "carp":
        base = carp.carp(config, dim, mesh, length, source)
    else:
        most = most_masked(grid, config.mask) if takes_patches(section) else 0
        base = prototypical(config, dim, mesh, length, source=source, most_masked=most)

    def measure(
        carried: Any,
        shared: Any,
        targets: Any,
        student_cls: Float[Array, "B V d"],
        now: Now,
    ) -> dict[str, Array]:
        """Measures also the entropy of the mixture's weights; ln K if all are equal."""
        weights = jnp.exp(components(carried["source"], 0.0).log_weights)
        signs = base.measure(carried, shared, targets, student_cls, now)
        return signs | {"mixture_entropy": entropy(weights)}

    warmup = min(duration(section, "beta_warmup_", length.epoch), length.steps)
    schedules = {**base.schedules, "beta": ramp(section.beta, warmup)}
    return base._replace(schedules=schedules, measure=measure)


def check(config: ml_collections.ConfigDict) -> None:
    """Checks the settings that methods with prototypes share, and those of the loss.

    Raises:
        UserError: they do not fit each other or those of the run.
    """
    section = config.decoupled
    no_patches = not FAMILIES[config.model.family].patches
    if takes_patches(section) and no_patches:
        raise UserError(
            f"decoupled.loss is ibot, but model.family={config.model.family} has no patches; set "
            "--config.decoupled.patch_weight=0 or --config.decoupled.loss=dino"
        )
    shared.check(config, unit=False, patches=takes_patches(section))
    if section.loss == "carp":
        carp.check_blocks(config)


def without_use(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Returns the settings that have no effect because of others, and the reason for each."""
    section = config.decoupled
    reasons = shared.without_use(config, takes_patches(section))
    because = f"decoupled.loss is {section.loss}"
    unused = [] if section.loss == "carp" else ["block"]
    if section.loss != "ibot":
        unused += list(ibot.PATCH_RULES)
    elif not section.patch_weight:
        because += " and decoupled.patch_weight is 0"
        unused += [name for name in ibot.PATCH_RULES if name != "patch_weight"]
    elif not section.patch_prototypes:
        because += " and decoupled.patch_prototypes is 0"
    if not learning(section):
        # The prototypes of [CLS] are unit vectors that learn by no gradient.
        unused += ["layer", "freeze_epochs", "freeze_steps", "koleo_prototypes"]
    return reasons | {f"decoupled.{name}": because for name in unused}


DECOUPLED = Method(
    settings=settings,
    build=build,
    rules=shared.rules("decoupled", **OWN_RULES),
    check=check,
    without_use=without_use,
    batch_limit=lambda config: None,
    any_batch={},
    cls_only={},
    warmups={
        **shared.warmups("decoupled", "patch_teacher_temperature"),
        "decoupled.beta_warmup": Warmup(
            "the responsibilities are fully annealed", ("decoupled.beta",)
        ),
    },
    scopes=(),
    files=shared.files,
)
