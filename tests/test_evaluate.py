"""The k-NN evaluation of a run, during training and by the command."""

import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from datasets import colours, pack
from etils import epath
from PIL import Image
from runs import APART, LENGTH, make_config, make_run

from sop_jax import config as config_lib
from sop_jax import evaluate, paths
from sop_jax.check import check_rules
from sop_jax.convert import convert
from sop_jax.data import sources
from sop_jax.data.named import name_data
from sop_jax.data.prepare import prepare
from sop_jax.data.sources import DigitsSource
from sop_jax.errors import UserError
from sop_jax.evaluation.splits import Splits
from sop_jax.evaluation.task import Features, Subject
from sop_jax.evaluation.tasks import TASKS, measure
from sop_jax.evaluation.views import VIEW_RULES
from sop_jax.objectives.sop.objective import sop
from sop_jax.parallel.mesh import make_mesh
from sop_jax.pretrained import load_network
from sop_jax.settings import flatten
from sop_jax.training import resume
from sop_jax.training.optim import optimizer, schedules
from sop_jax.training.state import init_state

pytestmark = pytest.mark.medium


class Unlabelled(DigitsSource):
    """Digits without labels."""

    def __init__(self, split: str) -> None:
        super().__init__(split)
        self.labels = None  # type: ignore[assignment]


class Pixels:
    """Tools that return pixels as features; some records may be unreadable."""

    def __init__(self, corrupt: tuple[int, ...] = ()) -> None:
        self.mesh, self.folder, self.seed, self.corrupt = make_mesh(), None, 0, list(corrupt)

    def features(self, source: Any, view: Any) -> Features:
        assert -1 not in self.corrupt, "nothing is to be computed"
        index = np.setdiff1d(np.arange(len(source)), self.corrupt).astype(np.int32)
        vectors = source.images[index].reshape(len(index), -1).astype(np.float32)
        return Features(vectors, None, index, source.labels[index], self.corrupt)

    def whole(self, features: Features) -> Features:
        return features

    def between(self) -> None:
        pass

    def at_once(self) -> Any:
        raise AssertionError

    def progress(self, total: int, unit: str) -> Any:
        raise AssertionError

    def note(self, text: str) -> None:
        raise AssertionError


def knn_row(train: Any, test: Any, tools: Any, **changes: Any) -> dict[str, Any]:
    """Returns the row that an evaluation during training adds."""
    config = make_config(**changes)
    subject = Subject("", config, None, {}, "", None)  # type: ignore[arg-type]
    return measure(subject, Splits(train, test), tools)


def test_reports_each_k_and_the_best() -> None:
    found = knn_row(
        DigitsSource("train"), DigitsSource("test"), Pixels(), **{"eval.knn_k": (1, 10, 5000)}
    )
    names = ["top1", "top5", "k"]
    names += [f"{top}_k{k}" for k in (1, 10, 5000) for top in ("top1", "top5")]
    assert list(found) == [f"knn_{name}" for name in [*names, "images", "unreadable"]]
    assert found["knn_top1"] == max(found["knn_top1_k1"], found["knn_top1_k10"]) > 0.95
    assert found["knn_top1"] == found[f"knn_top1_k{found['knn_k']}"]
    assert found["knn_top1"] <= found["knn_top5"] == found[f"knn_top5_k{found['knn_k']}"]
    assert found["knn_top1_k5000"] is None  # there are 1437 train images
    assert found["knn_unreadable"] == 0


def test_labels_follow_the_images_that_could_be_read() -> None:
    found = knn_row(DigitsSource("train"), DigitsSource("test"), Pixels((0, 1, 200)))
    assert found["knn_top1"] > 0.95
    assert found["knn_unreadable"] == 6 and found["knn_images"] == 357


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (DigitsSource("train"), None),
        (Unlabelled("train"), DigitsSource("test")),
        (DigitsSource("train"), Unlabelled("test")),
    ],
)
def test_is_null_without_labels_or_test_split(train: Any, test: Any) -> None:
    found = knn_row(train, test, Pixels((-1,)))
    assert {"knn_top1", "knn_k", "knn_top1_k10", "knn_top1_k200"} <= set(found)
    assert set(found.values()) == {None}


