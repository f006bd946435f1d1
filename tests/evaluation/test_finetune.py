"""Fine-tuning: its recipes, one step of training, and whole runs on digits."""

import json
import os
import pathlib
import signal
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import processes
import pytest
from PIL import Image
from runs import APART, make_run
from small import small_config

from sop_jax import evaluate, schedules
from sop_jax.convert import convert
from sop_jax.data import transfer
from sop_jax.data.subsets import Subset
from sop_jax.errors import Interrupted, UserError
from sop_jax.evaluation import finetune, fit
from sop_jax.evaluation.finetune import TASK
from sop_jax.evaluation.tables import text_of
from sop_jax.evaluation.task import Subject
from sop_jax.evaluation.tools import Toolbox
from sop_jax.models import build
from sop_jax.parallel.mesh import make_mesh, replicated
from sop_jax.training.layer_decay import layer_scales

METRICS = {"top1": "top-1", "mean_per_class": "mean per class"}
QUICK = dict(
    batch_size=48,
    epochs=4,
    warmup_epochs=1,
    lr=(2e-3,),
    magnitude=0.0,
    erase=0.0,
    mixup=0.0,
    cutmix=0.0,
    head_scale=1.0,
    drop_path=0.0,
    layer_decay=1.0,
    scale=(0.5, 1.0),
    threads=0,
)


def run_config(**changes: Any) -> ml_collections.ConfigDict:
    """Returns the settings of a small run on digits."""
    config = small_config(
        data=dict(source="digits", workers=0, threads=0),
        augment=dict(global_size=16, local_size=8),
        eval=dict(resize=16, crop=16, batch_size=128),
    )
    config.model.update(width=32, heads=2, init_std=0.1)
    config.head.update(hidden=24)
    config.update_from_flattened_dict(changes)
    return config


def settings_for(**changes: Any) -> ml_collections.ConfigDict:
    settings = TASK.settings()
    settings.update(changes)
    return settings


def subject(config: ml_collections.ConfigDict) -> Subject:
    model = build(config, config.augment.global_size)
    params = jax.jit(model.init, out_shardings=replicated(make_mesh()))(jax.random.key(0))
    return Subject("a network", config, model, params, "0", 0)


def tune(config: Any = None, tools: Any = None, **changes: Any) -> tuple[dict, Any]:
    """Returns the result of the task on digits, and its settings."""
    config = config or run_config()
    settings = settings_for(**QUICK | changes)
    inputs = TASK.open(config, settings, {})
    tools = tools or Toolbox(subject(config), make_mesh(), shown=False)
    return TASK.run(subject(config), inputs, settings, tools), settings


# Recipes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("s", dict(recipe="vits", epochs=200, layer_decay=0.75, drop_path=0.1, warmup_epochs=20)),
        ("b", dict(recipe="vitb", epochs=100, layer_decay=0.65, drop_path=0.2, warmup_epochs=20)),
        ("l", dict(recipe="vitl", epochs=50, layer_decay=0.75, drop_path=0.4, warmup_epochs=5)),
        ("custom", dict(recipe="vits", lr=(8e-4, 9e-4, 1e-3, 2e-3), min_lr=1e-6)),
    ],
)
def test_the_recipe_is_that_of_the_size(size, expected):
    settings = settings_for()
    finetune.complete(run_config(**{"model.size": size}), settings)
    assert {name: settings[name] for name in expected} == expected
    assert settings.validate_interpolation == "bilinear" and settings.batch_size == 1024


@pytest.mark.parametrize("recipe", finetune.RECIPES)
def test_every_recipe_is_complete_and_valid(recipe):
    settings = settings_for(recipe=recipe)
    finetune.complete(run_config(), settings)
    for name, rule in TASK.rules.items():
        value = settings[name]
        assert rule.fits(list(value) if isinstance(value, tuple) else value), name
    assert set(settings) == set(TASK.rules)


def test_settings_change_a_recipe():
    settings = settings_for(recipe="cars", epochs=7, lr=(1e-4, 2e-4))
    finetune.complete(run_config(), settings)
    assert (settings.epochs, settings.lr, settings.copies) == (7, (1e-4, 2e-4), 3)
    assert settings.set == "cars" and settings.head_layers == 0


def test_an_unknown_recipe_is_answered_with_those_that_exist():
    assert "semi1" in TASK.rules["recipe"].expected
    assert all(name in TASK.rules["recipe"].expected for name in finetune.RECIPES)
    assert not TASK.rules["recipe"].fits("vitg")


