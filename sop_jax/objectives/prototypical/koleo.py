"""KoLeo: the regularizer that spreads embeddings, or prototypes, over the sphere.

It maximises the Kozachenko-Leonenko estimate of their entropy, the mean log distance to the nearest
neighbour (Sablayrolles et al., 2019). DINOv2 applies it to the embeddings of a batch. Govindarajan
et al. (2024) apply it to prototypes, against partial prototype collapse.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sop_jax.models.head import unit

ROUNDING = 1e-6  # unit rows that are closer to each other differ by rounding errors only

REDUCTIONS = ("sum", "mean")


def koleo(x: Float[Array, "n d"], eps: float = 1e-8, nearest: int = 1) -> Float[Array, ""]:
    """Returns minus the mean log distance of rows to their nearest other rows, on the sphere.

    Args:
        x: the rows, of any length; they are L2-normalized first.
        eps: see `koleo_of_unit`.
        nearest: see `koleo_of_unit`.
    """
    return koleo_of_unit(unit(x), eps, nearest)


def koleo_of_unit(x: Float[Array, "n d"], eps: float = 1e-8, nearest: int = 1) -> Float[Array, ""]:
    """Returns minus the mean log distance of unit rows to their nearest other rows.

    The value and its gradient are finite for equal rows and for a single row, which is its own
    neighbour. Neither repels the other or itself: the exact gradients of two equal rows cancel.

    Args:
        x: unit rows in float32.
        eps: added to each distance, and to each entry of the difference that it is the norm of
            (DINOv2's code); 0 for the formula of the papers.
        nearest: the number of nearest rows over which the mean is taken (DINOv3's code); all other
            rows if there are fewer.
    """
    fixed = jax.lax.stop_gradient(x)
    cosines = jnp.einsum("id,jd->ij", fixed, fixed, precision=jax.lax.Precision.HIGHEST)
    cosines = jnp.where(jnp.eye(len(x), dtype=bool), -jnp.inf, cosines)
    _, found = jax.lax.top_k(cosines, max(1, min(nearest, len(x) - 1)))
    apart = x[:, None] - x[found]
    # XLA sums the squares of equal rows in different orders, so that their unit rows differ.
    equal = (apart**2).sum(-1, keepdims=True) < ROUNDING**2
    squares = (jnp.where(equal, 0, apart) + eps) ** 2
    # Without eps, the distance of equal rows has neither a logarithm nor a gradient.
    distances = jnp.sqrt(jnp.maximum(squares.sum(-1), jnp.finfo(jnp.float32).tiny))
    return -jnp.log(distances + eps).mean()


def partitions(key: Key[Array, ""], count: int, size: int) -> tuple[Int[Array, "_ _"], ...]:
    """Returns a random partition of `count` prototypes into as few parts as `size` permits.

    Every prototype is in exactly one part. The sizes of the parts differ by at most one, and those
    of equal size form one array, so that there are one or two arrays. The paper draws parts of 2048
    anew in every step (appendix A.3), and says nothing of numbers that 2048 does not divide.

    Args:
        key: draws the partition.
        count: K, the number of prototypes.
        size: the largest number of prototypes in a part.
    """
    order = jax.random.permutation(key, count)
    parts = -(-count // size)
    smaller, larger = (
        count // parts,
        count % parts,
    )  # the size of most parts; how many have one more
    cut = larger * (smaller + 1)
    arrays = order[:cut].reshape(larger, smaller + 1), order[cut:].reshape(-1, smaller)
    return tuple(array for array in arrays if len(array))


def koleo_of_prototypes(
    weight: Float[Array, "K d"],
    blocks: Sequence[Int[Array, "_ _"]],
    reduction: str = "sum",
    eps: float = 1e-8,
) -> Float[Array, ""]:
    """Returns KoLeo of prototypes, each compared with those in its own part of a partition.

    Parts are computed one after another, so that memory holds the cosines of one part only.

    Args:
        weight: the prototypes, of any length.
        blocks: the indices of the prototypes in each part, from `partitions`.
        reduction: `sum` adds the values of the parts, each a mean over its prototypes (appendix
            A.3); `mean` takes their mean (equation 5), which does not grow with K.
        eps: see `koleo`; the paper names none.
    """
    values = [jax.lax.map(lambda part: koleo(weight[part], eps), array) for array in blocks]
    joined = jnp.concatenate(values)
    return joined.sum() if reduction == "sum" else joined.mean()