def test_an_evaluation_can_have_several_tasks() -> None:
    tools = Pixels()
    tasks = {"eval.tasks": ("knn", "fewshot")}
    found = knn_row(DigitsSource("train"), DigitsSource("test"), tools, **tasks)
    assert found["knn_top1"] > found["fewshot_top1_5"] > found["fewshot_top1_1"] > 0.2
    none = knn_row(DigitsSource("train"), None, tools, **tasks)
    assert none.keys() == found.keys() and set(none.values()) == {None}


def test_untrained_network_on_digits_is_above_chance(tmp_path: pathlib.Path) -> None:
    make_run(tmp_path)
    found = results(tmp_path)
    assert found["top1"] > 0.3  # chance is 0.1


def record(workdir: pathlib.Path, **options: Any) -> dict[str, Any]:
    """Evaluates the run in a workdir with k-NN."""
    data = options.pop("data", None)
    return evaluate.evaluate(evaluate.Asked(workdir, **options), "knn", data=data)


def results(workdir: pathlib.Path, **options: Any) -> dict[str, Any]:
    return record(workdir, **options)["results"]


# Loading


def test_load_gives_the_teacher_of_the_step_asked_for(tmp_path: pathlib.Path) -> None:
    made = make_run(tmp_path)
    for asked, step in ((None, 7), (3, 3)):
        config, model, params, found = load_network(tmp_path, asked)
        assert found == step and config == made
        expected = init_state(
            jax.random.key(step),
            model,
            sop(config, model.dim, make_mesh(1), LENGTH),
            optimizer(config.optim, schedules(config, LENGTH), {}),
        ).teacher
        jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_load_says_what_is_missing(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="is not the folder of a run"):
        load_network(tmp_path / "nowhere")
    config_lib.save(make_config(), epath.Path(tmp_path))
    with pytest.raises(UserError, match="no checkpoint"):
        load_network(tmp_path)
    make_run(tmp_path)
    with pytest.raises(UserError, match=r"step 5.*\[3, 7\]"):
        load_network(tmp_path, 5)


def test_load_names_the_leaves_of_another_architecture(tmp_path: pathlib.Path) -> None:
    make_run(tmp_path)
    config_lib.save(make_config(**{"model.depth": 3}), epath.Path(tmp_path))
    with pytest.raises(UserError, match="teacher/backbone/blocks"):
        load_network(tmp_path)


# The command


