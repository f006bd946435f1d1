"""Heads for semantic segmentation on a ViT: a linear one and UPerNet, as in mmsegmentation 0.12.

The names of the parameters are mmsegmentation's, with the adaptors of the backbone in a sub-tree of
their own; `weights.tables.MMSEG` translates them. Feature maps are [B,h,w,C] in float32.

Sources: iBOT's `evaluation/semantic_segmentation`; mmsegmentation's `uper_head.py`, `psp_head.py`
and `fcn_head.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from sop_jax.errors import UserError
from sop_jax.models import Params, normalize, size_of, start_of, vit
from sop_jax.models.convolution import Convolution
from sop_jax.models.gelu import gelu
from sop_jax.models.layers import BatchNorm, Start, Statistics
from sop_jax.models.linear import Linear, linear

POOLS = (1, 2, 3, 6)  # the cells on each side of the grids of the pyramid pooling module
ADAPTED = (16, 8)  # the patches for which there are adaptors
PARTS = ("backbone", "pyramid", "decode_head", "auxiliary_head")  # of the parameters
LEVELS = 4  # the feature maps that UPerNet combines
AUXILIARY_LEVEL = 2  # the one that the auxiliary head sees

Maps = list[Float[Array, "B _h _w C"]]  # of different sizes


class Design(NamedTuple):
    """The design of a segmenter.

    Attributes:
        head: one of NETWORKS. "linear" classifies the concatenated feature maps of the layers, and
            "upernet" combines four levels and has an auxiliary head.
        layers: the indices of the layers whose patch tokens are the feature maps.
        classes: the number of classes.
        norm: whether the tokens of each layer pass the final norm of the backbone.
        channels: the channels inside UPerNet.
        auxiliary_channels: the channels inside the auxiliary head.
        dropout: the probability that a channel of an image is dropped before it is classified.
    """

    head: str
    layers: tuple[int, ...]
    classes: int
    norm: bool = True
    channels: int = 512
    auxiliary_channels: int = 256
    dropout: float = 0.1


class Outputs(NamedTuple):
    """What a segmenter returns for a batch of images.

    Attributes:
        logits: float32 [B,h,w,classes], at the resolution of the head.
        auxiliary: those of the auxiliary head, or None without one.
        statistics: the new running statistics of the batch norms, nested as the parameters are.
    """

    logits: Float[Array, "B h w classes"]
    auxiliary: Float[Array, "B i j classes"] | None
    statistics: Statistics


class Apply(Protocol):
    """Maps images to logits, see `Segmenter`."""

    def __call__(
        self,
        params: Params,
        images: Array,
        keys: Key[Array, " B"] | None = None,
        training: bool = False,
    ) -> Outputs:
        """Returns the logits and statistics of uint8 images [B,H,W,3]."""
        ...


class Segmenter(NamedTuple):
    """A network that classifies pixels, as functions of its parameters.

    Attributes:
        init: maps a key to parameters, a sub-tree for each of PARTS; a linear head has no pyramid
            and no auxiliary head.
        apply: maps (params, uint8 images [B,H,W,3], keys [B] or None, training=False) to `Outputs`.
            Rows and columns beyond the last whole patch are left out. With keys, drop path and
            dropout are on; in training, batch norm uses the statistics of the batch. A linear head
            has neither: its backbone is frozen.
        patch: the pixels on each side of a patch.
    """

    init: Callable[[Key[Array, ""]], Params]
    apply: Apply
    patch: int


def resize(x: Float[Array, "B h w C"], size: Sequence[int]) -> Float[Array, "B H W C"]:
    """Returns maps resized to a height and a width, bilinearly.

    As in PyTorch without `align_corners`, there is no antialiasing.
    """
    if x.shape[1:3] == tuple(size):
        return x
    return jax.image.resize(
        x,
        (x.shape[0], *size, x.shape[3]),
        "bilinear",
        antialias=False,
        precision=jax.lax.Precision.HIGHEST,
    )


def average_matrix(size: int, cells: int) -> np.ndarray:
    """Returns the matrix [cells, size] of PyTorch's adaptive average pooling along one axis.

    The cells cover the axis; where they do not divide it, they overlap.
    """
    matrix = np.zeros((cells, size), np.float32)
    for i in range(cells):
        start, end = i * size // cells, -(-(i + 1) * size // cells)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def adaptive_average(x: Float[Array, "B h w C"], cells: int) -> Float[Array, "B cells cells C"]:
    """Returns the averages over a grid of `cells` x `cells` cells."""
    down, across = (average_matrix(side, cells) for side in x.shape[1:3])
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("ih,jw,bhwc->bijc", down, across, x, precision=highest)


def drop_channels(
    x: Float[Array, "B h w C"], rate: float, keys: Key[Array, " B"] | None
) -> Float[Array, "B h w C"]:
    """Returns maps whose channels are zero with probability `rate`, and scaled up otherwise."""
    if keys is None or not rate:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, (x.shape[-1],)))(keys)
    return x * (keep.astype(x.dtype) / (1 - rate))[:, None, None]


class Upsample(nnx.Module):
    """A transposed convolution of 2 x 2 pixels with stride 2, which doubles both sides."""

    def __init__(self, width: int, start: Start, rngs: nnx.Rngs):
        self.dtype, self.precision = start.dtype, start.precision
        limit = (4 * width) ** -0.5  # PyTorch's default
        uniform = nnx.initializers.uniform(2 * limit)
        self.kernel = nnx.Param(uniform(rngs.params(), (2, 2, width, width)) - limit)
        self.bias = nnx.Param(uniform(rngs.params(), (width,)) - limit)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B 2*h 2*w C"]:
        """Returns the map at twice the resolution."""
        batch, height, width, channels = x.shape
        kernel = self.kernel[...].transpose(2, 0, 1, 3).reshape(channels, 4 * channels)
        x = linear(x.astype(self.dtype), kernel, None, self.precision)
        x = x.reshape(batch, height, width, 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, 2 * height, 2 * width, channels)
        return x.astype(jnp.float32) + self.bias[...]


class Pyramid(nnx.Module):
    """Adaptors that turn the maps of four layers into levels, each half as large as the last one.

    For patches of 16 pixels the levels are 4, 2, 1 and 1/2 times as large as the maps, and for
    patches of 8 pixels 2, 1, 1/2 and 1/4 times. Pooling drops an odd last row or column.
    """

    def __init__(self, width: int, patch: int, start: Start, rngs: nnx.Rngs):
        self.patch = patch

        def up() -> Upsample:
            return Upsample(width, start, rngs)

        if patch == 16:  # the names are positions in mmsegmentation's sequences
            self.fpn1 = nnx.Dict({"0": up(), "1": BatchNorm(width), "3": up()})
            self.fpn2 = nnx.Dict({"0": up()})
        else:
            self.fpn1 = nnx.Dict({"0": up()})

    def __call__(self, maps: Maps, training: bool) -> tuple[Maps, Statistics]:
        """Returns the levels, the finest first, and the new statistics."""
        first = self.fpn1["0"](maps[0])
        if self.patch == 8:
            return [first, maps[1], pooled(maps[2], 2), pooled(maps[3], 4)], {}
        first, moved = self.fpn1["1"](first, training)
        first = self.fpn1["3"](gelu(first))
        levels = [first, self.fpn2["0"](maps[1]), maps[2], pooled(maps[3], 2)]
        return levels, {"pyramid": {"fpn1": {"1": moved}}}


def pooled(x: Float[Array, "B h w C"], side: int) -> Float[Array, "B i j C"]:
    """Returns the largest values of whole squares of `side` x `side` pixels."""
    return nnx.max_pool(x, (side, side), (side, side))


class ConvModule(nnx.Module):
    """A convolution without bias, batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, side: int, start: Start, rngs: nnx.Rngs):
        self.conv = Convolution(inputs, outputs, side, 1, start, rngs.params())
        self.bn = BatchNorm(outputs)

    def __call__(
        self, x: Float[Array, "B h w I"], training: bool
    ) -> tuple[Float[Array, "B h w O"], Statistics]:
        """Returns the output in float32 and the new statistics."""
        x, moved = self.bn(self.conv(x).astype(jnp.float32), training)
        return jax.nn.relu(x), {"bn": moved}


