"""The labels of sources that have all of them as one array."""

import numpy as np


class Labelled:
    """The part of a source that is about labels.

    Attributes:
        labels: the label of each record, int32 [n], or None.
    """

    labels: np.ndarray | None

    @property
    def has_labels(self) -> bool:
        """Whether there are labels."""
        return self.labels is not None

    def label(self, index: int) -> int:
        """Returns the label of a record."""
        assert self.labels is not None
        return int(self.labels[index])