def command(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sop_jax.evaluate", *flags],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_command_prints_a_table_and_writes_the_same_json(tmp_path: pathlib.Path) -> None:
    make_run(tmp_path)
    done = command(f"--workdir={tmp_path}", "--task=knn", "--step=3")
    assert done.returncode == 0, done.stderr
    *shown, last = done.stdout.splitlines()
    found = json.loads(last)
    (file,) = (tmp_path / "evaluations").glob("knn_3_*.json")
    assert found == json.loads(file.read_text())
    assert list(found) == list(evaluate.RECORD)
    assert found["task"] == "knn" and found["step"] == 3
    best = found["results"]["top1"]
    assert re.search(rf"{100 * best:.2f} .* best", "\n".join(shown))
    again = command(f"--workdir={tmp_path}", "--task=knn", "--step=3")
    assert "measured before" in again.stdout and json.loads(again.stdout.splitlines()[-1]) == found


def test_a_result_without_its_files_is_not_finished(tmp_path: pathlib.Path, capsys: Any) -> None:
    place, facts = epath.Path(tmp_path / "x"), {"task": "segment"}
    record = facts | {"results": {"files": ["head.npz", "predictions/a.png"]}}
    (tmp_path / "x.json").write_text(json.dumps(record))
    (tmp_path / "x" / "predictions").mkdir(parents=True)
    for name in record["results"]["files"]:
        assert evaluate._finished(place, facts) is None
        assert "is missing" in capsys.readouterr().err
        (tmp_path / "x" / name).touch()
    assert evaluate._finished(place, facts) == record


@pytest.mark.parametrize("name", TASKS)
def test_each_setting_of_a_task_has_a_rule_that_its_default_follows(name: str) -> None:
    task = TASKS[name]
    settings = flatten(task.settings())
    assert settings.keys() == task.rules.keys()
    check_rules(settings, task.rules, settings, "--eval.")
    assert {*task.paths, *task.free} <= settings.keys()
    assert (task.view is None) == (not VIEW_RULES.keys() <= settings.keys())


def test_images_that_were_changed_in_place_are_measured_again(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", (3,))
    colours(tmp_path / "data", labelled=True)
    data = {"path": str(tmp_path / "data")}
    first = record(tmp_path / "run", data=data)
    assert first["results"]["top1"] == 1.0
    record(tmp_path / "run", data=data)
    assert "measured before" in capsys.readouterr().out
    for file in (tmp_path / "data" / "val" / "red").iterdir():
        file.write_bytes((tmp_path / "data" / "val" / "green" / "green0.png").read_bytes())
    second = record(tmp_path / "run", data=data)
    assert second["results"]["top1"] == 0.5
    assert first["data"]["contents"] != second["data"]["contents"]
    assert first["settings"]["resize"] == 16  # that of the run


def test_a_list_that_was_changed_is_read_again(tmp_path: pathlib.Path) -> None:
    make_run(tmp_path / "run", (3,))
    colours(tmp_path / "data", labelled=True)
    names = tmp_path / "list.txt"
    found = []
    for count in (2, 4):
        names.write_text("".join(f"red{i}.png\ngreen{i}.png\n" for i in range(count)))
        asked = evaluate.Asked(tmp_path / "run")
        settings = {"list": str(names), "k": (1,)}
        data = {"path": str(tmp_path / "data")}
        found.append(evaluate.evaluate(asked, "knn", settings, data)["data"]["train"]["images"])
    assert found == [4, 8]


def test_a_folder_of_all_data_that_does_not_exist_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="--root=.*absent is not a folder; give the folder"):
        evaluate.evaluate_all(evaluate.Asked(tmp_path), tmp_path / "absent")


def test_a_file_of_weights_gives_what_its_run_gives(tmp_path: pathlib.Path) -> None:
    make_run(tmp_path / "run", (3,), **APART, **{"head.hidden": 2048, "augment.local_size": 16})
    convert(tmp_path / "run", tmp_path / "net.safetensors", "timm")
    colours(tmp_path / "data", labelled=True)
    data = {"path": str(tmp_path / "data")}
    run = record(tmp_path / "run", data=data)
    asked = evaluate.Asked(weights=tmp_path / "net.safetensors", heads=2)
    file = evaluate.evaluate(asked, "knn", data=data)
    assert file["results"] == run["results"] and file["step"] is None
    (saved,) = (tmp_path / "evaluations").glob("knn_net_*.json")
    assert json.loads(saved.read_text()) == file


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"weights": "absent.pth"}, "there is no file absent.pth; check --weights"),
        ({"weights": "."}, "is a folder; give --workdir"),
        ({"weights": __file__, "step": 3}, "--step=3 is for --workdir"),
        ({"weights": __file__}, "test_evaluate.py"),
    ],
)
def test_what_is_no_file_of_weights_is_an_error(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate.evaluate(evaluate.Asked(**asked), "knn")


def test_all_tasks_that_have_data_are_done_and_the_others_listed(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run", (3,))
    colours(tmp_path / "root" / "imagenet", labelled=True)
    few = {name: TASKS[name] for name in ("knn", "fewshot", "video", "cluster")}
    monkeypatch.setattr(evaluate, "TASKS", few)
    found = evaluate.evaluate_all(evaluate.Asked(tmp_path / "run"), tmp_path / "root")
    assert found["knn"]["top1"] == 1.0 and found["cluster"] and found["fewshot"]
    assert found["video"] is None
    shown = capsys.readouterr().out
    assert "knn: done" in shown
    assert f"video: not done, {tmp_path / 'root' / 'DAVIS'} does not exist; it needs" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task=knn", "--eval.k=()"], "eval.k is (); expected one or more values"),
        (["--task=knn", "--eval.kk=3"], "unknown setting eval.kk; did you mean eval.k?"),
        (["--task=all", "--root=.", "--eval.k=3"], "--eval.KEY is for a single task"),
        (["--task=all", "--root=.", "--data.white=3"], "--data.white would have no effect"),
        (["--task=all"], "--task=all needs --root=ROOT"),
    ],
)
def test_no_flag_is_ignored(tmp_path: pathlib.Path, flags: list[str], message: str) -> None:
    make_run(tmp_path, steps=())
    done = command(f"--workdir={tmp_path}", *flags)
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.returncode != 0


