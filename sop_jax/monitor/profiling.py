"""A trace of some steps of a run, for TensorBoard's profile tab, XProf or Perfetto."""

from typing import Any

import jax
from etils import epath


class Trace:
    """Records what hosts and devices do in some steps.

    The parts of a step have the names of their `jax.named_scope`: teacher, targets, student,
    losses, update, health, and within the targets those of the objective, such as prototypes and
    memories.
    """

    def __init__(self, steps: tuple[int, int], folder: epath.PathLike) -> None:
        """Prepares a trace; nothing is recorded yet.

        Args:
            steps: the first and the last step to record, inclusive; (0, 0) records nothing.
            folder: where the trace is written, local or remote (`gs://`).
        """
        self._first, self._last = steps
        self._folder = epath.Path(folder)
        self._started = 0  # the first step of the running trace; 0 if none is running

    def before(self, step: int) -> bool:
        """Starts the trace if `step`, the next one, is its first, or a later one when resumed.

        Returns:
            Whether the trace was started now.
        """
        starts = not self._started and self._first <= step <= self._last and self._first > 0
        if starts:
            jax.profiler.start_trace(str(self._folder))
            self._started = step
        return starts

    def after(self, step: int, result: Any) -> str | None:
        """Ends the trace after its last step.

        Args:
            step: the step that was just given to the devices.
            result: arrays that are ready when the step has ended.

        Returns:
            A message that says where the trace is, if it was ended now.
        """
        if not (self._started and step >= self._last):
            return None
        jax.block_until_ready(result)
        words = f"steps {self._started} to {self._last} are traced in {self._folder}"
        self.close()
        return words

    def close(self) -> None:
        """Ends the trace if it is running."""
        if self._started:
            self._started = 0
            jax.profiler.stop_trace()
