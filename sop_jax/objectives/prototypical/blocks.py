"""Random blocks of prototypes, each with a softmax of its own (CARP, MaSSL)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def random_blocks(key: Key[Array, ""], count: int, size: int) -> Int[Array, "T {size}"]:
    """Returns the indices of T = count // size disjoint blocks, drawn uniformly.

    If `size` does not divide `count`, the indices that are left over are in no block of this draw,
    as in the authors' code of both methods.

    Args:
        key: draws the blocks.
        count: the number of prototypes.
        size: the number of prototypes in each block, at most `count`.
    """
    blocks = count // size
    return jax.random.permutation(key, count)[: blocks * size].reshape(blocks, size)


def block_log_softmax(
    logits: Float[Array, "*B K"], blocks: Int[Array, "T S"]
) -> Float[Array, "*B T S"]:
    """Returns the logarithm of a softmax within each block, in float32."""
    return jax.nn.log_softmax(jnp.take(logits.astype(jnp.float32), blocks, axis=-1), axis=-1)
