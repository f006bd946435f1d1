"""The call of timm that builds the network of an exported file and loads it."""

import math
from typing import Any

from etils import epath

from sop_jax.evaluation.views import view_of
from sop_jax.exports.trained import Trained
from sop_jax.models import FAMILIES, MEAN, STD, size_of

UNKNOWN = "HEADS"  # stands for a number of heads that weights do not show


def call(trained: Trained, file: epath.Path) -> list[str]:
    """Returns lines for the user with the call of `timm.create_model` for a file.

    Args:
        trained: the network.
        file: the exported file.
    """
    model, size = trained.config.model, size_of(trained.config.model)
    image = trained.config.augment.global_size
    settings: dict[str, Any]
    if model.family == "vit":
        name, settings = _vit(trained)
        if not trained.heads_known:
            heads = _usual_heads(size)
            settings["num_heads"] = _Word(UNKNOWN) if heads is None else heads
    elif model.family == "swin":
        name = "swin_tiny_patch4_window7_224"
        settings = dict(
            img_size=image,
            window_size=model.window,
            embed_dim=size.width,
            depths=tuple(size.depths),
            num_heads=tuple(size.heads),
        )
    elif model.stem != "imagenet":
        return [
            f"timm has no ResNet with the stem of model.stem={model.stem}, to load this file into"
        ]
    elif size.width == 64:
        name = {"basic": "resnet18", "bottleneck": "resnet50"}[size.block]
        settings = dict(layers=tuple(size.depths))
    else:
        return [f"timm has no ResNet whose stem has {size.width} channels, to load this file into"]
    crop = image if model.family == "swin" else view_of(trained.config).crop
    overlay = _preprocessing(trained, crop)
    settings |= dict(num_classes=0, pretrained_cfg_overlay=overlay, checkpoint_path=str(file))
    arguments = [repr(name), *(f"{key}={value!r}" for key, value in settings.items())]
    lines = [f"load it with: timm.create_model({', '.join(arguments)})"]
    if UNKNOWN in lines[0]:
        lines.append(f"{UNKNOWN} is the number of attention heads, which weights do not show")
    if crop != view_of(trained.config).crop:
        lines.append(
            f"timm's Swin takes images of {image} pixels only, but eval.crop is "
            f"{view_of(trained.config).crop}, so that features differ"
        )
    return lines


def _preprocessing(trained: Trained, crop: int) -> dict[str, Any]:
    """Returns how images are prepared, as `timm.data.resolve_data_config` returns it.

    Args:
        trained: the network.
        crop: the pixels on each side of the images that enter; the share of the scaled image that
            they are is that of the run.
    """
    view = view_of(trained.config)
    share = view.crop / view.resize
    if math.floor(view.crop / share) < view.resize:  # which timm scales to, after rounding errors
        share = math.nextafter(share, 0)
    return dict(
        input_size=(3, crop, crop),
        mean=MEAN,
        std=STD,
        interpolation=view.interpolation,
        crop_pct=share,
        crop_mode="center",
    )


class _Word(str):
    """A word that is printed without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _vit(trained: Trained) -> tuple[str, dict[str, Any]]:
    model, leaves = trained.config.model, trained.leaves
    size = size_of(model)
    settings: dict[str, Any] = dict(
        img_size=trained.config.augment.global_size,
        patch_size=model.patch,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        dynamic_img_size=True,
    )
    if model.pool == "mean":
        settings |= dict(global_pool="avg", fc_norm=False)
    if "backbone/register_tokens" in leaves:
        settings["reg_tokens"] = len(leaves["backbone/register_tokens"])
        return "vit_small_patch14_reg4_dinov2", settings
    if "backbone/blocks/ls1/scale" in leaves:
        return "vit_small_patch14_dinov2", settings
    return "vit_small_patch16_224", settings


def _usual_heads(size: Any) -> int | None:
    """Returns the heads of the named size with this width and depth, if there is one."""
    named = FAMILIES["vit"].sizes.values()
    return next((x.heads for x in named if x == size._replace(heads=x.heads)), None)
