"""Compares every expected number of the golden files with what the package computes.

SOP_GOLDEN_DIR names a folder with other seeds and sizes; all sizes come from the arrays.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sop_jax import models, optim
from sop_jax.config import paper
from sop_jax.mesh import make_mesh
from sop_jax.sop import assignment, losses, memory, prototypes

FOLDER = Path(os.environ.get("SOP_GOLDEN_DIR", Path(__file__).parent / "golden"))
SMOOTHING = 0.1
MESH = make_mesh(1)
METHOD_TOLERANCE = 1e-5  # of the largest magnitude
BACKBONE_TOLERANCE = 2e-4  # absolute, outputs of unit scale

METHOD_INPUTS = (
    *("assign_memory", "assign_anchors", "assign_u", "cls_student", "cls_teacher"),
    *("mim_student", "mim_teacher", "mim_mask", "mim_anchors", "fifo_0"),
)
# Numbers of methods that are not in the package.
OTHER_METHODS = ("collapse_", "koleo_", "sk_", "pc_")
BACKBONE_INPUTS = ("vit/config", "vit/image", "vit/mask", "vit/local_image", "vit/wide_image")


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / name) as arrays:
        return dict(arrays)


def method_inputs(key: str) -> bool:
    return key in METHOD_INPUTS or key.startswith(("fifo_push_", *OTHER_METHODS))


def single(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def method_numbers(golden: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """What the package makes of the inputs of method.npz, by the names of the expected arrays."""
    computed = {}
    rows, anchors = single(golden["assign_memory"]), jnp.asarray(golden["assign_anchors"])
    u = single(golden["assign_u"])
    sops = {}
    for pool in prototypes.POOLS:
        supports = golden[f"assign_supports_{pool}"].shape[1] - 1
        found = prototypes.find_supports(rows, anchors, supports, MESH, pool=pool)
        computed[f"assign_supports_{pool}"] = found
        for mode in prototypes.VOTES:
            built = sops[pool, mode] = prototypes.build_sops(rows, found, mode, SMOOTHING, MESH)
            computed[f"assign_weights_{pool}_{mode}"] = built.votes
            for temperature in ("0.1", "0.04"):
                log_p = assignment.log_assignment(u, built, float(temperature))
                computed[f"assign_probs_{pool}_{mode}_{temperature}"] = jnp.exp(log_p)

    for mode in ("one_hot", "smoothed", "similarity"):
        built = sops["non_anchors", mode]
        targets = jnp.exp(assignment.log_assignment(single(golden["cls_teacher"]), built, 0.04))
        computed[f"cls_loss_{mode}"], computed[f"cls_grad_{mode}"] = jax.value_and_grad(
            losses.cls_loss
        )(single(golden["cls_student"]), targets, built, 0.1)

    patch_sops = prototypes.build_sops(
        rows, jnp.asarray(golden["mim_anchors"])[:, None], "smoothed", SMOOTHING, MESH
    )
    computed["mim_loss"], computed["mim_grad"] = jax.value_and_grad(losses.mim_loss)(
        single(golden["mim_student"]),
        single(golden["mim_teacher"]),
        jnp.asarray(golden["mim_mask"]),
        patch_sops,
        0.1,
        0.07,
    )

    start = single(golden["fifo_0"])
    bank = memory.init_memory(jax.random.key(0), *start.shape, lanes=1)  # an undivided ring
    bank = bank._replace(rows=start[None])
    for n in range(1, 1 + sum(key.startswith("fifo_push_") for key in golden)):
        pushed = single(golden[f"fifo_push_{n}"])
        bank = memory.push(bank, pushed, jnp.arange(len(pushed)))
        computed[f"fifo_{n}"], computed[f"fifo_ptr_{n}"] = bank.rows[0], bank.next
    return computed


def vit_params(golden: dict[str, np.ndarray], depth: int) -> models.Params:
    """The weights of backbone.npz under the names and layouts of the package."""

    def weight(name: str) -> np.ndarray:
        return golden[f"vit/weights/{name}"]

    def linear(name: str) -> models.Params:
        return {"kernel": weight(f"{name}.weight").T, "bias": weight(f"{name}.bias")}

    def norm(name: str) -> models.Params:
        return {"scale": weight(f"{name}.weight"), "bias": weight(f"{name}.bias")}

    def block(i: int) -> models.Params:
        part = f"blocks.{i}"
        return {
            "norm1": norm(f"{part}.norm1"),
            "qkv": linear(f"{part}.attn.qkv"),
            "proj": linear(f"{part}.attn.proj"),
            "norm2": norm(f"{part}.norm2"),
            "fc1": linear(f"{part}.mlp.fc1"),
            "fc2": linear(f"{part}.mlp.fc2"),
        }

    patches = weight("patch_embed.proj.weight")  # [D, 3, p, p]
    return {
        "cls_token": weight("cls_token")[0, 0],
        "pos_embed": weight("pos_embed")[0],
        "mask_token": weight("masked_embed")[0],
        "patch_embed": {
            "kernel": patches.transpose(2, 3, 1, 0).reshape(-1, len(patches)),
            "bias": weight("patch_embed.proj.bias"),
        },
        "blocks": jax.tree.map(lambda *x: np.stack(x), *[block(i) for i in range(depth)]),
        "norm": norm("norm"),
    }


def backbone_numbers(golden: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """What the package makes of the inputs of backbone.npz."""
    image_size, patch, width, depth, heads = (int(x) for x in golden["vit/config"])
    config = paper()
    size = dict(size="custom", width=width, depth=depth, heads=heads, patch=patch)
    config.model.update(size | dict(dtype="float32"))
    config.head.update(dict(hidden=8, dim=8))
    model = models.build(config, image_size)
    backbone = jax.tree.map(jnp.asarray, vit_params(golden, depth))
    params = model.init(jax.random.key(0)) | {"backbone": backbone}

    def tokens(image: str, **options) -> list[jax.Array]:
        # The images of the file are normalised already: undo what the package does to pixels.
        pixels = golden[f"vit/{image}"].transpose(0, 2, 3, 1)
        pixels = (pixels * np.array(models.STD) + np.array(models.MEAN)) * 255
        return model.features(params, single(pixels), **options)

    last = tokens("image", last=2)
    steps = len(golden["schedule/lr"])
    lr = optim.learning_rate(5e-4, 1e-6, steps // 3, steps)
    step = jnp.arange(steps)
    return {
        "vit/tokens": tokens("image")[0],
        "vit/tokens_masked": tokens("image", mask=jnp.asarray(golden["vit/mask"]))[0],
        "vit/local_tokens": tokens("local_image")[0],
        "vit/wide_tokens": tokens("wide_image")[0],
        "vit/last2_0": last[0],
        "vit/last2_1": last[1],
        "schedule/lr": lr(step),
        "schedule/wd": optim.cosine((0.04, 0.4), steps)(step),
        "schedule/momentum": optim.cosine((0.994, 1.0), steps)(step),
    }


def difference(key: str, expected: np.ndarray, got: jax.Array) -> str | None:
    """What is wrong with a computed array, or None."""
    if expected.shape != got.shape:
        return f"{key}: shape {got.shape}, expected {expected.shape}"
    if np.issubdtype(expected.dtype, np.integer):
        return None if np.array_equal(expected, got) else f"{key}: indices differ"
    error = float(np.abs(np.asarray(got, np.float64) - expected).max())
    tolerance = BACKBONE_TOLERANCE
    if not key.startswith("vit/"):
        tolerance = METHOD_TOLERANCE * float(np.abs(expected).max())
    return None if error <= tolerance else f"{key}: off by {error:.2e}, allowed {tolerance:.2e}"


def differences(
    golden: dict[str, np.ndarray], computed: dict[str, jax.Array], skip: tuple[str, ...] = ()
) -> list[str]:
    """Every expected array that has no computed one, or another; inputs are left out."""
    found = []
    for key, expected in golden.items():
        if method_inputs(key) or key in BACKBONE_INPUTS or key.startswith(("vit/weights/", *skip)):
            continue
        if key not in computed:
            found.append(f"{key}: not computed")
        elif wrong := difference(key, expected, computed[key]):
            found.append(wrong)
    return found


def test_method():
    golden = load("method.npz")
    assert differences(golden, method_numbers(golden)) == []


def test_backbone_and_schedules():
    golden = load("backbone.npz")
    assert differences(golden, backbone_numbers(golden), skip=("swin/",)) == []


@pytest.mark.parametrize("name", ["method.npz", "backbone.npz"])
def test_any_changed_number_fails(name):
    """Changes each expected number array in turn: none may pass unnoticed."""
    golden = load(name)
    numbers = method_numbers if name == "method.npz" else backbone_numbers
    computed = numbers(golden)
    for key in computed:
        changed = np.array(golden[key])
        if np.issubdtype(changed.dtype, np.integer):
            changed.flat[-1] += 1
        else:
            changed.flat[-1] += 1e-3 * max(1.0, np.abs(changed).max())
        found = differences(golden | {key: changed}, computed, skip=("swin/",))
        assert [line.split(":")[0] for line in found] == [key]