def test_the_documented_recipes_and_sets_are_those_of_the_code():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "finetuning.md").read_text()
    rows = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in row] for row in rows]
    recipes = [row for row in cells if len(row) == 7]
    named = [name.strip("` ") for row in recipes for name in row[0].split(",")]
    assert named == list(finetune.RECIPES)
    for names, epochs, batch, rates, decay, drop, labels in recipes:
        for name in names.split(","):
            recipe = finetune.RECIPES[name.strip("` ")]
            assert (int(epochs), int(batch)) == (recipe["epochs"], recipe["batch_size"])
            given = tuple(float(rate) for rate in rates.removesuffix(" x batch / 512").split(","))
            assert given == recipe["lr"] and ("512" in rates) == (recipe["lr_batch"] == 512)
            assert float(decay.replace("none", "1")) == recipe["layer_decay"]
            assert float(drop) == recipe["drop_path"]
            assert float(labels.replace("all", "100").strip("% ")) == recipe["percent"]
    sets = [[cell.strip("`") for cell in row] for row in cells if len(row) == 5]
    assert sets == [
        [name, own.tfds or "not in TFDS", own.train, own.test, METRICS[own.metric]]
        for name, own in transfer.SETS.items()
    ]


# Learning rates


def test_the_schedule_of_the_full_recipe_is_that_of_beit():
    settings = settings_for(recipe="vits", epochs=6, warmup_epochs=2)
    finetune.complete(run_config(), settings)
    found = finetune.schedule_of(settings, 4e-3, 5)
    expected = schedules.learning_rate(4e-3, 1e-6, 10, 30)
    steps = jnp.arange(30)
    np.testing.assert_array_equal(jax.vmap(found)(steps), jax.vmap(expected)(steps))


def test_the_schedule_of_deit_changes_by_epoch():
    """The numbers are those of timm's CosineLRScheduler, computed by hand."""
    rate = finetune.by_epoch(1e-6, 1e-3, 1e-5, 2, 8, 10)
    assert rate(0) == pytest.approx(1e-6) == rate(9)
    assert rate(10) == pytest.approx(1e-6 + (1e-3 - 1e-6) / 2) == rate(19)
    half = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + np.cos(np.pi * 2 / 8))
    assert rate(20) == pytest.approx(half) and rate(79) < rate(69) < half


def test_rates_of_deit_are_for_512_images_and_never_rise_above_their_peak():
    settings = settings_for(recipe="semi1", batch_size=256)
    finetune.complete(run_config(), settings)
    rate = finetune.schedule_of(settings, 5e-6, 3)
    rates = np.array([rate(step) for step in range(0, 3000, 3)])
    assert rates.max() == pytest.approx(2.5e-6)


# The network


@pytest.mark.medium
def test_the_classifier_follows_the_layers_of_the_head():
    config = run_config()
    params = subject(config).params
    features = jax.random.normal(jax.random.key(1), (5, 32))
    for layers in (0, 1, 2):
        trained = finetune.trained_part(params, layers)
        assert set(trained.get("head", {})) == {f"fc{i}" for i in range(1, layers + 1)}
        x = features
        for i in range(1, layers + 1):
            layer = params["head"][f"fc{i}"]
            x = jax.nn.gelu(x @ layer["kernel"] + layer["bias"], approximate=False)
        trained["classifier"] = finetune.classifier(jax.random.key(2), x.shape[1], 7, 1.0)
        expected = x @ trained["classifier"]["kernel"]
        np.testing.assert_allclose(
            finetune.logits_of(trained, features), expected, rtol=2e-5, atol=1e-5
        )


def test_the_new_classifier_is_small():
    found = finetune.classifier(jax.random.key(0), 300, 100, 0.001)
    assert float(found["kernel"].std()) == pytest.approx(2e-5, rel=0.02)
    assert not found["bias"].any()


def problem_for(layers: int = 0, **changes: Any) -> tuple[Any, Any]:
    config = run_config()
    settings = settings_for(**QUICK | {"head_layers": layers} | changes)
    inputs = TASK.open(config, settings, {})
    network = subject(config)
    made = finetune.make_problem(
        network.model, config, inputs, settings, network.params, settings.lr[0], 0
    )
    return made, network


