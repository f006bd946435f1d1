"""The train state: everything that a run carries from step to step, in one pytree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from sop_jax.models import Model, Params
from sop_jax.objectives.objective import Objective

OWN = "objective"  # the name of the objective's parameters, next to those of the network


class TrainState(NamedTuple):
    """The state that a step maps to the next one, and that a checkpoint holds.

    Attributes:
        step: the number of steps done, which is also the position in the data.
        student: the student's parameters: `backbone`, `head` and, if the objective has parameters,
            `objective`. They include the running statistics of the student's forward passes.
        teacher: the moving average of the student's parameters, with running statistics of the
            teacher's own forward passes.
        opt_state: the state of the optimizer.
        carried: what the objective carries from step to step, such as memories.
        key: a key that never changes; each step uses `fold_in(key, step)`.
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
    """Returns the state before the first step, in which teacher and student are equal."""
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
