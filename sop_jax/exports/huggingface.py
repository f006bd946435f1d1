"""Folders that `AutoModel` and `AutoImageProcessor` of transformers load as they stand.

The weights have the names that the files on Hugging Face's hub have, which `from_pretrained` reads
in versions 4 and 5 of transformers.
"""

import json
from typing import Any

import numpy as np
from etils import epath

from sop_jax.errors import UserError
from sop_jax.evaluation.views import view_of
from sop_jax.exports.model_card import model_card
from sop_jax.exports.trained import Trained, at_crop
from sop_jax.models import MEAN, STD, size_of
from sop_jax.models.resnet import BLOCKS
from sop_jax.paths import write_whole
from sop_jax.weights import files, mapping

BICUBIC = 3  # Pillow's number
SWIN_EPS = 1e-5  # of two norms of its Swin, which no setting changes


def write(trained: Trained, folder: epath.Path) -> list[str]:
    """Writes config.json, model.safetensors, preprocessor_config.json and README.md.

    `pooler_output` of the network is the token of the image, as in `sop_jax.extract`.

    Returns:
        Lines for the user: what was not exported, and what differs.

    Raises:
        UserError: transformers has no such network, or the folder cannot be written.
    """
    original = trained
    trained, words = at_crop(trained)
    model = trained.config.model
    exported = mapping.export("hf4", model.family, trained.leaves)
    arrays, settings = exported.arrays, _settings(trained)
    if settings["model_type"] == "vit":  # a pooler that returns [CLS], see `_vit`
        width = settings["hidden_size"]
        arrays["pooler.dense.weight"] = np.eye(width, dtype=np.float32)
        arrays["pooler.dense.bias"] = np.zeros(width, np.float32)
    for name in [name for name in arrays if name.endswith(".running_mean")]:
        # PyTorch counts the batches of a batch norm, and transformers asks for the count.
        arrays[name.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
    files.write(folder / "model.safetensors", arrays)
    view = view_of(trained.config)
    for name, content in (
        ("config.json", settings),
        ("preprocessor_config.json", _preprocessing(view.resize, view.crop)),
    ):
        write_whole(folder / name, json.dumps(content, indent=2) + "\n")
    architecture = settings["architectures"][0]
    write_whole(folder / "README.md", model_card(original, architecture))
    words += _differences(trained, exported)
    return [*words, f"{folder}: {architecture}, for AutoModel.from_pretrained of transformers"]


def _differences(trained: Trained, exported: mapping.Exported) -> list[str]:
    model = trained.config.model
    words = []
    if left := [leaf for leaf in exported.not_exported if leaf not in trained.absent]:
        words.append(f"not exported: {', '.join(left)}")
    if model.pool == "mean" and model.family == "vit":
        words.append(
            "model.pool=mean, but pooler_output is [CLS]: average last_hidden_state over the "
            "patches instead"
        )
    if model.family == "swin" and model.norm_eps != SWIN_EPS:
        words.append(f"model.norm_eps={model.norm_eps}, but two norms of hf's Swin use {SWIN_EPS}")
    rule = exported.settings.get("positions", model.positions)
    if model.family == "vit" and rule != model.positions:
        words.append(
            f"for images of other sizes hf resizes positions by the rule {rule!r}, this network by "
            f"{model.positions!r}"
        )
    return words


def _settings(trained: Trained) -> dict[str, Any]:
    """Returns the content of config.json."""
    model = trained.config.model
    make = {"vit": _vit, "swin": _swin, "resnet": _resnet}[model.family]
    return make(trained) | {"num_channels": 3, "torch_dtype": "float32"}


def _vit(trained: Trained) -> dict[str, Any]:
    model, leaves = trained.config.model, trained.leaves
    size = size_of(model)
    settings = dict(
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        hidden_act="gelu",
        layer_norm_eps=model.norm_eps,
        image_size=trained.config.augment.global_size,
        patch_size=model.patch,
        qkv_bias=True,
        initializer_range=model.init_std,
    )
    if "backbone/blocks/ls1/scale" not in leaves:
        # The pooler of a ViTModel is a linear layer and an activation: with the identity for both,
        # `pooler_output` is [CLS] after the final norm.
        return settings | dict(
            model_type="vit",
            architectures=["ViTModel"],
            intermediate_size=4 * size.width,
            pooler_act="linear",
            pooler_output_size=size.width,
        )
    settings |= dict(mlp_ratio=4, layerscale_value=model.layer_scale, use_swiglu_ffn=False)
    registers = len(leaves.get("backbone/register_tokens", ()))
    if not registers:
        return settings | dict(model_type="dinov2", architectures=["Dinov2Model"])
    return settings | dict(
        model_type="dinov2_with_registers",
        architectures=["Dinov2WithRegistersModel"],
        num_register_tokens=registers,
    )


def _swin(trained: Trained) -> dict[str, Any]:
    model = trained.config.model
    size = size_of(model)
    return dict(
        model_type="swin",
        architectures=["SwinModel"],
        embed_dim=size.width,
        depths=list(size.depths),
        num_heads=list(size.heads),
        window_size=model.window,
        patch_size=4,
        mlp_ratio=4.0,
        qkv_bias=True,
        hidden_act="gelu",
        layer_norm_eps=model.norm_eps,
        image_size=trained.config.augment.global_size,
        initializer_range=model.init_std,
    )


def _resnet(trained: Trained) -> dict[str, Any]:
    size, stem = size_of(trained.config.model), trained.config.model.stem
    if stem != "imagenet":
        raise UserError(
            f"transformers has no ResNet with the stem of model.stem={stem}; export to stablehlo "
            "or ibot instead"
        )
    growth = BLOCKS[size.block].growth
    return dict(
        model_type="resnet",
        architectures=["ResNetModel"],
        embedding_size=size.width,
        hidden_sizes=[growth * size.width * 2**stage for stage in range(len(size.depths))],
        depths=list(size.depths),
        layer_type=size.block,
        hidden_act="relu",
    )


def _preprocessing(resize: int, crop: int) -> dict[str, Any]:
    """Returns the content of preprocessor_config.json: the centre crops of the run."""
    return dict(
        image_processor_type="BitImageProcessor",
        do_convert_rgb=True,
        do_resize=True,
        size={"shortest_edge": resize},
        resample=BICUBIC,
        do_center_crop=True,
        crop_size={"height": crop, "width": crop},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(MEAN),
        image_std=list(STD),
    )