def classifier(inputs: int, classes: int, start: Start, rngs: nnx.Rngs) -> Linear:
    """Returns the 1 x 1 convolution that classifies pixels."""
    return Linear(
        inputs,
        classes,
        kernel_init=nnx.initializers.normal(0.01),
        dtype=start.dtype,
        precision=start.precision,
        rngs=rngs,
    )


class LinearHead(nnx.Module):
    """Classifies each position of the concatenated maps."""

    def __init__(self, width: int, design: Design, start: Start, rngs: nnx.Rngs):
        self.conv_seg = classifier(len(design.layers) * width, design.classes, start, rngs)

    def __call__(self, maps: Maps) -> Float[Array, "B h w classes"]:
        """Returns the logits."""
        return self.conv_seg(jnp.concatenate(maps, axis=-1)).astype(jnp.float32)


class UPerHead(nnx.Module):
    """UPerNet: pyramid pooling of the coarsest level, and a feature pyramid network on all."""

    def __init__(self, width: int, design: Design, start: Start, rngs: nnx.Rngs):
        channels = design.channels

        def module(inputs: int, side: int) -> ConvModule:
            return ConvModule(inputs, channels, side, start, rngs)

        self.dropout = design.dropout
        self.conv_seg = classifier(channels, design.classes, start, rngs)
        self.psp_modules = nnx.Dict({str(i): module(width, 1) for i in range(len(POOLS))})
        self.bottleneck = module(width + len(POOLS) * channels, 3)
        self.lateral_convs = nnx.Dict({str(i): module(width, 1) for i in range(LEVELS - 1)})
        self.fpn_convs = nnx.Dict({str(i): module(channels, 3) for i in range(LEVELS - 1)})
        self.fpn_bottleneck = module(LEVELS * channels, 3)

    def pool(
        self, x: Float[Array, "B h w C"], training: bool
    ) -> tuple[Float[Array, "B h w D"], Statistics]:
        """Returns the coarsest level joined with its averages over grids, and the statistics."""
        parts, moved = [x], {}
        for cells, (name, module) in zip(POOLS, self.psp_modules.items(), strict=True):
            part, moved[name] = module(adaptive_average(x, cells), training)
            parts.append(resize(part, x.shape[1:3]))
        x, bottleneck = self.bottleneck(jnp.concatenate(parts, axis=-1), training)
        return x, {"psp_modules": moved, "bottleneck": bottleneck}

    def __call__(
        self, levels: Maps, keys: Key[Array, " B"] | None, training: bool
    ) -> tuple[Float[Array, "B h w classes"], Statistics]:
        """Returns the logits at the resolution of the finest level, and the new statistics."""
        coarsest, moved = self.pool(levels[-1], training)
        laterals, moved["lateral_convs"] = [], {}
        for name, module in self.lateral_convs.items():
            x, moved["lateral_convs"][name] = module(levels[int(name)], training)
            laterals.append(x)
        laterals.append(coarsest)
        for i in reversed(range(LEVELS - 1)):
            laterals[i] += resize(laterals[i + 1], laterals[i].shape[1:3])
        moved["fpn_convs"] = {}
        for name, module in self.fpn_convs.items():
            i = int(name)
            laterals[i], moved["fpn_convs"][name] = module(laterals[i], training)
        outputs = [resize(x, laterals[0].shape[1:3]) for x in laterals]
        x, moved["fpn_bottleneck"] = self.fpn_bottleneck(jnp.concatenate(outputs, -1), training)
        x = drop_channels(x, self.dropout, keys)
        return self.conv_seg(x).astype(jnp.float32), moved


