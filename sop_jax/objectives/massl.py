"""MaSSL: views are assigned to the blocks of one random partition of a memory.

It is SOP whose prototypes have no supports, whose votes are one-hot, and whose tasks are the blocks
of a single permutation of the memory.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def block_assignment(
    u: Float[Array, "*B d"],
    rows: Float[Array, "T S d"],
    temperature: Float[Array, ""] | float,
) -> Float[Array, "*B TS"]:
    """Returns the log probabilities of softmax(<u, row> / τ) within each block, block by block.

    The probabilities of each block sum to 1, so that a cross-entropy of all entries is the sum of
    the T cross-entropies of the blocks.

    Args:
        u: unit embeddings.
        rows: the rows of the memory in each of T blocks.
        temperature: τ.
    """
    logits = jnp.einsum(
        "...d,tsd->...ts", u.astype(jnp.float32), rows, precision=jax.lax.Precision.HIGHEST
    )
    log_p = jax.nn.log_softmax(logits / temperature, axis=-1)
    return log_p.reshape(*log_p.shape[:-2], -1)
