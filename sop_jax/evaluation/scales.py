"""Features of whole images, whose sizes differ, averaged over scales, as image retrieval uses them.

A program is compiled for each number of patches; images with the same number are computed together,
one on each of this process's devices.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import ml_collections
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8
from PIL import Image

from sop_jax.data.decode import Decoding, decoding, load_image
from sop_jax.data.sources import Source
from sop_jax.data.subsets import block
from sop_jax.data.thumbnails import cut, scaled, thumbnail
from sop_jax.evaluation.features import Extract, of_share, pooled
from sop_jax.evaluation.store import Memory, Store
from sop_jax.evaluation.task import Features, View
from sop_jax.models import Model, Params
from sop_jax.parallel import hosts
from sop_jax.parallel.mesh import make_mesh, put, replicated, split

SCALES = (1.0, 1 / 2**0.5, 0.5)
GROUP = 8  # images per device that are prepared and computed at a time


def at_scales(
    image: UInt8[np.ndarray, "h w 3"], longest: int, scales: Sequence[float], patch: int
) -> list[Float32[np.ndarray, "_ _ 3"]]:
    """Returns the pixels of an image at several scales, with sides that are multiples of `patch`.

    Args:
        image: the image as it is stored.
        longest: the most pixels on its longer side at scale 1; it is never enlarged, except that
            its shorter side has at least one patch.
        scales: the scales; one that would leave less than one patch is left out.
        patch: the side of a patch in pixels. Rows and columns that complete no patch are cut off.
    """
    small = thumbnail(image, longest)
    if (side := min(small.shape[:2])) < patch:
        height, width = (round(n * patch / side) for n in small.shape[:2])
        small = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    sizes = (cut(scaled(small, scale), patch) for scale in scales)
    return [pixels for pixels in sizes if pixels.size] or [cut(scaled(small, 1.0), patch)]


def make_scale_extractor(model: Model, config: ml_collections.ConfigDict, view: View) -> Extract:
    """Returns a function that computes the features of a source for a view with `longest`.

    It does what `features.make_extractor` does for views that are cropped: each process decodes a
    block of the records and receives their features. The tokens of patches are not kept, because
    images have different numbers of them.

    Args:
        model: the network.
        config: the config of the run.
        view: what the features are.
    """
    host, count = jax.process_index(), jax.process_count()
    mesh = make_mesh(devices=jax.local_devices())
    devices = mesh.devices.size
    group = GROUP * devices

    def forward(params: Params, images: Float[Array, "B H W 3"]) -> Float[Array, "B F"]:
        return pooled(model, params, images, view)[0]

    forward = jax.jit(forward, out_shardings=split(mesh))

    def compute(params: Params, images: list[list[np.ndarray] | None]) -> list[np.ndarray | None]:
        """Returns the features of images, given at all scales; None for None."""
        places: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for number, sizes in enumerate(images):
            for scale, pixels in enumerate(sizes or ()):
                places.setdefault(pixels.shape, []).append((number, scale))
        pending = []
        for shape, same in places.items():
            for start in range(0, len(same), devices):
                some = same[start : start + devices]
                batch = np.zeros((devices, *shape), np.float32)
                for row, (number, scale) in enumerate(some):
                    batch[row] = (images[number] or [])[scale]
                pending.append((some, forward(params, put(batch, split(mesh)))))
        vectors: dict[tuple[int, int], np.ndarray] = {}
        for some, found in pending:  # fetched when the devices have received all
            vectors |= zip(some, np.asarray(found), strict=False)
        parts = [
            [vectors[number, scale] for scale in range(len(sizes or ()))]
            for number, sizes in enumerate(images)
        ]
        return [np.stack(own).mean(axis=0) if own else None for own in parts]

    def extract(
        params: Params,
        source: Source,
        progress: Callable[[int], Any] | None = None,
        between: Callable[[], Any] | None = None,
        store: Store | None = None,
    ) -> Features:
        store = store or Memory()
        share = block(source, host, count)
        rows, first = len(share), host * len(share)
        params = jax.tree.map(
            lambda leaf: jax.device_put(leaf.addressable_data(0), replicated(mesh)), params
        )
        image = jax.ShapeDtypeStruct((devices, model.patch, model.patch, 3), np.float32)
        width = jax.eval_shape(forward, params, image).shape[1]
        vectors = store.array("vectors", (rows, width), np.float32)
        labels, valid = store.array("label", (rows,), np.int32), store.array("valid", (rows,), bool)
        # All processes start at the same group, since they call `between` after each.
        start = min(int(text) for text in hosts.gather(str(store.filled())))
        start -= start % group if start < rows else 0
        if progress:
            progress(min(start * count, len(source)))
        how = decoding(config.data, source)
        for images in _groups(share, view, model.patch, group, how, start):
            for row, vector in enumerate(compute(params, images), start):
                valid[row] = vector is not None and first + row < len(source)
                vectors[row] = 0 if vector is None else vector
                labels[row] = share.label(row) if valid[row] and source.has_labels else -1
            done, start = start, min(start + group, rows)
            store.keep(start)
            if progress:
                progress(min(start * count, len(source)) - min(done * count, len(source)))
            if between and start < rows:
                between()
        return of_share(source, first, {"vectors": vectors}, labels, valid)

    return extract


def _groups(
    share: Source, view: View, patch: int, size: int, how: Decoding, start: int
) -> Iterator[list[list[np.ndarray] | None]]:
    """Yields groups of images at all scales, in order; None for one that cannot be read."""
    stop = threading.Event()

    def make(record: int) -> list[np.ndarray] | None:
        try:
            image = load_image(share, record, how, stop)
        except ValueError:
            return None
        return at_scales(image, view.longest, view.scales, patch)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        try:
            starts = range(start, len(share), size)
            groups = (range(begin, min(begin + size, len(share))) for begin in starts)
            pending: list[Future] = []
            for group in groups:
                following = [pool.submit(make, record) for record in group]
                if pending:
                    yield [future.result() for future in pending]  # `following` is made meanwhile
                pending = following
            if pending:
                yield [future.result() for future in pending]
        finally:
            stop.set()  # nobody will use the images that are still being made
            pool.shutdown(wait=False, cancel_futures=True)
