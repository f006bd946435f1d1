"""A run that is interrupted in every way ends with the bits of one that was left in peace.

`LONG_HAUL_MINUTES=60 pytest -s tests/real/test_long_haul.py` interrupts a longer run for an hour;
docs/reliability.md has the figures.
"""

import os
import pathlib
import tempfile
from collections.abc import Iterator

import long_haul
import pytest
from long_haul import Haul
from test_train import SMALL, TIMINGS, rows, saved_state

from sop_jax.errors import LOST
from sop_jax.training import checkpoint

# One worker of pytest runs all tests with real programs, because each needs both cores.
pytestmark = [pytest.mark.xdist_group("real"), pytest.mark.slow]

MINUTES = float(os.environ.get("LONG_HAUL_MINUTES", "0"))  # 0: every trouble once
PAUSES = (20.0, 60.0) if MINUTES else (0.5, 1.0)
SETTINGS = SMALL | {
    "steps": 10**6,
    "log_every": 1,
    "eval_every": 20,
    "checkpoint_every": 20 if MINUTES else 4,
    "checkpoint.keep_every": 0,
}


@pytest.fixture
def folder() -> Iterator[pathlib.Path]:
    """A folder with images, and with a small disk if one can be mounted."""
    with tempfile.TemporaryDirectory() as name:
        long_haul.write_digits(pathlib.Path(name) / "digits")
        yield pathlib.Path(name)


def test_an_interrupted_run_has_the_bits_of_one_in_peace(folder: pathlib.Path) -> None:
    with long_haul.disk(folder / "disk") as mounted:
        haul = Haul(folder / "disk" / "run", folder / "digits", SETTINGS)
        troubles = [
            each for each in long_haul.TROUBLES if mounted or each is not long_haul.disk_full
        ]
        found = long_haul.interrupt(haul, troubles, PAUSES, MINUTES)
        print("", *long_haul.figures(found), sep="\n")
        step = checkpoint.latest_step(haul.workdir)
        assert step is not None and haul.step() == step
        peaceful = Haul(folder / "peaceful", folder / "digits", SETTINGS)
        peaceful.undisturbed(step)
        one, other = (saved_state(each.workdir, step) for each in (haul, peaceful))
        assert one.keys() == other.keys()
        assert [name for name in one if one[name].tobytes() != other[name].tobytes()] == []
        assert rows(haul.workdir, TIMINGS) == rows(peaceful.workdir, TIMINGS)[: step + 1]
        print(f"step {step}: every array and all {step + 1} rows are the same")
    assert "Traceback" not in haul.says(), haul.says()
    assert {each.kind for each in found} >= {each.__name__ for each in troubles}
    for each in found:
        if each.kind == "asked_to_stop":
            assert (each.codes, each.lost) == ([130, 130], 0)
        elif each.kind == "worker_killed":
            assert each.codes == [LOST, LOST]