def test_command_names_the_tasks_it_knows(tmp_path: pathlib.Path) -> None:
    done = command(f"--workdir={tmp_path}", "--task=kmn")
    assert done.returncode == 1
    assert "kmn" in done.stderr and "did you mean knn?" in done.stderr
    assert "Traceback" not in done.stderr


def test_moved_data_is_found_by_its_flag(tmp_path: pathlib.Path) -> None:
    folder = {"data.source": "folder", "data.path": "/moved/away", "data.test_split": "val"}
    make_run(tmp_path / "run", **folder)
    colours(tmp_path / "data", labelled=True)
    with pytest.raises(UserError, match="/moved/away"):
        record(tmp_path / "run")
    found = record(tmp_path / "run", data={"path": str(tmp_path / "data")})
    assert found["results"]["top1"] == 1.0 and found["step"] == 7
    assert found["data"]["train"]["images"] == 24
    (written,) = (tmp_path / "run" / "evaluations").glob("knn_7_*.json")
    assert json.loads(written.read_text()) == found
    assert found["results"]["top1_k100"] is None  # 24 train images


def test_other_images_than_those_of_the_run_are_reported(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    colours(tmp_path / "data", labelled=True)
    place = {"data.path": str(tmp_path / "data"), "data.test_split": "val"}
    config = make_run(tmp_path / "run", **place, **{"data.source": "folder"})
    train = sources.open_source(config.data, "train")
    test = sources.open_source(config.data, "test", train)
    resume.save(config, resume.data_of(train, test), epath.Path(tmp_path / "run"))
    record(tmp_path / "run")
    assert "not the data of the run" not in capsys.readouterr().err
    (tmp_path / "data" / "train" / "red" / "red0.png").unlink()
    record(tmp_path / "run")
    assert "not the data of the run: train: 24 images then, 23 now" in capsys.readouterr().err


def test_a_tree_of_classes_only_is_an_error_that_says_how_to_hold_images_out(
    tmp_path: pathlib.Path,
) -> None:
    make_run(tmp_path / "run")
    colours(tmp_path / "data", labelled=True)
    with pytest.raises(UserError, match="no split .*put it into a folder called val") as caught:
        record(tmp_path / "run", data={"path": str(tmp_path / "data" / "train")})
    assert "red" not in str(caught.value)


def test_a_setting_of_decoding_may_be_given(tmp_path: pathlib.Path) -> None:
    """The message about such an image names these flags."""
    make_run(tmp_path / "run")
    for split in ("train", "val"):
        for channel, name in enumerate(("dark", "bright")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(12):
                grey = np.full((20, 24), 0.2 + 0.5 * channel + 0.005 * i, np.float32)
                Image.fromarray(grey).save(folder / f"{i}.tif")
    data = {"path": str(tmp_path / "data"), "white": 1.0}
    assert results(tmp_path / "run", data=data)["unreadable"] == 0


def test_a_result_that_cannot_be_saved_is_shown(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path)
    (tmp_path / "evaluations").write_text("a file")
    record(tmp_path)
    shown = capsys.readouterr()
    assert "best" in shown.out and "only be printed, not saved" in shown.err


def test_data_without_labels_or_test_split_is_an_error(tmp_path: pathlib.Path) -> None:
    make_run(tmp_path / "run", **{"data.source": "folder", "data.test_split": "val"})
    colours(tmp_path / "bare", labelled=False)
    with pytest.raises(UserError, match="no split 'val'.*folder called val.*--data.path"):
        record(tmp_path / "run", data={"path": str(tmp_path / "bare")})
    colours(tmp_path / "split" / "train", labelled=False)
    colours(tmp_path / "split" / "val", labelled=False)
    with pytest.raises(UserError, match="no labels.*--data.path"):
        record(tmp_path / "run", data={"path": str(tmp_path / "split")})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": "/does/not/exist"}, "--data.path=/does/not/exist does not exist"),
        ({"path": __file__}, "is a file, but not a packed .npz"),
        ({"source": "digits", "path": "/x"}, "--data.path=/x would have no effect"),
        ({"test_split": "val"}, "--data.test_split=val would have no effect"),
        ({"source": "folder", "path": "/", "name": "x"}, "--data.name=x would have no effect"),
        ({"source": "folder"}, r"Set --data\.path"),
        ({"name": "absent"}, r"cannot open absent.*Set --data\.path and --data\.name"),
    ],
)
def test_a_flag_that_names_data_is_never_ignored(
    tmp_path: pathlib.Path, data: dict[str, str], message: str
) -> None:
    make_run(tmp_path, steps=())  # the data is opened before the checkpoint
    with pytest.raises(UserError, match=message):
        record(tmp_path, data=data)


