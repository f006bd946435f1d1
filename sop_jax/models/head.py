"""The projection head, which [CLS] and patches share."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sop_jax.models.layers import Start, dense


class Head(nnx.Module):
    """An MLP of three layers with GELU and no norm, whose output is L2-normalized in float32.

    This is the head of the authors' code, which is iBOT's without prototypes, with 2048 hidden
    units and 256 outputs.
    """

    def __init__(self, width: int, hidden: int, outputs: int, start: Start, rngs: nnx.Rngs):
        self.fc1 = dense(width, hidden, start, rngs)
        self.fc2 = dense(hidden, hidden, start, rngs)
        self.fc3 = dense(hidden, outputs, start, rngs)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B d"]:
        """Returns the unit embeddings of tokens, in float32."""
        x = jax.nn.gelu(self.fc1(x), approximate=False)
        x = jax.nn.gelu(self.fc2(x), approximate=False)
        return unit(self.fc3(x))


def unit(x: Float[Array, "*B d"]) -> Float[Array, "*B d"]:
    """Returns rows scaled to unit norm in float32; zeros remain zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
