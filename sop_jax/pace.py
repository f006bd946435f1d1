"""How fast a run goes, and whether its devices wait for images."""

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

    def step(self, result: Any) -> None:
        """Tells of a step that was given to the devices just now; `result` is there at its end."""
        self._given += 1
        self._begun.put((time.monotonic(), result))

    def look(self) -> Pace:
        """The pace since the last look, once all steps have ended; what follows starts anew.

        So the time until the next step, in which a run may evaluate or save, counts as nothing.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._done == self._given)
            pace = Pace(self._busy, self._idle, self._done - self._read)
            self._busy, self._idle, self._ended, self._read = 0.0, 0.0, 0.0, self._done
        return pace

    def close(self) -> None:
        """Ends the thread; where a step never ends, as after the loss of a host, leaves it."""
        self._begun.put(None)
        self._thread.join(timeout=1)

    def _watch(self) -> None:
        while (step := self._begun.get()) is not None:
            began, result = step
            try:
                jax.block_until_ready(result)
            except Exception:  # noqa: BLE001, S110: the run meets it too, and tells of it
                pass
            ended = time.monotonic()
            with self._changed:
                if self._ended:
                    self._idle += max(0.0, began - self._ended)
                self._busy += ended - max(began, self._ended)
                self._ended = ended
                self._done += 1
                self._changed.notify_all()


def in_words(pace: Pace, batch_size: int) -> str | None:
    """What holds the devices up, for a person; None when they are busy."""
    if pace.steps < 2 or pace.idle_share < NOTICED:
        return None
    without = pace.steps * batch_size / max(pace.busy, 1e-9)
    return (
        f"the bottleneck: devices wait {100 * pace.idle_share:.0f} % of the time, "
        f"{without:.4g} images/s without"
    )
