"""Signs of health: they tell learning from collapse long before the k-NN accuracy does.

These are for any objective, which adds signs of its own to them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def entropy(p: Float[Array, "*B K"]) -> Float[Array, "*B"]:
    """Returns the entropy of each distribution, in nats."""
    return -jax.scipy.special.xlogy(p, p).sum(-1)


def agreement(
    student: Float[Array, "B V d"],
    teacher: Float[Array, "B Q d"],
    pairs: Float[Array, "V Q"] | None = None,
) -> Float[Array, ""]:
    """Returns the correlation over images of student views with the teacher's other views.

    Embeddings are centred over the batch, and the mean is over all pairs of different views, in
    [-1, 1]. A direction of the embedding grows only if its agreement exceeds the ratio of the
    teacher's temperature to the student's, and shrinks otherwise: the linearised [CLS] loss moves
    the deviation from the mean along teacher / tau_t - student / tau_s.

    Args:
        student: embeddings of all V views, the global ones first.
        teacher: embeddings of the Q global views.
        pairs: 1 for each pair of different views and 0 for others; by default both networks see
            the same global views.
    """
    student = student - student.mean(0)
    teacher = teacher - teacher.mean(0)
    products = jnp.einsum("bvd,bqd->vq", student, teacher, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.sqrt((student**2).sum((0, 2))[:, None] * (teacher**2).sum((0, 2)))
    if pairs is None:
        pairs = 1.0 - jnp.eye(student.shape[1], teacher.shape[1])
    return (pairs * products / jnp.maximum(norms, 1e-12)).sum() / pairs.sum()


def embedding_std(x: Float[Array, "B d"]) -> Float[Array, ""]:
    """Returns the spread of unit embeddings: 1 if they fill the sphere, 0 at a single point.

    This is the root of their mean variance over the batch, times sqrt(d).
    """
    return jnp.sqrt(x.var(0).mean() * x.shape[1])


def effective_rank(x: Float[Array, "B d"]) -> Float[Array, ""]:
    """Returns the effective rank of the centred rows, from 1 to d (Roy & Vetterli, 2007).

    This is the exponential of the entropy of the singular values, normalized to sum to 1.
    """
    x = x - x.mean(0)
    sums = "bi,bj->ij" if len(x) > x.shape[1] else "ij,kj->ik"  # the smaller of the two products
    gram = jnp.einsum(sums, x, x, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.linalg.eigvalsh(gram)
    # Singular values that are only rounding error do not count.
    values = jnp.sqrt(jnp.where(squares > 1e-6 * squares.max(), squares, 0))
    return jnp.exp(entropy(values / jnp.maximum(values.sum(), 1e-12)))
