"""Which patches of a view enter an objective."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def masked_first(
    mask: Bool[Array, "B Q h w"], most: int | None
) -> tuple[Int[Array, "B Q M"], Bool[Array, "B Q M"]]:
    """Returns the positions of `most` patches of each view, masked ones first, and their masks.

    `most` is M; None selects all patches.
    """
    flat = mask.reshape(*mask.shape[:2], -1)
    indices = jnp.argsort(~flat, axis=-1, stable=True)[..., :most]
    return indices, jnp.take_along_axis(flat, indices, axis=-1)
