"""The embeddings of images that are compared with prototypes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32

from sop_jax.data.sources import Source
from sop_jax.data.subsets import Subset
from sop_jax.evaluation.task import Subject
from sop_jax.evaluation.tools import Toolbox
from sop_jax.evaluation.views import view_of
from sop_jax.models import Model, Params

COMPARED = ("cls", "patches", "patch_features")  # what an image alone determines


def draw(source: Source, most: int, seed: int) -> Source:
    """Returns at most `most` images of a source, drawn by seed, in the order of the source."""
    if len(source) <= most:
        return source
    drawn = np.random.default_rng(seed).permutation(len(source))[:most]
    return Subset(source, np.sort(drawn))


def embed(
    network: Subject,
    source: Source,
    compared: str,
    mesh: Mesh,
    seed: int,
) -> Float32[np.ndarray, "n d"]:
    """Returns one vector for each image that can be read; all processes call it.

    The images are split over the devices, and seen as in evaluations: a centre crop without
    augmentation.

    Args:
        network: the network, with its head.
        source: the images.
        compared: one of COMPARED: the embedding of [CLS], that of a patch, or the features of a
            patch before the head. The patch is drawn for each image, by `seed` and its pixels.
        mesh: the devices.
        seed: draws the patches.
    """
    model = network.model._replace(features=_only(network.model, compared, seed))
    tools = Toolbox(network._replace(model=model), mesh, seed=seed)
    return tools.whole(tools.features(source, view_of(network.config))).vectors


def _only(model: Model, compared: str, seed: int) -> Callable[..., list[Array]]:
    """Returns a function in place of `Model.features`, whose only token is what is compared."""

    def token(params: Params, images: Array) -> Float[Array, "B d"]:
        if compared == "cls":
            return model.embed(params, images, None, None, patches=False)[0]
        tokens = model.features(params, images, last=1)[-1][:, 1:]
        where = _draw_patches(images, tokens.shape[1], seed)
        if compared == "patches":
            return model.embed(params, images, None, None, patches=where)[1][:, 0]
        return jnp.take_along_axis(tokens, where[..., None], axis=1)[:, 0]

    def features(params: Params, images: Array, **_: Any) -> list[Array]:
        return [token(params, images)[:, None]]

    return features


def _draw_patches(images: Array, count: int, seed: int) -> Array:
    """Returns the index [B, 1] of a patch of each image, whatever batch the image is in."""
    sums = images.astype(jnp.uint32).sum(axis=(1, 2, 3))

    def draw_one(total: Array) -> Array:
        return jax.random.randint(jax.random.fold_in(jax.random.key(seed), total), (1,), 0, count)

    return jax.vmap(draw_one)(sums)
