"""Tokens of patches as colours: their first three principal components."""

import jax
import ml_collections
import numpy as np
from jaxtyping import UInt8

from sop_jax.models import Model, Params, token_side

COMPONENTS = 3  # red, green and blue
CLIPPED = 2  # percent of the patches at either end of a component, so that few do not set its scale


def components(
    config: ml_collections.ConfigDict,
    model: Model,
    params: Params,
    images: UInt8[np.ndarray, "n H W 3"],
) -> UInt8[np.ndarray, "n h w 3"]:
    """Returns a colour for each patch; patches of all images with like tokens have like colours.

    Args:
        config: the config of a network that has tokens of patches.
        model: the network.
        params: its parameters.
        images: images whose sides are multiples of those of a token, with at least three tokens.
    """
    from sklearn.decomposition import PCA  # takes a second, which the start of a training saves

    last = jax.jit(lambda params, images: model.features(params, images)[-1][:, 1:])
    tokens = np.asarray(last(params, images), np.float32)
    flat = tokens.reshape(-1, tokens.shape[-1])
    values = PCA(COMPONENTS, svd_solver="full").fit_transform(flat)
    low, high = np.percentile(values, [CLIPPED, 100 - CLIPPED], axis=0)
    scaled = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)
    side = token_side(config.model)
    height, width = (length // side for length in images.shape[1:3])
    return (255 * scaled).round().astype(np.uint8).reshape(len(images), height, width, COMPONENTS)
