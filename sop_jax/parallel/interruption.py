"""Ctrl-C and SIGTERM: they stop a run at once while it starts, and between batches afterwards.

Several processes also agree here, by the same message, on when to save between two batches.
"""

import collections
import contextlib
import signal
import socket
import threading
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from sop_jax.errors import Interrupted
from sop_jax.parallel import hosts
from sop_jax.signals import sent_again

# All in seconds.
GRACE = 2  # for the main thread to run the handler of a signal, which waits while XLA compiles
UNWIND = 10  # for the main thread to leave the context after that


class Answer(NamedTuple):
    """What the processes of a run agree on at a poll.

    Attributes:
        stop: whether any of them has received a signal to stop.
        save: whether any of them asks for a checkpoint.
    """

    stop: bool
    save: bool


class Interruption:
    """A context in which the first SIGINT or SIGTERM sets `asked`; a second one has its old effect.

    Any of several processes may receive the signal, and `poll` and `check` report it on all of
    them. While `starting` is set, the first signal leaves the context at once, since nothing is
    lost then.

    Args:
        ahead: the number of polls by which the devices may lag behind. With several processes, a
            signal is reported this many polls late.

    Attributes:
        asked: whether this process has received a signal to stop.
        starting: the message of an interruption during the start; None after the start.

    Raises:
        Interrupted: on leaving the context, if a signal came during the start.
    """

    def __init__(self, ahead: int = 1) -> None:
        self._ahead = ahead

    def __enter__(self) -> "Interruption":
        self.asked = False
        self.starting: str | None = None
        self._waits = False
        self._heard = threading.Event()  # set when the main thread has run the handler
        self._left = threading.Event()  # set when the main thread has left the context
        self._polls: collections.deque[jax.Array] = collections.deque()
        self._granted = 0  # the number of the oldest polls whose request to save is granted
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        wakeup, self._signalled = socket.socketpair()
        self._signalled.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(
            self._signalled.fileno(), warn_on_full_buffer=False
        )
        threading.Thread(target=self._insist, args=[wakeup], daemon=True).start()
        return self

    def poll(self, save: bool = False) -> Answer:
        """Returns what any process asks for; the answer is the same on all.

        All processes call this at the same points. With several processes, each answer is that of
        `ahead` calls earlier, so that the devices have work to do while it is fetched.

        Args:
            save: whether this process asks for a checkpoint.
        """
        if not hosts.several():
            return Answer(self.asked, save)
        self._polls.append(hosts.anywhere(self.asked, save))
        if len(self._polls) <= self._ahead:
            return Answer(False, False)
        stop, save = jax.device_get(self._polls.popleft()).tolist()
        granted, self._granted = self._granted > 0, max(0, self._granted - 1)
        return Answer(stop, save and not granted)

    def saved(self) -> None:
        """Takes all requests for a checkpoint that were made up to now as granted.

        All processes call this at the same points. Without it, the polls whose answers are still
        to come would each ask for one more.
        """
        self._granted = len(self._polls)

    def check(self) -> None:
        """Polls, and raises Interrupted on all processes at the same call if the answer is yes."""
        if self.poll().stop:
            raise Interrupted(self.starting or "interrupted")

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A context that a signal leaves at once in a run of one process, as in a wait for images.

        Raises:
            KeyboardInterrupt: the first signal came, and the run has only one process.
        """
        self._waits = not hosts.several()
        try:
            yield
        finally:
            self._waits = False

    def _ask(self, number: int, frame: types.FrameType | None) -> None:
        self.asked = True
        self._heard.set()
        if (self.starting or self._waits) and sent_again(number, frame):
            return
        signal.signal(number, self._before[signal.Signals(number)])
        if self.starting or self._waits:
            raise KeyboardInterrupt  # not an Exception, so that `except Exception` lets it pass

    def _insist(self, wakeup: socket.socket) -> None:
        """Ends the process if a signal comes during the start and the main thread stays in it.

        The main thread may be in a call that runs no handlers, such as XLA's compiler, or code that
        it called may have caught the exception.
        """
        with wakeup:
            while wakeup.recv(1):  # Python writes a byte per signal
                if self.starting and not (self._heard.wait(GRACE) and self._left.wait(UNWIND)):
                    if words := self.starting:  # the start has not ended in the meantime
                        hosts.leave(130, words, words)

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._left.set()
        signal.set_wakeup_fd(self._wakeup_before)
        self._signalled.close()  # ends the thread
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.starting and kind is KeyboardInterrupt:
            raise Interrupted(self.starting, together=False) from None
