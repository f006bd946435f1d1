"""Whether devices wait for images, inferred from when steps begin and end."""

import threading
import time
from collections.abc import Iterator

import pytest

from sop_jax.monitor.pace import Pace, PaceKeeper, pace_text


class Clock:
    """A clock that shows when the last step ended, or the time that a test sets."""

    now = 1.0

    def __call__(self) -> float:
        return self.now

    def step_that_ends(self, at: float) -> "Result":
        return Result(self, at)


class Result:
    """Returns the result of a step that ends at some time."""

    def __init__(self, clock: Clock, end: float) -> None:
        self.clock, self.end = clock, end

    def block_until_ready(self) -> "Result":
        self.clock.now = self.end
        return self


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keeper(clock: Clock) -> Iterator[PaceKeeper]:
    keeper = PaceKeeper(clock)
    yield keeper
    keeper.close()


def close_to(busy: float, idle: float, steps: int) -> Pace:
    return pytest.approx(Pace(busy, idle, steps), abs=1e-6)


def test_devices_that_wait_for_batches_are_idle(keeper: PaceKeeper, clock: Clock) -> None:
    for batch in (1.2, 1.5, 1.8, 2.1):  # each arrives 0.2 s after the previous step has ended
        keeper.step(batch, clock.step_that_ends(batch + 0.1))
    # The wait before the first step is not counted, because its length is unknown.
    assert keeper.look() == close_to(busy=0.4, idle=0.6, steps=4)


def test_devices_with_steps_in_hand_are_not_idle(keeper: PaceKeeper, clock: Clock) -> None:
    for i in range(4):  # the next batch arrives long before a step ends
        keeper.step(1 + 0.05 * i, clock.step_that_ends(1.1 + 0.1 * i))
    assert keeper.look() == close_to(busy=0.4, idle=0, steps=4)


def test_what_happens_after_a_look_is_nobodys_waiting(keeper: PaceKeeper, clock: Clock) -> None:
    keeper.step(1.0, clock.step_that_ends(1.1))
    assert keeper.look().steps == 1
    keeper.step(1.4, clock.step_that_ends(1.5))  # after an evaluation
    assert keeper.look() == close_to(busy=0.1, idle=0, steps=1)
    assert keeper.look() == Pace(0, 0, 0)


def test_after_each_look_the_wait_for_the_next_batch_counts(
    keeper: PaceKeeper, clock: Clock
) -> None:
    for _ in range(2):
        keeper.resume()
        batch = clock.now + 0.2
        keeper.step(batch, clock.step_that_ends(batch + 0.05))
        pace = keeper.look()
        assert pace == close_to(busy=0.05, idle=0.2, steps=1)
        assert pace.idle_share == pytest.approx(0.8)


def test_what_happens_in_a_pause_is_nobodys_waiting(keeper: PaceKeeper, clock: Clock) -> None:
    keeper.step(1.0, clock.step_that_ends(1.1))
    keeper.pause()  # once the step has ended
    keeper.step(1.4, clock.step_that_ends(1.5))  # after a trace was written
    assert keeper.look() == close_to(busy=0.2, idle=0, steps=2)


def test_a_dispatch_that_takes_long_is_work(keeper: PaceKeeper, clock: Clock) -> None:
    keeper.resume()
    began, clock.now = clock.now, clock.now + 0.2
    keeper.step(began, clock.step_that_ends(began + 0.3))
    assert keeper.look() == close_to(busy=0.3, idle=0, steps=1)


def test_a_step_that_fails_ends_too(keeper: PaceKeeper) -> None:
    class Broken:
        def block_until_ready(self) -> None:
            raise RuntimeError("the device is lost")

    keeper.step(1.0, Broken())
    assert keeper.look().steps == 1


def test_words_say_how_much_the_input_costs() -> None:
    few, sentence = pace_text(Pace(busy=2.0, idle=6.0, steps=10), 64)
    assert few == "bottleneck, 75 % waiting"
    assert "devices wait for images 75 % of the time, and would reach 320 images/s" in sentence
    assert pace_text(Pace(busy=9.7, idle=0.3, steps=10), 64) is None
    assert pace_text(Pace(busy=0.0, idle=0.0, steps=0), 64) is None


def test_a_step_that_never_ends_does_not_hold_up_the_end() -> None:
    released = threading.Event()

    class Endless:
        def block_until_ready(self) -> None:
            released.wait()

    keeper = PaceKeeper()
    keeper.step(time.monotonic(), Endless())
    began = time.monotonic()
    keeper.close()
    assert time.monotonic() - began < 10
    released.set()
