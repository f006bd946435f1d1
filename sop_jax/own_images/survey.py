"""What a data set contains: the sizes and formats of its images, and those that cannot be read.

All files are listed, the headers of some are read, and a sample of these is decoded. The samples
are drawn by a fixed seed.
"""

import collections
import io
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sop_jax.data.decode import ORIENTATION, Decoding, load_image
from sop_jax.data.folders import SHOWN, Files, printable
from sop_jax.data.formats import FORMATS
from sop_jax.data.read import read
from sop_jax.data.sources import Source
from sop_jax.own_images import duplicates

HEADERS = 5000  # the most images whose headers are read
REMOTE_HEADERS = 200  # the same for remote storage, where whole files are read
DECODED = 500  # the most images that are decoded
SECONDS = 20.0  # after which no more images are decoded
THREADS = 8
PIXELS = "pixels"  # the format of records that are not encoded


class Header(NamedTuple):
    """The header of an image.

    Attributes:
        format: Pillow's name of the format, or PIXELS.
        width: in pixels, as stored.
        height: in pixels, as stored.
        turned: whether its EXIF orientation says that it is to be rotated or mirrored.
    """

    format: str
    width: int
    height: int
    turned: bool


class Survey(NamedTuple):
    """What a data set contains.

    Attributes:
        name: where the images are, in printable form.
        images: the number of images to train on, readable or not.
        test: the number of test images; None without a test split.
        classes: the number of images to train on by class; None without labels.
        headers: the headers that were read, by index.
        decoded: the number of images that were decoded, or could not be.
        unreadable: names and reasons of those that cannot be read, by index.
        share: the share of all images that cannot be read, in [0, 1], estimated from these.
        seconds: the mean time that one thread needs to decode an image; 0 if none was decoded.
        equal: the files that have the same bytes; None for a source that is not of local files.
        notes: sentences on what was left out of the folder, and why.
    """

    name: str
    images: int
    test: int | None
    classes: dict[str, int] | None
    headers: dict[int, Header]
    decoded: int
    unreadable: dict[int, str]
    share: float
    seconds: float
    equal: duplicates.Equal | None
    notes: list[str]

    @property
    def readable(self) -> int:
        """The number of images to train on that can be read, estimated if there are many."""
        return round(self.images * (1 - self.share))

    @property
    def short_side(self) -> int:
        """The median of the shorter side in pixels; 0 if no image can be read."""
        sides = [min(header.width, header.height) for header in self.headers.values()]
        return round(statistics.median(sides)) if sides else 0


def survey(
    train: Source,
    test: Source | None,
    how: Decoding,
    name: str,
    notes: Sequence[str] = (),
    look: Callable[[int, np.ndarray], Any] | None = None,
) -> Survey:
    """Returns what a data set contains.

    Args:
        train: the images to train on.
        test: the test images, which are only counted; None if there are none.
        how: how images are decoded. Storage that fails is not waited for.
        name: where the images are.
        notes: sentences on what was left out.
        look: if given, all images are decoded rather than a sample, and threads call it with each
            index and image.

    Raises:
        UserError: an image may not be read by this user, or its storage cannot be reached.
    """
    how = how._replace(retry_seconds=0.0)
    local = isinstance(train, Files) and "://" not in train.root
    order = np.random.default_rng(0).permutation(len(train)).tolist()
    most = HEADERS if local else min(HEADERS, REMOTE_HEADERS)
    unreadable: dict[int, str] = {}
    headers: dict[int, Header] = {}

    def look_at_header(index: int) -> Header | str:
        try:
            return header_of(train, index, how)
        except ValueError as error:
            return str(error)

    for index, header in in_threads(look_at_header, order[:most]):
        if isinstance(header, str):
            unreadable[index] = f"{train.name(index)}: {header}"
        else:
            headers[index] = header
    looked_at = len(headers) + len(unreadable)

    def decode(index: int) -> tuple[float, str | None]:
        began = time.thread_time()
        try:
            image = load_image(train, index, how)
        except ValueError as error:
            return 0.0, str(error)
        took = time.thread_time() - began
        if look:
            look(index, image)
        return took, None

    times, decoded, broken = [], 0, 0
    chosen, until = (order, None) if look else (order[:DECODED], time.monotonic() + SECONDS)
    for index, (took, wrong) in in_threads(decode, chosen, until):
        decoded += 1
        if wrong is None:
            times.append(took)
        else:
            broken += 1
            unreadable[index] = f"{train.name(index)}: {wrong}"
            headers.pop(index, None)
    # Images that are damaged after their header are only found among those that were decoded.
    known = sum(index not in headers for index in order[:most])
    share = max(broken / max(1, decoded), known / max(1, looked_at))
    return Survey(
        name=name,
        images=len(train),
        test=None if test is None else len(test),
        classes=_classes(train),
        headers=headers,
        decoded=decoded,
        unreadable=dict(sorted(unreadable.items())),
        share=share,
        seconds=statistics.fmean(times) if times else 0.0,
        equal=duplicates.equal_files(train.root, train.files)
        if isinstance(train, Files) and local
        else None,
        notes=list(notes),
    )


