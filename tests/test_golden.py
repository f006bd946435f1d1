"""Compares every expected number of the golden files with what the package computes.

SOP_GOLDEN_DIR names a folder with other seeds and sizes; all sizes come from the arrays.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sop_jax import models, schedules
from sop_jax.config import paper
from sop_jax.objectives import losses, memory
from sop_jax.objectives.sop import assignment, prototypes
from sop_jax.parallel.mesh import make_mesh

FOLDER = Path(os.environ.get("SOP_GOLDEN_DIR", Path(__file__).parent / "golden"))
SMOOTHING = 0.1
MESH = make_mesh(1)
METHOD_TOLERANCE = 1e-5  # relative to the largest magnitude
BACKBONE_TOLERANCE = 2e-4  # absolute; outputs have unit scale

METHOD_INPUTS = (
    *("assign_memory", "assign_anchors", "assign_u", "cls_student", "cls_teacher"),
    *("mim_student", "mim_teacher", "mim_mask", "mim_anchors", "fifo_0"),
)
# Expected numbers of methods that the package does not have.
OTHER_METHODS = ("collapse_", "koleo_", "sk_", "pc_")
BACKBONE_INPUTS = (
    *("vit/config", "vit/image", "vit/mask", "vit/local_image", "vit/wide_image"),
    *("swin/config", "swin/image", "swin/mask", "swin/local_image"),
)


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / name) as arrays:
        return dict(arrays)


def method_inputs(key: str) -> bool:
    return key in METHOD_INPUTS or key.startswith(("fifo_push_", *OTHER_METHODS))


def single(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def method_numbers(golden: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Computes the expected arrays of method.npz from its inputs, by name."""
    computed = {}
    rows, anchors = single(golden["assign_memory"]), jnp.asarray(golden["assign_anchors"])
    u = single(golden["assign_u"])
    sops = {}
    for pool in prototypes.POOLS:
        supports = golden[f"assign_supports_{pool}"].shape[1] - 1
        found = prototypes.find_supports(rows, anchors, supports, MESH, pool=pool)
        computed[f"assign_supports_{pool}"] = found.T
        for mode in prototypes.VOTES:
            built = sops[pool, mode] = prototypes.build_sops(rows, found, mode, SMOOTHING, MESH)
            computed[f"assign_weights_{pool}_{mode}"] = built.votes.T
            for temperature in ("0.1", "0.04"):
                log_p = assignment.log_assignment(u, built, float(temperature))
                computed[f"assign_probs_{pool}_{mode}_{temperature}"] = jnp.exp(log_p)

    for mode in ("one_hot", "smoothed", "similarity"):
        built = sops["non_anchors", mode]
        targets = jnp.exp(assignment.log_assignment(single(golden["cls_teacher"]), built, 0.04))

        def cls(student: jax.Array, targets: jax.Array = targets, built: Any = built) -> jax.Array:
            views = jnp.moveaxis(student, 0, 1), jnp.moveaxis(targets, 0, 1)
            return losses.cls_loss(*views, lambda _, u: assignment.log_assignment(u, built, 0.1))

        computed[f"cls_loss_{mode}"], computed[f"cls_grad_{mode}"] = jax.value_and_grad(cls)(
            single(golden["cls_student"])
        )

    patch_sops = prototypes.build_sops(
        rows, jnp.asarray(golden["mim_anchors"])[None], "smoothed", SMOOTHING, MESH
    )

    def mim(student: jax.Array) -> jax.Array:
        views = [student, single(golden["mim_teacher"]), jnp.asarray(golden["mim_mask"])]
        return losses.mim_loss(
            *(jnp.moveaxis(x, 0, 1) for x in views),
            assign=lambda _, u: assignment.log_assignment(u, patch_sops, 0.1),
            assign_teacher=lambda u: assignment.log_assignment(u, patch_sops, 0.07),
        )

    computed["mim_loss"], computed["mim_grad"] = jax.value_and_grad(mim)(
        single(golden["mim_student"])
    )

    start = single(golden["fifo_0"])
    bank = memory.init_memory(jax.random.key(0), *start.shape, lanes=1)  # one lane: a single ring
    bank = bank._replace(rows=start[None])
    for n in range(1, 1 + sum(key.startswith("fifo_push_") for key in golden)):
        pushed = single(golden[f"fifo_push_{n}"])
        bank = memory.push(bank, pushed, jnp.arange(len(pushed)))
        computed[f"fifo_{n}"], computed[f"fifo_ptr_{n}"] = bank.rows[0], bank.next
    return computed


