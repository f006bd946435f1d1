"""The settings that methods with prototypes share: bad input is named before the long work."""

import io
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest

from sop_jax.check import check_config, without_use
from sop_jax.errors import UserError
from sop_jax.objectives.prototypical.settings import prior_of
from sop_jax.objectives.temperatures import temperatures
from sop_jax.parallel.mesh import make_mesh
from sop_jax.recipes import digits
from sop_jax.schedules import Length, by_epoch
from sop_jax.training.assemble import assemble


def changed(method: str, **changes: Any) -> ml_collections.ConfigDict:
    config = digits()
    config.method = method
    config.update_from_flattened_dict(changes)
    return config


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "one prototype": ("dino", {"dino.prototypes": 1}, r"dino\.prototypes is 1; expected 2 or more"),
    "one patch prototype": (
        *("ibot", {"ibot.patch_prototypes": 1}),
        r"ibot\.patch_prototypes is 1; expected 2 or more, or 0",
    ),
    "one view": ("dino", {"augment.global_crops": 1}, r"augment\.global_crops is 1; expected 2"),
    "Sinkhorn on one image": (
        *("dino", {"dino.marginal": "sinkhorn", "batch_size": 1}),
        r"dino\.marginal is sinkhorn, but batch_size is 1",
    ),
    "microbatches with a prior": (
        *("dino", {"dino.prior": "uniform", "accumulate": 2}),
        r"accumulate is 2, but dino\.prior is uniform, which compares all images",
    ),
    "microbatches with KoLeo": (
        *("ibot", {"ibot.koleo_data": 0.1, "accumulate": 2}),
        r"accumulate is 2, but ibot\.koleo_data is 0\.1",
    ),
    "an unknown prior": (
        *("dino", {"dino.prior": "unifrom"}),
        r"dino\.prior is 'unifrom'; expected one of none, uniform, power, or a \.npy file",
    ),
    "no prior file": ("dino", {"dino.prior": "nothing.npy"}, r"nothing\.npy cannot be read"),
    "a prior near zero": (
        *("dino", {"dino.prior": "power", "dino.prior_exponent": 12.0}),
        r"dino\.prior_exponent is 12, .* expected a smaller one",
    ),
    "embeddings of any length": ("dino", {"head.unit": False}, r"head\.unit is false"),
    "densities on a circle": (
        *("dino", {"dino.layer": "vmf", "head.dim": 2}),
        r"dino\.layer is vmf, but head\.dim is 2; expected 3 or more",
    ),
    "partitions of one": (
        *("dino", {"dino.koleo_prototypes": 0.1, "dino.koleo_partition": 1}),
        r"dino\.koleo_partition is 1; expected 2 or more",
    ),
    "patches that are never masked": (
        *("ibot", {"mask.none": 1.0}),
        r"mask\.none is 1 .* none of the 16 patches .* ibot\.patch_weight is 1, .*"
        r"--config\.mask\.none=0\.5 .*, or --config\.ibot\.patch_weight=0",
    ),
    "masks of less than a patch": (
        *("ibot", {"mask.ratio": (0.0, 0.06)}),
        r"mask\.ratio \(0\.0, 0\.06\), so that none of the 16 patches",
    ),
    "decoupled patches that are never masked": (
        *("decoupled", {"decoupled.loss": "ibot", "mask.ratio": (0.0, 0.0)}),
        r"mask\.ratio \(0\.0, 0\.0\), .* decoupled\.patch_weight is 1",
    ),
    "patches of SOP that are never masked": (
        *("sop", {"mask.none": 1.0}),
        r"mask\.none is 1 .* sop\.patch\.tasks is 1, .*or --config\.sop\.patch\.tasks=0",
    ),
    "an average of students": (
        *("swav", {"swav.prototypes": 64}),
        r"optim\.momentum is .* set --config\.optim\.momentum=0\.,0\.",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_named_with_a_remedy(case: str) -> None:
    method, changes, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        check_config(changed(method, **changes))


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (np.full((8, 1), 1 / 8), r"an array of float64 with shape \(8, 1\); expected 8 real"),
        (np.float64(1), r"with shape \(\); expected 8 real numbers"),
        (np.array(["a"] * 8), "expected 8 real numbers in one dimension"),
        (np.full(8, 1 / 8, complex), "expected 8 real numbers in one dimension"),
        (np.full(8, 0.2), r"sums to 1\.6; expected 1"),
        (np.full(7, 1 / 7), "has 7 entries; expected one for each of the 8 prototypes"),
        (np.array([1 - 1e-60] + [1e-60] * 7), "expected a share greater than 0 in float32"),
    ],
    ids=["column", "number", "words", "complex", "sum", "too few", "tiny"],
)
def test_a_file_that_is_no_prior_is_an_error(
    prior: np.ndarray, message: str, tmp_path: pathlib.Path
) -> None:
    np.save(tmp_path / "prior.npy", prior)
    changes = {"dino.prior": str(tmp_path / "prior.npy"), "dino.prototypes": 8}
    with pytest.raises(UserError, match=message):
        check_config(changed("dino", **changes))


