"""ADE20K's scene parsing benchmark: pairs of images and masks, and the crops of training.

The transforms are those of mmsegmentation's configuration for ADE20K, in its order, by OpenCV.
Images are uint8 RGB [h, w, 3], and masks uint8 [h, w] with classes 0 to 149 and IGNORED.

Sources: the scene parsing benchmark (sceneparsing.csail.mit.edu); mmsegmentation 0.12's
`pipelines/transforms.py` and mmcv's `imrescale`.
"""

import hashlib
import io
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cv2
import grain
import numpy as np
from etils import epath
from PIL import Image

from sop_jax.data import pipeline
from sop_jax.data.decode import AS_STORED, decode
from sop_jax.data.folders import printable
from sop_jax.errors import UserError

cv2.setNumThreads(0)  # parallel over images, not within one

CLASSES = 150
IGNORED = 255
SPLITS = ("training", "validation")
EXPECTS = (
    "the scene parsing benchmark of ADE20K, in its own layout: PATH/images/{training,validation}/"
    "NAME.jpg and PATH/annotations/{training,validation}/NAME.png, whose pixels are 0 (ignored) or "
    "a class from 1 to 150. It is ADEChallengeData2016.zip of "
    "http://sceneparsing.csail.mit.edu"
)
# Padding becomes about zero when the network normalizes the pixels.
MEAN_COLOUR = (124, 116, 104)
TRIES = 10  # crops to try for one without a dominant class
DOMINANT = 0.75  # the largest share of one class in a crop
RATIOS = (0.5, 2.0)  # of the random scale
ASPECT = 4  # the limit of the longer side, per limit of the shorter side
_SHOWN = 4  # the most names that a message lists
_PROBED = 8  # pairs that are read when the data is opened
_THREADS = 16  # that read headers


class Pair(NamedTuple):
    """An image and its mask.

    Attributes:
        image: uint8 RGB.
        mask: the class of each pixel, or IGNORED.
    """

    image: np.ndarray
    mask: np.ndarray


class Pairs:
    """The pairs of one split, in the order of their names."""

    has_labels = False  # one label per image; masks have one per pixel
    class_names = None

    def __init__(self, root: str, split: str, images: list[str]) -> None:
        """Creates the pairs of images, given by the names of their files."""
        self.root, self.split, self.images = root, split, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> bytes:
        return epath.Path(self.name(index)).read_bytes()

    def name(self, index: int) -> str:
        """Returns the path of an image."""
        return f"{self.root}/images/{self.split}/{self.images[index]}"

    def label(self, index: int) -> int:
        """Returns -1, because an image has no label of its own."""
        return -1

    def mask_name(self, index: int) -> str:
        """Returns the path of the mask of an image."""
        return f"{self.root}/annotations/{self.split}/{mask_of(self.images[index])}"

    @property
    def digest(self) -> str:
        """A hash of the names."""
        return hashlib.sha256("\0".join(self.images).encode()).hexdigest()[:12]

    def pair(self, index: int) -> Pair:
        """Returns an image and its mask.

        Raises:
            UserError: one of them cannot be read, their sizes differ, or a label is above 150.
        """
        name, mask_name = self.name(index), self.mask_name(index)
        try:
            image = decode(self[index], AS_STORED)
        except (OSError, ValueError) as error:
            raise UserError(f"{name} cannot be read: {error}. {_AGAIN}") from error
        try:
            with Image.open(io.BytesIO(epath.Path(mask_name).read_bytes())) as picture:
                mask = np.asarray(picture)
        except (OSError, ValueError) as error:
            raise UserError(f"{mask_name} cannot be read: {error}. {_AGAIN}") from error
        if fault := _fault(mask_name, mask.ndim == 2, mask.shape, image.shape):
            raise UserError(fault)
        if mask.max() > CLASSES:
            raise UserError(
                f"{mask_name} has the label {mask.max()}. Expected 0 for ignored pixels and "
                f"classes from 1 to {CLASSES}; use masks of the scene parsing benchmark, not of "
                "the full release of ADE20K"
            )
        return Pair(image, reduce_zero_label(mask))


def mask_of(image: str) -> str:
    """Returns the name of the file with the mask of an image, given by its name."""
    return f"{image.rpartition('.')[0]}.png"


def reduce_zero_label(mask: np.ndarray) -> np.ndarray:
    """Returns the labels, uint8 [h, w], of a mask whose 0 means that the pixel is ignored.

    The classes 1 to 150 become 0 to 149, and 0 becomes IGNORED.
    """
    return np.where(mask == 0, IGNORED, mask - 1).astype(np.uint8)


