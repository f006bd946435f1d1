"""How other projects name and lay out the weights of each backbone, with one table per layout.

A row maps names in a file to a leaf of the parameter tree; it is read from left to right to load
weights and from right to left to export them. `{i}` in a name is the number of a layer, for layers
that are stacked in one leaf, `{s}` is the number of a stage, and `{s+1}` that of the next stage.

Sources: iBOT's `models/{vision_transformer,swin_transformer,head}.py`, whose names DINO, SOP and
MaSSL share; timm 1.0's `vision_transformer.py` and `swin_transformer.py`, whose ViTs MoCo-v3,
solo-learn and lightly train; DINOv2's `vision_transformer.py`; MAE's `models_mae.py`; MSN's
`deit.py`; torchvision's `resnet.py`; the ViT, DINOv2, Swin and ResNet of transformers 5 (`hf`) and
of earlier versions, whose names the files on its hub also have (`hf4`); iBOT's segmenters in
mmsegmentation 0.12 (`mmseg`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from sop_jax.errors import UserError

Arrays = dict[str, np.ndarray]


class Transform(NamedTuple):
    """Converts a file's array to a leaf, and back; both directions keep every bit."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


def _to_patches(kernel: np.ndarray) -> np.ndarray:
    """Converts a convolution [D, 3, p, p] to the matrix [p*p*3, D] that is applied to a patch."""
    return kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0])


def _from_patches(matrix: np.ndarray) -> np.ndarray:
    side = round((matrix.shape[0] / 3) ** 0.5)
    return matrix.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


SAME = Transform(lambda x: x, lambda x: x)
MATRIX = Transform(np.transpose, np.transpose)  # [out, in]
FIRST = Transform(lambda x: x[0], lambda x: x[None])  # [1, ...]
TOKEN = Transform(lambda x: x[0, 0], lambda x: x[None, None])  # [1, 1, D]
PATCHES = Transform(_to_patches, _from_patches)
KERNEL = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW
TRANSPOSED = Transform(lambda x: x.transpose(2, 3, 0, 1), lambda x: x.transpose(2, 3, 0, 1))  # IOHW
POINT = Transform(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])  # [out, in, 1, 1]


class Row(NamedTuple):
    """Maps arrays of a file to one leaf of the parameter tree.

    Attributes:
        names: patterns of names; if there are several, the arrays are concatenated along their
            first axis.
        path: the pattern of the leaf's path.
        transform: converts between the two.
        optional: whether the project has networks without this leaf.
        exported: whether the leaf is exported.
    """

    names: tuple[str, ...]
    path: str
    transform: Transform = SAME
    optional: bool = False
    exported: bool = True


class Layout(NamedTuple):
    """How one project names the weights of one family of backbones.

    Attributes:
        project: the name of the project, as in `--export`.
        family: the family of the backbones, as in `model.family`.
        rows: one row per leaf of the parameter tree.
        settings: settings of `config.model` that reproduce the project's features: the rule for
            resizing positions, and the epsilon of LayerNorm.
        ignored: regular expressions of names that are not used.
        read: converts a file's arrays before the rows are applied.
        write: converts a tree's leaves, keyed by path, before the rows are applied.
    """

    project: str
    family: str
    rows: tuple[Row, ...]
    settings: Mapping[str, Any]
    ignored: tuple[str, ...]
    read: Callable[[Arrays], Arrays] = dict
    write: Callable[[Arrays], Arrays] = dict


def _linear(names: str, path: str) -> tuple[Row, ...]:
    """Returns the rows of a linear layer; blanks separate the names of layers to concatenate."""
    return (
        Row(tuple(f"{name}.weight" for name in names.split()), f"{path}/kernel", MATRIX),
        Row(tuple(f"{name}.bias" for name in names.split()), f"{path}/bias"),
    )


def _norm(name: str, path: str) -> tuple[Row, ...]:
    return Row((f"{name}.weight",), f"{path}/scale"), Row((f"{name}.bias",), f"{path}/bias")


def _patch_embed(name: str) -> tuple[Row, ...]:
    return (
        Row((f"{name}.weight",), "backbone/patch_embed/kernel", PATCHES),
        Row((f"{name}.bias",), "backbone/patch_embed/bias"),
    )


