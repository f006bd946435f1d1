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
from sop_jax.models.attention import Implementation
from sop_jax.models.head import Head
from sop_jax.models.vit import SIZES, Size, Start, ViT

Params = dict[str, Any]  # nested: {"backbone": ..., "head": ...}

# ImageNet's channel statistics, of pixels in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Model(NamedTuple):
    """What the train step and the evaluations see of a network.

    Attributes:
        init: key -> parameters.
        embed: (params, uint8 images [B,H,W,3], mask [B,h,w] or None, keys [B] or None,
            patches=True) -> unit embeddings, float32: [CLS] [B,d], and of patches [B,M,d].
            `patches` are True for all h*w, False for none, or places [B,M] of some, row by row;
            the head sees no others.
        features: (params, uint8 images, mask=None, last=1) -> tokens [B,1+h*w,D] of the last
            layers, normed.
        patch: side of a patch in pixels.
        dim: d, the size of an embedding.
    """

    init: Callable[[Key[Array, ""]], Params]
    embed: Callable[..., tuple[Array, Array]]
    features: Callable[..., list[Array]]
    patch: int
    dim: int


class Network(nnx.Module):
    """A backbone and the head on it."""

    def __init__(self, backbone: ViT, head: Head):
        self.backbone = backbone
        self.head = head

    def embed(
        self,
        images: Float[Array, "B H W 3"],
        mask: Bool[Array, "B h w"] | None,
        keys: Key[Array, " B"] | None,
        patches: bool | Int[Array, "B M"],
    ) -> tuple[Float[Array, "B d"], Float[Array, "B M d"]]:
        """Unit embeddings of [CLS], and of the patches that are asked for."""
        (tokens,) = self.backbone(images, mask, keys)
        if patches is False:
            tokens = tokens[:, :1]
        elif patches is not True:
            some = jnp.take_along_axis(tokens[:, 1:], patches[..., None], axis=1)
            tokens = jnp.concatenate([tokens[:, :1], some], axis=1)
        embeddings = self.head(tokens)
        return embeddings[:, 0], embeddings[:, 1:]


def vit_size(config: ml_collections.ConfigDict) -> Size:
    """Width, depth and heads of `config.model`."""
    if config.size == "custom":
        return Size(config.width, config.depth, config.heads)
    if config.size not in SIZES:
        raise UserError(
            f"model.size is {config.size!r}; expected one of {', '.join(SIZES)}, or custom with "
            "model.width, model.depth and model.heads"
        )
    return SIZES[config.size]


def build(
    config: ml_collections.ConfigDict,
    image_size: int,
    gather: Callable[[Any], Any] = lambda params: params,
    attention: Implementation = "xla",
) -> Model:
    """The network of `config.model` and `config.head`.

    Args:
        config: of the run.
        image_size: square images of so many pixels a side are what its positions are made for.
        gather: makes parameters whole that lie split over devices; called for one layer at a time.
        attention: xla or cudnn, see `models.attention`.
    """
    size, patch, dim = vit_size(config.model), config.model.patch, config.head.dim
    start = Start(jnp.dtype(config.model.dtype), config.model.init_std, config.model.position_std)
    side = image_size // patch

    def make(key: Key[Array, ""]) -> Network:
        rngs = nnx.Rngs(params=key)
        drop_rate, remat = config.model.drop_path, config.model.remat
        backbone = ViT(size, patch, (side, side), drop_rate, remat, gather, attention, start, rngs)
        return Network(backbone, Head(size.width, config.head.hidden, dim, start, rngs))

    graph, template = nnx.split(nnx.eval_shape(lambda: make(jax.random.key(0))))

    def init(key: Key[Array, ""]) -> Params:
        return nnx.to_pure_dict(nnx.split(make(key))[1])

    def network(params: Params) -> Network:
        state = jax.tree.map(lambda leaf: leaf, template)
        # The layers wait for their turn.
        layers = {"blocks": params["backbone"]["blocks"]}
        rest = {name: leaf for name, leaf in params["backbone"].items() if name != "blocks"}
        backbone, head = gather((rest, params["head"]))
        nnx.replace_by_pure_dict(state, {"backbone": backbone | layers, "head": head})
        return nnx.merge(graph, state)

    def embed(params, images, mask=None, keys=None, patches=True):
        return network(params).embed(normalise(images, start.dtype), mask, keys, patches)

    def features(params, images, mask=None, last=1):
        return network(params).backbone(normalise(images, start.dtype), mask, last=last)

    return Model(init, embed, features, patch, dim)


def normalise(images: Array, dtype: jnp.dtype) -> Float[Array, "B H W 3"]:
    """Pixels 0..255 with ImageNet's mean and standard deviation taken out."""
    pixels = images.astype(jnp.float32) / 255
    return ((pixels - jnp.array(MEAN)) / jnp.array(STD)).astype(dtype)