def test_a_converted_network_is_evaluated_on_any_data(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted = {"data.source": "folder", "data.path": "", "data.test_split": "validation"}
    make_run(tmp_path / "net", (0,), **converted)
    tree, packed = tmp_path / "tree", tmp_path / "data.npz"
    colours(tree, labelled=True)
    pack(tree, packed)
    prepare(str(tree), str(tmp_path / "tfds"), "colours", ["train", "val"])
    prepared = tmp_path / "tfds" / "colours" / "1.0.0"
    with pytest.raises(UserError, match=r"Set --data\.path"):
        record(tmp_path / "net")
    for data, source in (
        ({"path": str(tree)}, "folder"),
        ({"path": str(tree), "source": "folder", "test_split": "val"}, "folder"),
        ({"path": str(packed)}, "packed"),
        ({"path": str(prepared)}, "tfds"),
        ({"path": str(tmp_path / "tfds"), "name": "colours"}, "tfds"),
    ):
        found = record(tmp_path / "net", data=data)
        assert found["results"]["top1"] == 1.0
        assert found["data"]["source"] == source and found["data"]["test_split"] == "val"
        shown = capsys.readouterr().out
        assert "train: 24 images, test: 10 images" in shown
        assert f"data.source={source}, data.path={data['path']}" in shown
        assert "data.test_split=val" in shown
    with pytest.raises(UserError, match="no split 'test'.*there are train, val"):
        record(tmp_path / "net", data={"path": str(tree), "test_split": "test"})


def test_a_run_whose_tfds_data_moved_keeps_its_name(tmp_path: pathlib.Path) -> None:
    settings = {"data.source": "tfds", "data.name": "colours", "data.test_split": "train[:9]"}
    config = make_run(tmp_path / "run", (0,), **settings)
    colours(tmp_path / "tree", labelled=True)
    prepare(str(tmp_path / "tree"), str(tmp_path / "new"), "colours", ["train", "val"])
    name_data(config.data, {"path": str(tmp_path / "new")})
    assert config.data.to_dict() | settings_of(settings) == config.data.to_dict()
    name_data(config.data, {"path": str(tmp_path / "tree")})
    assert (config.data.source, config.data.name) == ("folder", "")


def settings_of(settings: dict[str, str]) -> dict[str, str]:
    return {name.removeprefix("data."): value for name, value in settings.items()}


def test_a_run_that_is_read_only_is_evaluated_and_not_saved(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path, (1,))

    def refuse(path: object, flag: str) -> None:
        raise UserError(f"cannot write to {path}: Read-only file system")

    monkeypatch.setattr(paths, "check_writable", refuse)
    record(tmp_path)
    shown = capsys.readouterr()
    assert "will only be printed, not saved: cannot write to" in shown.err
    assert "best" in shown.out and not (tmp_path / "evaluations").exists()