@pytest.mark.medium
def test_drop_path_and_mixing_depend_on_the_key_and_invalid_rows_do_not_count():
    made, network = problem_for()
    config = run_config(**{"model.drop_path": 0.5})
    model = build(config, 16)
    settings = settings_for(**QUICK | {"drop_path": 0.5, "mixup": 0.8, "cutmix": 1.0})
    finetune.complete(config, settings)
    trained = made.pretrained | made.init(jax.random.key(0))
    batches = made.batches(0, list(range(8)))
    batch = {name: jnp.asarray(x) for name, x in next(batches).items()}
    batches.close()
    unmixed = settings_for(**settings.to_dict() | {"mixup": 0.0, "cutmix": 0.0})
    for varied in (unmixed, settings):
        loss = jax.jit(finetune.make_loss(model, varied, 10))
        one, other, again = (
            float(loss(trained, made.frozen, batch, jax.random.key(k))[0]) for k in (0, 1, 0)
        )
        assert one == again != other
    still = jax.jit(
        finetune.make_loss(network.model, settings_for(**settings.to_dict() | QUICK), 10)
    )
    invalid = batch | {"valid": batch["valid"].at[3].set(False)}
    found = float(still(trained, made.frozen, invalid, jax.random.key(0))[0])
    rows = [
        float(
            still(
                trained, made.frozen, {k: v[i : i + 1] for k, v in batch.items()}, jax.random.key(0)
            )[0]
        )
        for i in range(8)
    ]
    assert found == pytest.approx(np.mean([x for i, x in enumerate(rows) if i != 3]), rel=1e-4)


@pytest.mark.medium
def test_an_early_layer_learns_slower():
    made, _ = problem_for(layer_decay=0.5)
    params = made.pretrained | made.init(jax.random.key(0))
    gradients = jax.tree.map(jnp.ones_like, params)
    state = made.optimizer.init(params)
    for _ in range(2):  # the first learning rate is 0
        updates, state = made.optimizer.update(
            gradients, state, jax.tree.map(jnp.zeros_like, params)
        )
    scales = layer_scales(params, 0.5)
    rate = float(np.abs(updates["classifier"]["kernel"]).max())
    assert rate > 0
    for update, scale in zip(jax.tree.leaves(updates), jax.tree.leaves(scales), strict=True):
        np.testing.assert_allclose(update, np.broadcast_to(-rate * scale, update.shape), rtol=1e-5)


# Whole runs


@pytest.mark.medium
def test_a_network_learns_the_digits():
    found, settings = tune(epochs=10, lr=(5e-3,))
    assert found["top1"] > 0.6 and found["top1"] == found["score"]
    assert found["best_epoch_top1"] >= found["top1"]
    assert 0.7 < found["top5"] and 0 < found["top1_error"] < 0.03
    assert found["mean_per_class"] == pytest.approx(found["top1"], abs=0.05)
    assert found["images"] == 360 and found["unreadable"] == 0
    assert found["head"] is None  # all classes are frequent
    json.dumps(found)
    text = text_of(TASK.table(found, settings))
    assert "top-1" in text and "84.2" in text and "recipe vits" in text


@pytest.mark.medium
def test_the_best_of_several_rates_is_reported():
    found, settings = tune(lr=(1e-7, 2e-3), epochs=2)
    assert found["lr"] == 2e-3 and found["top1_by_lr"][0] < found["top1_by_lr"][1]
    assert found["top1"] == found["top1_by_lr"][1]
    assert "1e-07" in text_of(TASK.table(found, settings))


@pytest.mark.medium
@pytest.mark.parametrize(
    "changes",
    [
        dict(recipe="semi10", percent=10.0, magnitude=9.0, erase=0.25, mixup=0.8, cutmix=1.0),
        dict(layer_decay=0.65, drop_path=0.2, copies=3),
    ],
    ids=["semi", "copies"],
)
def test_recipes_run_to_the_end(changes):
    found, settings = tune(**QUICK | {"epochs": 2} | changes)
    assert 0 <= found["top1"] <= 1 and found["images"] == 360
    share = "10 %" if settings.recipe == "semi10" else "100 %"
    assert f"{share} of the labels" in text_of(TASK.table(found, settings))


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        dict(family="swin", window=8, stage_depths=(2, 2, 2, 2), stage_heads=(1, 2, 2, 2)),
        dict(family="resnet", stage_depths=(1, 1, 1, 1)),
    ],
    ids=["swin", "resnet"],
)
def test_a_swin_and_a_resnet_can_be_tuned(model):
    config = small_config(
        model=model,
        data=dict(source="digits", workers=0, threads=0),
        augment=dict(global_size=32, local_size=8),
        eval=dict(resize=32, crop=32, batch_size=128),
    )
    decay = 1.0 if config.model.family == "resnet" else 0.75
    found, _ = tune(config, epochs=2, layer_decay=decay)
    assert found["images"] == 360
    if config.model.family == "resnet":
        with pytest.raises(UserError, match="no layers are defined for a ResNet"):
            tune(config, layer_decay=0.5)


