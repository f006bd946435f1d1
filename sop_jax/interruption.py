"""Ctrl-C and SIGTERM as a wish that the training loop grants at the end of a step."""

import signal
from typing import Any


class Interruption:
    """A context in which the first SIGINT or SIGTERM sets `asked`, and a second one ends it all."""

    def __enter__(self) -> "Interruption":
        self.asked = False
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _ask(self, number: int, _: Any) -> None:
        self.asked = True
        signal.signal(number, self._before[signal.Signals(number)])

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
