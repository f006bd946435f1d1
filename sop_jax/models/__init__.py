"""Backbones and heads, as pure functions of a parameter tree.

Flax NNX stays in this package: a model is split once into its static graph and a plain nested
dict of float32 parameters, and everything else sees the functions of `Model`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from sop_jax.errors import UserError
from sop_jax.models import resnet, swin, vit
from sop_jax.models.attention import Implementation
from sop_jax.models.head import Head
from sop_jax.models.layers import Start
from sop_jax.models.linear import precision_of

Params = dict[str, Any]  # nested: {"backbone": ..., "head": ...}

# ImageNet's channel statistics, of pixels in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Family(NamedTuple):
    """A kind of backbone, as `config.model.family` names it.

    Attributes:
        sizes: by `config.model.size`.
        custom: config.model -> the size that its numbers describe.
        token_side: config.model -> pixels a side that a token stands for.
        backbone: (size, config.model, image size, gather, start, rngs) -> the network, which has a
            `width` and maps images to tokens and attention weights as `vit.ViT` does.
    """

    sizes: dict[str, Any]
    custom: Callable[[ml_collections.ConfigDict], Any]
    token_side: Callable[[ml_collections.ConfigDict], int]
    backbone: Callable[..., Any]


FAMILIES = {
    "vit": Family(vit.SIZES, vit.custom, vit.token_side, vit.ViT),
    "swin": Family(swin.SIZES, swin.custom, swin.token_side, swin.Swin),
    "resnet": Family(resnet.SIZES, resnet.custom, resnet.token_side, resnet.ResNet),
}


class Model(NamedTuple):
    """What the train step and the evaluations see of a network.

    [CLS] is the token that stands for an image: that of a ViT, or, with `model.pool=mean` and in a
    Swin, the mean of its patches.

    Attributes:
        init: key -> parameters.
        embed: (params, uint8 images [B,H,W,3], mask [B,h,w] or None, keys [B] or None,
            patches=True) -> unit embeddings, float32: [CLS] [B,d], and of patches [B,M,d].
            `patches` are True for all h*w, False for none, or indices [B,M] of some, row by row;
            the head sees no others. A ResNet has none, whatever is asked for, and takes no notice
            of masks and keys.
        embed_training: (as embed, kept=None) -> four arrays: what embed gives, but by batch norm's
            statistics of these images, and the same tokens before the head [B,D] and [B,M,D]; and
            the running statistics that they leave behind, nested as the parameters are; {}
            without batch norm. `kept` are indices [B,T] of the patches that enter the encoder;
            `patches` are counted among those then.
        features: (params, uint8 images, mask=None, last=1) -> tokens [B,1+h*w,D] of the last
            layers, normed.
        attention: (params, uint8 images) -> float32 weights [B,heads,T,T] of the last layer, of
            queries to keys; see the backbone for which tokens those are.
        patch: pixels a side that a token stands for.
        dim: d, the size of an embedding.
    """

    init: Callable[[Key[Array, ""]], Params]
    embed: Callable[..., tuple[Array, Array]]
    embed_training: Callable[..., tuple[tuple[Array, Array, Array, Array], Params]]
    features: Callable[..., list[Array]]
    attention: Callable[..., Array]
    patch: int
    dim: int


class Network(nnx.Module):
    """A backbone and the head on it."""

    def __init__(self, backbone: Any, head: Head):
        self.backbone = backbone
        self.head = head

    def embed(
        self,
        images: Float[Array, "B H W 3"],
        mask: Bool[Array, "B h w"] | None,
        keys: Key[Array, " B"] | None,
        patches: bool | Int[Array, "B M"],
        kept: Int[Array, "B T"] | None,
        training: bool,
    ) -> tuple[tuple[Array, Array, Array, Array], Params]:
        """Unit embeddings and tokens of [CLS] and patches, see `Model`; running statistics."""
        statistics: Params = {}
        if kept is not None and not isinstance(self.backbone, vit.ViT):
            raise UserError("only a ViT can drop patches; choose model.family=vit")
        if isinstance(self.backbone, resnet.ResNet):
            tokens, moved = self.backbone.forward(images, training)
            tokens, statistics = tokens[:, :1], {"backbone": moved}
        else:
            dropping = {} if kept is None else {"kept": kept}
            (tokens,) = self.backbone(images, mask, keys, **dropping)
            if patches is False:
                tokens = tokens[:, :1]
            elif patches is not True:
                some = jnp.take_along_axis(tokens[:, 1:], patches[..., None], axis=1)
                tokens = jnp.concatenate([tokens[:, :1], some], axis=1)
        embeddings = self.head(tokens)
        arrays = (embeddings[:, 0], embeddings[:, 1:], tokens[:, 0], tokens[:, 1:])
        return arrays, statistics


def size_of(config: ml_collections.ConfigDict) -> Any:
    """The size of `config.model`, as its family describes sizes.

    Raises:
        UserError: the family, or its size, is not known.
    """
    if config.family not in FAMILIES:
        raise UserError(f"model.family is {config.family!r}; expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[config.family]
    if config.size == "custom":
        return family.custom(config)
    if config.size not in family.sizes:
        raise UserError(
            f"model.size is {config.size!r}; expected one of {', '.join(family.sizes)} for "
            f"model.family={config.family}, or custom, whose numbers have settings of their own"
        )
    return family.sizes[config.size]


def token_side(config: ml_collections.ConfigDict) -> int:
    """Pixels a side that a token of `config.model` stands for."""
    return FAMILIES[config.family].token_side(config)


def build(
    config: ml_collections.ConfigDict,
    image_size: int,
    gather: Callable[[Any], Any] = lambda params: params,
    implementation: Implementation = "xla",
) -> Model:
    """The network of `config.model` and `config.head`.

    Args:
        config: of the run.
        image_size: square images of so many pixels a side are what its positions are made for.
        gather: makes parameters whole that lie split over devices; called for one layer at a time.
        implementation: of a ViT's attention, see `models.attention`.
    """
    size, patch, dim = size_of(config.model), token_side(config.model), config.head.dim
    family = FAMILIES[config.model.family]
    dtype, numbers = jnp.dtype(config.model.dtype), config.model
    start = Start(
        dtype,
        numbers.init_std,
        numbers.position_std,
        numbers.norm_eps,
        implementation,
        precision_of(numbers),
    )

    def make(key: Key[Array, ""]) -> Network:
        rngs = nnx.Rngs(params=key)
        backbone = family.backbone(size, config.model, image_size, gather, start, rngs)
        return Network(backbone, Head(backbone.width, config.head.hidden, dim, start, rngs))

    graph, template = nnx.split(nnx.eval_shape(lambda: make(jax.random.key(0))))

    def init(key: Key[Array, ""]) -> Params:
        return nnx.to_pure_dict(nnx.split(make(key))[1])

    def network(params: Params) -> Network:
        state = jax.tree.map(lambda leaf: leaf, template)
        own = {name: params[name] for name in ("backbone", "head")}  # an objective has its own
        nnx.replace_by_pure_dict(state, gather_outside_blocks(own, gather))
        return nnx.merge(graph, state)

    def embed(params, images, mask=None, keys=None, patches=True):
        pixels = normalise(images, start.dtype)
        return network(params).embed(pixels, mask, keys, patches, None, training=False)[0][:2]

    def embed_training(params, images, mask=None, keys=None, patches=True, kept=None):
        pixels = normalise(images, start.dtype)
        return network(params).embed(pixels, mask, keys, patches, kept, training=True)

    def features(params, images, mask=None, last=1):
        return network(params).backbone(normalise(images, start.dtype), mask, last=last)

    def attention(params, images):
        return network(params).backbone.attention(normalise(images, start.dtype))

    return Model(init, embed, embed_training, features, attention, patch, dim)


def gather_outside_blocks(params: Params, gather: Callable[[Any], Any]) -> Params:
    """All parameters whole but those of stacked layers, which wait for their turn.

    Stacked layers are what lies under the name `blocks`, wherever that is.
    """

    def whole(path: tuple, leaf: Array) -> Array:
        return leaf if any(key.key == "blocks" for key in path) else gather(leaf)

    return jax.tree_util.tree_map_with_path(whole, params)


def normalise(images: Array, dtype: jnp.dtype) -> Float[Array, "B H W 3"]:
    """Pixels 0..255 with ImageNet's mean and standard deviation taken out."""
    pixels = images.astype(jnp.float32) / 255
    return ((pixels - jnp.array(MEAN)) / jnp.array(STD)).astype(dtype)