class Names(NamedTuple):
    """The names of the parts of a transformer layer; q, k and v are one name or three."""

    norm1: str
    qkv: str
    proj: str
    norm2: str
    fc1: str
    fc2: str


_PLAIN = Names("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_HF = Names(
    "layernorm_before",
    "attention.q_proj attention.k_proj attention.v_proj",
    "attention.o_proj",
    "layernorm_after",
    "mlp.fc1",
    "mlp.fc2",
)
_HF4 = Names(
    "layernorm_before",
    "attention.attention.query attention.attention.key attention.attention.value",
    "attention.output.dense",
    "layernorm_after",
    "intermediate.dense",
    "output.dense",
)
_SELF = "attention.self.query attention.self.key attention.self.value"


def _layer(before: str, names: Names, path: str) -> tuple[Row, ...]:
    """Returns the rows of a transformer's layers; `before` is the prefix of all names."""
    norm1, qkv, proj, norm2, fc1, fc2 = (
        " ".join(f"{before}.{name}" for name in part.split()) for part in names
    )
    return (
        *_norm(norm1, f"{path}/norm1"),
        *_linear(qkv, f"{path}/qkv"),
        *_linear(proj, f"{path}/proj"),
        *_norm(norm2, f"{path}/norm2"),
        *_linear(fc1, f"{path}/fc1"),
        *_linear(fc2, f"{path}/fc2"),
    )


def _scales(before: str, last: str, optional: bool = False) -> tuple[Row, ...]:
    """Returns the rows of LayerScale; `{}` in `last` is the number of the branch, 1 or 2."""
    return tuple(
        Row(
            (f"{before}.{last.format(branch)}",),
            f"backbone/blocks/ls{branch}/scale",
            optional=optional,
        )
        for branch in (1, 2)
    )


# ------------------------------------------------------------------------------------------- heads

# iBOT's head without its prototypes, which is the head of SOP and MaSSL.
_HEAD = tuple(
    row._replace(optional=True, exported=False)
    for layer, name in enumerate(("head.mlp.0", "head.mlp.2", "head.mlp.4"), 1)
    for row in _linear(name, f"head/fc{layer}")
)
# Buffers that a network computes when it is created, and iBOT's prototypes.
_MADE = (r".*\.(relative_position_index|attn_mask|num_batches_tracked)",)
_IBOT_IGNORED = (*_MADE, r"head\.last_layer2?\..*")
_TIMM_IGNORED = (*_MADE, r"(head|head\.fc|fc|fc_norm|head_dist)\.(weight|bias)")
# Heads of several layers in place of a classifier, as in MoCo's ResNets and in MSN.
_HEADS_IGNORED = (r"(fc|pred)\..*",)
_MAE_IGNORED = (*_MADE, r"decoder_\w+(\..*)?", "mask_token")  # the token is the decoder's
_HF_IGNORED = (*_MADE, r"(classifier|cls_classifier|pooler|decoder|lm_head)\..*")

# ---------------------------------------------------------------------------------------------- ViT


def _with_class_position(arrays: Arrays) -> Arrays:
    """Adds a zero position for [CLS], which timm's networks with registers do not have."""
    table = arrays.get("pos_embed")
    if table is None or table.ndim != 3 or round(table.shape[1] ** 0.5) ** 2 != table.shape[1]:
        return arrays
    return arrays | {"pos_embed": np.pad(table, ((0, 0), (1, 0), (0, 0)))}


def _without_class_position(leaves: Arrays) -> Arrays:
    """Adds the position of [CLS] to its token, because the network uses only their sum."""
    if "backbone/register_tokens" not in leaves:
        return leaves
    table = leaves["backbone/pos_embed"]
    cls = leaves["backbone/cls_token"] + table[0]
    return leaves | {"backbone/cls_token": cls, "backbone/pos_embed": table[1:]}


