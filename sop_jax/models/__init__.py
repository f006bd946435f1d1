"""Backbones and heads, as pure functions of a parameter tree.

Only this package uses Flax NNX. A model is split once into its static graph and a plain nested dict
of float32 parameters, and all other code uses the functions of `Model`.
"""

from collections.abc import Callable, Mapping
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

Params = dict[str, Any]  # nested: {"backbone": ..., "head": ...}; no head if it has no layers

# The channel statistics of ImageNet, for pixels in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Family(NamedTuple):
    """A kind of backbone, named by `config.model.family`.

    Attributes:
        sizes: the sizes by `config.model.size`.
        custom: maps `config.model` to the size that its numbers describe.
        token_side: maps `config.model` to the pixels on each side of the square that a token
            stands for.
        backbone: maps (size, config.model, image size, gather, start, rngs) to the network, which
            has a `width` and maps images to tokens and attention weights as `vit.ViT` does.
        check_size: raises UserError for a size that no network can have.
        unused: the settings of `config.model` that its networks do not have, other than the
            dimensions that a named size fixes.
        patches: whether it has tokens of patches, which can be masked.
        drops_patches: whether patches can be left out of the encoder.
        batch_norm: whether it normalizes by the statistics of the (micro)batch, and keeps running
            ones among its parameters.
        cudnn: whether cuDNN can compute its attention.
    """

    sizes: dict[str, Any]
    custom: Callable[[ml_collections.ConfigDict], Any]
    token_side: Callable[[ml_collections.ConfigDict], int]
    backbone: Callable[..., Any]
    check_size: Callable[[Any], None]
    unused: tuple[str, ...]
    patches: bool = True
    drops_patches: bool = False
    batch_norm: bool = False
    cudnn: bool = False


# A Swin and a ResNet always average their tokens.
FAMILIES = {
    "vit": Family(
        sizes=vit.SIZES,
        custom=vit.custom,
        token_side=vit.token_side,
        backbone=vit.ViT,
        check_size=vit.check_size,
        unused=("window", "stem", "block", "stage_depths", "stage_heads"),
        drops_patches=True,
        cudnn=True,
    ),
    "swin": Family(
        sizes=swin.SIZES,
        custom=swin.custom,
        token_side=swin.token_side,
        backbone=swin.Swin,
        check_size=swin.check_size,
        unused=(
            "patch",
            "depth",
            "heads",
            "registers",
            "layer_scale",
            "pool",
            "positions",
            "stem",
            "block",
            "unroll",
        ),
    ),
    "resnet": Family(
        sizes=resnet.SIZES,
        custom=resnet.custom,
        token_side=resnet.token_side,
        backbone=resnet.ResNet,
        check_size=lambda size: None,
        unused=(
            *("patch", "window", "depth", "heads", "stage_heads", "registers", "layer_scale"),
            *("pool", "positions", "position_std", "norm_eps", "unroll"),
        ),
        patches=False,
        batch_norm=True,
    ),
}


