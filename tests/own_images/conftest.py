"""The time that views take is fixed for all tests of what is chosen and estimated."""

import ml_collections
import pytest

from sop_jax.own_images import estimate
from sop_jax.own_images.survey import Survey

SECONDS_PER_PIXEL = 1e-8  # of all views of an image


@pytest.fixture(autouse=True)
def views_take_a_fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen follows from the time of an image, which differs from machine to machine."""

    def seconds(augment: ml_collections.ConfigDict, survey: Survey) -> float:
        of_globals = augment.global_crops * augment.global_size**2
        of_locals = augment.local_crops * augment.local_size**2
        return SECONDS_PER_PIXEL * (of_globals + of_locals)

    monkeypatch.setattr(estimate, "views_seconds", seconds)
