"""Makes batches of NumPy arrays from a source.

Training batches are a pure function of (seed, global index): they do not depend on the number of
hosts, processes or threads, and a run resumes by starting at a step.
"""

import gc
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import grain
import numpy as np
from absl import flags

from sop_jax.data import workers
from sop_jax.data.augment import eval_image, multi_crop
from sop_jax.data.decode import AS_STORED, Decoding, decode_or_substitute, decoding, load_image
from sop_jax.data.masks import first_step, view_mask
from sop_jax.data.sources import Source
from sop_jax.errors import UserError

PIECE_BYTES = 2**24  # the most that a thread makes and a process hands over at a time


class Batches:
    """An endless iterator of batches."""

    def __init__(self, iterator: Any, stop: threading.Event) -> None:
        """Takes Grain's iterator, and the event that ends this process's waits for storage."""
        self._iterator, self._stop, self._begun = iterator, stop, False

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            raise ValueError("these batches are closed")
        with workers.losses_in_words():
            batch = next(self._iterator)
        self._begun = True
        return batch

    def close(self) -> None:
        """Ends the threads and processes; can be called more than once."""
        if self._iterator is not None:
            self._stop.set()
            if not self._begun:  # do not wait for workers that are still starting
                workers.kill()
            self._iterator.close()
            # Grain's iterators print errors if they are still alive when the interpreter exits.
            self._iterator = None
            gc.collect()


class MakeViews(grain.transforms.RandomMap):
    """Maps the index of a record to its views and masks."""

    def __init__(
        self,
        source: Source,
        how: Decoding,
        augment: dict[str, Any],
        mask: dict[str, Any],
        patch: int,
        stop: threading.Event | None,
    ) -> None:
        # Plain attributes, because reading a ConfigDict takes longer than making a crop.
        self.source, self.how, self.patch = source, how, patch
        self.augment, self.mask = SimpleNamespace(**augment), SimpleNamespace(**mask)
        self.stop = stop

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"stop": None}  # other processes are ended as a whole

    def random_map(self, element: int, rng: np.random.Generator) -> dict[str, Any]:
        """Makes one element of the batches that `train_batches` describes."""
        image, used, corrupt = decode_or_substitute(self.source, int(element), self.how, self.stop)
        side = self.augment.global_size // self.patch
        masks = [view_mask((side, side), rng, self.mask) for _ in range(self.augment.global_crops)]
        global_views, local_views = multi_crop(image, rng, self.augment)
        return {
            "global_views": global_views,
            "local_views": local_views,
            "mask": np.stack(masks),
            "index": np.int32(used),
            "corrupt": np.int32(corrupt),
        }


class MaskFrom(grain.transforms.MapWithIndex):
    """Empties the masks of all images before image `first`, without changing any draw."""

    def __init__(self, first: int) -> None:
        self.first = first

    def map_with_index(self, index: int, element: dict[str, Any]) -> dict[str, Any]:
        """Returns the element, with its masks or with empty ones."""
        return element | {"mask": element["mask"] & (index >= self.first)}