class Model(NamedTuple):
    """A network as the functions that the train step and the evaluations use.

    [CLS] is the token that represents an image: that of a ViT, or the mean of the patches in a Swin
    and with `model.pool=mean`.

    Attributes:
        init: maps a key to parameters.
        embed: maps (params, uint8 images [B,H,W,3], mask [B,h,w] or None, keys [B] or None,
            patches=True) to embeddings in float32, of [CLS] [B,d] and of patches [B,M,d]. Their
            rows have unit norm unless `head.unit` is false.
            `patches` are True for all h*w patches, False for none, or the indices [B,M] of some,
            counted row by row; only these enter the head. A ResNet has no patches, whatever is
            requested, and ignores masks and keys.
        embed_training: maps the same arguments and `kept=None` to a pair. The first is four
            arrays: the results of `embed`, where batch norm uses the statistics of these images,
            and the same tokens before the head [B,D] and [B,M,D]. The second is the running
            statistics after the pass, nested as the parameters are; {} without batch norm. `kept`
            are the indices [B,T] of the patches that enter the encoder, and `patches` then index
            these.
        encode_training: the part of `embed_training` before the head. It maps the same arguments
            to a pair: the tokens [B,1+M,D], [CLS] first, and the running statistics of the
            backbone.
        project_training: the head. It maps (params, tokens [...,D]) to a pair: their embeddings
            [...,d], and the running statistics of the head.
        features: maps (params, uint8 images, mask=None, last=1, norm=True) to a list with the
            tokens [B,1+h*w,D] of each of the last layers. Only a ViT can leave out the final norm
            (`norm=False`).
        attention: maps (params, uint8 images) to the float32 weights [B,heads,T,T] of the last
            layer, from queries to keys. The backbone describes the T tokens.
        patch: the pixels on each side of the square that a token stands for.
        dim: d, the numbers in an embedding.
        together: whether the head's batch norm normalizes all views of a step together, so that
            the head has to see the tokens of all passes of the backbone at once.
    """

    init: Callable[[Key[Array, ""]], Params]
    embed: Callable[..., tuple[Array, Array]]
    embed_training: Callable[..., tuple[tuple[Array, Array, Array, Array], Params]]
    encode_training: Callable[..., tuple[Array, Params]]
    project_training: Callable[[Params, Array], tuple[Array, Params]]
    features: Callable[..., list[Array]]
    attention: Callable[..., Array]
    patch: int
    dim: int
    together: bool = False


class Network(nnx.Module):
    """A backbone and the head on it."""

    def __init__(self, backbone: Any, head: Head, family: Family):
        self.backbone = backbone
        self.head = head
        self.drops_patches, self.batch_norm = family.drops_patches, family.batch_norm

    def encode(
        self,
        images: Float[Array, "B H W 3"],
        mask: Bool[Array, "B h w"] | None,
        keys: Key[Array, " B"] | None,
        patches: bool | Int[Array, "B M"],
        kept: Int[Array, "B T"] | None,
        training: bool,
    ) -> tuple[Float[Array, "B N D"], Params]:
        """Returns what `Model.encode_training` does.

        Raises:
            UserError: patches are to be dropped, and the backbone is not a ViT.
        """
        statistics: Params = {}
        if kept is not None and not self.drops_patches:
            raise UserError("only a ViT can drop patches; choose model.family=vit")
        if self.batch_norm:
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
        return tokens, statistics

    def project(
        self, tokens: Float[Array, "*B D"], training: bool
    ) -> tuple[Float[Array, "*B d"], Params]:
        """Returns what `Model.project_training` does."""
        embeddings, moved = self.head(tokens, training)
        return embeddings, {"head": moved} if moved else {}


