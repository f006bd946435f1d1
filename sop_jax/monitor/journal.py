"""What a run writes and shows: rows of metrics, and warnings when something goes wrong."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sop_jax.monitor import pace as pace_lib
from sop_jax.monitor.metrics import Progress, Writer
from sop_jax.monitor.pace import Pace

# The columns of a row that the progress shows, by the name under which it shows them.
SHOWN = {"loss": "loss", "knn": "knn_top1", "images/s": "images_per_s"}


class Journal:
    """The rows of a run from its first step on, and what it shows of them.

    Args:
        rows: the rows of earlier steps, if the run resumes from a checkpoint.
        writer: writes the rows in the first process; None in others, which write nothing.
        progress: the progress on the screen.
        verdict: returns a warning if the logged rows show a failing run, see `Objective`.
        batch_size: the number of images per step.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        writer: Writer | None,
        progress: Progress,
        verdict: Callable[[Sequence[Mapping[str, Any]]], str | None],
        batch_size: int,
    ) -> None:
        self.rows = [dict(row) for row in rows]
        self.writer, self.progress, self.verdict = writer, progress, verdict
        self.batch_size = batch_size
        self._wall_before = self.rows[-1]["wall_s"] if self.rows else 0.0
        self._began = time.monotonic()
        self._unhealthy = self._held_up = False  # what the progress currently shows
        self._told = set[str]()

    def note(self, text: str) -> None:
        """Shows a message on a line of its own."""
        self.progress.note(text)

    def note_once(self, text: str) -> None:
        """Shows a message on a line of its own, unless it was shown before."""
        if text not in self._told:
            self._told.add(text)
            self.note(text)

    def record(self, step: int, row: Mapping[str, Any], pace: Pace | None = None) -> None:
        """Writes the row of a step and shows its main metrics.

        Args:
            step: the number of the step.
            row: the metrics of the step itself, of an evaluation, or of both.
            pace: the pace since the last row with metrics of a step; None for a row without them.
        """
        row = {"step": step, **row, "wall_s": self._wall_before + time.monotonic() - self._began}
        self.rows.append(row)
        if self.writer is not None:
            self.writer.write(step, {name: x for name, x in row.items() if name != "step"})
        shown = {name: row.get(key) for name, key in SHOWN.items()}
        if pace is not None:
            shown |= self._input(step, pace)
        if "loss" in row:
            shown |= self._health(step)
        self.progress.show(step, shown)

    def flush(self) -> None:
        """Makes sure that all rows are stored where a later run finds them."""
        if self.writer is not None:
            self.writer.flush()

    def _input(self, step: int, pace: Pace) -> dict[str, str]:
        """Returns what the progress shows of the input; warns when it becomes the bottleneck."""
        words = pace_lib.pace_text(pace, self.batch_size)
        before, self._held_up = self._held_up, words is not None
        if words and not before:
            self.note(f"step {step}: {words[1]}")
        if not (words or before):
            return {}
        return {"input": words[0] if words else "keeps up"}

    def _health(self, step: int) -> dict[str, str]:
        """Returns what the progress shows of the health; warns when training begins to fail."""
        words = self.verdict([row for row in self.rows if "loss" in row])
        before, self._unhealthy = self._unhealthy, words is not None
        if words and not before:
            self.note(f"step {step}: {words}")
        if not (words or before):
            return {}
        return {"health": "collapsing" if words else "no longer collapsing"}
