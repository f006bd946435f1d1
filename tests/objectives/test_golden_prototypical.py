"""DINO, iBOT, DINOv2's losses and the marginals give the numbers of the authors' codes.

The golden files hold logits. They are the embeddings here, and the prototypes are the unit vectors
of the axes, so that the whole objective computes with them.
"""

from typing import Any

import golden_numbers
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from golden_numbers import Found, differences, unnoticed

from sop_jax.config import paper
from sop_jax.objectives.losses import cls_loss, mim_loss
from sop_jax.objectives.methods import method_of
from sop_jax.objectives.objective import Objective, Outputs
from sop_jax.objectives.prototypical.marginals import (
    centering,
    marginal,
    probability_centering,
    sinkhorn_offset,
)
from sop_jax.parallel.mesh import make_mesh
from sop_jax.schedules import Length

pytestmark = pytest.mark.medium

TOLERANCE = 1e-5
FAMILY = golden_numbers.load("family.npz")
METHOD = golden_numbers.load("method.npz")


def single(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def by_image(x: np.ndarray) -> jax.Array:
    """Returns an array [V B ...] as [B V ...]."""
    return single(x).swapaxes(0, 1)


def by_view(x: Any) -> np.ndarray:
    return np.swapaxes(x, 0, 1)


def axes(count: int) -> dict[str, jax.Array]:
    """Returns prototypes whose logits are the embeddings themselves."""
    return {"direction": jnp.eye(count)}


def outputs(cls: np.ndarray, patches: np.ndarray | None = None) -> Outputs:
    batch = cls.shape[1]
    given = jnp.zeros((batch, 2, 0, 1)) if patches is None else by_image(patches)
    return Outputs(by_image(cls), given, jnp.zeros((batch, len(cls), 1)), given)


def objective(method: str, views: int, batch: int, prototypes: int, masked: int = 0) -> Objective:
    config: ml_collections.ConfigDict = paper()
    config.method = method
    config.batch_size = batch
    config.augment.local_crops = views - 2
    config.mask.ratio = (1.0, 1.0)  # every patch may be masked
    config[method].update(prototypes=prototypes, layer="unit", freeze_epochs=0.0)
    side = round(masked**0.5)
    built = method_of(config).build
    return built(config, prototypes, make_mesh(1), Length(10, 1.0), (side, side))


def ibot(
    section: str, method: str, student: np.ndarray, teacher: np.ndarray, patches: Any = None
) -> dict[str, Found]:
    """Returns the losses, gradients and centers of two batches by their golden names."""
    (_, views, batch, count), found = student.shape, {}
    masked = patches["mask"].shape[-1] if patches else 0
    own = objective(method, views, batch, count, masked)
    params = {"prototypes": {"cls": axes(count)}}
    _, carried = own.init(jax.random.key(0))
    if patches:
        size = patches["student"].shape[-1]
        params["prototypes"]["patch"] = axes(size)
        carried["marginals"]["patch"] = {"center": jnp.zeros(size)}
    for i in range(2):
        now = {
            "student_temperature": 0.1,
            "teacher_temperature": single(FAMILY[f"{section}/{'cls_' if patches else ''}temps"][i]),
        }
        mask = jnp.zeros((batch, 2, 0), bool)
        if patches:
            now["patch_teacher_temperature"] = single(FAMILY[f"{section}/patch_temps"][i])
            mask = jnp.asarray(patches["mask"][i]).swapaxes(0, 1)
        taught = outputs(teacher[i], patches["teacher"][i] if patches else None)
        given = params, params, carried, taught, mask, jnp.arange(batch), now, jax.random.key(0)
        shared, targets, carried = own.teach(*given)
        seen = outputs(student[i], patches["student"][i] if patches else None)

        def loss(cls, own_patches, shared=shared, targets=targets, mask=mask, now=now, seen=seen):
            moved = seen._replace(cls=cls, patches=own_patches)
            return own.loss(params, shared, targets, moved, mask, now)

        (value, terms), (by_cls, by_patch) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
            seen.cls, seen.patches
        )
        found[f"loss_{i}"] = value
        if patches:
            found |= {f"cls_{i}": terms["cls"], f"patch_{i}": terms["mim"]}
            found |= {f"grad_cls_{i}": by_view(by_cls), f"grad_patch_{i}": by_view(by_patch)}
            found[f"center_patch_{i}"] = carried["marginals"]["patch"]["center"]
            found[f"center_cls_{i}"] = carried["marginals"]["cls"]["center"]
        else:
            found |= {f"grad_{i}": by_view(by_cls)}
            found[f"center_{i}"] = carried["marginals"]["cls"]["center"]
    return {f"{section}/{name}": Found(value, TOLERANCE) for name, value in found.items()}


def dino_numbers() -> dict[str, Found]:
    return ibot("dino", "dino", FAMILY["dino/student"], FAMILY["dino/teacher"])


def ibot_numbers() -> dict[str, Found]:
    patches = {name: FAMILY[f"ibot/{name}_patch"] for name in ("student", "teacher")}
    patches["mask"] = FAMILY["ibot/mask"]
    return ibot("ibot", "ibot", FAMILY["ibot/student_cls"], FAMILY["ibot/teacher_cls"], patches)


