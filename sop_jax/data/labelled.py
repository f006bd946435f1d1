"""Makes batches of labelled training crops, for supervised training on a source.

They are a pure function of (seed, step), as the batches of pretraining are. Every epoch has the
same number of steps and contains every image once, so that the last batch of an epoch is filled up
with empty rows.
"""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import grain
import numpy as np

from sop_jax.data import pipeline
from sop_jax.data.augment import FILTERS, crop_box, resized_crop
from sop_jax.data.decode import Decoding, load_image
from sop_jax.data.randaugment import STRONGEST, erase, rand_augment
from sop_jax.data.sources import Source
from sop_jax.errors import UserError


class Recipe(NamedTuple):
    """How a training crop is made: a random resized crop, perhaps flipped and changed.

    Attributes:
        size: the side of a crop in pixels.
        scale: the smallest and the largest share of the image's area that a crop shows.
        interpolation: "bilinear", torchvision's default, or "bicubic"; both antialiased.
        flip: the probability of a horizontal flip.
        magnitude: the mean magnitude of RandAugment, up to 10; 0 leaves it out.
        erase: the probability that a box is filled with noise.
        copies: the number of crops of an image that follow each other (repeated augmentation of
            DeiT, with 3). An epoch has as many crops as there are images, and so shows only one in
            `copies` of them.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    interpolation: str = "bilinear"
    flip: float = 0.5
    magnitude: float = 0.0
    erase: float = 0.0
    copies: int = 1


class MakeCrop(grain.transforms.RandomMap):
    """Maps the number of a record, or -1, to an element of `labelled_batches`."""

    def __init__(
        self, source: Source, recipe: Recipe, how: Decoding, stop: threading.Event | None
    ) -> None:
        self.source, self.recipe, self.how, self.stop = source, recipe, how, stop

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"stop": None}  # other processes are ended as a whole

    def random_map(self, element: int, rng: np.random.Generator) -> dict[str, Any]:
        """Makes one element; its image is black if there is no record or it cannot be read."""
        index, size = int(element), self.recipe.size
        image, label, corrupt = np.zeros((size, size, 3), np.uint8), -1, -1
        if index >= 0:
            try:
                pixels = load_image(self.source, index, self.how, self.stop)
                label = self.source.label(index)
            except ValueError:
                corrupt = index
            else:
                image = training_crop(pixels, rng, self.recipe)
        return {
            "image": image,
            "label": np.int32(label),
            "valid": np.bool_(index >= 0 and corrupt < 0),
            "index": np.int32(index),
            "corrupt": np.int32(corrupt),
        }


class Epochs(grain.MapDataset):
    """A stream of records as epochs of whole batches: -1 fills up the last batch of an epoch."""

    def __init__(self, stream: grain.MapDataset, records: np.ndarray, batch_size: int, copies: int):
        """Takes endless permutations of range(len(records)), one after another."""
        super().__init__(stream)
        self.records, self.copies = records, copies
        self.length = steps_per_epoch(len(records), batch_size) * batch_size

    def __len__(self) -> int:
        return len(self.parents[0])

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, self.length)
        if place >= len(self.records):
            return -1
        place //= self.copies
        return int(self.records[self.parents[0][epoch * len(self.records) + place]])


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Returns the number of batches that contain each image once."""
    return -(-images // batch_size)


def labelled_batches(
    source: Source,
    recipe: Recipe,
    batch_size: int,
    seed: int,
    how: Decoding,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    subset: np.ndarray | None = None,
    threads: int = 0,
    workers: int = 0,
) -> pipeline.Batches:
    """Returns endless batches of labelled training crops, reshuffled every epoch.

    An epoch has `steps_per_epoch` batches. The same crops are made for any number of hosts,
    processes and threads.

    Args:
        source: the training split; it has labels.
        recipe: how a crop is made.
        batch_size: the number of images per batch, of all processes together.
        seed: of the order of the images and of all draws.
        how: the decoding options.
        start_step: the step of the first batch.
        rows: the positions in the global batch of the images that this process makes; all by
            default.
        subset: the numbers of the records to train on, int [n]; all by default.
        threads: the number of threads of each process; with 0, batches are made when requested.
        workers: the number of worker processes; with 0, this process makes the batches.

    Returns:
        An iterator of dicts, where b = len(rows) and S is the size of a crop:
        `image` uint8 [b, S, S, 3], `label` int32 [b], `index` int32 [b], the number of the record,
        `corrupt` int32 [b], -1 or the record that could not be read, and `valid` bool [b], False
        for such records and where a batch is filled up. There the image is black and the label is
        -1; the index is -1 where a batch is filled up.

    Raises:
        UserError: the source has no labels, there are no records, or the recipe is invalid; or,
            during the iteration, the storage of the records cannot be reached.
    """
    records = np.arange(len(source)) if subset is None else np.asarray(subset)
    _check(source, recipe, records)
    rows = range(batch_size) if rows is None else rows
    stop = threading.Event()
    order = grain.MapDataset.range(len(records)).seed(seed).shuffle().repeat()
    images = Epochs(order, records, batch_size, recipe.copies)
    # Before Share, because the random numbers of an image depend on its position in the stream.
    images = images.random_map(MakeCrop(source, recipe, how, stop))
    images = pipeline.Share(images, batch_size, start_step, rows)
    piece = pipeline.piece_size(len(rows), 3 * recipe.size**2)
    return pipeline.start(images, len(rows), piece, threads, workers, stop)


def _check(source: Source, recipe: Recipe, records: np.ndarray) -> None:
    if not source.has_labels:
        raise UserError(
            "The images to train on have no labels. Supervised training needs a class for each. "
            "Sort them into one folder per class, or name a data set that has labels."
        )
    if not len(records):
        raise UserError(
            "There are no images to train on. Expected at least one. Choose a larger subset."
        )
    if records.min() < 0 or records.max() >= len(source):
        raise UserError(
            f"The subset names record {records.max() if records.min() >= 0 else records.min()}, "
            f"but the records of the split are 0 to {len(source) - 1}. Use a list that was made "
            "for this data set."
        )
    low, high = recipe.scale
    if not 0 < low <= high <= 1:
        raise UserError(
            f"The shares of the area that a crop shows are {recipe.scale}. Expected two numbers "
            "with 0 < first <= second <= 1, such as 0.08,1."
        )
    if not 0 <= recipe.magnitude <= STRONGEST:
        raise UserError(
            f"The magnitude of RandAugment is {recipe.magnitude}. Expected a number from 0, for "
            f"none, to {STRONGEST:g}."
        )
    if recipe.interpolation not in FILTERS:
        raise UserError(
            f"The interpolation is {recipe.interpolation!r}. Choose one of: {', '.join(FILTERS)}."
        )


def training_crop(image: np.ndarray, rng: np.random.Generator, recipe: Recipe) -> np.ndarray:
    """Draws a training crop of an image.

    Args:
        image: uint8 [h, w, 3].
        rng: the generator of all draws.
        recipe: how the crop is made.

    Returns:
        uint8 [S, S, 3], where S is the recipe's size.
    """
    box = crop_box(image.shape[0], image.shape[1], recipe.scale, rng)
    crop = resized_crop(image, box, recipe.size, recipe.interpolation)
    if rng.random() < recipe.flip:
        crop = cv2.flip(crop, 1)
    if recipe.magnitude:
        crop = rand_augment(crop, rng, recipe.magnitude, recipe.interpolation)
    if rng.random() < recipe.erase:
        crop = erase(crop, rng)
    return crop