def header_of(source: Source, index: int, how: Decoding) -> Header:
    """Returns the header of a record; of a local file, only its beginning is read.

    Raises:
        ValueError: it is not an image, or is larger than allowed; the message is the reason.
        UserError: this user may not read it, or its storage cannot be reached.
    """
    local = isinstance(source, Files) and "://" not in source.root
    try:
        if local:
            assert isinstance(source, Files)
            with open(f"{source.root}/{source.files[index]}", "rb") as file:
                return _parse(file, how)
        record = read(source, index, how.retry_seconds)
        if isinstance(record, np.ndarray):
            return Header(PIXELS, record.shape[1], record.shape[0], False)
        return _parse(io.BytesIO(record), how)
    except Exception:  # broken bytes can make Pillow's decoders raise anything
        image = load_image(source, index, how)  # says what is wrong in the words of a run
        return Header("other", image.shape[1], image.shape[0], False)


def _parse(file: Any, how: Decoding) -> Header:
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > how.max_pixels:
            raise ValueError("it is too large")
        known = image.format != "PNG" or "exif" in image.info  # otherwise Pillow would decode it
        turned = known and image.getexif().get(ORIENTATION, 1) not in (0, 1)
        return Header(str(image.format), image.width, image.height, turned)


def in_threads(
    function: Callable[[int], Any], items: Sequence[int], until: float | None = None
) -> Iterator[tuple[int, Any]]:
    """Yields each item with the value of a function, computed by threads, in order.

    Args:
        function: maps an item to a value.
        items: the items.
        until: the time by `time.monotonic` after which no further item is begun, except the first.
    """
    threads = min(THREADS, 2 * (os.cpu_count() or 1))
    pool = ThreadPoolExecutor(threads)
    waiting: collections.deque[tuple[int, Any]] = collections.deque()
    rest = iter(items)
    try:
        while True:
            while len(waiting) < 2 * threads and (until is None or time.monotonic() < until):
                if (item := next(rest, None)) is None:
                    break
                waiting.append((item, pool.submit(function, item)))
            if not waiting:
                return
            item, future = waiting.popleft()
            yield item, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _classes(source: Source) -> dict[str, int] | None:
    labels = getattr(source, "labels", None)
    if labels is None or source.class_names is None:
        return None
    counts = np.bincount(labels, minlength=len(source.class_names))
    return {name: int(count) for name, count in zip(source.class_names, counts, strict=True)}


def words(found: Survey) -> list[str]:
    """Returns a survey in words for people, one line each."""
    split = "" if found.test is None else f" to train on, {found.test} test images"
    lines = [f"{found.name}: {count(found.images, 'image')}{split}", f"  classes: {_labels(found)}"]
    if headers := list(found.headers.values()):
        of = "" if len(headers) + len(found.unreadable) >= found.images else " (of a sample)"
        sides = np.array([sorted((header.width, header.height)) for header in headers])
        (least, middle, most), longest = np.percentile(sides[:, 0], (0, 50, 100)), sides.max()
        lines.append(
            f"  sizes{of}: shorter side {least:.0f} to {most:.0f} pixels, median {middle:.0f}; "
            f"longest side {longest}"
        )
        kinds = collections.Counter(header.format for header in headers)
        shown = [f"{number} {kind}" for kind, number in kinds.most_common()]
        lines.append(f"  formats{of}: {', '.join(shown)}")
        if turned := sum(header.turned for header in headers):
            lines.append(f"  rotated by their EXIF orientation{of}: {turned}")
    lines += _unreadable(found)
    if found.equal is not None:
        lines.append(f"  equal files: {duplicates.equal_words(found.equal)}")
    return lines + [f"  {note}" for note in found.notes]


def _labels(found: Survey) -> str:
    if found.classes is None:
        return "none (training needs none; k-NN accuracies do)"
    sizes = sorted(found.classes.values())
    each = f"{sizes[0]} to {sizes[-1]}" if sizes[0] < sizes[-1] else f"{sizes[0]}"
    names = ", ".join(map(printable, list(found.classes)[:SHOWN]))
    more = ", ..." if len(sizes) > SHOWN else ""
    return f"{len(sizes)} folders of {each} images: {names}{more}"


def _unreadable(found: Survey) -> list[str]:
    whole = found.decoded >= found.images
    of = "all images" if whole else f"{len(found.headers) + len(found.unreadable)} headers"
    and_decoded = "" if whole else f", and {count(found.decoded, 'image')} decoded"
    lines = [f"  unreadable: {len(found.unreadable) or 'none'} (of {of}{and_decoded})"]
    lines += [f"    {line}" for line in list(found.unreadable.values())[:SHOWN]]
    if (more := len(found.unreadable) - SHOWN) > 0:
        lines.append(f"    and {more} more")
    return lines


def count(number: int, what: str) -> str:
    """Returns a number with its noun, in the plural unless it is 1."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
