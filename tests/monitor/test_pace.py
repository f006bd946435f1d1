"""What holds a run up: told from when steps begin and end."""

import time
from collections.abc import Iterator

import pytest

from sop_jax.monitor.pace import Pace, PaceKeeper, pace_text


class Result:
    """What a step of so many seconds gives."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def block_until_ready(self) -> "Result":
        time.sleep(max(0.0, self.end - time.monotonic()))
        return self


@pytest.fixture
def keeper() -> Iterator[PaceKeeper]:
    keeper = PaceKeeper()
    yield keeper
    keeper.close()


def test_devices_that_wait_for_batches_are_idle(keeper: PaceKeeper) -> None:
    for _ in range(4):
        time.sleep(0.2)  # for the batch
        keeper.step(time.monotonic(), Result(0.1))
        time.sleep(0.1)
    pace = keeper.look()
    assert pace.steps == 4
    assert 0.4 <= pace.busy < 0.7
    assert 0.55 <= pace.idle < 1.2  # not before the first step, of which nobody knows


def test_devices_with_steps_in_hand_are_not_idle(keeper: PaceKeeper) -> None:
    results = [Result(0.1 * (i + 1)) for i in range(4)]
    for result in results:
        keeper.step(time.monotonic(), result)
        time.sleep(0.05)  # the next batch is there long before this step ends
    pace = keeper.look()
    assert pace.steps == 4 and pace.idle == 0
    assert 0.3 <= pace.busy < 0.7


def test_what_happens_after_a_look_is_nobodys_waiting(keeper: PaceKeeper) -> None:
    keeper.step(time.monotonic(), Result(0))
    assert keeper.look().steps == 1
    time.sleep(0.3)  # an evaluation
    keeper.step(time.monotonic(), Result(0))
    assert keeper.look() == pytest.approx(Pace(0, 0, 1), abs=0.05)
    assert keeper.look() == Pace(0, 0, 0)


def test_after_each_look_the_wait_for_the_next_batch_counts(keeper: PaceKeeper) -> None:
    for _ in range(2):
        keeper.resume()
        time.sleep(0.2)
        keeper.step(time.monotonic(), Result(0.05))
        pace = keeper.look()
        assert pace.steps == 1 and 0.15 <= pace.idle < 0.5 and pace.idle_share > 0.5


def test_what_happens_in_a_pause_is_nobodys_waiting(keeper: PaceKeeper) -> None:
    keeper.step(time.monotonic(), Result(0.1))
    keeper.pause()  # once the step has ended
    time.sleep(0.3)  # a trace is written
    keeper.step(time.monotonic(), Result(0))
    pace = keeper.look()
    assert pace.steps == 2 and pace.idle < 0.05


def test_a_dispatch_that_takes_long_is_work(keeper: PaceKeeper) -> None:
    keeper.resume()
    began = time.monotonic()
    time.sleep(0.2)
    keeper.step(began, Result(0.1))
    pace = keeper.look()
    assert pace.idle < 0.05 and pace.busy >= 0.3


def test_a_step_that_fails_ends_too(keeper: PaceKeeper) -> None:
    class Broken:
        def block_until_ready(self) -> None:
            raise RuntimeError("the device is lost")

    keeper.step(time.monotonic(), Broken())
    assert keeper.look().steps == 1


def test_words_say_how_much_the_input_costs() -> None:
    few, sentence = pace_text(Pace(busy=2.0, idle=6.0, steps=10), 64)
    assert few == "bottleneck, 75 % waiting"
    assert "devices wait for images 75 % of the time, and would reach 320 images/s" in sentence
    assert pace_text(Pace(busy=9.7, idle=0.3, steps=10), 64) is None
    assert pace_text(Pace(busy=0.0, idle=0.0, steps=0), 64) is None


def test_a_step_that_never_ends_does_not_hold_up_the_end() -> None:
    keeper = PaceKeeper()
    keeper.step(time.monotonic(), Result(30))
    began = time.monotonic()
    keeper.close()
    assert time.monotonic() - began < 10
