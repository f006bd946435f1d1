"""Machines, and surveys of photos that do not exist, for tests of what is chosen."""

from typing import Any

import ml_collections

from sop_jax.own_images.decisions import decide
from sop_jax.own_images.machine import Machine
from sop_jax.own_images.survey import Header, Survey
from sop_jax.recipes import folder

LAPTOP = Machine("cpu", "cpu", 1, 8 * 2**30, 2, 8e10)
GPU = Machine("gpu", "NVIDIA H100", 1, 70 * 2**30, 16, 1e14)
NODE = GPU._replace(devices=8, rate=8e14, cores=128)


def survey(images: int = 500, side: int = 224, **changes: Any) -> Survey:
    headers = {index: Header("JPEG", side, side * 4 // 3, False) for index in range(20)}
    found = Survey("photos", images, None, None, headers, 20, {}, 0.0, 2e-3, None, [])
    return found._replace(**changes)


def config_for(
    images: Survey, machine: Machine = LAPTOP, **given: Any
) -> ml_collections.ConfigDict:
    config = folder()
    config.data.path = "/photos"
    return decide(config, images, machine, {k.replace("__", "."): v for k, v in given.items()})[0]
