"""A trace of some steps of a run, for TensorBoard's profile tab, XProf or Perfetto."""

from typing import Any

import jax
from etils import epath


class Trace:
    """Records what hosts and devices do in some steps.

    The parts of a step carry the names of `jax.named_scope`: prototypes, teacher, student, losses,
    update, memories, health.
    """

    def __init__(self, steps: tuple[int, int], folder: epath.PathLike) -> None:
        """Of the first to the last of `steps`, both included; (0, 0) records nothing."""
        self._first, self._last = steps
        self._folder = epath.Path(folder)
        self._running = False

    def before(self, step: int) -> None:
        """Starts the trace when its first step is next, or a later one in a resumed run."""
        if not self._running and self._first <= step <= self._last and self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, result: Any) -> str | None:
        """Ends it when its last step has ended; says where it is."""
        if not (self._running and step >= self._last):
            return None
        jax.block_until_ready(result)
        self.close()
        return f"steps {self._first} to {self._last} are traced in {self._folder}"

    def close(self) -> None:
        """Ends a trace that still runs."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
