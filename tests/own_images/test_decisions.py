"""The settings that are chosen for images and machines, and those that a user gives."""

from typing import Any

import ml_collections
import numpy as np
import pytest
from surveys import GPU, LAPTOP, NODE, config_for, survey

from sop_jax.check import check_config, check_used
from sop_jax.errors import UserError
from sop_jax.models import size_of
from sop_jax.own_images import decisions
from sop_jax.own_images.decisions import Choice, check_images, decide, words
from sop_jax.own_images.estimate import estimate
from sop_jax.own_images.machine import Machine
from sop_jax.recipes import folder


@pytest.mark.parametrize(
    ("images", "side", "machine"),
    [
        (30, 16, LAPTOP),
        (30, 224, LAPTOP._replace(devices=8)),
        (500, 32, GPU),
        (500, 3000, NODE),
        (9469, 50, LAPTOP),
        (9469, 320, GPU),
        (50_000, 32, LAPTOP._replace(memory=None)),
        (50_000, 3000, NODE),
        (1_281_167, 400, LAPTOP),
        (1_281_167, 400, NODE),
    ],
)
def test_choices_are_valid_for_all_images_and_machines(
    images: int, side: int, machine: Machine
) -> None:
    config = config_for(survey(images, side), machine)
    check_config(config)
    assert config.batch_size % (machine.devices * config.accumulate) == 0
    assert config.augment.global_size <= max(side, 32)
    assert config.sop.cls.anchors < config.sop.cls.memory


def test_five_hundred_photos_train_on_a_laptop_in_well_under_an_hour() -> None:
    config = config_for(survey())
    seconds = estimate(config, survey(), LAPTOP).seconds
    assert 5 * 60 < seconds <= 30 * 60
    assert config.model.dtype == "float32"


def test_a_faster_machine_trains_a_larger_network_on_larger_views() -> None:
    slow, fast = (config_for(survey(5000), machine) for machine in (LAPTOP, GPU))
    assert size_of(slow.model).width < size_of(fast.model).width
    assert slow.augment.global_size < fast.augment.global_size == 224
    assert fast.model.dtype == "bfloat16"


def test_a_machine_that_is_too_slow_trains_for_fewer_epochs() -> None:
    snail = LAPTOP._replace(rate=4e10)
    config, choices = decide(folder(), survey(), snail, {})
    assert 100 < config.epochs < 400
    assert estimate(config, survey(), snail).seconds == pytest.approx(30 * 60, rel=0.2)
    assert any("on this machine" in choice.reason for choice in choices)
    stone = LAPTOP._replace(rate=1e6)
    assert config_for(survey(), stone).epochs * 500 == decisions.FEWEST_VIEWED
    assert config_for(survey(1_000_000), stone).epochs == decisions.FEWEST_EPOCHS
    _, made = decide(folder(), survey(100), stone, {})
    kept = [choice.reason for choice in made if "epochs" in choice.settings]
    assert len(kept) == 1 and "would take" not in kept[0]  # what stays is not said to change


def test_more_images_get_larger_networks_memories_and_fewer_epochs() -> None:
    few, more, most = (config_for(survey(n), NODE) for n in (500, 20_000, 1_281_167))
    widths = [size_of(config.model).width for config in (few, more, most)]
    assert widths == sorted(set(widths))
    assert few.epochs > more.epochs >= most.epochs
    assert few.sop.cls.memory < more.sop.cls.memory < most.sop.cls.memory == 65536
    assert most.sop.teacher_temperature == (0.04, 0.07)
    assert few.sop.teacher_temperature == (0.02, 0.02)


def test_images_that_many_processes_make_in_time_do_not_shrink_the_network() -> None:
    quick, slow = (config_for(survey(20_000, seconds=each), GPU) for each in (1e-3, 0.1))
    assert size_of(slow.model).width == size_of(quick.model).width == 384
    assert slow.data.workers == GPU.cores


def test_small_images_are_not_enlarged_and_not_blurred() -> None:
    config = config_for(survey(side=32))
    assert (config.augment.global_size, config.model.patch) == (32, 4)
    assert config.augment.blur == (0.0, 0.0, 0.0)


def test_views_of_few_images_have_more_in_common() -> None:
    few, many = config_for(survey(500), GPU).augment, config_for(survey(50_000), GPU).augment
    for key in ("brightness", "contrast", "saturation", "hue", "grayscale"):
        assert few[key] < many[key]
    assert few.global_scale[0] > many.global_scale[0] == 0.25


