"""Images that could not be read: named, counted over all hosts, and at some point too many."""

import numpy as np

from sop_jax.data.sources import Source
from sop_jax.errors import UserError

FEW_IMAGES = 1000  # below this many seen, a share says little
SHOWN = 100  # names in the error


class CorruptImages:
    """What a run has met so far. Batches report those of all hosts, so every host knows them."""

    def __init__(self, source: Source, allowed: float):
        """Counts for a run over `source`, of whose images a share of `allowed` may be corrupt."""
        self.source, self.allowed = source, allowed
        self.seen, self.found = 0, set[int]()

    def add(self, corrupt: np.ndarray) -> list[str]:
        """Takes `corrupt` [B] of a global batch and returns the names not met before."""
        self.seen += len(corrupt)
        new = sorted(set(corrupt[corrupt >= 0].tolist()) - self.found)
        self.found.update(new)
        return [self.source.name(index) for index in new]

    def check(self) -> None:
        """Raises UserError when more than the allowed share of the images seen is corrupt."""
        images = min(len(self.source), max(self.seen, FEW_IMAGES))
        if len(self.found) <= self.allowed * images:
            return
        names = [self.source.name(index) for index in sorted(self.found)]
        more = f"\n  and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise UserError(
            f"{len(names)} of {images} images cannot be read, more than the share of "
            f"data.max_corrupt_share={self.allowed:g}:\n  "
            + "\n  ".join(names[:SHOWN])
            + more
            + "\nRepair or remove them, or allow more with --config.data.max_corrupt_share "
            "in a new --workdir"
        )
