"""Images that could not be read: named, counted over all hosts, and refused if too many."""

import math
import sys
from collections.abc import Sequence

import numpy as np

from sop_jax.data.decode import Decoding, reason
from sop_jax.data.sources import Source
from sop_jax.errors import UserError

FEW_IMAGES = 1000  # fewer images than these say little about the share of corrupt ones
SHOWN = 100  # names listed in a message


class CorruptImages:
    """The corrupt images that a run has met, of all hosts: batches report them to every host."""

    def __init__(self, source: Source, allowed: float, how: Decoding) -> None:
        """Starts to count.

        Args:
            source: the images of the run.
            allowed: the share of these that may be corrupt, in [0, 1].
            how: how images are decoded.
        """
        self.source, self.allowed, self.how = source, allowed, how
        self.seen, self.found = 0, dict[int, str]()

    def add(self, corrupt: np.ndarray) -> list[str]:
        """Counts a batch; returns a line for each corrupt image that was not met before.

        Args:
            corrupt: [B], of the global batch: the index of each corrupt image, -1 for good ones.
        """
        self.seen += len(corrupt)
        new = sorted(set(corrupt[corrupt >= 0].tolist()) - self.found.keys())
        self.found |= {index: line_of(self.source, index, self.how) for index in new}
        return [self.found[index] for index in new]

    def check(self) -> None:
        """Raises UserError if more than the allowed share of the images seen is corrupt."""
        images = min(len(self.source), max(self.seen, FEW_IMAGES))
        if len(self.found) <= self.allowed * images:
            return
        lines = cut_short([line for _, line in sorted(self.found.items())])
        enough = math.ceil(100 * len(self.found) / images) / 100
        more = "; choose more if you expect more among the images not yet read"
        raise UserError(
            f"{len(self.found)} of {images} images cannot be read, more than the share of "
            f"data.max_corrupt_share={self.allowed:g}:\n  "
            + "\n  ".join(lines)
            + "\nRepair or remove them, or allow more: add --config.data.max_corrupt_share="
            f"{enough:g} to the same command, which resumes from the last checkpoint"
            f"{more if self.seen < len(self.source) else ''}. A run without them, or with other "
            "settings that affect pixels, needs a new --workdir"
        )


def line_of(source: Source, index: int, how: Decoding) -> str:
    """Returns the name of a corrupt record and why it cannot be read."""
    return f"{source.name(index)}: {reason(source, index, how)}"


def lines_of(source: Source, corrupt: Sequence[int], how: Decoding) -> list[str]:
    """Returns a line for each of the first corrupt records, and one that counts the rest."""
    return cut_short([line_of(source, index, how) for index in corrupt[:SHOWN]], len(corrupt))


def print_corrupt(source: Source, corrupt: Sequence[int], how: Decoding) -> None:
    """Lists on stderr the records that an evaluation or an export leaves out, if any."""
    if corrupt:
        count = "1 image" if len(corrupt) == 1 else f"{len(corrupt)} images"
        lines = [f"{count} cannot be read:", *lines_of(source, corrupt, how)]
        print("\n  ".join(lines), file=sys.stderr)


def cut_short(lines: list[str], count: int | None = None) -> list[str]:
    """Returns the first lines, and one that counts the rest of `count`, by default all lines."""
    more = (len(lines) if count is None else count) - SHOWN
    return lines[:SHOWN] + ([f"and {more} more"] if more > 0 else [])
