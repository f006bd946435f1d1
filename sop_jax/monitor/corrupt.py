"""Images that could not be read: named, counted over all hosts, and at some point too many."""

import math
import sys
from collections.abc import Sequence

import numpy as np

from sop_jax.data.decode import Decoding, reason
from sop_jax.data.sources import Source
from sop_jax.errors import UserError

FEW_IMAGES = 1000  # below this many seen, a share says little
SHOWN = 100  # names in a list


class CorruptImages:
    """What a run has met so far. Batches report those of all hosts, so every host knows them."""

    def __init__(self, source: Source, allowed: float, how: Decoding) -> None:
        """Counts for a run over `source`, of whose images a share of `allowed` may be corrupt."""
        self.source, self.allowed, self.how = source, allowed, how
        self.seen, self.found = 0, dict[int, str]()

    def add(self, corrupt: np.ndarray) -> list[str]:
        """Takes `corrupt` [B] of a global batch; what was not met before, a line each."""
        self.seen += len(corrupt)
        new = sorted(set(corrupt[corrupt >= 0].tolist()) - self.found.keys())
        self.found |= {index: line_of(self.source, index, self.how) for index in new}
        return [self.found[index] for index in new]

    def check(self) -> None:
        """Raises UserError when more than the allowed share of the images seen is corrupt."""
        images = min(len(self.source), max(self.seen, FEW_IMAGES))
        if len(self.found) <= self.allowed * images:
            return
        lines = cut_short([line for _, line in sorted(self.found.items())])
        enough = math.ceil(100 * len(self.found) / images) / 100
        raise UserError(
            f"{len(self.found)} of {images} images cannot be read, more than the share of "
            f"data.max_corrupt_share={self.allowed:g}:\n  "
            + "\n  ".join(lines)
            + "\nRepair or remove them, or allow more with --config.data.max_corrupt_share="
            f"{enough:g} and the same command, which goes on from the last checkpoint. A run "
            "without them, or with another setting that decides about pixels, needs a new --workdir"
        )


def line_of(source: Source, index: int, how: Decoding) -> str:
    """The name of a record that was found corrupt, and why it cannot be read."""
    return f"{source.name(index)}: {reason(source, index, how)}"


def lines_of(source: Source, corrupt: Sequence[int], how: Decoding) -> list[str]:
    """A line for each of the first records, and how many more there are."""
    return cut_short([line_of(source, index, how) for index in corrupt[:SHOWN]], len(corrupt))


def tell(source: Source, corrupt: Sequence[int], how: Decoding) -> None:
    """Lists on stderr the records that an evaluation or an export leaves out, if any."""
    if corrupt:
        lines = [f"{len(corrupt)} images cannot be read:", *lines_of(source, corrupt, how)]
        print("\n  ".join(lines), file=sys.stderr)


def cut_short(lines: list[str], count: int | None = None) -> list[str]:
    """The first lines of `count`, and one that says how many more there are."""
    more = (len(lines) if count is None else count) - SHOWN
    return lines[:SHOWN] + ([f"and {more} more"] if more > 0 else [])
