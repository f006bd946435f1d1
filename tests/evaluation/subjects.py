"""A small untrained network, and the tools to measure it."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
from etils import epath
from small import small_config

from sop_jax.evaluation.task import Subject
from sop_jax.evaluation.tools import Toolbox
from sop_jax.models import build
from sop_jax.parallel.mesh import make_mesh, put, replicated

SIDE = 16  # of the images for which its positions are made


@functools.cache
def untrained() -> Subject:
    """Returns a network with patches of four pixels."""
    config = small_config(
        augment=dict(global_size=SIDE, local_size=8),
        data=dict(source="digits"),
        eval=dict(resize=SIDE, crop=SIDE, batch_size=512),
    )
    model = build(config, SIDE)
    params = jax.tree.map(
        lambda leaf: put(np.asarray(leaf), replicated(make_mesh())), model.init(jax.random.key(0))
    )
    return Subject("the network", config, model, params, "untrained", None)


def toolbox(folder: pathlib.Path | None = None, **options: Any) -> Toolbox:
    """Returns quiet tools that leave files in a folder."""
    place = None if folder is None else epath.Path(folder)
    return Toolbox(untrained(), make_mesh(), folder=place, shown=False, **options)