def size_of(config: ml_collections.ConfigDict) -> Any:
    """Returns the size of `config.model`, of the type that its family uses.

    Raises:
        UserError: the family or its size is unknown.
    """
    if config.family not in FAMILIES:
        raise UserError(f"model.family is {config.family!r}; expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[config.family]
    if config.size == "custom":
        return family.custom(config)
    if config.size not in family.sizes:
        raise UserError(
            f"model.size is {config.size!r}; expected one of {', '.join(family.sizes)} for "
            f"model.family={config.family}, or custom to set the numbers themselves"
        )
    return family.sizes[config.size]


def has_batch_norm(config: ml_collections.ConfigDict) -> bool:
    """Whether the network of a run normalizes by the statistics of its (micro)batches."""
    return FAMILIES[config.model.family].batch_norm or has_head_norm(config)


def has_head_norm(config: ml_collections.ConfigDict) -> bool:
    """Whether the head of a run has batch norm, which follows its hidden layers."""
    return config.head.batch_norm and config.head.layers > 1


def token_side(config: ml_collections.ConfigDict) -> int:
    """Returns the pixels on each side of the square that a token of `config.model` stands for."""
    return FAMILIES[config.family].token_side(config)


def start_of(
    config: ml_collections.ConfigDict, implementation: Implementation = "xla", unroll: bool = False
) -> Start:
    """Returns the options of the layers of `config.model`."""
    return Start(
        jnp.dtype(config.dtype),
        config.init_std,
        config.position_std,
        config.norm_eps,
        implementation,
        precision_of(config),
        unroll,
    )


def build(
    config: ml_collections.ConfigDict,
    image_size: int,
    gather: Callable[[Any], Any] = lambda params: params,
    implementation: Implementation = "xla",
    unroll: bool = False,
) -> Model:
    """Returns the network of `config.model` and `config.head`.

    Args:
        config: the config of the run.
        image_size: the pixels on each side of the images for which its positions are made.
        gather: gathers parameters that are split over devices; called for one layer at a time.
        implementation: the implementation of a ViT's attention, see `models.attention`.
        unroll: whether the layers of a ViT are unrolled, see `Start`.

    Raises:
        UserError: the family or its size is unknown, or the head does not fit the backbone.
    """
    size, patch = size_of(config.model), token_side(config.model)
    family = FAMILIES[config.model.family]
    start = start_of(config.model, implementation, unroll)

    def make(key: Key[Array, ""]) -> Network:
        rngs = nnx.Rngs(params=key)
        backbone = family.backbone(size, config.model, image_size, gather, start, rngs)
        head = Head(backbone.width, config.head, start, rngs)
        return Network(backbone, head, family)

    graph, template = nnx.split(nnx.eval_shape(lambda: make(jax.random.key(0))))

    def init(key: Key[Array, ""]) -> Params:
        return nnx.to_pure_dict(nnx.split(make(key))[1])

    def network(params: Params) -> Network:
        state = jax.tree.map(lambda leaf: leaf, template)
        # Not the objective's; a head without layers has no parameters.
        own = {name: part for name, part in params.items() if name in ("backbone", "head")}
        nnx.replace_by_pure_dict(state, gather_outside_blocks(own, gather))
        return nnx.merge(graph, state)

    def embed(params, images, mask=None, keys=None, patches=True):
        own, pixels = network(params), normalize(images, start.dtype)
        tokens, _ = own.encode(pixels, mask, keys, patches, None, training=False)
        embeddings, _ = own.project(tokens, training=False)
        return embeddings[:, 0], embeddings[:, 1:]

    def encode_training(params, images, mask=None, keys=None, patches=True, kept=None):
        pixels = normalize(images, start.dtype)
        return network(params).encode(pixels, mask, keys, patches, kept, training=True)

    def project_training(params, tokens):
        return network(params).project(tokens, training=True)

    def embed_training(params, images, mask=None, keys=None, patches=True, kept=None):
        tokens, statistics = encode_training(params, images, mask, keys, patches, kept)
        embeddings, moved = project_training(params, tokens)
        arrays = (embeddings[:, 0], embeddings[:, 1:], tokens[:, 0], tokens[:, 1:])
        return arrays, statistics | moved

    def features(params, images, mask=None, last=1, norm=True):
        if not norm and config.model.family != "vit":
            raise UserError("only a ViT can leave out the final norm; choose model.family=vit")
        without = {} if norm else {"norm": False}
        pixels = normalize(images, start.dtype)
        return network(params).backbone(pixels, mask, last=last, **without)

    def attention(params, images):
        return network(params).backbone.attention(normalize(images, start.dtype))

    return Model(
        *(init, embed, embed_training, encode_training, project_training, features, attention),
        patch=patch,
        dim=config.head.dim,
        together=has_head_norm(config) and config.head.batch_norm_views == "together",
    )


def nested(leaves: Mapping[str, Any]) -> Params:
    """Returns the parameters whose leaves are given by their paths, such as `head/fc1/bias`."""
    params: Params = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        place = params
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = leaf
    return params


def gather_outside_blocks(params: Params, gather: Callable[[Any], Any]) -> Params:
    """Gathers all parameters except those of stacked layers, which are gathered one at a time.

    Stacked layers are the sub-trees named `blocks`, at any depth.
    """

    def whole(path: tuple, leaf: Array) -> Array:
        return leaf if any(key.key == "blocks" for key in path) else gather(leaf)

    return jax.tree_util.tree_map_with_path(whole, params)


def normalize(images: Array, dtype: jnp.dtype) -> Float[Array, "B H W 3"]:
    """Returns pixels from 0 to 255 normalized by ImageNet's mean and standard deviation."""
    pixels = images.astype(jnp.float32) / 255
    return ((pixels - jnp.array(MEAN)) / jnp.array(STD)).astype(dtype)
