"""The temperatures of student and teacher: their settings, and their schedules."""

from typing import Any

import ml_collections
from ml_collections import config_dict

from sop_jax.objectives.objective import Warmup
from sop_jax.rules import NOT_NEGATIVE, POSITIVE, STEPS, TRUTH, Rule, each, unset_or
from sop_jax.schedules import Length, Schedule, by_epoch, constant, duration, ramp


def settings(**own: Any) -> dict[str, Any]:
    """Returns the settings of temperatures, as in DINO and SOP.

    Args:
        **own: defaults that differ, and `temperature_by_epoch` for methods that have it: whether
            the teacher's temperature changes only between epochs.
    """
    shared = dict(
        student_temperature=0.1,
        teacher_temperature=(0.04, 0.07),  # increases linearly during its warm-up
        temperature_warmup_epochs=30.0,
        temperature_warmup_steps=config_dict.placeholder(int),
    )
    return shared | own


RULES: dict[str, Rule] = {
    "student_temperature": POSITIVE,
    "teacher_temperature": each(POSITIVE, 2),
    "temperature_warmup_epochs": NOT_NEGATIVE,
    "temperature_warmup_steps": unset_or(STEPS),
}
BY_EPOCH: dict[str, Rule] = {"temperature_by_epoch": TRUTH}


def temperatures(
    section: ml_collections.ConfigDict, length: Length, patches: bool = False
) -> dict[str, Schedule]:
    """Returns the schedules of the temperatures of student and teacher.

    Args:
        section: the settings of the method.
        length: the length of the run.
        patches: whether the teacher has another temperature for patches.
    """
    warmup = min(duration(section, "temperature_warmup_", length.epoch), length.steps)

    def rise(ends: tuple[float, float]) -> Schedule:
        if section.get("temperature_by_epoch"):
            return by_epoch(ramp(ends, round(warmup / length.epoch)), length.epoch)
        return ramp(ends, warmup)

    found = {
        "teacher_temperature": rise(section.teacher_temperature),
        "student_temperature": constant(section.student_temperature),
    }
    if patches:
        found["patch_teacher_temperature"] = rise(section.patch_teacher_temperature)
    return found


def warmups(name: str, *patches: str) -> dict[str, Warmup]:
    """Returns the duration among the settings of a method, see `Method.warmups`.

    Args:
        name: the name of the method.
        *patches: the setting of another temperature of the teacher for patches, if there is one.
    """
    ends = tuple(f"{name}.{key}" for key in ("teacher_temperature", *patches))
    happens = "the teacher's temperature reaches its final value"
    return {f"{name}.temperature_warmup": Warmup(happens, ends)}