_VIT = (
    Row(("cls_token",), "backbone/cls_token", TOKEN),
    Row(("pos_embed",), "backbone/pos_embed", FIRST),
    *_patch_embed("patch_embed.proj"),
    *_layer("blocks.{i}", _PLAIN, "backbone/blocks"),
    *_norm("norm", "backbone/norm"),
)
_DINOV2 = (
    *_VIT,
    *_scales("blocks.{i}", "ls{}.gamma"),
    Row(("mask_token",), "backbone/mask_token", FIRST, optional=True),
)
_HF_VIT = (
    Row(("embeddings.cls_token",), "backbone/cls_token", TOKEN),
    Row(("embeddings.position_embeddings",), "backbone/pos_embed", FIRST),
    *_patch_embed("embeddings.patch_embeddings.projection"),
    *_norm("layernorm", "backbone/norm"),
)
_HF_VIT_MASK = Row(
    ("embeddings.mask_token",), "backbone/mask_token", TOKEN, optional=True, exported=False
)
_HF_DINOV2 = (
    *_HF_VIT,
    *_scales("encoder.layer.{i}", "layer_scale{}.lambda1"),
    Row(("embeddings.mask_token",), "backbone/mask_token", FIRST, optional=True),
)
_HF_DINOV2_LAYER = _HF._replace(norm1="norm1", norm2="norm2")
_HF4_DINOV2_LAYER = _HF4._replace(norm1="norm1", norm2="norm2", fc1="mlp.fc1", fc2="mlp.fc2")
_HF_REGISTERS = Row(("embeddings.register_tokens",), "backbone/register_tokens", FIRST)


_IBOT_RULE = {"positions": "ibot", "norm_eps": 1e-6}
_ANTIALIASED = {"positions": "antialiased", "norm_eps": 1e-6}
_SIZE_RULE = {"positions": "size", "norm_eps": 1e-6}


def _hf_vits(project: str, vit: tuple[str, Names], dinov2: Names) -> tuple[Layout, ...]:
    """Returns the layouts of ViT, DINOv2, and DINOv2 with registers, which resizes differently."""
    plain = (*_HF_VIT, _HF_VIT_MASK, *_layer(*vit, "backbone/blocks"))
    scaled = (*_HF_DINOV2, *_layer("encoder.layer.{i}", dinov2, "backbone/blocks"))
    return (
        Layout(project, "vit", plain, {"positions": "size", "norm_eps": 1e-12}, _HF_IGNORED),
        Layout(project, "vit", scaled, _SIZE_RULE, _HF_IGNORED),
        Layout(project, "vit", (*scaled, _HF_REGISTERS), _ANTIALIASED, _HF_IGNORED),
    )


_VITS = (
    Layout(
        "ibot",
        "vit",
        (*_VIT, Row(("masked_embed",), "backbone/mask_token", FIRST, optional=True), *_HEAD),
        _IBOT_RULE,
        _IBOT_IGNORED,
    ),
    Layout(
        "timm",
        "vit",
        (
            *_VIT,
            *_scales("blocks.{i}", "ls{}.gamma", optional=True),
            Row(("reg_token",), "backbone/register_tokens", FIRST, optional=True),
        ),
        _ANTIALIASED,
        _TIMM_IGNORED,
        _with_class_position,
        _without_class_position,
    ),
    Layout("dinov2", "vit", _DINOV2, _IBOT_RULE, _IBOT_IGNORED),
    Layout(
        "dinov2",
        "vit",
        (*_DINOV2, Row(("register_tokens",), "backbone/register_tokens", FIRST)),
        _ANTIALIASED,
        _IBOT_IGNORED,
    ),
    Layout("mae", "vit", _VIT, _SIZE_RULE, _MAE_IGNORED),
    Layout("msn", "vit", _VIT, _SIZE_RULE, (*_MADE, *_HEADS_IGNORED)),
    *_hf_vits("hf", ("layers.{i}", _HF), _HF_DINOV2_LAYER),
    *_hf_vits("hf4", ("encoder.layer.{i}", _HF4), _HF4_DINOV2_LAYER),
)

# --------------------------------------------------------------------------------------------- Swin

_STAGE = "backbone/stages/{s}"
_BLOCKS = f"{_STAGE}/blocks"


def _downsample(name: str) -> tuple[Row, ...]:
    """Returns the rows of patch merging; all projects order the 2x2 patches by columns."""
    return (
        Row((f"{name}.reduction.weight",), f"{_STAGE}/downsample/reduction/kernel", MATRIX),
        *_norm(f"{name}.norm", f"{_STAGE}/downsample/norm"),
    )


