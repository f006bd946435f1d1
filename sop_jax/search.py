"""Exact nearest rows by cosine: the supports of SOPs, and the neighbours of the k-NN evaluation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# JAX's default product is TF32 on GPUs and bfloat16 on TPUs, so the precision of scores is named.
PRECISIONS = {
    "float32": (jnp.float32, jax.lax.Precision.HIGHEST),
    "high": (jnp.float32, jax.lax.Precision.HIGH),  # TF32 on GPUs, three bfloat16 passes on TPUs
    "bfloat16": (jnp.bfloat16, jax.lax.Precision.DEFAULT),  # bfloat16 rows, float32 sums
}


def nearest(
    queries: Float[Array, "Q d"],
    rows: Float[Array, "N d"],
    k: int,
    *,
    allowed: Bool[Array, " N"] | None = None,
    own: Int[Array, " Q"] | None = None,
    precision: str = "float32",
    chunk: int = 256,
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """The k rows with the largest inner product with each query, largest first, ties by index.

    Exact on the scores as `precision` makes them. Works through `chunk` queries at a time, so
    that no more than chunk x N scores exist.

    Args:
        queries: unit vectors.
        rows: unit vectors.
        k: at most the number of rows that may be found.
        allowed: rows that may be found at all.
        own: for each query, one row that it may not find.
        precision: a key of PRECISIONS.
        chunk: queries at a time.

    Returns:
        Scores in float32, and indices of rows.
    """
    dtype, product = PRECISIONS[precision]
    rows = rows.astype(dtype)

    def search(inputs: tuple) -> tuple[Array, Array]:
        query, self_row = inputs
        scores = jnp.dot(
            rows, query.astype(dtype), precision=product, preferred_element_type=jnp.float32
        )
        if allowed is not None:
            scores = jnp.where(allowed, scores, -jnp.inf)
        if self_row is not None:
            scores = jnp.where(jnp.arange(len(rows)) == self_row, -jnp.inf, scores)
        scores, indices = jax.lax.top_k(scores, k)
        return scores, indices

    return jax.lax.map(search, (queries, own), batch_size=min(chunk, len(queries)))
