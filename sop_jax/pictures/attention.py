"""The attention of [CLS] in the last layer, head by head."""

import jax
import ml_collections
import numpy as np
from jaxtyping import Float, UInt8

from sop_jax.models import Model, Params, token_side


def without_cls(config: ml_collections.ConfigDict) -> str | None:
    """Returns why a network has no attention of [CLS]; None if it has some."""
    if config.model.family != "vit":
        return f"a {config.model.family} has no [CLS] that attends to patches"
    if config.model.pool != "cls":
        return "with model.pool=mean, [CLS] does not represent the image"
    return None


def attention(
    config: ml_collections.ConfigDict,
    model: Model,
    params: Params,
    images: UInt8[np.ndarray, "n H W 3"],
) -> Float[np.ndarray, "n heads h w"]:
    """Returns the weights from [CLS] to each patch, which sum to at most 1 per head.

    The rest is the attention of [CLS] to itself and to registers.

    Args:
        config: the config of the network, for which `without_cls` is None.
        model: the network.
        params: its parameters.
        images: images whose sides are multiples of those of a patch.
    """
    first = 1 + config.model.registers
    weights = np.asarray(
        jax.jit(lambda p, x: model.attention(p, x)[:, :, 0, first:])(params, images)
    )
    side = token_side(config.model)
    height, width = (length // side for length in images.shape[1:3])
    return weights.reshape(*weights.shape[:2], height, width)
