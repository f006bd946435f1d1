"""Exact nearest rows by cosine: the supports of SOPs, and the neighbours of the k-NN evaluation.

The rows are split over the devices and stay there; only the results are sent.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

# By default, JAX multiplies in TF32 on GPUs and bfloat16 on TPUs, so the precision is explicit.
PRECISIONS = {
    "float32": (jnp.float32, jax.lax.Precision.HIGHEST),
    "high": (jnp.float32, jax.lax.Precision.HIGH),  # TF32 on GPUs, three bfloat16 passes on TPUs
    "bfloat16": (jnp.bfloat16, jax.lax.Precision.DEFAULT),  # bfloat16 rows, float32 sums
}

GROUP = 64  # scores per group, see `top_k`

# Queries at a time. GPUs multiply more of them faster; caches of processors prefer fewer.
CHUNK, CHUNK_GPU = 256, 1024


def nearest(
    queries: Float[Array, "Q d"],
    rows: Float[Array, "N d"],
    k: int,
    mesh: Mesh,
    *,
    allowed: Bool[Array, " N"] | None = None,
    own: Int[Array, " Q"] | None = None,
    precision: str = "float32",
    chunk: int | None = None,
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """Finds the k rows with the largest inner product with each query.

    The search is exact for scores of the given precision, for any number of devices. Every device
    finds the k best of its own rows for all queries, `chunk` queries at a time, so that at most
    chunk x N / devices scores per device are in memory. It then merges the results of all devices
    for its share of the queries. The only communication is one all-to-all of Q k scores and
    indices per device.

    Args:
        queries: unit vectors, the same on every device.
        rows: unit vectors, split over the devices of `mesh`, whose number divides N.
        k: the number of rows to find, at most the number of allowed rows.
        mesh: the devices.
        allowed: which rows may be found; all by default.
        own: for each query, the index of a row that it must not find.
        precision: a key of PRECISIONS.
        chunk: the number of queries at a time; by default CHUNK_GPU on GPUs and CHUNK elsewhere.

    Returns:
        Scores in float32, the largest first, and the indices of their rows; rows with equal scores
        are in the order of their indices. Both are split over the devices by query.
    """
    devices, axes = mesh.devices.size, mesh.axis_names
    gpu = mesh.devices.flat[0].platform == "gpu"
    count = chunk or (CHUNK_GPU if gpu else CHUNK)
    padding = -len(queries) % devices  # the merge is split by query
    padded = jnp.pad(queries, ((0, padding), (0, 0)))
    padded_own = None if own is None else jnp.pad(own, (0, padding))

    def search(
        queries: Array, rows: Array, allowed: Array | None, own: Array | None
    ) -> tuple[Array, Array]:
        first = jax.lax.axis_index(axes) * len(rows)
        own = None if own is None else own - first
        found = nearest_local(queries, rows, k, allowed, own, precision, count)
        # Packed as integers in one array: if the result of a sort goes directly into a collective,
        # XLA for CPUs sorts all scores, which is some twenty times slower.
        packed = jnp.stack(
            [jax.lax.bitcast_convert_type(found[0], jnp.int32), found[1] + first], axis=-1
        )
        packed = jax.lax.all_to_all(packed, axes, 0, 1, tiled=True)  # [Q/D, D k, 2]
        scores = jax.lax.bitcast_convert_type(packed[..., 0], jnp.float32)
        # The devices' results are in the order of their rows, so ties are still broken by index.
        scores, indices = jax.lax.top_k(scores, k)
        return scores, jnp.take_along_axis(packed[..., 1], indices, axis=1)

    by_row, whole = P(axes), P()
    search = jax.shard_map(
        search,
        mesh=mesh,
        in_specs=(whole, by_row, by_row, whole),
        out_specs=(by_row, by_row),
        check_vma=False,  # the check rejects the carry of a scan that differs between devices
    )
    scores, indices = search(padded, rows, allowed, padded_own)
    return scores[: len(queries)], indices[: len(queries)]


def nearest_local(
    queries: Float[Array, "Q d"],
    rows: Float[Array, "N d"],
    k: int,
    allowed: Bool[Array, " N"] | None,
    own: Int[Array, " Q"] | None,
    precision: str,
    chunk: int,
) -> tuple[Float[Array, "Q best"], Int[Array, "Q best"]]:
    """Finds rows as `nearest` does, among the rows of one device, and all of them if k > N.

    `own` may be outside of 0 to N-1 for a row of another device.
    """
    dtype, product = PRECISIONS[precision]
    rows = rows.astype(dtype)

    def search(inputs: tuple) -> tuple[Array, Array]:
        query, own_row = inputs
        scores = jnp.dot(
            rows, query.astype(dtype), precision=product, preferred_element_type=jnp.float32
        )
        if allowed is not None:
            scores = jnp.where(allowed, scores, -jnp.inf)
        if own_row is not None:
            scores = jnp.where(jnp.arange(len(rows)) == own_row, -jnp.inf, scores)
        return top_k(scores, min(k, len(rows)))

    return jax.lax.map(search, (queries, own), batch_size=min(chunk, len(queries)))


def top_k(scores: Float[Array, " N"], k: int) -> tuple[Float[Array, " k"], Int[Array, " k"]]:
    """Returns the same as `jax.lax.top_k`, ties included, in a third of its time; 0 equals -0.

    The k largest scores are in the k groups with the largest maxima, and finding the maxima is as
    fast as reading the scores. The size of a group is the greatest common divisor of N and GROUP;
    if that is 1, or there are fewer than k groups, this is `jax.lax.top_k` itself.
    """
    group = math.gcd(len(scores), GROUP)
    if group == 1 or len(scores) < k * group:
        found, indices = jax.lax.top_k(scores, k)
        return found, indices
    groups = scores.reshape(-1, group)
    _, best = jax.lax.top_k(groups.max(-1), k)
    best = jnp.sort(best)  # so that ties are still broken by index
    found, indices = jax.lax.top_k(groups[best].reshape(-1), k)
    return found, best[indices // group] * group + indices % group


def take(rows: Float[Array, "N d"], indices: Int[Array, "*K"], mesh: Mesh) -> Float[Array, "*K d"]:
    """Returns the rows at `indices`, replicated on every device; only these rows are sent.

    `rows` are split over the devices of `mesh`.
    """
    axes = mesh.axis_names

    def pick(rows: Array, indices: Array) -> Array:
        local = indices - jax.lax.axis_index(axes) * len(rows)
        here = (local >= 0) & (local < len(rows))
        picked = rows[jnp.clip(local, 0, len(rows) - 1)]
        return jax.lax.psum(jnp.where(here[..., None], picked, 0), axes)

    return jax.shard_map(pick, mesh=mesh, in_specs=(P(axes), P()), out_specs=P())(rows, indices)
