"""Parts of a source: some of its records, few labels per class, and images held out of training."""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
from etils import epath

from sop_jax.data.sources import Source, stamp
from sop_jax.errors import UserError


class Subset:
    """Some records of a source, in a given order; a record may be repeated.

    Attributes:
        source: the whole source.
        records: the indices of the records in it, int [n].
    """

    def __init__(self, source: Source, records: np.ndarray) -> None:
        self.source, self.records = source, records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> bytes | np.ndarray:
        return self.source[int(self.records[index])]

    def name(self, index: int) -> str:
        """Returns the source's name of one of these records."""
        return self.source.name(int(self.records[index]))

    @property
    def has_labels(self) -> bool:
        """Whether the source has labels."""
        return self.source.has_labels

    def label(self, index: int) -> int:
        """Returns the label of one of these records."""
        return self.source.label(int(self.records[index]))

    @property
    def class_names(self) -> list[str] | None:
        """The class names of the source."""
        return self.source.class_names

    @property
    def digest(self) -> str:
        """A hash of the source's digest and of the records."""
        records = np.asarray(self.records, "<i8").tobytes()
        return hashlib.sha256(self.source.digest.encode() + records).hexdigest()[:12]

    @property
    def stamp(self) -> str:
        """The stamp of the whole source, see `sources.stamp`."""
        return stamp(self.source)


def block(source: Source, part: int, parts: int) -> Subset:
    """Returns one of `parts` blocks of consecutive records, such as the share of a process.

    All blocks have the same number of records: where the source has too few, its last record is
    repeated. Record i is number i of the concatenated blocks.
    """
    size = -(-len(source) // parts)
    return Subset(source, np.minimum(np.arange(size) + part * size, len(source) - 1))


def by_class(labels: np.ndarray) -> list[np.ndarray]:
    """Returns the records of each class, ascending, in the order of the labels that occur."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def draw_per_class(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Returns `count` records of each class, drawn by seed, or all of a class that has fewer.

    Args:
        labels: int [n]; negative labels are no class.
        count: the number of records per class.
        seed: the seed of the draw.

    Returns:
        Ascending indices.
    """
    draw = np.random.default_rng(seed)
    classes = [own for own in by_class(labels) if labels[own[0]] >= 0]
    chosen = [draw.permutation(own)[:count] for own in classes]
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)


def draw_share(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Returns a share of the records of each class, at least one of each, drawn by seed.

    The number per class is rounded; SimCLR's lists of 1 % and 10 % of ImageNet have 12 or 13, and
    128 or so, of each.

    Args:
        labels: int [n]; negative labels are no class.
        share: in (0, 1].
        seed: the seed of the draw.

    Returns:
        Ascending indices.
    """
    draw = np.random.default_rng(seed)
    classes = [own for own in by_class(labels) if labels[own[0]] >= 0]
    chosen = [draw.permutation(own)[: max(1, round(share * len(own)))] for own in classes]
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)


def read_list(path: epath.PathLike, source: Source) -> np.ndarray:
    """Returns the records whose file names a list has, such as SimCLR's `1percent.txt`.

    Args:
        path: a text file with one file name per line, with or without folders.
        source: the images, whose names end in these file names.

    Returns:
        Ascending indices.

    Raises:
        UserError: the list cannot be read, or has names that the source does not have.
    """
    try:
        lines = epath.Path(path).read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the list {path} cannot be read: {error}; give a text file with one file name per line"
        ) from error
    wanted = {line.strip().rpartition("/")[2] for line in lines if line.strip()}
    # The name of a TFDS record is that of the data set and its number in brackets, then the file's.
    here = {re.split(r"/|\] ", source.name(i))[-1]: i for i in range(len(source))}
    unknown = sorted(wanted - here.keys())
    if unknown or not wanted:
        what = f"{len(unknown)} of its {len(wanted)} names are not" if wanted else "it has no names"
        example = f", such as {unknown[0]!r}" if unknown else ""
        raise UserError(
            f"the list {path} is not of these images: {what} among them{example}. Expected file "
            f"names such as {min(here)!r}, one per line; give the list of "
            "this data set, or leave it out to draw the images by seed"
        )
    return np.sort(np.array([here[name] for name in wanted]))


def labels_of(source: Source) -> np.ndarray:
    """Returns the label of each record, int32 [n]; reads the records of a TFDS source."""
    labels = getattr(source, "labels", None)
    if labels is None:
        labels = [source.label(i) for i in range(len(source))]
    return np.asarray(labels, np.int32)


def rest_of(count: int, records: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns the indices below `count` that are not among `records`, ascending."""
    return np.setdiff1d(np.arange(count), records)
