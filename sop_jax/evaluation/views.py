"""What the features of a task are: its settings, and whether a network has such features."""

from typing import Any

import ml_collections
from ml_collections import config_dict

from sop_jax.data.augment import FILTERS
from sop_jax.errors import UserError
from sop_jax.evaluation.task import POOLS, View
from sop_jax.models import FAMILIES, size_of, token_side
from sop_jax.rules import COUNT, Rule, one_of, unset_or

AUTO = "auto"  # what the papers use
LARGE = 768  # the width of ViT-B

# The settings of a task that say what its features are, and the values that they can have.
VIEW_RULES: dict[str, Rule] = {
    "resize": unset_or(COUNT),
    "crop": unset_or(COUNT),
    "interpolation": one_of(FILTERS),
    "layers": unset_or(COUNT),
    "pool": one_of((*POOLS, AUTO)),
}


def view_settings(
    layers: int | None = 1, pool: str = "cls", interpolation: str = "bicubic"
) -> dict[str, Any]:
    """Returns the settings of VIEW_RULES with their defaults.

    Args:
        layers: the default of `layers`; None for what the papers use for the size of the network.
        pool: the default of `pool`; AUTO for what the papers use.
        interpolation: the default of `interpolation`.

    Returns:
        The settings; an unset `resize` or `crop` is that of the run.
    """
    unset = {name: config_dict.placeholder(int) for name in ("resize", "crop", "layers")}
    given = {} if layers is None else {"layers": layers}
    return {**unset, **given, "interpolation": interpolation, "pool": pool}


def usual(model: ml_collections.ConfigDict) -> tuple[int, str]:
    """Returns the layers and the pool that iBOT and the SOP paper use for linear classifiers.

    [CLS] of the last four layers for ViT-S and Swin; [CLS] and the mean of the patches of the last
    layer for ViT-B and larger (iBOT's `run.sh`). A ResNet has only its last layer.
    """
    if not FAMILIES[model.family].patches:
        return 1, "cls"
    if model.family == "vit" and size_of(model).width >= LARGE:
        return 1, "cls_patches"
    return min(4, depth_of(model)), "cls"


def depth_of(model: ml_collections.ConfigDict) -> int:
    """Returns the number of layers whose tokens can be taken."""
    if not FAMILIES[model.family].patches:
        return 1
    size = size_of(model)
    return sum(size.depths) if model.family == "swin" else size.depth


def view_of(
    config: ml_collections.ConfigDict,
    settings: ml_collections.ConfigDict | None = None,
    **changes: Any,
) -> View:
    """Returns the view that the settings of a task describe.

    Args:
        config: the config of the run.
        settings: the settings of the task; by default [CLS] of the centre crops of `config.eval`.
        **changes: fields of the view that the settings do not have.

    Raises:
        UserError: the network does not have these features.
    """
    own = view_settings() if settings is None else {name: settings[name] for name in VIEW_RULES}
    for name in ("resize", "crop"):
        if own[name] is None or settings is None:
            own[name] = config.eval[name]
    layers, pool = usual(config.model)
    own["layers"] = layers if own["layers"] is None else own["layers"]
    own["pool"] = pool if own["pool"] == AUTO else own["pool"]
    view = View(**own)._replace(**changes)
    _check_view(config, view)
    return view


def _check_view(config: ml_collections.ConfigDict, view: View) -> None:
    model, family = config.model, FAMILIES[config.model.family]
    side, depth = token_side(model), depth_of(model)
    if view.crop > view.resize:
        raise UserError(
            f"eval.crop is {view.crop}, larger than eval.resize {view.resize}, the image that it "
            "is cut out of; set both"
        )
    if family.patches and view.crop % side:
        raise UserError(
            f"eval.crop {view.crop} is not a multiple of the {side} pixels of a token; choose "
            f"{view.crop // side * side or side} or {(view.crop // side + 1) * side}"
        )
    if not family.patches and (view.patches or view.pool != "cls" or view.layers > 1):
        raise UserError(
            f"model.family={model.family} has no tokens of patches, and only its last layer gives "
            "features; choose eval.layers=1 and eval.pool=cls, or another network"
        )
    if view.pool == "patches" and (model.family != "vit" or view.layers > 1):
        raise UserError(
            "eval.pool=patches is the mean of the last layer's patches before the final norm, "
            f"which needs a ViT and eval.layers=1, but this is model.family={model.family} with "
            f"eval.layers={view.layers}; choose eval.pool=cls_patches"
        )
    if view.layers > depth:
        raise UserError(
            f"eval.layers is {view.layers}, but the network has {depth} layers; choose at most that"
        )