def test_files_that_numpy_did_not_save_are_errors(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "prior.npy"
    several = io.BytesIO()
    np.savez(several, a=np.ones(8))
    for content, message in (
        (b"", "cannot be read"),
        (b"text", "cannot be read"),
        (several.getvalue(), "has several arrays; expected one"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            check_config(changed("dino", **{"dino.prior": str(path), "dino.prototypes": 8}))


def test_a_prior_from_a_file_is_used(tmp_path: pathlib.Path) -> None:
    shares = np.array([0.5, 0.25, 0.25])
    np.save(tmp_path / "prior.npy", shares)
    changes = {"dino.prior": str(tmp_path / "prior.npy"), "dino.prototypes": 3}
    found = prior_of(changed("dino", **changes))
    assert found is not None
    np.testing.assert_array_equal(found, shares)


@pytest.mark.parametrize("name", ["ibot.prototypes", "ibot.patch_prototypes"])
def test_prototypes_that_cannot_fit_are_named_before_compilation(name: str) -> None:
    config = changed("ibot", **{name: 10**12})
    check_config(config)
    with pytest.raises(UserError, match=r"ibot\.prototypes is .* GiB .* use fewer"):
        assemble(config, make_mesh(1), 1000)


def test_a_loss_of_weight_zero_needs_no_masks() -> None:
    check_config(changed("ibot", **{"mask.none": 1.0, "ibot.patch_weight": 0.0}))
    check_config(changed("sop", **{"mask.none": 1.0, "sop.patch.tasks": 0}))


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_prototypes_of_patches_exist_only_for_a_loss(weight: float) -> None:
    own = {"ibot.patch_prototypes": 20, "ibot.patch_weight": weight, "ibot.prototypes": 24}
    run = assemble(changed("ibot", **own), make_mesh(1), 1000)
    levels = run.abstract.student["objective"]["prototypes"]
    assert {name: len(level["direction"]) for name, level in levels.items()} == (
        {"cls": 24, "patch": 20} if weight else {"cls": 24}
    )
    assert ("patch_teacher_temperature" in run.objective.schedules) == (weight > 0)


@pytest.mark.parametrize("loss", ["carp", "dino"])
def test_decoupled_prototypes_of_patches_count_only_for_their_loss(loss: str) -> None:
    own = {"decoupled.patch_prototypes": 10**12, "decoupled.loss": loss}
    small = {"decoupled.prototypes": 24, "decoupled.block": 6}
    run = assemble(changed("decoupled", **own, **small), make_mesh(1), 1000)
    assert "patch_teacher_temperature" not in run.objective.schedules


def test_epochs_begin_at_their_first_step() -> None:
    for epoch in range(1, 400):
        value = jax.jit(by_epoch(lambda index: index, float(epoch)))
        for index in (1, 3, 7):
            assert value(index * epoch) == index, epoch
            assert value(index * epoch - 1) == index - 1, epoch


def test_the_teachers_temperature_changes_between_epochs_only() -> None:
    section = changed("dino").dino
    section.temperature_warmup_epochs = 4.0
    sharp = temperatures(section, Length(steps=100, epoch=10.0))["teacher_temperature"]
    found = [float(sharp(step)) for step in range(60)]
    np.testing.assert_allclose(found[::10], [0.04, 0.05, 0.06, 0.07, 0.07, 0.07], rtol=1e-6)
    assert all(len(set(found[i : i + 10])) == 1 for i in range(0, 60, 10))


OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "local views": ("capi", {}, r"augment\.local_crops is 4, but capi does not see local views"),
    "nothing hidden": (
        *("capi", {"augment.local_crops": 0, "mask.ratio": (0.0, 0.0)}),
        r"is ever masked, but capi learns from hidden .* --config\.mask\.ratio=0\.65,0\.65",
    ),
    "less than a patch hidden": (
        *("capi", {"augment.local_crops": 0, "mask.ratio": (0.0, 0.06)}),
        r"none of the 16 patches of a view is ever masked, but capi learns from hidden",
    ),
    "hidden late": (
        *("capi", {"augment.local_crops": 0, "mask.start_steps": 10}),
        r"masks start after the first step",
    ),
    "one image": (
        *("capi", {"augment.local_crops": 0, "batch_size": 1}),
        r"batch_size is 1, but Sinkhorn-Knopp balances each position",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_capi_cannot_use_is_refused(case: str) -> None:
    method, changes, message = OTHERS[case]
    with pytest.raises(UserError, match=message):
        check_config(changed(method, **changes))


def test_a_memory_that_cannot_fit_is_named_before_compilation() -> None:
    config = changed("massl", **{"massl.memory": 10**12, "massl.block": 1024})
    check_config(config)
    with pytest.raises(UserError, match=r"massl\.memory is 1000000000000: .* GiB .* use fewer"):
        assemble(config, make_mesh(1), 1000)


def test_decoupled_prototypes_need_patches_only_for_their_loss() -> None:
    resnet = {"model.family": "resnet", "model.size": "50", "augment.global_size": 32}
    resnet |= {"eval.resize": 32, "eval.crop": 32, "augment.local_size": 32}
    check_config(changed("decoupled", **resnet, **{"decoupled.loss": "dino"}))
    with pytest.raises(UserError, match=r"decoupled\.loss is ibot, but .*resnet has no patches"):
        check_config(changed("decoupled", **resnet, **{"decoupled.loss": "ibot"}))


def test_decoupled_settings_that_only_learnt_prototypes_use_are_refused() -> None:
    own = {"decoupled.loss": "ibot", "decoupled.patch_weight": 0.0}
    reasons = without_use(changed("decoupled", **own))
    for key in ("patch_prototypes", "layer", "freeze_epochs", "koleo_prototypes"):
        assert "patch_weight is 0" in reasons[f"decoupled.{key}"]
    reasons = without_use(changed("decoupled", **{"decoupled.loss": "ibot"}))
    assert "decoupled.layer" not in reasons
