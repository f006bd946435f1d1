"""Random blocks of prototypes, each with a softmax of its own (CARP, MaSSL)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sop_jax.errors import UserError


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


def block_log_softmax(logits: Float[Array, "*B TS"], size: int) -> Float[Array, "*B T {size}"]:
    """Returns the logarithm of a softmax within each block of logits, in float32.

    Args:
        logits: logits for the prototypes of all blocks, block by block.
        size: S, the number of prototypes in each block.
    """
    blocks = logits.reshape(*logits.shape[:-1], -1, size)
    return jax.nn.log_softmax(blocks.astype(jnp.float32), axis=-1)


def check_block(section: str, size: int, of: str, count: int) -> None:
    """Checks that a block has at least two prototypes, and not more than there are.

    Args:
        section: the section of the settings, whose setting `block` is the size.
        size: the number of prototypes in each block.
        of: the name of the setting that is the number of prototypes.
        count: that number.

    Raises:
        UserError: the size is not possible.
    """
    if not 2 <= size <= count:
        raise UserError(
            f"{section}.block is {size}, but {section}.{of} is {count}; expected a block of 2 to "
            f"{count}, because blocks are disjoint parts of them; change one of the two"
        )
