"""Images that are there more than once: files of the same bytes, and pictures that look alike."""

import collections
import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from sop_jax.data.folders import SHOWN
from sop_jax.data.sources import Source

COMPARED = 20_000  # the most files whose content is compared
BEGINNING = 2**16  # bytes by which files of the same size are compared first
HASH_SIDE = 32  # pixels on each side of the picture that is hashed
HASH_BITS = 8  # frequencies on each side: 64 bits in total
NEAR = 6  # the most bits in which the hashes of near-duplicates differ
ROWS = 1000  # hashes that are compared with all others at a time


class Equal(NamedTuple):
    """Files that have the same bytes as others.

    Attributes:
        groups: the indices of files with the same bytes, each group in order.
        compared: the number of files whose content was compared with those of the same size.
        candidates: the number of files that have the size of another file.
    """

    groups: list[list[int]]
    compared: int
    candidates: int


def equal_files(root: str, files: Sequence[str]) -> Equal:
    """Returns which local files have the same bytes; those that cannot be read have none.

    Only files of the same size are compared. If these are more than COMPARED, some are drawn.

    Args:
        root: the folder.
        files: the names, relative to it.
    """
    sizes: dict[int, list[int]] = collections.defaultdict(list)
    for index, name in enumerate(files):
        with contextlib.suppress(OSError):
            sizes[os.stat(f"{root}/{name}").st_size].append(index)
    candidates = [index for group in sizes.values() if len(group) > 1 for index in group]
    found = candidates
    if len(candidates) > COMPARED:
        found = np.random.default_rng(0).choice(candidates, COMPARED, replace=False).tolist()
    compared = len(found)
    for length in (BEGINNING, None):
        groups: dict[tuple[int, bytes], list[int]] = collections.defaultdict(list)
        for index in sorted(found):
            with contextlib.suppress(OSError):
                groups[_digest(f"{root}/{files[index]}", length)].append(index)
        same = [group for group in groups.values() if len(group) > 1]
        found = [index for group in same for index in group]
    return Equal(sorted(same), compared, len(candidates))


def _digest(path: str, length: int | None) -> tuple[int, bytes]:
    """Returns the size of a file, and a hash of its beginning or of all of it."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if length is not None:
            return size, hashlib.blake2b(file.read(length)).digest()
        return size, hashlib.file_digest(file, hashlib.blake2b).digest()


def equal_words(found: Equal) -> str:
    """Returns in words how many files have the same bytes as others."""
    more = sum(len(group) - 1 for group in found.groups)
    of = "" if found.compared == found.candidates else f" among {found.compared:,} of a sample"
    if not more:
        return f"none{of}"
    copies = "1 file is a copy" if more == 1 else f"{more:,} files are copies"
    return f"{copies} of others{of}; they train as often as they are there"


def perceptual_hash(image: np.ndarray) -> np.uint64:
    """Returns 64 bits that are similar for similar pictures, whatever their size and quality.

    These are the signs of the lowest frequencies of the discrete cosine transform of the grey
    picture, relative to their median; the mean brightness does not count.

    Args:
        image: uint8 [h, w, 3].
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (HASH_SIDE, HASH_SIDE), interpolation=cv2.INTER_AREA)
    low = cv2.dct(small.astype(np.float32))[:HASH_BITS, :HASH_BITS].ravel()
    bits = low > np.median(low[1:])
    bits[0] = False
    return np.packbits(bits).view(np.uint64)[0]


def near_duplicates(hashes: np.ndarray) -> list[list[int]]:
    """Returns the groups of pictures that look alike: neighbours differ in at most NEAR bits.

    Args:
        hashes: uint64 [n], see `perceptual_hash`.

    Returns:
        The indices in each group of two or more, the largest group first.
    """
    pairs: list[np.ndarray] = []
    for start in range(0, len(hashes), ROWS):
        rows = hashes[start : start + ROWS, None]
        differing = np.bitwise_count(rows ^ hashes[None, start:])
        one, other = np.nonzero(differing <= NEAR)
        pairs.append(np.stack([one, other]) + start)
    if not pairs:
        return []
    one, other = np.concatenate(pairs, axis=1)
    graph = coo_matrix((np.ones(len(one), bool), (one, other)), shape=(len(hashes),) * 2)
    _, group_of = connected_components(graph, directed=False)
    groups: dict[int, list[int]] = collections.defaultdict(list)
    for index, group in enumerate(group_of.tolist()):
        groups[group].append(index)
    return sorted((g for g in groups.values() if len(g) > 1), key=len, reverse=True)


def words(hashes: Mapping[int, np.uint64], source: Source) -> list[str]:
    """Returns in words which images of a source look alike, one line each.

    If there are more than COMPARED, some are drawn.

    Args:
        hashes: of all images that can be read, by index.
        source: the images.
    """
    indices = sorted(hashes)
    of = ""
    if len(indices) > COMPARED:
        indices = sorted(np.random.default_rng(0).choice(indices, COMPARED, replace=False).tolist())
        of = f", among a sample of {COMPARED:,}"
    groups = near_duplicates(np.array([hashes[index] for index in indices], np.uint64))
    if not groups:
        return [f"  near-duplicates: none{of}"]
    members, sets = sum(map(len, groups)), f"{len(groups):,} group{'s' * (len(groups) > 1)}"
    lines = [f"  near-duplicates: {members:,} images look alike, in {sets}{of}"]
    for group in groups[:SHOWN]:
        shown = ", ".join(source.name(indices[member]) for member in group[:SHOWN])
        lines.append(f"    {shown}{' ...' if len(group) > SHOWN else ''}")
    if (more := len(groups) - SHOWN) > 0:
        lines.append(f"    and {more:,} more")
    return lines