class Torch:
    """The weights of backbone.npz under the names and in the layouts of the package."""

    def __init__(self, golden: dict[str, np.ndarray], family: str):
        self.golden, self.family = golden, family

    def __call__(self, name: str) -> np.ndarray:
        return self.golden[f"{self.family}/weights/{name}"]

    def linear(self, name: str) -> models.Params:
        return {"kernel": self(f"{name}.weight").T, "bias": self(f"{name}.bias")}

    def norm(self, name: str) -> models.Params:
        return {"scale": self(f"{name}.weight"), "bias": self(f"{name}.bias")}

    def patches(self) -> models.Params:
        kernel = self("patch_embed.proj.weight")  # [D, 3, p, p]
        return {
            "kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel)),
            "bias": self("patch_embed.proj.bias"),
        }

    def block(self, name: str) -> models.Params:
        return {
            "norm1": self.norm(f"{name}.norm1"),
            "qkv": self.linear(f"{name}.attn.qkv"),
            "proj": self.linear(f"{name}.attn.proj"),
            "norm2": self.norm(f"{name}.norm2"),
            "fc1": self.linear(f"{name}.mlp.fc1"),
            "fc2": self.linear(f"{name}.mlp.fc2"),
        }


def stack(layers: list[models.Params]) -> models.Params:
    return jax.tree.map(lambda *x: np.stack(x), *layers)


def vit_params(golden: dict[str, np.ndarray], depth: int) -> models.Params:
    weight = Torch(golden, "vit")
    return {
        "cls_token": weight("cls_token")[0, 0],
        "pos_embed": weight("pos_embed")[0],
        "mask_token": weight("masked_embed")[0],
        "patch_embed": weight.patches(),
        "blocks": stack([weight.block(f"blocks.{i}") for i in range(depth)]),
        "norm": weight.norm("norm"),
    }


def swin_params(golden: dict[str, np.ndarray], depths: tuple[int, ...]) -> models.Params:
    weight = Torch(golden, "swin")

    def block(name: str) -> models.Params:
        table = weight(f"{name}.attn.relative_position_bias_table")
        return weight.block(name) | {"relative_bias": table}

    def stage(i: int, depth: int) -> models.Params:
        name = f"layers.{i}"
        blocks = {"blocks": stack([block(f"{name}.blocks.{j}") for j in range(depth)])}
        if i == len(depths) - 1:
            return blocks
        reduction = {"kernel": weight(f"{name}.downsample.reduction.weight").T}
        norm = weight.norm(f"{name}.downsample.norm")
        return blocks | {"downsample": {"norm": norm, "reduction": reduction}}

    return {
        "patch_embed": weight.patches(),
        "patch_norm": weight.norm("patch_embed.norm"),
        "mask_token": weight("masked_embed")[0],
        "stages": {str(i): stage(i, depth) for i, depth in enumerate(depths)},
        "norm": weight.norm("norm"),
    }


def features(
    golden: dict[str, np.ndarray],
    family: str,
    settings: dict[str, Any],
    image_size: int,
    backbone: models.Params,
) -> Callable[..., list[jax.Array]]:
    """Returns a function of the name of an image in the file."""
    config = paper()
    config.model.update(settings | dict(family=family, size="custom", dtype="float32"))
    config.head.update(dict(hidden=8, dim=8))
    model = models.build(config, image_size)
    params = model.init(jax.random.key(0)) | {"backbone": jax.tree.map(jnp.asarray, backbone)}

    def tokens(image: str, **options: Any) -> list[jax.Array]:
        # The images of the file are normalized: this inverts the normalization of the package.
        pixels = golden[f"{family}/{image}"].transpose(0, 2, 3, 1)
        pixels = (pixels * np.array(models.STD) + np.array(models.MEAN)) * 255
        return model.features(params, single(pixels), **options)

    return tokens


