"""What is measured of the devices."""

import jax
import pytest

from sop_jax.own_images import machine
from sop_jax.own_images.machine import GIB, Machine, Probe, words


@pytest.mark.medium
def test_the_speed_is_measured_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine.PROBES, "cpu", Probe(64, 1, 32, 2, "float32"))
    found = machine.measure()
    assert (found.platform, found.devices) == ("cpu", jax.device_count())
    assert found.shares_cores and found.cores >= 1
    assert 1e6 < found.rate < 1e13
    assert found.memory is None or found.memory > 0


def test_words_say_what_there_is() -> None:
    gpus = Machine("gpu", "NVIDIA H100", 8, 70.0 * GIB, 64, 2.5e15)
    assert words(gpus) == (
        "8 NVIDIA H100 devices with 70.0 GiB each, 64 cores; a small network trains at "
        "2.5e+03 TFLOP/s"
    )
    assert "1 cpu device with unknown memory" in words(Machine("cpu", "cpu", 1, None, 2, 1e11))
