"""The projection head that [CLS] and patches share."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sop_jax.models.vit import Start, dense


class Head(nnx.Module):
    """MLP of three layers with GELU and no norm, its output L2-normalised in float32.

    Source: the authors' head (iBOT's without its prototypes): hidden 2048, output 256.
    """

    def __init__(self, width: int, hidden: int, outputs: int, start: Start, rngs: nnx.Rngs):
        self.fc1 = dense(width, hidden, start, rngs)
        self.fc2 = dense(hidden, hidden, start, rngs)
        self.fc3 = dense(hidden, outputs, start, rngs)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B d"]:
        """Unit embeddings of tokens."""
        x = jax.nn.gelu(self.fc1(x), approximate=False)
        x = jax.nn.gelu(self.fc2(x), approximate=False)
        return unit(self.fc3(x))


def unit(x: Float[Array, "*B d"]) -> Float[Array, "*B d"]:
    """Rows of length 1 in float32; a row of zeros stays one, with a finite gradient."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
