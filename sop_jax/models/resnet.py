"""ResNets, with the running statistics of their batch norms among the parameters.

The paper has no ResNet; this is DINO's, which is torchvision's.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from sop_jax.errors import UserError
from sop_jax.models import layers
from sop_jax.models.convolution import Convolution
from sop_jax.models.layers import BatchNorm, Start, Statistics

# The side and the stride of the first convolution, and the stride of the pooling after it; there is
# no pooling if that is 1.
STEMS = {"imagenet": (7, 2, 2), "strided": (3, 2, 1), "small": (3, 1, 1)}


class Design(NamedTuple):
    """The convolutions of a residual block, which have no bias and are each followed by batch norm.

    Attributes:
        sides: the side of each kernel.
        strided: the number of the convolution that has the block's stride, from 0.
        growth: output channels of the block per channel inside it.
    """

    sides: tuple[int, ...]
    strided: int
    growth: int


# In version 1.5 the 3 x 3 convolution of a bottleneck has the stride, not the 1 x 1 before it.
BLOCKS = {"basic": Design((3, 3), 0, 1), "bottleneck": Design((1, 3, 1), 1, 4)}


def is_product(primitive: Any, *_: Any, **details: Any) -> bool:
    """Whether an operation is a convolution, for policies of `jax.checkpoint`."""
    return primitive.name == "conv_general_dilated" or layers.is_product(primitive, **details)


# As for the transformers, but most products are convolutions here.
REMATS = layers.REMATS | {"products": is_product, "dots": is_product}


class Size(NamedTuple):
    """The size of a ResNet.

    Attributes:
        width: the channels of the stem.
        depths: the number of blocks of each stage.
        block: the kind of these blocks, of BLOCKS.
    """

    width: int
    depths: tuple[int, ...]
    block: str


SIZES = {
    "18": Size(64, (2, 2, 2, 2), "basic"),
    "34": Size(64, (3, 4, 6, 3), "basic"),
    "50": Size(64, (3, 4, 6, 3), "bottleneck"),
}


def custom(config: ml_collections.ConfigDict) -> Size:
    """Returns the size that `config.model` describes."""
    return Size(config.width, tuple(config.stage_depths), config.block)


def token_side(config: ml_collections.ConfigDict) -> int:
    """Returns the pixels on each side of the square that a token stands for."""
    _, stride, pooling = STEMS[config.stem]
    size = SIZES.get(config.size) or custom(config)
    return stride * pooling * 2 ** (len(size.depths) - 1)


class Stem(nnx.Module):
    """The first convolution and its batch norm.

    For images of ImageNet's size it is 7 x 7 of stride 2, followed by 3 x 3 max pooling of stride
    2; for small images it is 3 x 3 of stride 1, without pooling, as in SimCLR (appendix B.9), or of
    stride 2 to save time.
    """

    def __init__(self, width: int, kind: str, start: Start, key: Array):
        side, stride, pooling = STEMS[kind]
        self.pools = pooling > 1
        self.conv = Convolution(3, width, side, stride, start, key)
        self.bn = BatchNorm(width)

    def __call__(
        self, x: Float[Array, "B H W 3"], training: bool
    ) -> tuple[Float[Array, "B h w C"], Statistics]:
        """Returns features of the stem's share of the height and width, and statistics."""
        x, moved = self.bn(self.conv(x), training)
        x = jax.nn.relu(x)
        if self.pools:
            x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        return x, {"bn": moved}


class Shortcut(nnx.Module):
    """The projection of a block's input to the shape of its output."""

    def __init__(self, inputs: int, outputs: int, stride: int, start: Start, key: Array):
        self.conv = Convolution(inputs, outputs, 1, stride, start, key)
        self.bn = BatchNorm(outputs)

    def __call__(
        self, x: Float[Array, "B H W I"], training: bool
    ) -> tuple[Float[Array, "B h w O"], Statistics]:
        """Returns the result of a 1 x 1 convolution and its batch norm, and statistics."""
        x, moved = self.bn(self.conv(x), training)
        return x, {"bn": moved}


class Block(nnx.Module):
    """A residual block of a kind of BLOCKS."""

    def __init__(
        self, inputs: int, width: int, stride: int, design: Design, start: Start, rngs: nnx.Rngs
    ):
        channels = inputs
        for i, side in enumerate(design.sides):
            outputs = width * (design.growth if i == len(design.sides) - 1 else 1)
            own = stride if i == design.strided else 1
            convolution = Convolution(channels, outputs, side, own, start, rngs.params())
            setattr(self, f"conv{i + 1}", convolution)
            setattr(self, f"bn{i + 1}", BatchNorm(outputs))
            channels = outputs
        self.convolutions = len(design.sides)
        if inputs != channels or stride > 1:
            self.shortcut = Shortcut(inputs, channels, stride, start, rngs.params())

    def __call__(
        self, x: Float[Array, "B H W I"], training: bool
    ) -> tuple[Float[Array, "B h w O"], Statistics]:
        """Returns the block's output and the new running statistics."""
        y, moved = x, {}
        for i in range(1, self.convolutions + 1):
            y = getattr(self, f"conv{i}")(y if i == 1 else jax.nn.relu(y))
            y, moved[f"bn{i}"] = getattr(self, f"bn{i}")(y, training)
        if hasattr(self, "shortcut"):
            x, moved["shortcut"] = self.shortcut(x, training)
        return jax.nn.relu(y + x), moved


