"""The vision transformer of backbone.npz, whose outputs on real code are known."""

import functools

import golden_numbers
import jax
import jax.numpy as jnp
import numpy as np
from test_golden import vit_params

from sop_jax import models
from sop_jax.config import paper
from sop_jax.evaluation.task import Subject
from sop_jax.parallel.mesh import make_mesh, put, replicated


@functools.cache
def golden_network() -> Subject:
    """Returns the network, replicated over all devices."""
    arrays = golden_numbers.load("backbone.npz")
    image_size, patch, width, depth, heads = (int(x) for x in arrays["vit/config"])
    config = paper()
    config.model.update(width=width, depth=depth, heads=heads, patch=patch, size="custom")
    config.model.dtype = "float32"
    config.head.update(hidden=8, dim=8)
    model = models.build(config, image_size)
    params = model.init(jax.random.key(0))
    params["backbone"] = jax.tree.map(jnp.asarray, vit_params(arrays, depth))
    everywhere = replicated(make_mesh())
    params = jax.tree.map(lambda leaf: put(np.asarray(leaf), everywhere), params)
    return Subject("golden", config, model, params, "", None)
