"""Ctrl-C and SIGTERM: granted at once while a run starts, afterwards between two batches."""

import collections
import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import jax

from sop_jax.errors import Interrupted
from sop_jax.parallel import hosts

# In seconds, for the main thread to
GRACE = 2  # hear a signal, which it does not while XLA compiles
UNWIND = 10  # leave what it was doing


class Interruption:
    """A context in which the first SIGINT or SIGTERM sets `asked`, and a second one ends it all.

    Of several processes any may be asked; `poll` and `check` tell all of them. While `starting`
    is set, the first signal ends the context at once, for nothing is lost then.

    Args:
        ahead: how many polls the devices may be behind; of several processes, a wish is known so
            many polls late.

    Attributes:
        asked: whether this process has been asked to stop.
        starting: what to say when a signal comes during the start; None after it.

    Raises:
        Interrupted: on leaving the context, where a signal came during the start.
    """

    def __init__(self, ahead: int = 1) -> None:
        self._ahead = ahead

    def __enter__(self) -> "Interruption":
        self.asked = False
        self.starting: str | None = None
        self._waits = False
        self._heard = threading.Event()  # the main thread has run the handler
        self._left = threading.Event()  # and has left the context
        self._polls: collections.deque[jax.Array] = collections.deque()
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        bell, self._rope = socket.socketpair()
        self._rope.setblocking(False)
        self._rope_before = signal.set_wakeup_fd(self._rope.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._insist, args=[bell], daemon=True).start()
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
            raise Interrupted(self.starting or "interrupted")

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Where a run of one process may be ended at any place, such as while it waits for images.

        Raises:
            KeyboardInterrupt: the first signal came.
        """
        self._waits = not hosts.several()
        try:
            yield
        finally:
            self._waits = False

    def _ask(self, number: int, _: Any) -> None:
        self.asked = True
        self._heard.set()
        signal.signal(number, self._before[signal.Signals(number)])
        if self.starting or self._waits:
            raise KeyboardInterrupt  # which no `except Exception` takes for something else

    def _insist(self, bell: socket.socket) -> None:
        """Ends the process if a signal comes during the start and the main thread does not.

        It may be deaf, or something that it called may have swallowed the exception.
        """
        with bell:
            while bell.recv(1):
                if self.starting and not (self._heard.wait(GRACE) and self._left.wait(UNWIND)):
                    if words := self.starting:  # nothing was trained meanwhile
                        hosts.leave(130, words, words)

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._left.set()
        signal.set_wakeup_fd(self._rope_before)
        self._rope.close()  # ends the thread
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.starting and kind is KeyboardInterrupt:
            raise Interrupted(self.starting, together=False) from None