class Stage(nnx.Module):
    """The blocks of one resolution: the first, which changes it, and the others, stacked."""

    def __init__(
        self,
        inputs: int,
        width: int,
        depth: int,
        stride: int,
        design: Design,
        start: Start,
        rngs: nnx.Rngs,
    ):
        self.first = Block(inputs, width, stride, design, start, rngs)
        outputs = design.growth * width

        @nnx.split_rngs(splits=depth - 1)
        @nnx.vmap
        def rest(rngs: nnx.Rngs) -> Block:
            return Block(outputs, width, 1, design, start, rngs)

        if depth > 1:
            self.blocks = rest(rngs)


class ResNet(nnx.Module):
    """torchvision's ResNet version 1.5 for NHWC images; its [CLS] is the mean of the features.

    In training every batch norm normalizes by its batch, in the teacher too, as in DINO, whose
    teacher is never in evaluation mode. Running statistics are updated only by the forward passes
    of their own network. As in DINO, the moving average that makes the teacher leaves them out. A
    step passes the global views in one batch and then, for the student only, the local views in
    another, and each pass updates the statistics. Evaluations normalize by them.

    The initialization is DINO's, which is torchvision's default: the last batch norm of a block
    has a scale of one, not zero.

    Args:
        size: the channels, depths and blocks.
        config: `config.model` of the run, of which `remat` and `stem` matter.
        image_size: ignored; a ResNet takes images of any size.
        gather: gathers the parameters of a block that are split over devices.
        start: gives the dtype and precision of the convolutions.
    """

    def __init__(
        self,
        size: Size,
        config: ml_collections.ConfigDict,
        image_size: int,
        gather: Callable[[Any], Any],
        start: Start,
        rngs: nnx.Rngs,
    ):
        self.remat, self.gather = config.remat, gather
        self.stem = Stem(size.width, config.stem, start, rngs.params())
        stages = {}
        inputs, design = size.width, BLOCKS[size.block]
        for i, depth in enumerate(size.depths):
            width, stride = size.width * 2**i, 2 if i else 1
            stages[str(i)] = Stage(inputs, width, depth, stride, design, start, rngs)
            inputs = design.growth * width
        self.stages = nnx.Dict(stages)
        self.width = inputs

    def forward(
        self, images: Float[Array, "B H W 3"], training: bool
    ) -> tuple[Float[Array, "B T D"], Statistics]:
        """Returns tokens in float32, and the running statistics after the pass.

        Args:
            images: normalized pixels, in images of any size.
            training: whether to normalize by the batch.

        Returns:
            The tokens, which are the mean feature and then the features row by row, each for a
            square of `token_side` pixels a side; and the statistics, nested as the parameters are.
        """
        remat = functools.partial(jax.checkpoint, policy=REMATS[self.remat])
        x, stem = self.stem(images, training)
        moved: Statistics = {"stem": stem, "stages": {}}
        for name, stage in self.stages.items():
            graph, first = nnx.split(stage.first)
            apply = remat(lambda x, params, graph=graph: nnx.merge(graph, params)(x, training))
            x, statistics = apply(x, first)
            moved["stages"][name] = {"first": statistics}
            if not hasattr(stage, "blocks"):
                continue
            graph, blocks = nnx.split(stage.blocks)
            apply = remat(
                lambda x, params, graph=graph: nnx.merge(graph, self.gather(params))(x, training),
                prevent_cse=False,  # the scan prevents it already
            )
            x, moved["stages"][name]["blocks"] = jax.lax.scan(apply, x, blocks)
        features = x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1])
        return jnp.concatenate([features.mean(1, keepdims=True), features], axis=1), moved

    def __call__(
        self,
        images: Float[Array, "B H W 3"],
        mask: Bool[Array, "B h w"] | None = None,
        keys: Key[Array, " B"] | None = None,
        last: int = 1,
    ) -> list[Float[Array, "B T D"]]:
        """Returns the tokens of `forward` in evaluation, as a list of one array.

        Raises:
            UserError: a mask is given, or more layers than the last are requested.
        """
        if mask is not None:
            raise UserError("a ResNet has no patches to mask; give it whole images")
        if last != 1:
            raise UserError(
                f"the last {last} layers of a ResNet were requested, but only the last one can be "
                "returned, because the others have features of other sizes; request 1"
            )
        return [self.forward(images, training=False)[0]]

    def attention(self, images: Float[Array, "B H W 3"]) -> Array:
        """Raises UserError, because a ResNet has no attention."""
        raise UserError(
            "a ResNet has no attention maps; use a network of model.family vit or swin instead"
        )
