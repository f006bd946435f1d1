"""How fast a run trains, and whether its devices wait for images.

Each process measures its own devices, and the first process shows its own. If the input of another
process is slow, the first one cannot see that: its devices seem busy while they wait in a
collective for the slowest.
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

NOTICED = 0.05  # the share of the time that devices must wait for images to be reported


class Pace(NamedTuple):
    """The work and the waiting of the devices since the last call of `PaceKeeper.look`.

    Attributes:
        busy: the seconds that the devices worked.
        idle: the seconds that the devices waited because the next batch was not ready.
        steps: the number of steps that ended.
    """

    busy: float
    idle: float
    steps: int

    @property
    def idle_share(self) -> float:
        """The share of the time that the devices waited, in [0, 1]."""
        return self.idle / max(self.busy + self.idle, 1e-9)


class PaceKeeper:
    """Measures when steps begin and end, in a thread, so that the run itself need not wait."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads the time in seconds from `clock`."""
        self._clock = clock
        self._begun: queue.SimpleQueue[tuple[float, Any] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._given, self._done, self._read = 0, 0, 0
        self._busy, self._idle, self._ended = 0.0, 0.0, 0.0
        self._thread = threading.Thread(target=self._watch, name="pace", daemon=True)
        self._thread.start()

    def step(self, began: float, result: Any) -> None:
        """Adds a step.

        Args:
            began: when its batch was ready, by `time.monotonic`.
            result: arrays that are ready when the step has ended.
        """
        self._given += 1
        self._begun.put((began, result))

    def look(self) -> Pace:
        """Waits for all steps, pauses, and returns the pace since the last look."""
        self.pause()
        with self._changed:
            pace = Pace(self._busy, self._idle, self._done - self._read)
            self._busy, self._idle, self._read = 0.0, 0.0, self._done
        return pace

    def pause(self) -> None:
        """Waits for all steps; no idle time is counted until `resume` or the next step."""
        with self._changed:
            self._changed.wait_for(lambda: self._done == self._given)
            self._ended = 0.0

    def resume(self) -> None:
        """Counts idle time again from now on."""
        with self._changed:
            self._ended = self._clock()

    def close(self) -> None:
        """Ends the thread, or abandons it if a step never ends, as after the loss of a host."""
        self._begun.put(None)
        self._thread.join(timeout=1)

    def _watch(self) -> None:
        while (step := self._begun.get()) is not None:
            began, result = step
            try:
                jax.block_until_ready(result)
            except Exception:  # the run meets the same error and reports it
                pass
            ended = self._clock()
            with self._changed:
                if self._ended:
                    self._idle += max(0.0, began - self._ended)
                self._busy += max(1e-9, ended - max(began, self._ended))
                self._ended = ended
                self._done += 1
                self._changed.notify_all()


def pace_text(pace: Pace, batch_size: int) -> tuple[str, str] | None:
    """Returns a warning that devices wait for images, or None if they hardly do.

    Args:
        pace: the pace of some steps.
        batch_size: the number of images per step.

    Returns:
        The warning twice: in a few words for the line of progress, and as a sentence.
    """
    if pace.idle_share < NOTICED:
        return None
    share, without = f"{100 * pace.idle_share:.0f} %", pace.steps * batch_size / pace.busy
    return f"bottleneck, {share} waiting", (
        f"the input is the bottleneck: devices wait for images {share} of the time, and would "
        f"reach {without:.4g} images/s without waiting. Increase --config.data.workers if there "
        "are idle cores"
    )
