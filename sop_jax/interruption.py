"""Ctrl-C and SIGTERM as a wish that loops grant between two batches, all processes at the same."""

import collections
import signal
from typing import Any

import jax

from sop_jax import hosts
from sop_jax.errors import Interrupted


class Interruption:
    """A context in which the first SIGINT or SIGTERM sets `asked`, and a second one ends it all.

    Of several processes any may be asked; `poll` and `check` tell all of them.

    Args:
        ahead: how many polls the devices may be behind; of several processes, a wish is known so
            many polls late.
    """

    def __init__(self, ahead: int = 1) -> None:
        self._ahead = ahead

    def __enter__(self) -> "Interruption":
        self.asked = False
        self._polls: collections.deque[jax.Array] = collections.deque()
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def poll(self) -> bool:
        """Whether any process has been asked to stop, the same on all of them.

        All processes call it at the same places. Of several each answer is of `ahead` calls before:
        while it is waited for, the devices are busy with what they were given since.
        """
        if not hosts.several():
            return self.asked
        self._polls.append(hosts.anywhere(self.asked))
        if len(self._polls) <= self._ahead:
            return False
        return bool(jax.device_get(self._polls.popleft()))

    def check(self) -> None:
        """Raises Interrupted, on all processes at the same call, where `poll` says so."""
        if self.poll():
            raise Interrupted("interrupted")

    def check_start(self) -> None:
        """Raises where this process was asked, while it does not yet wait for others."""
        if self.asked and hosts.several():
            raise KeyboardInterrupt  # which ends the others too
        if self.asked:
            raise Interrupted("interrupted at the start; nothing was trained")

    def _ask(self, number: int, _: Any) -> None:
        self.asked = True
        signal.signal(number, self._before[signal.Signals(number)])

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