@pytest.mark.medium
def test_a_network_without_a_head_cannot_begin_from_its_head(tmp_path):
    make_run(tmp_path / "run", (3,), **{"head.hidden": 2048, "augment.local_size": 16})
    convert(tmp_path / "run", tmp_path / "net.safetensors", "timm")
    asked = evaluate.Asked(weights=tmp_path / "net.safetensors", heads=2)
    data = {"source": "digits"}
    changes = {"recipe": "semi10", "batch_size": 32}
    with pytest.raises(UserError, match="has no projection head.*--eval.head_layers=0"):
        evaluate.evaluate(asked, "finetune", changes, data)


@pytest.mark.medium
@pytest.mark.parametrize("head", [{"batch_norm": True}, {"layers": 1}, {"layers": 0, "dim": 32}])
def test_only_a_head_without_norm_can_come_before_the_classifier(head):
    config = run_config(**{f"head.{name}": value for name, value in head.items()})
    with pytest.raises(UserError, match="head_layers is 1, but the projection head of a network"):
        tune(config, head_layers=1)
    # A classifier on the backbone needs no head, and leaves its running statistics alone.
    settings, network = settings_for(**QUICK), subject(config)
    inputs = TASK.open(config, settings, {})
    made = finetune.make_problem(
        network.model, config, inputs, settings, network.params, settings.lr[0], 0
    )
    batch = {
        "image": jnp.zeros((2, 16, 16, 3), jnp.uint8),
        "label": jnp.zeros(2, jnp.int32),
        "valid": jnp.ones(2, bool),
    }
    params = made.init(jax.random.key(0)) | made.pretrained
    _, statistics = jax.eval_shape(made.loss, params, made.frozen, batch, jax.random.key(0))
    assert statistics == {}


@pytest.mark.medium
def test_the_recipe_of_cifar10_on_some_of_its_images(shared):
    config = run_config(**{"augment.global_size": 32, "eval.resize": 32, "eval.crop": 32})
    settings = settings_for(**QUICK | {"recipe": "cifar10", "percent": 0.4, "epochs": 2})
    inputs = TASK.open(config, settings, {"path": str(shared / "data" / "cifar10_jpeg_full.npz")})
    assert inputs.classes == 10 and len(inputs.splits.train) == 200
    some = Subset(inputs.splits.test, np.arange(100))
    inputs = inputs._replace(splits=inputs.splits._replace(test=some))
    tools = Toolbox(subject(config), make_mesh(), shown=False)
    found = TASK.run(subject(config), inputs, settings, tools)
    assert found["images"] == 100 and found["metric"] == "top1"
    assert "99.3" in text_of(TASK.table(found, settings))


SHORT = QUICK | {"epochs": 2, "batch_size": 480, "lr": (1e-3, 1e-2), "mixup": 0.8, "cutmix": 1.0}
SHORT |= {
    "scale": (0.9, 1.0),
    "drop_path": 0.2,
    "magnitude": 9.0,
    "erase": 0.25,
    "layer_decay": 0.75,
}


def measure(workdir: pathlib.Path, **changes: Any) -> dict[str, Any]:
    asked = evaluate.Asked(workdir, cache="off")
    return evaluate.evaluate(asked, "finetune", SHORT | changes)["results"]


