"""Settings are unchanged after a file, and those that a run changed are reported."""

import json
import pathlib
import runpy
from typing import Any

import pytest
import setuptools
from etils import epath

import sop_jax
from sop_jax import config as config_lib
from sop_jax.check import check_config
from sop_jax.errors import UserError
from sop_jax.settings import flatten
from sop_jax.training.resume import changes

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIRST = ROOT / "tests" / "golden" / "config_0.1.0.json"  # written by that version for paper()


def test_settings_come_back_from_their_file(tmp_path) -> None:
    config = config_lib.paper()
    config.steps, config.batch_size, config.sop.teacher_temperature = 12, 48, (0.02, 0.03)
    config_lib.save(config, epath.Path(tmp_path))
    loaded = config_lib.read_config(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert changes(loaded, config) == []


def test_unset_settings_come_back_unset_and_can_be_set(tmp_path) -> None:
    config_lib.save(config_lib.paper(), epath.Path(tmp_path))
    loaded = config_lib.read_config(tmp_path)
    assert loaded.steps is None
    loaded.steps = 3
    with pytest.raises(TypeError):
        loaded.steps = "three"


def test_the_file_is_json_that_ends_in_a_line(tmp_path) -> None:
    config_lib.save(config_lib.paper(), epath.Path(tmp_path))
    text = (tmp_path / "config.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text)["sop"]["cls"]["memory"] == 65536


def test_the_version_that_made_a_workdir_is_kept_with_it(tmp_path) -> None:
    config_lib.save(config_lib.paper(), epath.Path(tmp_path))
    made = json.loads((tmp_path / "config.json").read_text())
    assert made["version"] == sop_jax.__version__
    assert config_lib.read_config(tmp_path).to_dict() == config_lib.paper().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(made | {"version": "0.1.0"}))
    config_lib.save(config_lib.paper(), epath.Path(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["version"] == "0.1.0"


def test_the_package_has_one_version(monkeypatch) -> None:
    built: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", built.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    assert built["version"] == sop_jax.__version__


def test_a_run_of_the_first_version_keeps_its_settings_and_behaviour(tmp_path) -> None:
    text = FIRST.read_text()
    (tmp_path / "config.json").write_text(text)
    loaded = flatten(config_lib.read_config(tmp_path))
    saved = flatten(json.loads(text))
    assert {key: loaded[key] for key in saved} == saved
    later = config_lib.later_settings("0.1.0") | config_lib.other_methods("sop")
    assert loaded.keys() - saved.keys() == later.keys(), "a new setting needs a row in BEFORE"
    assert {key: loaded[key] for key in later} == later


def test_a_missing_setting_is_as_the_version_that_did_not_know_it(tmp_path, monkeypatch) -> None:
    made = json.loads(FIRST.read_text())
    del made["augment"]["resample"]
    monkeypatch.setitem(config_lib.BEFORE["0.2.0"], "augment.resample", "pillow")
    (tmp_path / "config.json").write_text(json.dumps(made))
    assert config_lib.read_config(tmp_path).augment.resample == "pillow"
    (tmp_path / "config.json").write_text(json.dumps(made | {"version": sop_jax.__version__}))
    with pytest.raises(UserError, match="lacks .*augment.resample, .*which every run of"):
        config_lib.read_config(tmp_path)


FAULTS: dict[str, tuple[dict[str, Any] | list[int], str]] = {
    "no object": ([1], r"must contain an object of settings, not \[1\]; restore it"),
    "an unknown section": ({"modle": {"width": 64}}, "unknown setting modle.width; did you mean "),
    "an unknown key": ({"model": {"widht": 64}}, "widht; did you mean model.width?"),
    "a value for a section": ({"model": 3}, "model is 3; expected a section of settings"),
    "a section for a value": ({"seed": {"a": 1}}, "unknown setting seed.a"),
    "another type": ({"batch_size": "many"}, "batch_size is 'many'; expected a whole number"),
    "a fraction": ({"batch_size": 1.5}, "batch_size is 1.5; expected a whole number"),
    "no value": ({"epochs": None}, "epochs is None; expected a number"),
    "a number for numbers": ({"eval": {"knn_k": 3}}, "eval.knn_k is 3; expected a list of numbers"),
    "too few numbers": ({"augment": {"global_scale": [1.0]}}, "expected 2 numbers"),
    "words for numbers": ({"profile_steps": ["a", "b"]}, "expected a list of numbers"),
    "a newer version": ({"version": "9.1.0"}, "written by sop_jax 9.1.0, and this is .*: use "),
    "no version": ({"version": "new"}, "its version is 'new', not one such as"),
    "a number as version": ({"version": 0.2}, "its version is 0.2, not one such as"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_settings_that_cannot_be_read_are_reported_in_one_line(tmp_path, case: str) -> None:
    fault, message = FAULTS[case]
    config_lib.save(config_lib.paper(), epath.Path(tmp_path))
    saved = json.loads((tmp_path / "config.json").read_text())
    if isinstance(fault, dict):
        for key, value in fault.items():
            of_section = isinstance(saved.get(key), dict) and isinstance(value, dict)
            saved[key] = saved[key] | value if of_section else value
    (tmp_path / "config.json").write_text(json.dumps(saved if isinstance(fault, dict) else fault))
    with pytest.raises(UserError, match=message) as caught:
        config_lib.read_config(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_recipe_with_a_mistyped_setting_is_refused() -> None:
    config = config_lib.paper()
    config.model.widht = 64
    with pytest.raises(UserError, match="unknown setting model.widht; did you mean model.width?"):
        check_config(config)


def test_a_folder_of_no_run_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match="config.json does not exist.*check --workdir"):
        config_lib.read_config(tmp_path / "nothing")


def test_changes_names_what_differs_with_both_values() -> None:
    old, new = config_lib.paper(), config_lib.paper()
    new.batch_size = 64
    new.sop.cls.anchors = 128
    new.augment.global_scale = (0.5, 1.0)
    lines = changes(old, new)
    assert [line.split(":")[0] for line in lines] == [
        "augment.global_scale",
        "batch_size",
        "sop.cls.anchors",
    ]
    assert "1024" in lines[1] and "64" in lines[1]


def test_changes_names_settings_that_only_one_has() -> None:
    old, new = config_lib.paper(), config_lib.paper()
    del new["seed"]
    assert [line.split(":")[0] for line in changes(old, new)] == ["seed"]


@pytest.mark.parametrize("key", config_lib.RESUMABLE)
def test_what_a_resumed_run_may_change_is_no_difference(key: str) -> None:
    new = config_lib.paper()
    others = {"model.remat": "full", "model.attention": "xla", "model.unroll": "yes"}
    others |= {"profile_steps": (3, 5), "sop.search_precision": "high"}
    others |= {"init_from": "weights.npz", "data.path": "elsewhere", "tracker": "wandb"}
    other = others.get(key, 3)
    assert flatten(new)[key] != other
    new.update_from_flattened_dict({key: other})
    assert changes(config_lib.paper(), new) == []


def test_each_config_is_its_own() -> None:
    first, second = config_lib.paper(), config_lib.paper()
    first.sop.cls.memory = 5
    assert second.sop.cls.memory == 65536


def test_flatten_names_settings_by_their_path() -> None:
    flat = flatten(config_lib.paper())
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
