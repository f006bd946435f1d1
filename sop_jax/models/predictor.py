"""CAPI's predictor: features of hidden patches from those of visible ones (Darcet et al., 2025).

Each hidden patch is a query of its own. It starts as the mask token, and attends to the encoder's
tokens in every layer, but never to another query. Positions turn queries and keys (rotary
embeddings), so that attention depends on the offset between the patches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from sop_jax.errors import UserError
from sop_jax.models.attention import attend
from sop_jax.models.gelu import gelu
from sop_jax.models.layers import REMATS, Start, dense, drop_path, layer_norm

# Turns per side of the image, of the fastest and of the slowest rotation (the authors' code).
FASTEST, SLOWEST = 7.0, 7e-4


class Predictor(NamedTuple):
    """A predictor as pure functions.

    Attributes:
        init: maps a key to parameters.
        predict: maps (params, context [B,T,D], where the tokens of the context are [B,T,2],
            where the queries are [B,P,2], draws [B,depth,2] or None) to the features [B,P,D] of
            the queries, in float32. Places are (row, column) from 0 to 1. With draws from the
            uniform distribution on [0, 1), drop path is on.
    """

    init: Callable[[Key[Array, ""]], dict[str, Any]]
    predict: Callable[..., Float[Array, "B P D"]]


def rotate(x: Float[Array, "B T N h"], places: Float[Array, "B T 2"]) -> Float[Array, "B T N h"]:
    """Returns queries or keys, turned by their places (rotary embeddings in two dimensions).

    Channel i forms a pair with channel i + h/2. The first half of the pairs turns with the row,
    the second half with the column, at rates from FASTEST to SLOWEST. The authors' code turns one
    channel of each pair by the row and the other by the column, which is not a rotation.

    Args:
        x: queries or keys in N heads of h channels, a multiple of 4.
        places: rows and columns, from 0 to 1.
    """
    pairs = x.shape[-1] // 2
    steps = jnp.linspace(0, 1, pairs // 2)
    turns = FASTEST * (SLOWEST / FASTEST) ** steps
    angles = 2 * jnp.pi * places[..., None] * turns  # [B T 2 h/4]
    angles = angles.reshape(*places.shape[:2], 1, pairs)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


class CrossBlock(nnx.Module):
    """A pre-norm layer in which queries attend to the context, which is normalized already."""

    def __init__(self, width: int, heads: int, start: Start, rngs: nnx.Rngs):
        self.heads, self.precision = heads, start.precision
        self.norm1 = layer_norm(width, start, rngs)
        self.q = dense(width, width, start, rngs)
        self.kv = dense(width, 2 * width, start, rngs)
        self.proj = dense(width, width, start, rngs)
        self.norm2 = layer_norm(width, start, rngs)
        self.fc1 = dense(width, 4 * width, start, rngs)
        self.fc2 = dense(4 * width, width, start, rngs)

    def attention(
        self,
        x: Float[Array, "B P D"],
        places: Float[Array, "B P 2"],
        context: Float[Array, "B T D"],
        context_places: Float[Array, "B T 2"],
    ) -> Float[Array, "B P D"]:
        """Returns the multi-head attention of normalized queries to the context."""
        (batch, queries, width), tokens = x.shape, context.shape[1]
        q = self.q(x).reshape(batch, queries, self.heads, -1)
        k, v = jnp.moveaxis(self.kv(context).reshape(batch, tokens, 2, self.heads, -1), 2, 0)
        q, k = rotate(q, places), rotate(k, context_places)
        mixed = attend(q, k, v, implementation="xla", precision=self.precision)
        return self.proj(mixed.reshape(batch, queries, width))

    def __call__(
        self,
        x: Float[Array, "B P D"],
        places: Float[Array, "B P 2"],
        context: Float[Array, "B T D"],
        context_places: Float[Array, "B T 2"],
        rate: float,
        draws: Float[Array, "B 2"] | None,
    ) -> Float[Array, "B P D"]:
        """Adds both residual branches, each dropped for samples whose draw is below `rate`."""
        first, second = (None, None) if draws is None else draws.T
        drop = jnp.float32(rate)
        mixed = self.attention(self.norm1(x), places, context, context_places)
        x = x + drop_path(mixed, drop, first)
        mlp = self.fc2(gelu(self.fc1(self.norm2(x))))
        return x + drop_path(mlp, drop, second)


class Queries(nnx.Module):
    """The predictor's parameters: the mask token, stacked layers, and the final norm."""

    def __init__(self, width: int, heads: int, depth: int, start: Start, rngs: nnx.Rngs):
        self.mask_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,)))
        self.norm = layer_norm(width, start, rngs)

        @nnx.split_rngs(splits=depth)
        @nnx.vmap
        def layers(rngs: nnx.Rngs) -> CrossBlock:
            return CrossBlock(width, heads, start, rngs)

        self.blocks = layers(rngs)


def predictor(
    width: int,
    heads: int,
    depth: int,
    drop_rate: float,
    start: Start,
    remat: str = "none",
    gather: Callable[[Any], Any] = lambda params: params,
) -> Predictor:
    """Returns the predictor.

    Its layers have LayerNorm and biases, as those of the encoder have; the authors' networks have
    RMSNorm and no biases.

    Args:
        width: D, the width of the encoder and of the predictor.
        heads: the number of attention heads.
        depth: the number of layers.
        drop_rate: the probability to drop a branch of a layer, the same for all layers.
        start: the dtype and the initialization of the parameters.
        remat: what the layers store for the backward pass, by the names of `model.remat`.
        gather: gathers parameters that are split over devices; called for one layer at a time.

    Raises:
        UserError: the width of a head is not a multiple of 4, which rotations in two dimensions
            need.
    """
    if width % (4 * heads):
        raise UserError(
            f"model.width {width} over model.heads {heads} is {width / heads:g} channels per head; "
            "expected a multiple of 4, of which the predictor turns pairs by rows and by columns; "
            "choose another width or number of heads"
        )

    def make(key: Key[Array, ""]) -> Queries:
        return Queries(width, heads, depth, start, nnx.Rngs(params=key))

    graph, template = nnx.split(nnx.eval_shape(lambda: make(jax.random.key(0))))

    def init(key: Key[Array, ""]) -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.split(make(key))[1])

    def predict(
        params: dict[str, Any],
        context: Float[Array, "B T D"],
        context_places: Float[Array, "B T 2"],
        places: Float[Array, "B P 2"],
        draws: Float[Array, "B depth 2"] | None = None,
    ) -> Float[Array, "B P D"]:
        state = jax.tree.map(lambda leaf: leaf, template)
        own = {name: gather(part) if name != "blocks" else part for name, part in params.items()}
        nnx.replace_by_pure_dict(state, own)
        module = nnx.merge(graph, state)
        block, layers = nnx.split(module.blocks)
        token = module.mask_token[...]
        x = jnp.broadcast_to(token, (*places.shape[:2], width)).astype(start.dtype)
        context = context.astype(start.dtype)

        def layer(x: Array, inputs: tuple) -> tuple[Array, None]:
            weights, layer_draws = inputs
            one = nnx.merge(block, gather(weights))
            return one(x, places, context, context_places, drop_rate, layer_draws), None

        layer = jax.checkpoint(layer, prevent_cse=False, policy=REMATS[remat])
        by_layer = None if draws is None else jnp.moveaxis(draws, 1, 0)
        x, _ = jax.lax.scan(layer, x, (layers, by_layer))
        return module.norm(x).astype(jnp.float32)

    return Predictor(init, predict)
