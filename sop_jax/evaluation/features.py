"""The features that a trained network gives to images, for evaluations and exports."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Int32, Num

from sop_jax.data.decode import AS_STORED, Decoding, decoding
from sop_jax.data.pipeline import eval_batches
from sop_jax.data.sources import Source
from sop_jax.data.subsets import block
from sop_jax.evaluation.store import Memory, Store
from sop_jax.evaluation.task import Features, View
from sop_jax.evaluation.views import view_of
from sop_jax.models import Model, Params
from sop_jax.parallel import hosts
from sop_jax.parallel.mesh import put, replicated, split, to_devices


@runtime_checkable
class Extract(Protocol):
    """Computes the features of this process's share of a source."""

    def __call__(
        self,
        params: Params,
        source: Source,
        progress: Callable[[int], Any] | None = None,
        between: Callable[[], Any] | None = None,
        store: Store | None = None,
    ) -> Features:
        """Returns the features.

        Args:
            params: the parameters of the network.
            source: the images.
            progress: called after each batch with the number of images in it, of all processes.
            between: called before each batch but the first; it may raise.
            store: keeps the arrays; they are in memory by default.
        """


def pooled(
    model: Model, params: Params, images: Num[Array, "B H W 3"], view: View
) -> tuple[Float[Array, "B F"], Float[Array, "B L D"]]:
    """Returns the features of images that `view.pool` and `view.layers` say, and the patches.

    Both are in float32; the patches are those of the last layer, after the final norm.
    """
    layers = model.features(params, images, last=view.layers)
    parts = [tokens[:, 0].astype(jnp.float32) for tokens in layers]
    patches = layers[-1][:, 1:].astype(jnp.float32)
    if view.pool == "cls_patches":
        parts.append(patches.mean(axis=1))
    elif view.pool == "patches":
        (raw,) = model.features(params, images, norm=False)
        parts = [raw[:, 1:].astype(jnp.float32).mean(axis=1)]
    return jnp.concatenate(parts, axis=1), patches


def make_extractor(
    model: Model, config: ml_collections.ConfigDict, mesh: Mesh, view: View | None = None
) -> Extract:
    """Returns a function that computes the features of a source; its program is compiled once.

    Images are decoded as `config.data` says. A batch has `config.eval.batch_size` images, rounded
    up to a multiple of the number of devices. Each process decodes a block of the records, and
    receives the features of that block only.

    Args:
        model: the network.
        config: the config of the run.
        mesh: the devices to split the batches over.
        view: what the features are; by default [CLS] of the centre crops of `config.eval`.
    """
    view = view or view_of(config)
    host, count = jax.process_index(), jax.process_count()
    devices = mesh.devices.size
    batch_size = -(-config.eval.batch_size // devices) * devices // count  # per process

    def forward(params: Params, images: Array) -> dict[str, Array]:
        vectors, patches = pooled(model, params, images, view)
        outputs = {"vectors": vectors}
        if view.patches:
            outputs["patches"] = patches.astype(jnp.float16)
        return outputs

    compiled = jax.jit(forward, out_shardings=split(mesh))

    def outputs(
        params: Params, source: Source, start: int
    ) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
        """Yields batches and their results, each fetched while the devices compute the next."""
        pending: Any = None
        how = decoding(config.data, source)
        for batch in host_batches(source, view, batch_size, host, count, how, start):
            images = to_devices(mesh, {"images": batch.pop("image")})["images"]
            done, pending = pending, (batch, compiled(params, images))
            if done is not None:
                yield done[0], own_rows(done[1])
        if pending is not None:
            yield pending[0], own_rows(pending[1])

    def extract(
        params: Params,
        source: Source,
        progress: Callable[[int], Any] | None = None,
        between: Callable[[], Any] | None = None,
        store: Store | None = None,
    ) -> Features:
        store = store or Memory()
        rows = len(block(source, host, count))
        image = jax.ShapeDtypeStruct((1, view.crop, view.crop, 3), np.uint8)
        arrays = {
            name: store.array(name, (rows, *one.shape[1:]), one.dtype)
            for name, one in jax.eval_shape(forward, params, image).items()
        }
        labels, valid = store.array("label", (rows,), np.int32), store.array("valid", (rows,), bool)
        # All processes start at the same batch, since they compute each batch together.
        start = min(int(text) for text in hosts.gather(str(store.filled())))
        start -= start % batch_size if start < rows else 0
        if progress and start:
            progress(min(start * count, len(source)))
        first = host * rows
        for batch, made in outputs(params, source, start):
            part = slice(start, min(start + batch_size, rows))
            size = part.stop - part.start
            for name, array in made.items():
                arrays[name][part] = array[:size]
            labels[part], valid[part] = batch["label"][:size], batch["valid"][:size]
            start = part.stop
            store.keep(start)
            if progress:
                done = min(start, rows) * count
                progress(min(done, len(source)) - min(done - size * count, len(source)))
            if between and start < rows:
                between()
        store.keep(rows)
        return of_share(source, first, arrays, labels, valid)

    return extract


def of_share(
    source: Source,
    first: int,
    arrays: Mapping[str, np.ndarray],
    labels: Int32[np.ndarray, " rows"],
    valid: Bool[np.ndarray, " rows"],
) -> Features:
    """Returns the features of this process's share of a source.

    Args:
        source: the whole source.
        first: the first record of the share.
        arrays: `vectors`, and perhaps `patches`, with one row for each record of the share.
        labels: the label of each record.
        valid: which rows are images that could be read; False for padding of the share.
    """
    here = np.arange(first, first + len(valid))
    mine = here[(here < len(source)) & ~valid].tolist()
    corrupt = [json.loads(text) for text in hosts.gather(json.dumps(mine))]
    kept = {name: array if valid.all() else array[valid] for name, array in arrays.items()}
    return Features(
        kept["vectors"],
        kept.get("patches"),
        here[valid].astype(np.int32),
        labels[valid],
        sorted(itertools.chain.from_iterable(corrupt)),
    )


def own_rows(outputs: dict[str, Array]) -> dict[str, np.ndarray]:
    """Returns this process's rows of arrays that are split over all devices by row."""
    found = {}
    for name, array in outputs.items():
        shards = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
        found[name] = np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])
    return found