_AGAIN = "Download and unpack the data again"


def _fault(mask: str, grey: bool, shape: Sequence[int], image: Sequence[int]) -> str:
    """Returns what is wrong with a mask of a shape for an image of a shape; empty if nothing."""
    if not grey:
        return (
            f"{mask} has several channels: it looks like a mask of the full ADE20K release, coded "
            f"in colours. Expected {EXPECTS}; use that version"
        )
    if tuple(shape[:2]) != tuple(image[:2]):
        return (
            f"{mask} has {shape[1]} x {shape[0]} pixels, but its image has {image[1]} x {image[0]}."
            f" Expected the same size. {_AGAIN}"
        )
    return ""


def _fault_in_headers(pairs: Pairs, index: int) -> str:
    """Returns what is wrong with a pair according to the headers of its files."""
    sizes, channels = [], 0
    for name in (pairs.name(index), pairs.mask_name(index)):
        try:
            with epath.Path(name).open("rb") as file, Image.open(file) as picture:
                sizes.append((picture.height, picture.width))
                channels = len(picture.getbands())
        except (OSError, ValueError) as error:
            return f"{name} cannot be read: {error}. {_AGAIN}"
    return _fault(pairs.mask_name(index), channels == 1, sizes[1], sizes[0])


def open_pairs(path: epath.PathLike, split: str) -> Pairs:
    """Opens one split, and reads the headers of all its pairs and the pixels of a few.

    Args:
        path: the folder that contains `images` and `annotations`.
        split: one of SPLITS.

    Raises:
        UserError: the layout is another one, images have no masks, or a pair is invalid.
    """
    root = epath.Path(path)
    if not (root / "images").is_dir() and (root / "ADEChallengeData2016" / "images").is_dir():
        root /= "ADEChallengeData2016"
    for kind in ("images", "annotations"):
        if not (root / kind / split).is_dir():
            raise UserError(
                f"there is no folder {root / kind / split}. Expected {EXPECTS}; give the folder "
                "that contains images and annotations with --data.path"
            )
    images = sorted(x.name for x in (root / "images" / split).iterdir())
    images = [name for name in images if name.endswith((".jpg", ".png")) and name[0] != "."]
    if not images:
        raise UserError(
            f"there is no image in {root / 'images' / split}. Expected {EXPECTS}. {_AGAIN}"
        )
    masks = {x.name for x in (root / "annotations" / split).iterdir()}
    lost = [name for name in images if mask_of(name) not in masks]
    if lost:
        more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        raise UserError(
            f"{len(lost)} of {len(images)} images in {root / 'images' / split} have no mask: "
            f"{', '.join(map(printable, lost[:_SHOWN]))}{more}. Expected "
            f"{root / 'annotations' / split}/NAME.png for each. {_AGAIN}"
        )
    pairs = Pairs(str(root), split, images)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda index: _fault_in_headers(pairs, index), range(len(pairs)))
        faults = [fault for fault in found if fault]
    if faults:
        others = len(faults) - 1
        more = f". {others} other pairs of {split} are invalid too" if others else ""
        raise UserError(faults[0] + more)
    for index in np.unique(np.linspace(0, len(images) - 1, _PROBED).astype(int)):
        pairs.pair(int(index))
    return pairs


