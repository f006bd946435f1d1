"""The recipes: each loads, can run and names its command; the paper's have its numbers."""

import ast
import pathlib
import re
import runpy
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from sop_jax.check import check_config
from sop_jax.config import paper
from sop_jax.errors import UserError
from sop_jax.objectives.methods import METHODS
from sop_jax.objectives.temperatures import temperatures
from sop_jax.parallel.mesh import make_mesh
from sop_jax.schedules import run_length
from sop_jax.settings import flatten
from sop_jax.training.assemble import assemble
from sop_jax.training.optim import schedules

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(FOLDER.glob("*.py"))
LARGE = [file for file in FILES if file.stem.startswith(("imagenet_", "inat18_"))]
IMAGENET_TRAIN = 1_281_167


def name(file: pathlib.Path) -> str:
    return file.stem


def load(file: pathlib.Path, **changes: Any) -> ml_collections.ConfigDict:
    config = runpy.run_path(str(file))["get_config"]()
    config.update_from_flattened_dict(changes)
    return config


def test_the_recipes_are_there() -> None:
    assert {"digits", "cifar10", "imagenette", "folder"} <= {file.stem for file in FILES}
    assert {file.stem for file in LARGE} == RECIPES.keys() | OTHER_METHODS.keys()
    digits = {f"digits_{name}" for name in METHODS if name != "sop"}
    assert {file.stem for file in FILES if file.stem.startswith("digits_")} == digits


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"sop"}))
def test_a_recipe_for_the_digits_has_the_network_and_the_crops_of_sops(method: str) -> None:
    sop, own = flatten(load(FOLDER / "digits.py")), flatten(load(FOLDER / f"digits_{method}.py"))
    assert own["method"] == method
    for key in sop.keys() - {"augment.local_crops", "model.pool"}:  # CAPI learns from patches only
        if key.startswith(("model.", "augment.", "data.", "eval.")) or key == "steps":
            assert own[key] == sop[key], key
    assert own["epochs"] == sop["epochs"] * (2 if method == "capi" else 1)  # its steps are cheaper


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_recipe_works_and_has_no_unknown_setting(file: pathlib.Path) -> None:
    config = load(file)
    check_config(config)
    assert flatten(config).keys() == flatten(paper()).keys()


@pytest.mark.parametrize("file", FILES, ids=name)
def test_the_header_names_the_command(file: pathlib.Path) -> None:
    header = ast.get_docstring(ast.parse(file.read_text())) or ""
    command = rf"python -m sop_jax\.train --config=configs/{file.name} +--workdir=runs/"
    assert re.search(command, header)