class AuxiliaryHead(nnx.Module):
    """A convolution of 3 x 3 pixels and a classifier, for a loss on an inner level."""

    def __init__(self, width: int, design: Design, start: Start, rngs: nnx.Rngs):
        channels = design.auxiliary_channels
        self.dropout = design.dropout
        self.convs = nnx.Dict({"0": ConvModule(width, channels, 3, start, rngs)})
        self.conv_seg = classifier(channels, design.classes, start, rngs)

    def __call__(
        self, x: Float[Array, "B h w C"], keys: Key[Array, " B"] | None, training: bool
    ) -> tuple[Float[Array, "B h w classes"], Statistics]:
        """Returns the logits and the new statistics."""
        x, moved = self.convs["0"](x, training)
        x = drop_channels(x, self.dropout, keys)
        return self.conv_seg(x).astype(jnp.float32), {"convs": {"0": moved}}


class LinearNetwork(nnx.Module):
    """A frozen ViT and the linear head."""

    def __init__(self, backbone: vit.ViT, design: Design, start: Start, rngs: nnx.Rngs):
        self.backbone, self.layers, self.norm = backbone, design.layers, design.norm
        self.decode_head = LinearHead(backbone.width, design, start, rngs)

    def __call__(
        self, images: Float[Array, "B H W 3"], keys: Key[Array, " B"] | None, training: bool
    ) -> Outputs:
        """Returns the outputs for normalized pixels in whole patches; nothing is random."""
        maps = self.backbone.maps(images, self.layers, None, self.norm)
        return Outputs(self.decode_head(jax.lax.stop_gradient(maps)), None, {})