class Share(grain.MapDataset):
    """The images at some rows of every batch of a stream, starting at a given step."""

    def __init__(
        self, stream: grain.MapDataset, batch_size: int, start_step: int, rows: Sequence[int]
    ):
        super().__init__(stream)
        self.batch_size, self.start_step, self.rows = batch_size, start_step, rows

    def __len__(self) -> int:
        return (len(self.parents[0]) // self.batch_size - self.start_step) * len(self.rows)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        step, place = divmod(index, len(self.rows))
        first = (self.start_step + step) * self.batch_size
        return self.parents[0][first + int(self.rows[place])]


def train_batches(
    source: Source,
    config: Any,
    patch_size: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
) -> Batches:
    """Returns endless batches of augmented views, reshuffled every epoch.

    Args:
        source: the training split.
        config: the config of the run; `seed`, `batch_size`, `data`, `augment` and `mask` are read.
        patch_size: the patch size of the encoder in pixels.
        start_step: the step of the first batch.
        rows: the positions in the global batch of the images that this process makes; all by
            default.

    Returns:
        An iterator of dicts, where b = len(rows), S and s are the sizes of global and local
        views, and Q and V are the numbers of them:
        `global_views` uint8 [b, Q, S, S, 3], `local_views` uint8 [b, V, s, s, 3],
        `mask` bool [b, Q, S / patch_size, S / patch_size], `index` int32 [b], the record that
        was used, and `corrupt` int32 [b], -1 or the record that could not be read.
    """
    rows = range(config.batch_size) if rows is None else rows
    how = decoding(config.data, source)
    augment, mask = config.augment.to_dict(), config.mask.to_dict()
    stop = threading.Event()
    views = MakeViews(source, how, augment, mask, patch_size, stop)
    # The random numbers of an image depend on its position in the global stream, so random_map
    # comes before Share: after it, all hosts would draw the same numbers.
    images = grain.MapDataset.range(len(source)).seed(config.seed).shuffle().repeat()
    images = images.random_map(views)
    first = first_step(config.mask, len(source) / config.batch_size)
    images = images.map_with_index(MaskFrom(first * config.batch_size))
    images = Share(images, config.batch_size, start_step, rows)
    piece = piece_size(len(rows), _image_bytes(config.augment))
    return start(images, len(rows), piece, config.data.threads, config.data.workers, stop)


def start(
    images: grain.MapDataset,
    local_batch: int,
    piece: int,
    threads: int,
    processes: int,
    stop: threading.Event,
) -> Batches:
    """Starts the threads and worker processes that make batches.

    Args:
        images: the stream of this process's images, each a dict of arrays.
        local_batch: the number of images per batch that this process makes.
        piece: the number of images per piece, see `piece_size`.
        threads: the number of threads of each process; with 0, batches are made when requested.
        processes: the number of worker processes; with 0, this process makes the batches.
        stop: ends the waits for storage of this process.
    """
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    pieces = images.batch(piece, drop_remainder=True).to_iter_dataset(options)
    if processes:
        if not flags.FLAGS.is_parsed():  # Grain passes its flags to the workers
            flags.FLAGS.mark_as_parsed()
        pieces = pieces.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=processes, per_worker_buffer_size=workers.BUFFER
            ),
            worker_init_fn=workers.prepare,
        )
    if processes or piece < local_batch:
        pieces = pieces.batch(local_batch // piece, batch_fn=_join)
    iterator = iter(pieces)
    if processes:
        workers.start(iterator)
    return Batches(iterator, stop)


def check_shared_memory(config: Any, local_batch: int) -> None:
    """Checks that there is enough shared memory for the batches of the worker processes.

    Args:
        config: the config of the run.
        local_batch: the number of images per batch that this process makes.

    Raises:
        UserError: there is not enough shared memory.
    """
    image_bytes = _image_bytes(config.augment)
    piece = piece_size(local_batch, image_bytes)
    piece_bytes = piece * image_bytes
    workers.check_shared_memory(config.data.workers, piece_bytes, local_batch // piece)


def _image_bytes(augment: Any) -> int:
    """Returns the size of all views of one image in bytes."""
    of_global = augment.global_crops * augment.global_size**2
    return 3 * (of_global + augment.local_crops * augment.local_size**2)


def piece_size(local_batch: int, image_bytes: int) -> int:
    """Returns the number of images per piece: the largest divisor of the batch within PIECE_BYTES.

    If every thread of every process made a whole batch of large images, they would need several
    times the memory, and one thread would make the first batch by itself. Small batches are best
    made whole.
    """
    most = max(1, PIECE_BYTES // image_bytes)
    return max(size for size in range(1, min(local_batch, most) + 1) if local_batch % size == 0)


def _join(pieces: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenates the pieces of a batch, which copies them out of the workers' shared memory."""
    return {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}


def eval_batches(
    source: Source,
    resize: int,
    crop: int,
    batch_size: int,
    how: Decoding = AS_STORED,
    interpolation: str = "bicubic",
    start: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Makes one pass over a source in order, with the centre crops of the k-NN protocol.

    Args:
        source: any split.
        resize: the length of the short side after scaling, in pixels.
        crop: the side of the centre crop in pixels.
        batch_size: the number of images per batch; the last batch is padded with the last image.
        how: the decoding options.
        interpolation: "bicubic" or "bilinear", both antialiased.
        start: the first record.

    Yields:
        Dicts of `image` uint8 [batch_size, crop, crop, 3], `index` int32 [batch_size], `corrupt`
        int32 [batch_size], -1 or the record that could not be read, `label` int32 [batch_size], -1
        where there is none, and `valid` bool [batch_size], False for padding and for unreadable
        records, whose image is black.

    Raises:
        UserError: the crop is larger than the resized image, or, during the iteration, the
            storage of the records cannot be reached.
    """
    if not 0 < crop <= resize:
        raise UserError(
            f"A centre crop of {crop} pixels does not fit an image resized to {resize}. "
            "Make the resized side at least as large as the crop."
        )
    return _eval_batches(source, resize, crop, batch_size, how, interpolation, start)


def _eval_batches(
    source: Source,
    resize: int,
    crop: int,
    batch_size: int,
    how: Decoding,
    interpolation: str,
    first: int,
) -> Iterator[dict[str, np.ndarray]]:
    threads = os.cpu_count() or 1
    stop = threading.Event()

    def make(indices: np.ndarray) -> list[np.ndarray | None]:
        images: list[np.ndarray | None] = []
        for index in indices:
            try:
                pixels = load_image(source, int(index), how, stop)
                images.append(eval_image(pixels, resize, crop, interpolation))
            except ValueError:
                images.append(None)
        return images

    def submit(start: int) -> tuple[np.ndarray, list[Any]]:
        """Starts the work on one batch and returns its indices and futures of its images."""
        indices = np.minimum(np.arange(start, start + batch_size, dtype=np.int32), last)
        real = indices[: min(batch_size, len(source) - start)]
        return indices, [pool.submit(make, piece) for piece in np.array_split(real, threads)]

    last = len(source) - 1
    if first > last:
        return
    with ThreadPoolExecutor(threads) as pool:
        try:
            pending = submit(first)
            for start in range(first, len(source), batch_size):
                indices, pieces = pending
                if start + batch_size < len(source):
                    pending = submit(start + batch_size)  # made while this batch is used
                loaded = list(itertools.chain.from_iterable(piece.result() for piece in pieces))
                image = np.zeros((batch_size, crop, crop, 3), np.uint8)
                valid = np.zeros(batch_size, bool)
                corrupt, label = np.full((2, batch_size), -1, np.int32)
                for row, pixels in enumerate(loaded):
                    if pixels is None:
                        corrupt[row] = indices[row]
                    else:
                        image[row], valid[row] = pixels, True
                        if source.has_labels:
                            label[row] = source.label(int(indices[row]))
                image[len(loaded) :] = image[len(loaded) - 1]
                batch = {"image": image, "index": indices, "label": label}
                yield batch | {"corrupt": corrupt, "valid": valid}
        finally:
            stop.set()  # nobody will use the images that are still being made
            pool.shutdown(wait=False, cancel_futures=True)