class MakeCrop(grain.transforms.RandomMap):
    """Maps the number of a pair to an element of `train_batches`."""

    def __init__(self, pairs: Pairs, crop: int) -> None:
        self.pairs, self.crop = pairs, crop

    def random_map(self, element: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Makes one element."""
        crop = train_crop(self.pairs.pair(int(element)), self.crop, rng)
        return crop._asdict() | {"index": np.int32(element), "corrupt": np.int32(-1)}


def train_batches(
    pairs: Pairs,
    crop: int,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    threads: int = 0,
    workers: int = 0,
) -> pipeline.Batches:
    """Returns endless batches of training crops, reshuffled every epoch.

    The same crops are made for any number of hosts, processes and threads.

    Args:
        pairs: the training split.
        crop: S, the side of a crop in pixels.
        batch_size: the number of pairs per batch, of all processes together.
        seed: of the order of the pairs and of all draws.
        start_step: the step of the first batch.
        rows: the positions in the global batch of the pairs that this process makes; all by
            default.
        threads: the number of threads of each process; with 0, batches are made when requested.
        workers: the number of worker processes; with 0, this process makes the batches.

    Returns:
        An iterator of dicts, where b = len(rows): `image` uint8 [b, S, S, 3], `mask` uint8
        [b, S, S], `index` int32 [b], the number of the pair, and `corrupt` int32 [b], always -1,
        because a pair that cannot be read is an error.
    """
    rows = range(batch_size) if rows is None else rows
    crops = grain.MapDataset.range(len(pairs)).seed(seed).shuffle().repeat()
    # Before Share, because the random numbers of a crop depend on its position in the stream.
    crops = crops.random_map(MakeCrop(pairs, crop))
    crops = pipeline.Share(crops, batch_size, start_step, rows)
    piece = pipeline.piece_size(len(rows), 4 * crop**2)
    return pipeline.start(crops, len(rows), piece, threads, workers, threading.Event())


def rescale(
    image: np.ndarray, limits: tuple[int, int], interpolation: int = cv2.INTER_LINEAR
) -> np.ndarray:
    """Scales an image or mask to the largest size within limits, and keeps its aspect ratio.

    Args:
        image: uint8 [h, w, 3] or [h, w].
        limits: the limits of the longer and the shorter side in pixels, in any order.
        interpolation: OpenCV's; masks need `cv2.INTER_NEAREST`.
    """
    height, width = image.shape[:2]
    long, short = max(limits), min(limits)
    factor = min(long / max(height, width), short / min(height, width))
    size = int(width * factor + 0.5), int(height * factor + 0.5)
    return cv2.resize(image, size, interpolation=interpolation)


def train_crop(pair: Pair, crop: int, rng: np.random.Generator) -> Pair:
    """Draws the training crop of a pair: image [crop, crop, 3] and mask [crop, crop].

    The pair is scaled so that the shorter side has `crop` pixels (or the longer one ASPECT times as
    many, if that is less) times a factor drawn from RATIOS. A crop is drawn, up to TRIES times
    while one class covers more than DOMINANT of it, and flipped with probability 1/2. The colours
    are distorted, and what is missing to the right and below is padded.
    """
    ratio = rng.uniform(*RATIOS)
    limits = int(ASPECT * crop * ratio), int(crop * ratio)
    image = rescale(pair.image, limits)
    mask = rescale(pair.mask, limits, cv2.INTER_NEAREST)
    place = crop_place(mask, crop, rng)
    image, mask = image[place], mask[place]
    if rng.random() < 0.5:
        image, mask = image[:, ::-1], mask[:, ::-1]
    image = distort(np.ascontiguousarray(image), rng)
    below, right = crop - mask.shape[0], crop - mask.shape[1]
    border = (0, below, 0, right, cv2.BORDER_CONSTANT)
    return Pair(
        cv2.copyMakeBorder(image, *border, value=MEAN_COLOUR),
        cv2.copyMakeBorder(np.ascontiguousarray(mask), *border, value=IGNORED),
    )


def crop_place(mask: np.ndarray, crop: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """Draws the rows and columns of a crop in which no class covers more than DOMINANT.

    Ignored pixels do not count, and after TRIES crops the next one is taken, whatever it covers.
    """

    def draw() -> tuple[slice, slice]:
        top, left = (int(rng.integers(max(side - crop, 0) + 1)) for side in mask.shape)
        return slice(top, top + crop), slice(left, left + crop)

    for _ in range(TRIES):
        place = draw()
        counts = np.bincount(mask[place].ravel(), minlength=IGNORED + 1)[:IGNORED]
        if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < DOMINANT:
            return place
    return draw()


def distort(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Changes brightness, contrast, saturation and hue, each with probability 1/2.

    Contrast changes before or after saturation and hue, with equal probability. The ranges are
    mmsegmentation's: brightness +-32 grey levels, contrast and saturation factors from 0.5 to 1.5,
    and hue +-18 of 180 steps of the colour circle.

    Args:
        image: uint8 [h, w, 3].
        rng: the generator of all draws.

    Returns:
        uint8 [h, w, 3].
    """

    def yes() -> bool:
        return bool(rng.integers(2))

    if yes():
        image = _adjusted(image, 1.0, rng.uniform(-32, 32))
    contrast_first = yes()
    if contrast_first and yes():
        image = _adjusted(image, rng.uniform(0.5, 1.5), 0.0)
    if yes():
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = _adjusted(hsv[..., 1], rng.uniform(0.5, 1.5), 0.0)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if yes():
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + rng.integers(-18, 18)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if not contrast_first and yes():
        image = _adjusted(image, rng.uniform(0.5, 1.5), 0.0)
    return image


def _adjusted(image: np.ndarray, factor: float, offset: float) -> np.ndarray:
    """Returns factor x image + offset, clipped, and rounded down as in mmsegmentation."""
    return np.clip(image.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)
