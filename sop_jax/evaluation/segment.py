"""Semantic segmentation of ADE20K with a linear head or UPerNet, as in iBOT."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sop_jax.data.ade20k import IGNORED
from sop_jax.models import Params
from sop_jax.models.positions import resize_positions
from sop_jax.models.segmentation import resize

EMBEDDED = ("cls_token", "pos_embed", "mask_token", "register_tokens")  # what tokens start from


def resized_positions(table: Float[Array, "n D"], side: int) -> Float[Array, "m D"]:
    """Returns positions of a square grid, [CLS] first, resized to `side` x `side` patches.

    They are resized as mmsegmentation does when it loads weights: bicubic by size, whatever the
    rule is in the forward pass.
    """
    old = round((len(table) - 1) ** 0.5)
    grid = resize_positions(table[1:].reshape(old, old, -1), (side, side), "size")
    return jnp.concatenate([table[:1], grid.reshape(side * side, -1)])


def pixel_loss(
    logits: Float[Array, "B h w classes"], labels: Int[Array, "B H W"]
) -> Float[Array, ""]:
    """Returns the cross-entropy of the logits, resized to the labels, as in mmsegmentation.

    It is the sum over all pixels that are not ignored, divided by the number of all pixels.
    """
    log_p = jax.nn.log_softmax(resize(logits, labels.shape[1:]))
    counted = labels != IGNORED
    right = jnp.take_along_axis(log_p, jnp.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
    return -jnp.where(counted, right, 0.0).mean()


def pixel_accuracy(
    logits: Float[Array, "B h w classes"], labels: Int[Array, "B H W"]
) -> Float[Array, ""]:
    """Returns the share of all pixels, ignored ones included, that are classified correctly."""
    return (resize(logits, labels.shape[1:]).argmax(-1) == labels).mean()


def rate_scales(params: Params, decay: float) -> Any:
    """Returns the factor of each parameter's learning rate, for a network of `segmentation.build`.

    With L layers it is decay^(L - i) for layer i, decay^(L + 1) for what comes before the layers,
    and 1 for the final norm, the adaptors and the heads.

    Returns:
        A tree of arrays that broadcast to the parameters, where layers are stacked.
    """
    depth = len(params["backbone"]["blocks"]["qkv"]["bias"])

    def scale(path: tuple, leaf: Any) -> Any:
        root, name = path[0].key, path[1].key
        if root != "backbone" or name == "norm":
            return np.float32(1)
        if name != "blocks":
            return np.float32(decay ** (depth + 1))
        factors = decay ** (depth - np.arange(depth, dtype=np.float32))
        return factors.reshape(-1, *(1,) * (leaf.ndim - 1))

    return jax.tree_util.tree_map_with_path(scale, params)


def decayed(params: Params, official: bool = False) -> Any:
    """Returns whether weight decay applies to each parameter: not to vectors, tokens and positions.

    Args:
        params: the parameters.
        official: whether [CLS] and the positions decay, as in iBOT's code, which means to leave
            them out but compares their names without the prefix `backbone.`.
    """

    def decays(path: tuple, _: Any) -> bool:
        name = path[-1].key
        if name in EMBEDDED:
            return official and name in ("cls_token", "pos_embed")
        return name not in ("bias", "scale", "mean", "var")

    return jax.tree_util.tree_map_with_path(decays, params)
