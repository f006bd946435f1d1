"""CARP: views agree on random blocks of prototypes, which all of them have to use equally."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sop_jax.objectives.health import entropy


def consistency(
    student: Float[Array, "*B T S"], teacher: Float[Array, "*B T S"]
) -> Float[Array, "*B"]:
    """Returns -ln <p, q>, the mean over T blocks, for log probabilities p and q within each block.

    This is not a cross-entropy: it is least where both are the same one-hot distribution.
    """
    return -jax.nn.logsumexp(student + teacher, axis=-1).mean(-1)


def inequality(mean: Float[Array, "T S"]) -> Float[Array, ""]:
    """Returns ln S minus the entropy of the mean assignment, as the mean over T blocks.

    This is ME-MAX within each block: 0 if its prototypes are used equally, else positive.

    Args:
        mean: the mean probabilities of all views of student and teacher.
    """
    return jnp.log(jnp.float32(mean.shape[-1])) - entropy(mean).mean()
