"""A trace of some steps of a run, for TensorBoard's profile tab, XProf or Perfetto."""

from typing import Any

import jax
from etils import epath


class Trace:
    """Records what hosts and devices do in some steps.

    The parts of a step carry the names of `jax.named_scope`: teacher, targets, student, losses,
    update, health, and in the targets those of the objective, such as prototypes and memories.
    """

    def __init__(self, steps: tuple[int, int], folder: epath.PathLike) -> None:
        """Of the first to the last of `steps`, both included; (0, 0) records nothing."""
        self._first, self._last = steps
        self._folder = epath.Path(folder)
        self._started = 0  # the step before which the trace began; 0 while there is none

    def before(self, step: int) -> bool:
        """Starts the trace if its first step is next, or a later one in a resumed run."""
        starts = not self._started and self._first <= step <= self._last and self._first > 0
        if starts:
            jax.profiler.start_trace(str(self._folder))
            self._started = step
        return starts

    def after(self, step: int, result: Any) -> str | None:
        """Ends it when its last step has ended; says where it is."""
        if not (self._started and step >= self._last):
            return None
        jax.block_until_ready(result)
        words = f"steps {self._started} to {self._last} are traced in {self._folder}"
        self.close()
        return words

    def close(self) -> None:
        """Ends a trace that still runs."""
        if self._started:
            self._started = 0
            jax.profiler.stop_trace()