def test_a_step_is_split_until_it_fits() -> None:
    little = GPU._replace(memory=8 * 2**30)
    config = config_for(survey(50_000), little)
    assert config.accumulate > 1
    found = estimate(config, survey(50_000), little).memory
    assert found is not None and found < 8 * 2**30


def test_large_photos_take_longer_so_that_there_are_fewer_epochs_or_more_workers() -> None:
    slow = survey(seconds=0.3)
    config = config_for(slow)
    assert config.epochs < config_for(survey()).epochs
    assert config.data.threads == 2
    assert config_for(survey()).data.threads == 1
    server = GPU._replace(rate=1e12)
    assert config_for(slow, server).data.workers > config_for(survey(), server).data.workers >= 1


def test_unreadable_images_are_allowed_for() -> None:
    config = config_for(survey(share=0.1, unreadable={3: "photos/3.jpg: it is empty"}))
    assert 0.1 < config.data.max_corrupt_share <= 0.2
    assert config_for(survey()).data.max_corrupt_share == 0.01


def test_given_settings_are_kept_and_what_follows_is_chosen_from_them() -> None:
    given = {"batch_size": 48, "augment.global_size": 64, "optim.weight_decay": (0.0, 0.0)}
    config, choices = decide(folder(), survey(), LAPTOP, given)
    check_config(config)
    assert (config.batch_size, config.augment.global_size) == (48, 64)
    assert (config.model.patch, config.augment.local_size, config.eval.crop) == (8, 32, 64)
    assert config.optim.lr == pytest.approx(0.256 / 48, rel=1e-2)
    assert not any(key in choice.settings for choice in choices for key in given)
    text = "\n".join(words(choices, given))
    assert "given: batch_size=48 augment.global_size=64 optim.weight_decay=0,0" in text


GIVEN: dict[str, dict[str, Any]] = {
    "a named network": {"model.size": "s"},
    "a width": {"model.width": 256},
    "an odd width": {"model.width": 96, "model.depth": 3},
    "patches": {"model.patch": 8},
    "patches that do not divide the usual views": {"model.patch": 14},
    "steps": {"steps": 20},
    "epochs": {"epochs": 3.0},
    "a memory": {"sop.cls.memory": 4096},
    "no patches": {"sop.patch.tasks": 0, "sop.patch.memory": 0},
    "no local views": {"augment.local_crops": 0},
    "a Swin": {"model.family": "swin", "model.size": "t"},
    "another method": {"method": "dino"},
    "large batches": {"batch_size": 256},
}


@pytest.mark.parametrize("name", GIVEN)
def test_choices_fit_what_is_given(name: str) -> None:
    given = GIVEN[name]
    config, _ = decide(folder(), survey(), LAPTOP, given)
    check_config(config)
    check_used(config, given)
    flat = ml_collections.FrozenConfigDict(config)
    for key, value in given.items():
        node: Any = flat
        for part in key.split("."):
            node = node[part]
        assert node == value, key


def test_a_short_trial_has_the_network_of_the_whole_run() -> None:
    trial, whole = config_for(survey(), steps=2), config_for(survey())
    assert trial.model == whole.model
    assert trial.eval_every == 1


def test_too_few_images_are_refused_with_a_reason() -> None:
    with pytest.raises(UserError, match="photos has 3 images .* Training begins at 30"):
        check_images(survey(3))
    check_images(survey(30))
    broken = {0: "photos/0.tif: it has too many pixels"}
    with pytest.raises(UserError, match=r"29 images (.|\n)*0\.tif: it has too many pixels"):
        check_images(survey(30, share=1 / 30, unreadable=broken))


def test_images_that_mostly_cannot_be_read_are_refused() -> None:
    broken = {index: f"photos/{index}.jpg: it is empty" for index in range(15)}
    with pytest.raises(UserError, match="15 of 35 images in photos cannot be read"):
        check_images(survey(100, share=0.75, unreadable=broken))


@pytest.mark.parametrize(
    ("folders", "expected"),
    [([], "val"), (["train", "Test"], "test"), (["train", "valid", "test"], "valid")],
)
def test_the_test_split_is_the_one_that_is_there(folders: list[str], expected: str) -> None:
    assert decisions.test_split(folders) == expected


def test_each_choice_has_a_line_and_a_reason() -> None:
    lines = words([Choice({"a.b": (0.5, 1.0), "c": 3, "d": "x"}, "because")], {})
    assert lines == ["  a.b=0.5,1 c=3 d=x", "      because"]
    _, choices = decide(folder(), survey(), LAPTOP, {})
    assert all(choice.reason for choice in choices)
    assert np.unique([key for choice in choices for key in choice.settings]).size > 25