def host_batches(
    source: Source,
    view: View,
    batch_size: int,
    host: int,
    hosts: int,
    how: Decoding = AS_STORED,
    start: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields one process's part of the batches of `eval_batches`, with its labels and `valid`.

    All processes yield the same number of batches, for any size of the source. Each record is valid
    or corrupt in exactly one of them.

    Args:
        source: the images.
        view: how they are scaled and cropped.
        batch_size: the number of images per batch and process.
        host: the number of this process.
        hosts: the number of processes.
        how: how images are decoded.
        start: the first record of this process's share to make.
    """
    share = block(source, host, hosts)
    crops = eval_batches(share, view.resize, view.crop, batch_size, how, view.interpolation, start)
    for batch in crops:
        index = batch["index"] + host * len(share)
        inside = index < len(source)
        yield batch | {
            "index": index,
            "valid": batch["valid"] & inside,
            "corrupt": np.where(inside & (batch["corrupt"] >= 0), index, -1),
        }


def unit(vectors: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
    """Returns the vectors divided by their lengths; lengths below 1e-12 count as 1e-12."""
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def whole(features: Features) -> Features:
    """Returns the features with the rows of all processes, on every process."""
    if not hosts.several():
        return features
    arrays = {"vectors": features.vectors, "index": features.index, "labels": features.labels}
    if features.patches is not None:
        arrays["patches"] = features.patches
    counts = [int(text) for text in hosts.gather(str(len(features.index)))]
    most = max(counts)
    joined = {}
    for name, array in arrays.items():
        padded = np.pad(array, [(0, most - len(array)), *[(0, 0)] * (array.ndim - 1)])
        parts = process_allgather(padded)
        joined[name] = np.concatenate([part[:n] for part, n in zip(parts, counts, strict=True)])
    return Features(
        joined["vectors"],
        joined.get("patches"),
        joined["index"],
        joined["labels"],
        features.corrupt,
    )


def on_devices(
    features: Features, mesh: Mesh
) -> tuple[Float[Array, "N D"], Int[Array, " N"], Int[Array, " N"]]:
    """Returns the vectors of all processes as one array that is split over the devices by row.

    Rows are in the order of the records, with padding between the shares of processes.

    Returns:
        The rows; their labels and their records, both on every device. Those of padding are -1.
    """
    here, count = len(mesh.local_devices), jax.process_count()
    most = max(int(text) for text in hosts.gather(str(len(features.index))))
    size = max(1, -(-most // here)) * here
    padding = size - len(features.index)
    rows = np.pad(features.vectors, ((0, padding), (0, 0)))
    labels = np.pad(features.labels, (0, padding), constant_values=-1)
    index = np.pad(features.index, (0, padding), constant_values=-1)
    if count > 1:
        labels, index = (process_allgather(x).reshape(-1) for x in (labels, index))
    return (
        to_devices(mesh, {"rows": rows})["rows"],
        put(labels, replicated(mesh)),
        put(index, replicated(mesh)),
    )


def in_chunks(features: Features, mesh: Mesh, size: int) -> Iterator[dict[str, Array]]:
    """Yields the rows of all processes in chunks that are split over the devices.

    All processes yield the same number of chunks, whose shapes are equal.

    Args:
        features: this process's rows.
        mesh: the devices.
        size: the number of rows per chunk, of all processes together.

    Yields:
        `vectors` [n, D], `labels` [n], and which rows are images and not padding, `valid` [n].
    """
    processes, devices = jax.process_count(), mesh.devices.size
    most = max(int(text) for text in hosts.gather(str(len(features.index))))
    own = -(-min(size, most * processes) // devices) * devices // processes
    for start in range(0, most, own):
        part = slice(start, start + own)
        vectors, labels = features.vectors[part], features.labels[part]
        padding = own - len(labels)
        yield to_devices(
            mesh,
            {
                "vectors": np.pad(vectors, ((0, padding), (0, 0))),
                "labels": np.pad(labels, (0, padding), constant_values=-1),
                "valid": np.arange(own) < len(labels),
            },
        )
