"""How fast a run goes, and whether its devices wait for images.

Each process watches its own devices. What is shown is the first one's, which also sees nothing of
another whose input is slow: it then works as long as the slowest.
"""

import queue
import threading
import time
from typing import Any, NamedTuple

import jax

NOTICED = 0.05  # share of the time; devices that wait less are called busy


class Pace(NamedTuple):
    """Of the steps since the last look.

    Attributes:
        busy: seconds that the devices took for them.
        idle: seconds that the devices had nothing to do, because the next batch was not there yet.
        steps: how many ended.
    """

    busy: float
    idle: float
    steps: int

    @property
    def idle_share(self) -> float:
        """Of the time in which the devices might have worked."""
        return self.idle / max(self.busy + self.idle, 1e-9)


class PaceKeeper:
    """Notes when steps begin and end, in a thread of its own, so that the run waits for nothing."""

    def __init__(self) -> None:
        self._begun: queue.SimpleQueue[tuple[float, Any] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._given, self._done, self._read = 0, 0, 0
        self._busy, self._idle, self._ended = 0.0, 0.0, 0.0
        self._thread = threading.Thread(target=self._watch, name="pace", daemon=True)
        self._thread.start()

    def step(self, began: float, result: Any) -> None:
        """Tells of a step whose batch was there at `began`; `result` is there at its end."""
        self._given += 1
        self._begun.put((began, result))

    def look(self) -> Pace:
        """The pace since the last look, once all steps have ended; pauses."""
        self.pause()
        with self._changed:
            pace = Pace(self._busy, self._idle, self._done - self._read)
            self._busy, self._idle, self._read = 0.0, 0.0, self._done
        return pace

    def pause(self) -> None:
        """Waits for all steps; what a run does until the next one, or `resume`, is no waiting."""
        with self._changed:
            self._changed.wait_for(lambda: self._done == self._given)
            self._ended = 0.0

    def resume(self) -> None:
        """From now on devices without a batch are waiting again."""
        with self._changed:
            self._ended = time.monotonic()

    def close(self) -> None:
        """Ends the thread; where a step never ends, as after the loss of a host, leaves it."""
        self._begun.put(None)
        self._thread.join(timeout=1)

    def _watch(self) -> None:
        while (step := self._begun.get()) is not None:
            began, result = step
            try:
                jax.block_until_ready(result)
            except Exception:  # the run meets it too, and tells of it
                pass
            ended = time.monotonic()
            with self._changed:
                if self._ended:
                    self._idle += max(0.0, began - self._ended)
                self._busy += max(1e-9, ended - max(began, self._ended))
                self._ended = ended
                self._done += 1
                self._changed.notify_all()


def in_words(pace: Pace, batch_size: int) -> tuple[str, str] | None:
    """That the input holds the devices up, in a few words and in a sentence; None if it does not.

    The few are short enough for a line of progress.
    """
    if pace.idle_share < NOTICED:
        return None
    share, without = f"{100 * pace.idle_share:.0f} %", pace.steps * batch_size / pace.busy
    return f"bottleneck, {share} waiting", (
        f"the input is the bottleneck: devices wait for images {share} of the time, and would do "
        f"{without:.4g} images/s without. More data.workers help as long as there are cores"
    )
