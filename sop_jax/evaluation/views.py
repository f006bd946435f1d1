"""What the features of a task are: its settings, and whether a network has such features."""

from typing import Any

import ml_collections
from ml_collections import config_dict

from sop_jax.data.augment import FILTERS
from sop_jax.errors import UserError
from sop_jax.evaluation.task import POOLS, View
from sop_jax.models import FAMILIES, size_of, token_side
from sop_jax.rules import COUNT, Rule, one_of, unset_or

# The settings of a task that say what its features are, and the values that they can have.
VIEW_RULES: dict[str, Rule] = {
    "resize": unset_or(COUNT),
    "crop": unset_or(COUNT),
    "interpolation": one_of(FILTERS),
    "layers": COUNT,
    "pool": one_of(POOLS),
}


def view_settings(layers: int = 1, pool: str = "cls") -> dict[str, Any]:
    """Returns the settings of VIEW_RULES; an unset `resize` or `crop` is that of the run."""
    sides = {name: config_dict.placeholder(int) for name in ("resize", "crop")}
    return {**sides, "interpolation": "bicubic", "layers": layers, "pool": pool}


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
    view = View(**own)._replace(**changes)
    _check_view(config, view)
    return view


def _check_view(config: ml_collections.ConfigDict, view: View) -> None:
    model, family = config.model, FAMILIES[config.model.family]
    size, side = size_of(model), token_side(model)
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
    depth = sum(size.depths) if hasattr(size, "depths") else size.depth if family.patches else 1
    if view.layers > depth:
        raise UserError(
            f"eval.layers is {view.layers}, but the network has {depth} layers; choose at most that"
        )