class UPerNetwork(nnx.Module):
    """A ViT with adaptors, UPerNet and an auxiliary head."""

    def __init__(self, backbone: vit.ViT, design: Design, start: Start, rngs: nnx.Rngs):
        width = backbone.width
        self.backbone, self.layers, self.norm = backbone, design.layers, design.norm
        self.pyramid = Pyramid(width, backbone.patch, start, rngs)
        self.decode_head = UPerHead(width, design, start, rngs)
        self.auxiliary_head = AuxiliaryHead(width, design, start, rngs)

    def __call__(
        self, images: Float[Array, "B H W 3"], keys: Key[Array, " B"] | None, training: bool
    ) -> Outputs:
        """Returns the outputs for normalized pixels in whole patches."""
        paths, first, second = (None,) * 3
        if keys is not None:
            split = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
            paths, first, second = jnp.moveaxis(split, 1, 0)
        maps = self.backbone.maps(images, self.layers, paths, self.norm)
        levels, moved = self.pyramid(maps, training)
        logits, moved["decode_head"] = self.decode_head(levels, first, training)
        auxiliary, moved["auxiliary_head"] = self.auxiliary_head(
            levels[AUXILIARY_LEVEL], second, training
        )
        return Outputs(logits, auxiliary, moved)


NETWORKS = {"linear": LinearNetwork, "upernet": UPerNetwork}  # by the name of the head


def check(config: ml_collections.ConfigDict, head: str, layers: Sequence[int]) -> None:
    """Raises UserError if the network of `config.model` cannot have a head on these layers."""
    if config.family != "vit":
        raise UserError(
            f"segmentation needs the patch tokens of several layers, which a {config.family} does "
            "not have at one resolution. Expected a network of model.family=vit; evaluate a ViT"
        )
    depth = size_of(config).depth
    if not layers or max(layers) >= depth or min(layers) < 0:
        raise UserError(
            f"the layers {list(layers)} were requested of a network that has {depth} layers. "
            f"Expected indices from 0 to {depth - 1}; choose others with --eval.layers"
        )
    if head == "upernet" and len(layers) != LEVELS:
        raise UserError(
            f"{len(layers)} layers were requested, but UPerNet combines {LEVELS}; give {LEVELS} "
            "indices with --eval.layers"
        )
    if head == "upernet" and config.patch not in ADAPTED:
        raise UserError(
            f"model.patch is {config.patch}, but UPerNet has adaptors only for patches of "
            f"{' and '.join(map(str, ADAPTED))} pixels; use --eval.head=linear"
        )


def build(config: ml_collections.ConfigDict, design: Design, image_size: int) -> Segmenter:
    """Returns the segmenter with the backbone of `config.model`.

    Args:
        config: the config of a run whose `model` describes a ViT.
        design: the heads.
        image_size: the pixels on each side of the crops, for which positions are made.

    Raises:
        UserError: the network cannot have this head.
    """
    check(config.model, design.head, design.layers)
    size, start = size_of(config.model), start_of(config.model)
    patch = config.model.patch

    def make(key: Key[Array, ""]) -> nnx.Module:
        rngs = nnx.Rngs(params=key)
        backbone = vit.ViT(size, config.model, image_size, lambda params: params, start, rngs)
        return NETWORKS[design.head](backbone, design, start, rngs)

    graph, template = nnx.split(nnx.eval_shape(lambda: make(jax.random.key(0))))

    def init(key: Key[Array, ""]) -> Params:
        return nnx.to_pure_dict(nnx.split(make(key))[1])

    def apply(
        params: Params,
        images: Array,
        keys: Key[Array, " B"] | None = None,
        training: bool = False,
    ) -> Outputs:
        height, width = (side // patch * patch for side in images.shape[1:3])
        state = jax.tree.map(lambda leaf: leaf, template)
        nnx.replace_by_pure_dict(state, params)
        pixels = normalize(images[:, :height, :width], start.dtype)
        network: Any = nnx.merge(graph, state)
        return network(pixels, keys, training)

    return Segmenter(init, apply, patch)
