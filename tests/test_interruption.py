"""The first signal is a wish, the second an order, and afterwards all is as before."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from sop_jax.errors import Interrupted
from sop_jax.interruption import Interruption

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Ended(Exception):
    """What the handlers from before raise."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Handlers that tests survive."""

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


def test_a_process_alone_knows_at_once() -> None:
    with Interruption(ahead=2) as interruption:
        assert not interruption.poll()
        interruption.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.poll() and interruption.poll()
        for _ in range(2):
            with pytest.raises(Interrupted, match="interrupted"):
                interruption.check()


def test_each_run_is_asked_anew() -> None:
    interruption = Interruption()
    with interruption:
        os.kill(os.getpid(), signal.SIGTERM)
    with interruption:
        assert not interruption.asked
