"""Layer-wise decay of the learning rate, with which pretrained transformers are fine-tuned.

As BEiT's recipe, which iBOT uses: the layers of a backbone are numbered from its embeddings (0)
through its blocks to what follows them (depth + 1), and the learning rate of a layer is multiplied
by the decay once for each layer between it and the end.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sop_jax.errors import UserError
from sop_jax.schedules import Schedule
from sop_jax.training.optim import decays

TOKENS = ("cls_token", "pos_embed", "mask_token", "register_tokens")
EMBEDDINGS = (*TOKENS, "patch_embed", "patch_norm")


def adamw(
    schedule: Schedule, weight_decay: float, decay: float, decay_tokens: bool = False
) -> optax.GradientTransformation:
    """Returns AdamW whose learning rate is multiplied by `layer_scales`.

    Args:
        schedule: the learning rate of the last layer.
        weight_decay: for the parameters of `decayed`.
        decay: the factor of the learning rate per layer; 1 for the same rate everywhere.
        decay_tokens: whether [CLS], positions and other tokens have weight decay too.
    """
    mask = decays if decay_tokens else decayed
    return optax.chain(
        optax.adamw(schedule, weight_decay=weight_decay, mask=mask), scale_by_layer(decay)
    )


def scale_by_layer(decay: float) -> optax.GradientTransformation:
    """Returns the transformation that multiplies updates by `layer_scales`."""

    def scale(updates: Any, _: Any) -> Any:
        scales = layer_scales(updates, decay)
        return jax.tree.map(lambda x, factor: x * jnp.asarray(factor, x.dtype), updates, scales)

    return optax.stateless(scale) if decay != 1 else optax.identity()


def layer_scales(params: Any, decay: float) -> Any:
    """Returns the factors of the learning rate, float64, that broadcast against each parameter.

    A factor is decay^(depth + 1 - layer): the embeddings of patches, [CLS], positions and other
    tokens are layer 0 and block i is layer i + 1. Whatever follows the blocks has the factor 1,
    which includes all parameters outside of `backbone`. The blocks of a Swin are numbered through
    all stages, and a downsampling belongs to the layer of the block before it.

    Args:
        params: a tree with the parameters of a backbone under the name `backbone`.
        decay: the factor per layer.

    Raises:
        UserError: the backbone is a ResNet, for which no layers are defined.
    """
    before = _blocks_before(params.get("backbone", {}))
    depth = sum(before.values())
    factors = np.array([decay ** (depth + 1 - layer) for layer in range(depth + 2)])

    def factor(path: tuple, leaf: Any) -> np.ndarray:
        names = [key.key for key in path]
        layer: Any = depth + 1
        if names[0] == "backbone":
            if names[1] in EMBEDDINGS:
                layer = 0
            elif names[1] == "blocks" or names[1] == "stages" and "blocks" in names:
                first = _first(before, names)
                layer = 1 + np.arange(first, first + leaf.shape[0])
                layer = layer.reshape(-1, *(1,) * (leaf.ndim - 1))
            elif names[1] == "stages" and names[3] == "downsample":
                layer = _first(before, names) + before[names[2]]
            elif names[1] != "norm":
                raise UserError(
                    f"Layer-wise decay of the learning rate is not defined for {'/'.join(names)}. "
                    "It is for the layers of a ViT or a Swin. Set a layer decay of 1."
                )
        return np.asarray(factors[layer])

    return jax.tree_util.tree_map_with_path(factor, params)


def _blocks_before(backbone: Any) -> dict[Any, int]:
    """Returns the number of blocks of each stage, in order; a ViT has one stage."""
    if "blocks" in backbone:
        return {None: jax.tree.leaves(backbone["blocks"])[0].shape[0]}
    stages = backbone.get("stages", {})
    return {
        name: jax.tree.leaves(stages[name]["blocks"])[0].shape[0]
        for name in sorted(stages, key=int)
        if "blocks" in stages[name]
    }


def _first(blocks: dict[Any, int], names: list[Any]) -> int:
    """Returns the number of blocks before the stage of a parameter."""
    stage = names[2] if names[1] == "stages" else None
    order = list(blocks)
    return sum(blocks[name] for name in order[: order.index(stage)])


def decayed(params: Any) -> Any:
    """Returns the mask of weight decay in fine-tuning: that of `optim.decays` without all tokens.

    [CLS] and positions decay in pretraining, but not in fine-tuning.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, decays: decays and path[-1].key not in TOKENS, decays(params)
    )
