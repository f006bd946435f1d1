"""The first signal asks a run to stop, and the second has the effect that it had before."""

import gc
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from sop_jax.errors import Interrupted
from sop_jax.parallel import hosts
from sop_jax.parallel.interruption import Interruption

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Ended(Exception):
    """Raised by the previous handlers."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Installs handlers that do not end the test."""

    def end(number: int, _: Any) -> None:
        raise Ended(number)

    before = {number: signal.signal(number, end) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nothing_is_asked_without_a_signal() -> None:
    with Interruption() as interruption:
        assert not interruption.asked


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_only_asks(number: signal.Signals) -> None:
    with Interruption() as interruption:
        os.kill(os.getpid(), number)
        assert interruption.asked


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_signal_ends_it(number: signal.Signals) -> None:
    with pytest.raises(Ended), Interruption() as interruption:
        os.kill(os.getpid(), number)
        assert interruption.asked
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("asked", [True, False])
def test_afterwards_signals_do_what_they_did(number: signal.Signals, asked: bool) -> None:
    with Interruption():
        if asked:
            os.kill(os.getpid(), number)
    with pytest.raises(Ended, match=str(int(number))):
        os.kill(os.getpid(), number)


def test_an_error_inside_restores_them_too() -> None:
    with pytest.raises(ValueError, match="inside"), Interruption():
        raise ValueError("inside")
    with pytest.raises(Ended):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_single_process_knows_at_once() -> None:
    with Interruption(ahead=2) as interruption:
        assert interruption.poll() == (False, False)
        assert interruption.poll(save=True) == (False, True)
        interruption.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.poll().stop and interruption.poll().stop
        for _ in range(2):
            with pytest.raises(Interrupted, match="interrupted"):
                interruption.check()


def test_a_checkpoint_that_several_processes_ask_for_is_saved_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One save grants all requests made before it, also those whose answers come later."""
    monkeypatch.setattr(hosts, "several", lambda: True)
    with Interruption(ahead=2) as interruption:
        saves, began = [], 0
        for step in range(14):
            if interruption.poll(save=step - began >= 4).save:
                saves.append(step)
                began = step
                interruption.saved()
    assert saves == [6, 12]


def test_each_run_starts_without_a_signal() -> None:
    interruption = Interruption()
    with interruption:
        os.kill(os.getpid(), signal.SIGTERM)
    with interruption:
        assert not interruption.asked


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_the_start_ends_it_at_once(number: signal.Signals) -> None:
    with pytest.raises(Interrupted, match="nothing was trained"), Interruption() as interruption:
        interruption.starting = "nothing was trained"
        try:
            os.kill(os.getpid(), number)
            raise AssertionError("the signal had no effect")
        except Exception as error:  # as code that catches errors of libraries
            raise AssertionError("the signal was caught as an error") from error
    with pytest.raises(Ended):
        os.kill(os.getpid(), number)


def test_a_signal_in_a_callback_that_drops_exceptions_comes_again() -> None:
    """Python drops those of its garbage collector's callbacks, and JAX has one."""
    interruption, sent = Interruption(), []

    def callback(phase: str, info: dict[str, int]) -> None:
        if not sent:
            sent.append(phase)
            os.kill(os.getpid(), signal.SIGINT)

    with interruption, pytest.raises(KeyboardInterrupt), interruption.at_once():
        gc.callbacks.append(callback)
        try:
            gc.collect()
            assert interruption.asked and sent
            time.sleep(10)
            pytest.fail("the signal had no effect")
        finally:
            gc.callbacks.remove(callback)


def test_after_the_start_a_signal_only_asks() -> None:
    with Interruption() as interruption:
        interruption.starting = "nothing was trained"
        interruption.starting = None
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.asked


DEAF = """
        lock = ctypes.CDLL(None).pthread_mutex_lock  # runs no handlers, like XLA's compiler
        mutex = ctypes.create_string_buffer(64)
        lock(mutex), lock(mutex)
"""
SWALLOWING = """
        while True:  # ignores exceptions, like callbacks of the garbage collector
            try:
                time.sleep(1)
            except KeyboardInterrupt:
                pass
"""


@pytest.mark.medium
@pytest.mark.parametrize("main_thread", [DEAF, SWALLOWING], ids=["deaf", "swallowing"])
def test_a_signal_during_a_long_compilation_ends_the_process(main_thread: str) -> None:
    script = """
import ctypes, multiprocessing, threading, os, signal, time
from sop_jax.parallel import interruption
if __name__ == "__main__":
    interruption.GRACE = interruption.UNWIND = 0.1
    with interruption.Interruption() as asked:
        asked.starting = "nothing was trained"
        threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGTERM]).start()
"""
    script += main_thread
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (ended.returncode, ended.stderr) == (130, "nothing was trained\n")
