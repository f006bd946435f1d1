"""The train state: everything that a run is, in one pytree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from sop_jax.models import Model, Params
from sop_jax.objectives.objective import Objective

OWN = "objective"  # the name of the objective's parameters beside those of the network


class TrainState(NamedTuple):
    """What a step takes and gives, and what a checkpoint holds.

    Attributes:
        step: steps done, which is also the position in the data.
        student: parameters that learn: `backbone`, `head` and, where the objective learns too,
            `objective`. Running statistics of its forward passes are among them.
        teacher: their moving average, and running statistics of its own.
        opt_state: of the optimizer.
        carried: what the objective carries from step to step, such as memories.
        key: never changes; a step's randomness is `fold_in(key, step)`.
    """

    step: Int[Array, ""]
    student: Params
    teacher: Params
    opt_state: Any
    carried: Any
    key: Key[Array, ""]


def init_state(
    key: Key[Array, ""], model: Model, objective: Objective, tx: optax.GradientTransformation
) -> TrainState:
    """The state before the first step: student and teacher are alike."""
    key, model_key, objective_key = jax.random.split(key, 3)
    params, carried = objective.init(objective_key)
    student = model.init(model_key) | ({OWN: params} if params else {})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        student=student,
        teacher=jax.tree.map(jnp.copy, student),
        opt_state=tx.init(student),
        carried=carried,
        key=key,
    )
