"""CARP (Silva and Ramírez Rivera, 2023): views agree on random blocks of prototypes.

A partition of the prototypes is drawn anew in each step, and each block has a softmax of its own.
Its prototypes have to be used equally, in place of a temperature or a center.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh
from jaxtyping import Array, Float

from sop_jax.errors import UserError
from sop_jax.objectives.blocks import block_log_softmax, check_block, random_blocks
from sop_jax.objectives.losses import by_view, different_views, sum_over_views, views_at_once
from sop_jax.objectives.objective import Method, Now, Objective
from sop_jax.objectives.prototypical import settings as shared_settings
from sop_jax.objectives.prototypical.layers import Prototypes, logits
from sop_jax.objectives.prototypical.objective import Source, prototypical
from sop_jax.objectives.prototypical.priors import mean_to_prior, prior_to_mean
from sop_jax.rules import COUNT
from sop_jax.schedules import Length

PRIORS = ("none", "uniform")


def settings() -> ml_collections.ConfigDict:
    """Returns the settings of the authors' code, whose embeddings are not normalized.

    The lengths of the prototypes do not learn, and there are no temperatures.
    """
    return shared_settings.settings(
        block=512,  # prototypes in each block
        layer="unit",
        freeze_epochs=0.0,
        marginal="none",
        student_temperature=1.0,
        teacher_temperature=(1.0, 1.0),
        temperature_warmup_epochs=0.0,
        prior="uniform",  # none | uniform (ME-MAX), in each block
    )


def consistency(p: Float[Array, "*B T S"], q: Float[Array, "*B T S"]) -> Float[Array, "*B"]:
    """Returns -ln <p, q>, the mean over T blocks, given log probabilities within each block.

    This is not a cross-entropy: it is least where both are the same one-hot distribution.
    """
    return -jax.nn.logsumexp(p + q, axis=-1).mean(-1)


def inequality(mean: Float[Array, "T S"], direction: str = "mean_to_prior") -> Float[Array, ""]:
    """Returns how unequally prototypes are used, the mean over T blocks, in nats; 0 if equally.

    Args:
        mean: the mean probabilities within each block of all views of student and teacher.
        direction: `mean_to_prior` for ln S - H(mean), that is, ME-MAX as in the authors' code;
            `prior_to_mean` for the reverse divergence from equal use.
    """
    divergence = mean_to_prior if direction == "mean_to_prior" else prior_to_mean
    equal = jnp.full(mean.shape[-1], 1 / mean.shape[-1])
    return jax.vmap(lambda block: divergence(block, equal))(mean).mean()


def carp(
    config: ml_collections.ConfigDict,
    dim: int,
    mesh: Mesh,
    length: Length,
    source: Source | None = None,
) -> Objective:
    """Returns CARP's objective with the settings of the method that the config names.

    Args:
        config: the config of the run.
        dim: d, the numbers in an embedding.
        mesh: the devices.
        length: the length of the run.
        source: where prototypes come from; they learn by gradient by default.
    """
    section = config[config.method]
    globals_, locals_ = config.augment.global_crops, config.augment.local_crops
    pairs = different_views(range(globals_ + locals_), range(globals_))

    def views(
        learning: Prototypes,
        shared: dict[str, Any],
        targets: Float[Array, "b Q d"],
        student: Float[Array, "b V d"],
        now: Now,
    ) -> dict[str, Array]:
        """Returns the consistency of all pairs of different views, and the inequality."""
        blocks = random_blocks(shared["key"], section.prototypes, section.block).reshape(-1)
        learnt, taught = jax.tree.map(lambda x: x[blocks], (learning, shared["prototypes"]["cls"]))

        def log_p(prototypes: Prototypes, u: Array) -> Array:
            raw = logits(section.layer, prototypes, u, now["student_temperature"])
            return block_log_softmax(raw, section.block)

        raw = logits(section.layer, taught, targets, now["teacher_temperature"])
        log_q = block_log_softmax(raw + shared["offsets"]["cls"][blocks], section.block)

        def view(learnt: Prototypes, u: Array, partners: Array) -> Array:
            by_partner = jax.vmap(consistency, (None, 1), 1)(log_p(learnt, u), log_q)
            return (partners * by_partner).sum()

        at_once = views_at_once(student, globals_ * section.prototypes, mesh)
        total = sum_over_views(view, at_once, learnt, by_view(student), pairs)
        terms = {"cls": total / (pairs.sum() * len(student))}
        if section.prior != "none":
            sums = (
                jnp.exp(log).mean(0).sum(0)
                for log in (jax.checkpoint(log_p)(learnt, student), log_q)
            )
            mean = sum(sums, start=jnp.zeros(())) / sum(pairs.shape)
            terms["prior"] = inequality(mean, section.prior_direction)
        return terms

    return prototypical(config, dim, mesh, length, source=source, views=views)


def build(
    config: ml_collections.ConfigDict,
    dim: int,
    mesh: Mesh,
    length: Length,
    grid: tuple[int, int],
) -> Objective:
    """Returns the objective of a run, see `objective.Build`."""
    del grid
    return carp(config, dim, mesh, length)


def check(config: ml_collections.ConfigDict) -> None:
    """Checks the settings that methods with prototypes share, and the size of blocks.

    Raises:
        UserError: they do not fit each other or those of the run.
    """
    shared_settings.check(config, unit=False)
    check_blocks(config)


def check_blocks(config: ml_collections.ConfigDict) -> None:
    """Checks the size of blocks, and that equal use is the only prior within them.

    Raises:
        UserError: one of these does not hold.
    """
    name, section = config.method, config[config.method]
    check_block(name, section.block, "prototypes", section.prototypes)
    if section.prior not in PRIORS:
        raise UserError(
            f"{name}.prior is {section.prior}; expected one of {', '.join(PRIORS)}, because blocks "
            f"are drawn anew in each step; for example, set --config.{name}.prior=uniform"
        )


CARP = Method(
    settings=settings,
    build=build,
    rules=shared_settings.rules("carp", block=COUNT),
    check=check,
    without_use=shared_settings.without_use,
    batch_limit=lambda config: None,
    any_batch={},
    cls_only={},
    warmups=shared_settings.warmups("carp"),
    scopes=(),
    files=shared_settings.files,
)
