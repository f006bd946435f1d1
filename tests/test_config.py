"""Settings survive their file, and a run knows which of them changed."""

import json

import pytest
from etils import epath

from sop_jax import config as config_lib
from sop_jax.errors import UserError


def test_settings_come_back_from_their_file(tmp_path) -> None:
    config = config_lib.paper()
    config.steps, config.batch_size, config.sop.teacher_temperature = 12, 48, (0.02, 0.03)
    config_lib.save(config, epath.Path(tmp_path))
    loaded = config_lib.load(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert config_lib.changes(loaded, config) == []


def test_unset_settings_come_back_unset_and_can_be_set(tmp_path) -> None:
    config_lib.save(config_lib.paper(), epath.Path(tmp_path))
    loaded = config_lib.load(tmp_path)
    assert loaded.steps is None
    loaded.steps = 3
    with pytest.raises(TypeError):
        loaded.steps = "three"


def test_the_file_is_json_that_ends_in_a_line(tmp_path) -> None:
    config_lib.save(config_lib.paper(), epath.Path(tmp_path))
    text = (tmp_path / "config.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text)["sop"]["cls"]["memory"] == 65536


def test_a_folder_of_no_run_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match="config.json is not there.*check --workdir"):
        config_lib.load(tmp_path / "nothing")


def test_changes_names_what_differs_with_both_values() -> None:
    old, new = config_lib.paper(), config_lib.paper()
    new.batch_size = 64
    new.sop.cls.anchors = 128
    new.augment.global_scale = (0.5, 1.0)
    lines = config_lib.changes(old, new)
    assert [line.split(":")[0] for line in lines] == [
        "augment.global_scale",
        "batch_size",
        "sop.cls.anchors",
    ]
    assert "1024" in lines[1] and "64" in lines[1]


def test_changes_names_settings_that_only_one_has() -> None:
    old, new = config_lib.paper(), config_lib.paper()
    del new["seed"]
    assert [line.split(":")[0] for line in config_lib.changes(old, new)] == ["seed"]


@pytest.mark.parametrize("key", config_lib.RESUMABLE)
def test_what_a_resumed_run_may_change_is_no_difference(key: str) -> None:
    new = config_lib.paper()
    others = {"model.remat": "full", "model.attention": "xla", "profile_steps": (3, 5)}
    other = others.get(key, 3)
    assert config_lib.flatten(new)[key] != other
    new.update_from_flattened_dict({key: other})
    assert config_lib.changes(config_lib.paper(), new) == []


def test_each_config_is_its_own() -> None:
    first, second = config_lib.paper(), config_lib.paper()
    first.sop.cls.memory = 5
    assert second.sop.cls.memory == 65536


def test_flatten_names_settings_by_their_path() -> None:
    flat = config_lib.flatten(config_lib.paper())
    assert flat["sop.patch.anchors"] == 512
    assert flat["augment.global_scale"] == [0.25, 1.0]
    assert not any(hasattr(value, "items") for value in flat.values())


def test_settings_are_the_papers() -> None:
    config = config_lib.paper()
    assert (config.sop.cls.memory, config.sop.patch.memory) == (65536, 8192)
    assert (config.sop.cls.anchors, config.sop.cls.supports, config.sop.cls.tasks) == (4096, 8, 2)
    assert (config.sop.patch.anchors, config.sop.patch.supports, config.sop.patch.tasks) == (
        *(512, 0),
        1,
    )
    assert config.sop.student_temperature == 0.1
    assert config.sop.teacher_temperature == (0.04, 0.07)
