"""Workdirs of small runs of every method that have just begun."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import layouts
import ml_collections
from etils import epath

from sop_jax import config as config_lib
from sop_jax.parallel.mesh import make_mesh
from sop_jax.training import checkpoint
from sop_jax.training.assemble import assemble
from sop_jax.training.state import TrainState


class Saved:
    """The workdir of a run that has just begun, and what its checkpoint holds."""

    def __init__(self, workdir: pathlib.Path, method: str, **changes: Any) -> None:
        self.workdir, self.config = workdir, settings(method, **changes)
        self.run = assemble(self.config, make_mesh(1), images=1000)
        self.state = apart(self.run.init(jax.random.key(0)))
        save(workdir, self.config, {3: self.state})


def settings(method: str, **changes: Any) -> ml_collections.ConfigDict:
    config = layouts.make_config(method=method)
    config.data.source = "digits"
    config.eval.update(resize=8, crop=8, batch_size=64)
    config.update_from_flattened_dict(changes)
    return config


def save(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, states: dict[int, TrainState]
) -> None:
    workdir.mkdir(exist_ok=True)
    config_lib.save(config, epath.Path(workdir))
    checkpoints = checkpoint.Checkpoints(workdir, keep_last=len(states))
    for step, state in states.items():
        checkpoints.save(step, state)
    checkpoints.close()


def apart(state: TrainState) -> TrainState:
    """Returns a state whose teacher is not its student, and whose mixture has begun."""
    teacher = jax.tree.map(
        lambda x: x + jnp.cos(jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape)), state.teacher
    )
    carried = state.carried
    if isinstance(carried, dict) and "total" in getattr(carried.get("source"), "_fields", ()):
        mixture = carried["source"]
        begun = mixture._replace(
            mass=mixture.mass + 2,
            total=jnp.sin(jnp.arange(mixture.total.size, dtype=jnp.float32) + 1).reshape(
                mixture.total.shape
            ),
        )
        carried = carried | {"source": begun}
    return state._replace(teacher=teacher, carried=carried)