@pytest.mark.parametrize("file", LARGE, ids=name)
def test_the_header_says_what_to_expect_and_what_it_costs(file: pathlib.Path) -> None:
    config, header = load(file), ast.get_docstring(ast.parse(file.read_text())) or ""
    assert f"Expected after {config.epochs:.0f} epochs" in header
    published = config.model.family == "vit" and config.data.name == "imagenet"
    assert ("k-NN 7" in header or config.model.family == "swin") or not published
    assert re.search(r"Cost,\s.*not\s+measured", header)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_recipe_initialises(file: pathlib.Path) -> None:
    config = load(file)
    run = assemble(config, make_mesh(), 50_000)
    model, params, memories = run.model, run.abstract.student, run.abstract.carried
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert jax.tree.leaves(run.abstract.opt_state)
    # Views of both sizes give embeddings of the size that the memories store.
    for size in (config.augment.global_size, config.augment.local_size):
        views = jax.ShapeDtypeStruct((2, size, size, 3), jnp.uint8)
        cls, patches = jax.eval_shape(
            lambda params, views: model.embed(params, views, None, None, True), params, views
        )
        assert cls.shape == (2, config.head.dim)
        tokens = 0 if config.model.family == "resnet" else (size // model.patch) ** 2
        assert patches.shape == (2, tokens, config.head.dim)
    if config.method != "sop":
        return
    assert memories.keys() == {name for name in ("cls", "patch") if config.sop[name].tasks}
    for name in memories:
        lanes, slots, dim = memories[name].rows.shape
        assert (lanes, dim) == (config.batch_size, config.head.dim)
        assert lanes * slots == config.sop[name].memory  # no row is spare


# The recipes of the paper


PAPER = {
    "augment.global_size": 224,
    "augment.local_size": 96,
    "augment.local_crops": 10,
    "mask.kind": "block",
    "mask.ratio": [0.3, 0.3],
    "mask.none": 0.0,
    "mask.start_epochs": 0,
    "model.family": "vit",
    "model.size": "s",
    "model.patch": 16,
    "model.drop_path": 0.1,
    "head.hidden": 2048,
    "head.dim": 256,
    "sop.cls.memory": 65536,
    "sop.cls.anchors": 4096,
    "sop.cls.supports": 8,
    "sop.cls.tasks": 2,
    "sop.cls.weight": 1.0,
    "sop.patch.memory": 8192,
    "sop.patch.anchors": 512,
    "sop.patch.supports": 0,
    "sop.patch.tasks": 1,
    "sop.patch.weight": 1.0,
    "sop.anchors": "random",
    "sop.search_precision": "high",
    "sop.student_temperature": 0.1,
    "sop.teacher_temperature": [0.04, 0.07],
    "optim.weight_decay": [0.04, 0.4],
    "optim.momentum": [0.994, 1.0],
    "eval.crop": 224,
    "eval.knn_k": [10, 20, 100, 200],
    "eval.knn_temperature": 0.07,
}

SWIN = {"model.family": "swin", "model.size": "t", "mask.start_epochs": 50}

RESNET = {
    "model.family": "resnet",
    "model.size": "50",
    "model.drop_path": 0.0,
    "mask.none": 1.0,
    "sop.patch.memory": 0,
    "sop.patch.tasks": 0,
    "augment.global_scale": [0.14, 1.0],  # from DINO, like the next
    "augment.local_scale": [0.05, 0.14],
}

# For each recipe: epochs, batch, learning rate for 256 images, and settings that differ from PAPER.
RECIPES: dict[str, tuple[float, int, float, dict[str, Any]]] = {
    "imagenet_vits16": (800, 1024, 5e-4, {}),
    "imagenet_vitb16": (400, 512, 7.5e-4, {"model.size": "b"}),
    "imagenet_vitl16": (250, 1024, 7.5e-4, {"model.size": "l"}),
    "imagenet_vith14": (
        *(250, 1024, 7.5e-4),
        {"model.size": "h", "model.patch": 14, "augment.local_size": 98},
    ),
    "imagenet_swint14": (300, 1024, 5e-4, SWIN | {"model.window": 14}),
    "imagenet_swint7": (300, 1024, 5e-4, SWIN | {"model.window": 7}),
    "imagenet_resnet50": (100, 1024, 5e-4, RESNET),
}


# The recipes of other methods, likewise: epochs, batch, learning rate and other settings.
IBOT = {
    "mask.ratio": [0.1, 0.5],
    "mask.none": 0.5,
    "optim.momentum": [0.996, 1.0],
    "optim.weight_decay": [0.04, 0.4],
    "optim.clip": 3.0,
    "augment.global_scale": [0.25, 1.0],
    "augment.local_crops": 10,
    "head.hidden": 2048,
    "head.dim": 256,
}
LARGER = {"optim.clip": 0.3, "optim.min_lr": 2e-6, "augment.global_scale": [0.32, 1.0]}


def with_prototypes(method: str, large: bool, vmf: bool) -> tuple[float, int, float, Any]:
    own = {
        "prototypes": 8192 if method == "ibot" else 65536,
        "freeze_epochs": 3.0 if large else 1.0,
        "temperature_warmup_epochs": 50.0 if large else 30.0,
        "teacher_temperature": [0.04, 0.07],
        "layer": "vmf" if vmf else "weight_norm",
        "marginal": "probability_centering" if vmf else "centering",
        "koleo_prototypes": 0.0,
        "koleo_data": 0.0,
    }
    changes = {f"{method}.{key}": value for key, value in own.items()} | {"method": method}
    base = IBOT | (LARGER if large else {})
    return (400, 512, 7.5e-4, base | changes) if large else (800, 1024, 5e-4, base | changes)


OTHER_METHODS: dict[str, tuple[float, int, float, dict[str, Any]]] = {
    "imagenet_dino_vits16": with_prototypes("dino", large=False, vmf=False),
    "imagenet_dino_vmf_vits16": with_prototypes("dino", large=False, vmf=True),
    "imagenet_dino_vmf_vitb16": with_prototypes("dino", large=True, vmf=True),
    "imagenet_dino_vmf_resnet50": (
        *(100, 4096, 0.3),
        {
            "method": "dino",
            "dino.prototypes": 8192,
            "dino.layer": "vmf",
            "dino.marginal": "probability_centering",
            "dino.teacher_temperature": [0.04, 0.07],
            "dino.temperature_warmup_epochs": 50,
            "dino.freeze_epochs": 1,
            "model.family": "resnet",
            "model.size": "50",
            "head.batch_norm": True,
            "head.batch_norm_views": "together",
            "augment.local_crops": 6,
            "augment.global_scale": [0.14, 1.0],
            "augment.local_scale": [0.05, 0.14],
            "optim.kind": "lars",
            "optim.min_lr": 0.0048,
            "optim.weight_decay": [1e-6, 1e-6],
            "optim.momentum": [0.996, 1.0],
            "optim.clip": 0.0,
        },
    ),
    "imagenet_ibot_vits16": with_prototypes("ibot", large=False, vmf=False),
    "imagenet_ibot_vitb16": with_prototypes("ibot", large=True, vmf=False),
    "imagenet_ibot_vmf_vits16": with_prototypes("ibot", large=False, vmf=True),
    "imagenet_ibot_vmf_vitb16": with_prototypes("ibot", large=True, vmf=True),
    "imagenet_massl_vits16": (
        *(800, 128, 5e-4),
        {"method": "massl", "massl.memory": 131072, "massl.block": 16384},
    ),
    "imagenet_carp_decoupled_resnet50": (
        *(100, 1024, 0.45),
        {
            "method": "decoupled",
            "decoupled.loss": "carp",
            "decoupled.prototypes": 65536,
            "decoupled.block": 512,
            "optim.kind": "lars",
            "head.unit": False,
            "head.batch_norm_views": "together",
        },
    ),
    "inat18_msn_vits16": (
        *(300, 1536, 1e-3),
        {
            "method": "msn",
            "msn.prototypes": 8142,
            "msn.prior": "uniform",
            "msn.prior_weight": 1.0,
            "msn.patch_drop": 0.15,
        },
    ),
    "inat18_pmsn_vits16": (
        *(300, 1536, 1e-3),
        {
            "method": "pmsn",
            "pmsn.prototypes": 8142,
            "pmsn.prior": "power",
            "pmsn.prior_weight": 5.0,
            "pmsn.patch_drop": 0.15,
        },
    ),
}


@pytest.mark.parametrize("name", OTHER_METHODS)
def test_the_recipes_of_other_methods_are_their_papers(name: str) -> None:
    flat = flatten(load(FOLDER / f"{name}.py"))
    *schedule, expected = OTHER_METHODS[name]
    assert {key: flat[key] for key in expected} == expected
    assert [flat["epochs"], flat["batch_size"], flat["optim.lr"]] == schedule


@pytest.mark.parametrize("file", [f for f in LARGE if "_vmf_" in f.stem], ids=name)
def test_a_recipe_with_densities_has_variants_with_koleo(file: pathlib.Path) -> None:
    make = runpy.run_path(str(file))["get_config"]
    plain = flatten(make())
    for variant, setting in (("kd", "koleo_data"), ("kp", "koleo_prototypes")):
        changed = flatten(make(variant))
        key = f"{plain['method']}.{setting}"
        assert {k for k in plain if plain[k] != changed[k]} == {key} and changed[key] == 0.1
    assert flatten(make("base")) == plain
    with pytest.raises(UserError, match=r"variant of the recipe is 'kx'; expected one of base, kd"):
        make("kx")


@pytest.mark.parametrize("file", [f for f in LARGE if f.stem in RECIPES], ids=name)
def test_the_imagenet_recipes_are_the_papers(file: pathlib.Path) -> None:
    flat = flatten(load(file))
    *schedule, changes = RECIPES[file.stem]
    expected = PAPER | changes
    assert {key: flat[key] for key in expected} == expected
    assert [flat["epochs"], flat["batch_size"], flat["optim.lr"]] == schedule
    assert flat["steps"] is None


@pytest.mark.parametrize("file", [f for f in LARGE if f.stem in RECIPES], ids=name)
@pytest.mark.parametrize("batch", [None, 256, 4096])
def test_what_follows_from_the_batch_is_derived(file: pathlib.Path, batch: int | None) -> None:
    config = load(file, **({} if batch is None else {"batch_size": batch}))
    check_config(config)
    length = run_length(config, IMAGENET_TRAIN)
    steps, epoch = length
    assert epoch == IMAGENET_TRAIN / config.batch_size
    assert steps == pytest.approx(config.epochs * epoch, abs=1)

    plan = schedules(config, length) | temperatures(config.sop, length)
    warmup = round(config.optim.warmup_epochs * epoch)
    rates = np.asarray(plan["lr"](np.arange(steps)))
    assert rates[0] == 0
    assert rates.max() == pytest.approx(config.optim.lr * config.batch_size / 256)
    assert abs(int(rates.argmax()) - warmup) <= 1
    assert rates[-1] == pytest.approx(config.optim.min_lr, rel=0.01)

    heating = round(config.sop.temperature_warmup_epochs * epoch)
    temperature = np.asarray(plan["teacher_temperature"](np.arange(steps)))
    assert temperature[0] == pytest.approx(0.04) and temperature[-1] == pytest.approx(0.07)
    assert (temperature < 0.0699).sum() == pytest.approx(heating, rel=0.02)
    for setting, ends in (("momentum", (0.994, 1.0)), ("weight_decay", (0.04, 0.4))):
        assert [float(plan[setting](step)) for step in (0, steps)] == pytest.approx(ends)