_SWIN = (
    *_patch_embed("patch_embed.proj"),
    *_norm("patch_embed.norm", "backbone/patch_norm"),
    *_layer("layers.{s}.blocks.{i}", _PLAIN, _BLOCKS),
    Row(
        ("layers.{s}.blocks.{i}.attn.relative_position_bias_table",),
        f"{_BLOCKS}/relative_bias",
    ),
    *_norm("norm", "backbone/norm"),
)


def _with_one_window(leaves: Arrays) -> Arrays:
    """Checks that all stages have one window: only iBOT and timm shrink it to small grids."""
    sizes = {leaf.shape[1] for path, leaf in leaves.items() if path.endswith("relative_bias")}
    if len(sizes) > 1:
        raise UserError(
            "transformers has no Swin with a smaller window in some stages, as in the last stage "
            "of a Swin with window 14; export with --export=timm or --export=ibot"
        )
    return leaves


def _hf_swin(project: str, names: Names, bias: str) -> Layout:
    layer = "encoder.layers.{s}.blocks.{i}"
    rows = (
        *_patch_embed("embeddings.patch_embeddings.projection"),
        *_norm("embeddings.norm", "backbone/patch_norm"),
        *_layer(layer, names, _BLOCKS),
        Row((f"{layer}.{bias}.relative_position_bias_table",), f"{_BLOCKS}/relative_bias"),
        *_downsample("encoder.layers.{s}.downsample"),
        *_norm("layernorm", "backbone/norm"),
        _HF_VIT_MASK,
    )
    return Layout(project, "swin", rows, {"norm_eps": 1e-5}, _HF_IGNORED, dict, _with_one_window)


_SWINS = (
    # timm merges patches at the start of a stage, the others at the end of the previous one. timm's
    # layout comes first because the first is taken if both fit; the others have additional names.
    Layout(
        "timm",
        "swin",
        (*_SWIN, *_downsample("layers.{s+1}.downsample")),
        {"norm_eps": 1e-5},
        _TIMM_IGNORED,
    ),
    Layout(
        "ibot",
        "swin",
        (
            *_SWIN,
            *_downsample("layers.{s}.downsample"),
            Row(("masked_embed",), "backbone/mask_token", FIRST, optional=True),
            *_HEAD,
        ),
        {"norm_eps": 1e-6},
        (*_IBOT_IGNORED, r"head\.(weight|bias)"),
    ),
    _hf_swin("hf", _HF, "attention.relative_position_bias"),
    _hf_swin("hf4", _HF4._replace(qkv=_SELF), "attention.self"),
)

# ------------------------------------------------------------------------------------------- ResNet


def _conv(name: str, path: str) -> tuple[Row, ...]:
    return (Row((f"{name}.weight",), f"{path}/kernel", KERNEL),)


def _batch_norm(name: str, path: str) -> tuple[Row, ...]:
    return (
        *_norm(name, path),
        Row((f"{name}.running_mean",), f"{path}/mean"),
        Row((f"{name}.running_var",), f"{path}/var"),
    )


def _optional(*rows: Row) -> tuple[Row, ...]:
    return tuple(row._replace(optional=True) for row in rows)


def _convolutions(before: str, conv: str, norm: str, path: str) -> tuple[Row, ...]:
    """Returns the rows of a block's two or three convolutions; `{}` in names is their number."""
    return tuple(
        row._replace(optional=n == 3)
        for n in (1, 2, 3)
        for row in (
            *_conv(f"{before}.{conv.format(n, n - 1)}", f"{path}/conv{n}"),
            *_batch_norm(f"{before}.{norm.format(n, n - 1)}", f"{path}/bn{n}"),
        )
    )