@pytest.mark.slow
def test_an_interrupted_task_continues_exactly_and_repeats_no_fit(tmp_path, monkeypatch):
    make_run(tmp_path / "whole", steps=(3,), **APART | {"eval.batch_size": 128})
    make_run(tmp_path / "parts", steps=(3,), **APART | {"eval.batch_size": 128})
    rows: list[Any] = []

    def recording(*args: Any, **options: Any) -> fit.Fitted:
        fitted = fit.fit(*args, **options)
        rows.append(fitted.rows)
        return fitted

    monkeypatch.setattr(finetune, "fit", recording)
    whole = measure(tmp_path / "whole")
    expected, rows[:] = [*rows], []
    to_devices, seen = fit.to_devices, {fit: 0, finetune: 0}

    def stop_after(module: Any, count: int) -> None:
        """Sends SIGTERM to this process after a number of batches of training or validation."""

        def counted(*args: Any) -> Any:
            seen[module] += 1
            if seen[module] == count:
                os.kill(os.getpid(), signal.SIGTERM)
            return to_devices(*args)

        monkeypatch.setattr(module, "to_devices", counted)

    # In the first fit, in its last validation, and in the second fit.
    for module, count, step in ((fit, 2, 2), (finetune, 4, 6), (fit, 8, 2)):
        stop_after(module, count)
        with pytest.raises(Interrupted, match=f"step {step} of 6 is saved"):
            measure(tmp_path / "parts")
    stop_after(fit, 0)
    rows.clear()
    assert measure(tmp_path / "parts") == whole
    assert rows == expected and len(rows) == 2
    assert seen[fit] == 12  # two fits of six steps
    assert not list((tmp_path / "parts").glob("evaluations/*/unfinished"))


@pytest.mark.slow
def test_two_processes_measure_the_same_as_one_device(tmp_path):
    flags = [f"--eval.{name}={_text(value)}" for name, value in SHORT.items()]
    found = []
    for count, devices in ((1, 1), (2, 4)):
        workdir = tmp_path / f"{count}"
        make_run(workdir, steps=(3,), **APART)
        command = ["-m", "sop_jax.evaluate", f"--workdir={workdir}", "--task=finetune", *flags]
        others = processes.among(count) if count > 1 else [["--processes=1"]]
        ended = processes.run(
            [command + other for other in others], tmp_path / "out", devices=devices, timeout=400
        )
        assert all(one.code == 0 for one in ended), ended
        found.append(json.loads(ended[0].out.splitlines()[-1])["results"])
    one, several = found
    assert one["images"] == several["images"] == 360
    for name in ("top1", "top5", "mean_per_class", "best_epoch_top1"):
        assert several[name] == pytest.approx(one[name], abs=2 / 360), name


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(warmup_epochs=4), "only 4 epochs"),
        (dict(batch_size=12), "cannot be split over 8 devices"),
        (dict(crop=17), "eval.crop is 17, larger than"),
        (dict(crop=14), "not a multiple of the 4 pixels"),
        (dict(recipe="cars"), "Stanford Cars needs its images.*cars196"),
        (dict(list="/nowhere.txt"), "the list /nowhere.txt cannot be read"),
    ],
)
def test_errors_come_before_the_network_is_loaded(changes, message):
    settings = settings_for(**QUICK | changes)
    with pytest.raises(UserError, match=message):
        TASK.open(run_config(), settings, {})


def test_splits_of_other_classes(tmp_path):
    for split, names in (("train", "ab"), ("val", "abc")):
        for name in names:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    with pytest.raises(UserError, match="val contains c, but"):
        TASK.open(run_config(), settings_for(**QUICK), {"path": str(tmp_path)})


def test_packed_splits_of_other_classes(tmp_path):
    arrays: dict[str, Any] = {}
    blob = np.frombuffer(b"x" * 3, np.uint8)
    for split, labels in (("train", [0, 1, 1]), ("test", [0, 1, 2])):
        arrays |= {f"{split}_blob": blob, f"{split}_offsets": np.arange(4)}
        arrays |= {f"{split}_labels": np.array(labels)}
    np.savez(tmp_path / "p.npz", **arrays)
    with pytest.raises(UserError, match="3 classes and those to learn from 2"):
        TASK.open(run_config(), settings_for(**QUICK), {"path": str(tmp_path / "p.npz")})


def test_inaturalist_in_its_own_layout(tmp_path):
    for split, categories in (("train", [3, 5, 5]), ("val", [5])):
        images = [{"id": i, "file_name": f"{split}{i}.png"} for i in range(len(categories))]
        for image in images:
            Image.new("RGB", (8, 8)).save(tmp_path / str(image["file_name"]))
        annotations = [{"image_id": i, "category_id": c} for i, c in enumerate(categories)]
        content = {"images": images, "annotations": annotations}
        (tmp_path / f"{split}2019.json").write_text(json.dumps(content))
    inputs = TASK.open(
        run_config(), settings_for(**QUICK | {"recipe": "inat19"}), {"path": str(tmp_path)}
    )
    assert inputs.classes == 2 and len(inputs.splits.train) == 3
