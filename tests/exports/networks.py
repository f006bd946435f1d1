"""Small networks of every family, for tests of exports."""

import pathlib
from typing import Any

import numpy as np
from runs import make_run

APART = {"model.init_std": 0.2, "model.position_std": 0.5}
# Their views are as large as their images, so that nothing is scaled in tests.
NETWORKS: dict[str, dict[str, Any]] = {
    "vit": {"model.patch": 4, "eval.crop": 24, "eval.resize": 24, **APART},
    "mean": {"model.pool": "mean", **APART},
    "scaled": {"model.layer_scale": 0.5, **APART},
    "registers": {"model.layer_scale": 0.5, "model.registers": 3, **APART},
    "swin": {
        "model.family": "swin",
        "model.width": 16,
        "model.window": 7,
        "model.stage_depths": (2, 2, 2, 2),
        "model.stage_heads": (1, 2, 4, 8),
        "augment.global_size": 224,
        "augment.local_size": 96,
        "eval.crop": 224,
        "eval.resize": 224,
        "model.init_std": 0.1,
        "model.norm_eps": 1e-5,
    },
    "resnet": {
        "model.family": "resnet",
        "model.width": 64,
        "model.stage_depths": (1, 2, 1, 1),
        "augment.global_size": 64,
        "augment.local_size": 32,
        "eval.crop": 64,
        "eval.resize": 64,
    },
}
NETWORKS["resnet of basic blocks"] = NETWORKS["resnet"] | {"model.block": "basic"}
OWN: dict[str, dict[str, Any]] = {  # which no other project has
    "small stem": {
        "model.family": "resnet",
        "model.stem": "small",
        "model.width": 4,
        "model.stage_depths": (1, 1, 1, 1),
    },
}


def make(workdir: pathlib.Path, name: str) -> pathlib.Path:
    """Makes the workdir of a run of a network."""
    workdir = workdir / name
    make_run(workdir, steps=(7,), **{"model.size": "custom", **(NETWORKS | OWN)[name]})
    return workdir


def images(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