def _resnet(
    stem: tuple[str, str], stage: str, block: tuple[str, str], shortcut: tuple[str, str]
) -> tuple[Row, ...]:
    """Returns the rows of a ResNet; all blocks of a stage but the first are stacked."""
    first, rest = f"{_STAGE}/first", f"{_STAGE}/blocks"
    return (
        *_conv(stem[0], "backbone/stem/conv"),
        *_batch_norm(stem[1], "backbone/stem/bn"),
        *_convolutions(f"{stage}.0", *block, first),
        # The first stage does not have it if its blocks are basic.
        *_optional(
            *_conv(f"{stage}.0.{shortcut[0]}", f"{first}/shortcut/conv"),
            *_batch_norm(f"{stage}.0.{shortcut[1]}", f"{first}/shortcut/bn"),
        ),
        # A stage may have only one block.
        *_optional(*_convolutions(f"{stage}.{{i+1}}", *block, rest)),
    )


_TORCHVISION = _resnet(
    ("conv1", "bn1"), "layer{s+1}", ("conv{}", "bn{}"), ("downsample.0", "downsample.1")
)
_HF_RESNET = _resnet(
    ("embedder.embedder.convolution", "embedder.embedder.normalization"),
    "encoder.stages.{s}.layers",
    ("layer.{1}.convolution", "layer.{1}.normalization"),
    ("shortcut.convolution", "shortcut.normalization"),
)
_RESNETS = (
    Layout(
        "ibot",
        "resnet",
        (*_TORCHVISION, *_HEAD),
        {},
        (*_IBOT_IGNORED, *_TIMM_IGNORED, *_HEADS_IGNORED),
    ),
    Layout("timm", "resnet", _TORCHVISION, {}, (*_TIMM_IGNORED, *_HEADS_IGNORED)),
    Layout("hf", "resnet", _HF_RESNET, {}, _HF_IGNORED),
    Layout("hf4", "resnet", _HF_RESNET, {}, _HF_IGNORED),
)

LAYOUTS = (*_VITS, *_SWINS, *_RESNETS)

# ------------------------------------------------------------------------------------ segmentation


def _conv_module(name: str, path: str) -> tuple[Row, ...]:
    """Returns the rows of mmsegmentation's ConvModule."""
    return (*_conv(f"{name}.conv", f"{path}/conv"), *_batch_norm(f"{name}.bn", f"{path}/bn"))


def _upsample(name: str) -> tuple[Row, ...]:
    """Returns the rows of a transposed convolution of the adaptors."""
    path = f"pyramid/{name.replace('.', '/')}"
    return (
        Row((f"backbone.{name}.weight",), f"{path}/kernel", TRANSPOSED),
        Row((f"backbone.{name}.bias",), f"{path}/bias"),
    )


def _conv_seg(head: str) -> tuple[Row, ...]:
    return (
        Row((f"{head}.conv_seg.weight",), f"{head}/conv_seg/kernel", POINT),
        Row((f"{head}.conv_seg.bias",), f"{head}/conv_seg/bias"),
    )


# The segmenters of `models.segmentation`, by the names of mmsegmentation and of iBOT's backbone in
# it, so that a checkpoint of either loads in the other. It is not one of LAYOUTS, which are those
# of backbones.
MMSEG = Layout(
    "mmseg",
    "vit",
    (
        *(row._replace(names=tuple(f"backbone.{name}" for name in row.names)) for row in _VIT),
        Row(("backbone.masked_embed",), "backbone/mask_token", FIRST, optional=True),
        *_conv_seg("decode_head"),
        *_optional(
            *_upsample("fpn1.0"),
            *_batch_norm("backbone.fpn1.1", "pyramid/fpn1/1"),
            *_upsample("fpn1.3"),
            *_upsample("fpn2.0"),
            *_conv_module("decode_head.psp_modules.{s}.1", "decode_head/psp_modules/{s}"),
            *_conv_module("decode_head.bottleneck", "decode_head/bottleneck"),
            *_conv_module("decode_head.lateral_convs.{s}", "decode_head/lateral_convs/{s}"),
            *_conv_module("decode_head.fpn_convs.{s}", "decode_head/fpn_convs/{s}"),
            *_conv_module("decode_head.fpn_bottleneck", "decode_head/fpn_bottleneck"),
            *_conv_module("auxiliary_head.convs.{s}", "auxiliary_head/convs/{s}"),
            *_conv_seg("auxiliary_head"),
        ),
    ),
    {"positions": "size", "norm_eps": 1e-6},
    _MADE,
)