def backbone_numbers(golden: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Computes the expected arrays of backbone.npz from its inputs, by name."""
    image_size, patch, width, depth, heads = (int(x) for x in golden["vit/config"])
    size = dict(width=width, depth=depth, heads=heads, patch=patch)
    vit = features(golden, "vit", size, image_size, vit_params(golden, depth))
    last = vit("image", last=2)

    image_size, patch, width, window = (int(x) for x in golden["swin/config"])
    assert patch == 4
    size = dict(width=width, window=window, stage_depths=(2, 2, 2, 2), stage_heads=(1, 2, 3, 6))
    swin = features(golden, "swin", size, image_size, swin_params(golden, (2, 2, 2, 2)))

    steps = len(golden["schedule/lr"])
    lr = schedules.learning_rate(5e-4, 1e-6, steps // 3, steps)
    step = jnp.arange(steps)
    return {
        "vit/tokens": vit("image")[0],
        "vit/tokens_masked": vit("image", mask=jnp.asarray(golden["vit/mask"]))[0],
        "vit/local_tokens": vit("local_image")[0],
        "vit/wide_tokens": vit("wide_image")[0],
        "vit/last2_0": last[0],
        "vit/last2_1": last[1],
        "swin/tokens": swin("image")[0],
        "swin/tokens_masked": swin("image", mask=jnp.asarray(golden["swin/mask"]))[0],
        "swin/local_tokens": swin("local_image")[0],
        "schedule/lr": lr(step),
        "schedule/wd": schedules.cosine((0.04, 0.4), steps)(step),
        "schedule/momentum": schedules.cosine((0.994, 1.0), steps)(step),
    }


def difference(key: str, expected: np.ndarray, got: jax.Array) -> str | None:
    """Returns a message if a computed array is not as expected, or None."""
    if expected.shape != got.shape:
        return f"{key}: shape {got.shape}, expected {expected.shape}"
    if np.issubdtype(expected.dtype, np.integer):
        return None if np.array_equal(expected, got) else f"{key}: indices differ"
    error = float(np.abs(np.asarray(got, np.float64) - expected).max())
    tolerance = BACKBONE_TOLERANCE
    if not key.startswith(("vit/", "swin/")):
        tolerance = METHOD_TOLERANCE * float(np.abs(expected).max())
    return None if error <= tolerance else f"{key}: off by {error:.2e}, allowed {tolerance:.2e}"


def differences(golden: dict[str, np.ndarray], computed: dict[str, jax.Array]) -> list[str]:
    """Returns messages about expected arrays, except inputs, that are not computed or differ."""
    found = []
    for key, expected in golden.items():
        if method_inputs(key) or key in BACKBONE_INPUTS or "/weights/" in key:
            continue
        if key not in computed:
            found.append(f"{key}: not computed")
        elif wrong := difference(key, expected, computed[key]):
            found.append(wrong)
    return found


@functools.cache
def computed_numbers(name: str) -> dict[str, jax.Array]:
    return NUMBERS[name](load(name))


NUMBERS = {"method.npz": method_numbers, "backbone.npz": backbone_numbers}
NAMES = ["method.npz", "backbone.npz"]


@pytest.mark.medium
@pytest.mark.parametrize("name", NAMES)
def test_every_number(name):
    assert differences(load(name), computed_numbers(name)) == []


@pytest.mark.medium
@pytest.mark.parametrize("name", NAMES)
def test_any_changed_number_fails(name):
    """Changes each expected array in turn: every change must be noticed."""
    golden, computed = load(name), computed_numbers(name)
    for key in computed:
        changed = np.array(golden[key])
        if np.issubdtype(changed.dtype, np.integer):
            changed.flat[-1] += 1
        else:
            changed.flat[-1] += 1e-3 * max(1.0, np.abs(changed).max())
        found = differences(golden | {key: changed}, computed)
        assert [line.split(":")[0] for line in found] == [key]
