"""SwAV (Caron et al., 2020): views predict each other's codes, which Sinkhorn-Knopp balances.

There is one network: the codes are from a teacher of momentum 0, which is the student of this step
without its gradient. In the authors' code the prototypes are scaled to unit norm before each step.
"""

from typing import Any

import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh
from ml_collections import config_dict

from sop_jax.errors import UserError
from sop_jax.objectives.objective import Method, Objective
from sop_jax.objectives.prototypical import settings as shared
from sop_jax.objectives.prototypical.marginals import SINKHORN, Marginal, sinkhorn_offset
from sop_jax.objectives.prototypical.objective import prototypical
from sop_jax.rules import COUNT_OR_ZERO, NOT_NEGATIVE, STEPS, unset_or
from sop_jax.schedules import Length, duration

CODED = (0, 1)  # the views with codes, which are the first two global ones

QUEUE_RULES = {
    "queue": COUNT_OR_ZERO,
    "queue_start_epochs": NOT_NEGATIVE,
    "queue_start_steps": unset_or(STEPS),
}


def settings() -> ml_collections.ConfigDict:
    """Returns the settings of SwAV's `main_swav.py`, which freezes its prototypes for 313 steps."""
    return shared.settings(
        prototypes=3000,
        layer="normalized",
        freeze_epochs=0.0,
        freeze_steps=313,
        marginal="sinkhorn",
        teacher_temperature=(0.05, 0.05),  # the authors' epsilon
        temperature_warmup_epochs=0.0,
        queue=0,  # earlier embeddings per view that the codes are balanced with; 0 for none
        queue_start_epochs=15.0,  # the queue is empty before
        queue_start_steps=config_dict.placeholder(int),
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
    queued = None
    if config.swav.queue and config.swav.marginal in SINKHORN:
        start = duration(config.swav, "queue_start_", length.epoch)
        queued = queued_sinkhorn(config.swav, dim, config.batch_size, start)
    return prototypical(
        config, dim, mesh, length, of_cls=queued, per_view=True, teacher_views=CODED
    )


def queued_sinkhorn(
    section: ml_collections.ConfigDict, dim: int, batch: int, start: int
) -> Marginal:
    """Returns Sinkhorn-Knopp over a batch and a queue of the batches before it, if that is full.

    The queue holds the same row of each batch in one lane, the newest first, so that its lanes are
    split over the devices as the images are.

    Args:
        section: `config.swav` of the run.
        dim: d, the numbers in an embedding.
        batch: B, the images of a batch.
        start: the step at which the queue begins to fill.
    """
    slots = section.queue // batch
    of_probabilities = section.marginal == "sinkhorn_probabilities"

    def offset(logits, rows, weight, state, temperature):
        del temperature
        queue, steps = state["queue"]["rows"], state["steps"]
        full = (steps >= start + slots).astype(jnp.float32)
        together = jnp.concatenate([jnp.moveaxis(rows, 0, 1), queue], axis=1)
        counts = jnp.concatenate([weight.T, jnp.full(queue.shape[:2], full)], axis=1)
        of_rows = logits(together).reshape(counts.size, -1)
        a = sinkhorn_offset(
            of_rows, counts.reshape(-1), section.sinkhorn_iterations, of_probabilities
        )
        return a, {"queue": {"rows": together[:, :-1]}, "steps": steps + 1}

    empty: dict[str, Any] = {"rows": jnp.zeros((batch, slots, dim))}
    return Marginal({"queue": empty, "steps": jnp.zeros((), jnp.int32)}, offset)


def check(config: ml_collections.ConfigDict) -> None:
    """Checks SwAV's settings, see `Method.check`.

    Raises:
        UserError: embeddings are not of unit norm, or batches do not fill the queue.
    """
    shared.check(config)
    if tuple(config.optim.momentum) != (0.0, 0.0):
        raise UserError(
            f"optim.momentum is {tuple(config.optim.momentum)}, but the codes of swav are from the "
            "student itself, a teacher of momentum 0; set --config.optim.momentum=0.,0."
        )
    queue, batch = config.swav.queue, config.batch_size
    if queue % batch:
        more = batch * (queue // batch + 1)
        raise UserError(
            f"swav.queue {queue} does not consist of whole batches of batch_size {batch}; expected "
            f"a multiple, for example --config.swav.queue={more}, or 0 for no queue"
        )


def without_use(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Returns SwAV's settings that have no effect because of others, and the reason for each."""
    reasons = shared.without_use(config)
    if config.swav.marginal not in SINKHORN:
        reasons["swav.queue"] = f"swav.marginal is {config.swav.marginal}"
    if not config.swav.queue or "swav.queue" in reasons:
        for name in ("queue_start_epochs", "queue_start_steps"):
            reasons[f"swav.{name}"] = "there is no queue"
    return reasons


SWAV = Method(
    settings=settings,
    build=build,
    rules=shared.rules("swav", **QUEUE_RULES),
    check=check,
    without_use=without_use,
    batch_limit=lambda config: (config.swav.queue, "swav.queue") if config.swav.queue else None,
    any_batch={"swav.queue": 0},
    cls_only={},
    warmups=shared.warmups("swav"),
    scopes=(),
    files=shared.files,
)
