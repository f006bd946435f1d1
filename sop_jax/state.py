"""The train state: everything that a run is, in one pytree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from sop_jax.models import Model, Params
from sop_jax.sop.objective import Objective


class TrainState(NamedTuple):
    """What a step takes and gives, and what a checkpoint holds.

    Attributes:
        step: steps done, which is also the position in the data.
        student: parameters that learn, and running statistics of its forward passes.
        teacher: their moving average, and running statistics of its own.
        opt_state: of the optimizer.
        memories: of the objective.
        key: never changes; a step's randomness is `fold_in(key, step)`.
    """

    step: Int[Array, ""]
    student: Params
    teacher: Params
    opt_state: Any
    memories: Any
    key: Key[Array, ""]


def init_state(
    key: Key[Array, ""], model: Model, objective: Objective, tx: optax.GradientTransformation
) -> TrainState:
    """The state before the first step: student and teacher alike, memories random."""
    key, model_key, memory_key = jax.random.split(key, 3)
    student = model.init(model_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        student=student,
        teacher=jax.tree.map(jnp.copy, student),
        opt_state=tx.init(student),
        memories=objective.init(memory_key),
        key=key,
    )