def dinov2_numbers() -> dict[str, Found]:
    student, teacher = FAMILY["dinov2/student"], single(FAMILY["dinov2/teacher"])
    balance = marginal("sinkhorn", student.shape[-1], 0.9, 3)
    scaled = teacher / 0.05
    offset, _ = balance.offset(lambda u: u / 0.05, teacher, jnp.ones(teacher.shape[:2]), {}, 0.05)
    balanced = jax.nn.softmax(scaled + offset)
    targets = balanced.swapaxes(0, 1)

    def log_p(_: Any, u: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(u / 0.1)

    views, globals_ = len(student), len(teacher)
    images = by_image(student)
    every = cls_loss(images, targets, log_p, pairs=jnp.ones((views, globals_)))
    others, gradient = jax.value_and_grad(lambda u: cls_loss(u, targets, log_p))(images)

    masks, count = FAMILY["dinov2/patch_masks"], int(FAMILY["dinov2/patch_n_masked"])
    rows, length = FAMILY["dinov2/patch_teacher"], len(FAMILY["dinov2/patch_teacher"])
    given = single(rows)[None]
    real = (jnp.arange(length) < count).astype(jnp.float32)[None]  # the rest is padding
    patch_offset, _ = balance.offset(lambda u: u / 0.06, given, real, {}, 0.06)
    where = tuple(np.argwhere(masks).T)

    def placed(x: jax.Array) -> jax.Array:
        """Returns rows [count K] at their places among the patches [views 1 L K]."""
        return jnp.zeros((*masks.shape, x.shape[-1])).at[where].set(x[:count])[:, None]

    def patch_loss(x: jax.Array) -> jax.Array:
        return mim_loss(
            *(placed(x), placed(single(rows)), jnp.asarray(masks)[:, None], log_p),
            lambda u: jax.nn.log_softmax(u / 0.06 + patch_offset),
        )

    value, patch_gradient = jax.value_and_grad(patch_loss)(single(FAMILY["dinov2/patch_student"]))
    found = {
        "sinkhorn": balanced,
        "loss_sum_all_pairs": every * views * globals_,
        "loss_mean_all_pairs": every,
        "loss_mean_other_views": others,
        "grad_mean_other_views": by_view(gradient),
        "patch_sinkhorn": jax.nn.softmax(given[0] / 0.06 + patch_offset)[:count],
        "patch_loss": value,
        "patch_grad": patch_gradient,
    }
    return {f"dinov2/{name}": Found(value, TOLERANCE) for name, value in found.items()}


def marginal_numbers() -> dict[str, Found]:
    batches, temps = single(FAMILY["marginal/logits"]), FAMILY["marginal/temps"]
    momentum, count = float(FAMILY["marginal/momentum"]), batches.shape[-1]
    raw, probable = centering(count, momentum), probability_centering(count, momentum)
    state, probable_state, found = raw.init, probable.init, {}
    for i, (x, temp) in enumerate(zip(batches, temps, strict=True)):
        ones, scaled = jnp.ones((1, len(x))), x / temp
        given = (lambda u, temp=temp: u / temp), x[None], ones
        offset, state = raw.offset(*given, state, temp)
        probable_offset, probable_state = probable.offset(*given, probable_state, temp)

        def balanced(x: jax.Array, *given: Any) -> jax.Array:
            return jax.nn.softmax(x + sinkhorn_offset(x, jnp.ones(len(x)), *given))

        halves = jnp.split(scaled, 2)
        found |= {
            f"centering_probs_{i}": jax.nn.softmax(scaled + offset),
            f"center_{i}": state["center"],
            f"probability_probs_{i}": jax.nn.softmax(scaled + probable_offset),
            f"probability_center_{i}": probable_state["center"],
            f"sinkhorn1_{i}": balanced(scaled, 1, True),
            f"sinkhorn3_{i}": balanced(scaled, 3),
            f"sinkhorn3_probs_{i}": balanced(scaled, 3, True),
            f"sinkhorn3_unsynchronised_{i}": jnp.concatenate([balanced(h, 3) for h in halves]),
        }
    return {f"marginal/{name}": Found(value, TOLERANCE) for name, value in found.items()}


def method_numbers() -> dict[str, Found]:
    scaled = single(METHOD["sk_logits"]) / 0.05
    own = probability_centering(METHOD["pc_logits"].shape[-1], 0.9)
    balanced = jax.nn.softmax(scaled + sinkhorn_offset(scaled, jnp.ones(len(scaled)), 3))
    found, state = {"sk_probs": balanced}, own.init
    for i, x in enumerate(single(METHOD["pc_logits"])):
        offset, state = own.offset(lambda u: u, x[None], jnp.ones((1, len(x))), state, 1.0)
        found |= {f"pc_probs_{i}": jax.nn.softmax(x + offset), f"pc_center_{i}": state["center"]}
    return {name: Found(value, TOLERANCE) for name, value in found.items()}


SECTIONS = {
    "dino": (FAMILY, dino_numbers, ("student", "teacher", "temps", "head/")),
    "ibot": (
        *(FAMILY, ibot_numbers),
        ("student_", "teacher_", "mask", "cls_temps", "patch_temps", "head_"),
    ),
    "dinov2": (
        *(FAMILY, dinov2_numbers),
        ("student", "teacher", "patch_masks", "patch_n_masked", "patch_teacher", "patch_student"),
    ),
    "marginal": (
        *(FAMILY, marginal_numbers),
        ("logits", "temps", "momentum", "prior", "memax", "kl_"),
    ),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_every_number_of_a_section_is_as_expected(name: str) -> None:
    golden, compute, others = SECTIONS[name]
    numbers = compute()
    others = tuple(f"{name}/{other}" for other in others)
    assert set(numbers) == {
        key for key in golden if key.startswith(f"{name}/") and not key.startswith(others)
    }
    assert differences(golden, numbers) == []
    assert unnoticed(golden, numbers) == []


def test_marginals_of_the_method_file() -> None:
    numbers = method_numbers()
    inputs = ("sk_logits", "pc_logits")
    assert set(numbers) == {k for k in METHOD if k.startswith(("sk_", "pc_")) and k not in inputs}
    assert differences(METHOD, numbers) == []
    assert unnoticed(METHOD, numbers) == []
