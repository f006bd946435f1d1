"""Workdirs of runs that were not trained, for tests of what reads them."""

import pathlib
from typing import Any

import jax
import ml_collections
from etils import epath
from small import small_config

from sop_jax import config as config_lib
from sop_jax.models import build
from sop_jax.objectives.sop.objective import sop
from sop_jax.parallel.mesh import make_mesh
from sop_jax.schedules import Length
from sop_jax.training import checkpoint
from sop_jax.training.optim import optimizer, schedules
from sop_jax.training.state import init_state

# The settings of an untrained network that maps different images to different features.
APART = {"model.init_std": 0.2, "model.position_std": 0.5}
LENGTH = Length(steps=10, epoch=5.0)


def make_config(**changes: Any) -> ml_collections.ConfigDict:
    config = small_config(
        steps=10,
        batch_size=8,
        data=dict(source="digits"),
        model=dict(width=32),
        head=dict(hidden=32),
        augment=dict(global_size=16, local_size=8),
        sop=dict(cls=dict(memory=64, anchors=16, supports=2), patch=dict(memory=64, anchors=16)),
        eval=dict(resize=16, crop=16, batch_size=512),
    )
    config.update_from_flattened_dict(changes)
    return config


def make_run(workdir: pathlib.Path, steps: tuple[int, ...] = (3, 7), **changes: Any) -> Any:
    """Makes a workdir with checkpoints of an untrained network, each with other parameters."""
    config = make_config(**changes)
    workdir.mkdir(exist_ok=True)
    config_lib.save(config, epath.Path(workdir))
    model = build(config, config.augment.global_size)
    tx = optimizer(config.optim, schedules(config, LENGTH), {})
    checkpoints = checkpoint.Checkpoints(workdir, keep_last=5)
    for step in steps:
        key = jax.random.key(step)
        checkpoints.save(
            step, init_state(key, model, sop(config, model.dim, make_mesh(1), LENGTH), tx)
        )
    checkpoints.close()
    return config
