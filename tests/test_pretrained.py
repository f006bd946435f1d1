"""Networks of runs and of files, with which training starts."""

import pathlib
import shutil
from typing import Any

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import save_pth
from test_train import assert_same_run, small_config

from sop_jax import pretrained, train
from sop_jax.convert import convert
from sop_jax.errors import UserError
from sop_jax.models.positions import resize_positions
from sop_jax.parallel.mesh import make_mesh
from sop_jax.training import checkpoint
from sop_jax.training.assemble import Run, assemble
from sop_jax.training.checkpoint import named_leaves

pytestmark = pytest.mark.medium

SHORT = {"steps": 4, "eval_every": 0, "log_every": 1, "checkpoint_every": 2}


def ibot_file(path: pathlib.Path, rows: int = 17) -> pathlib.Path:
    """Returns a checkpoint of the network of `small_config`, whose student has other weights."""
    teacher = checkpoints.ibot(depth=1, rows=rows, hidden=32)
    student = {f"module.{name}": -array for name, array in teacher.items()}
    return save_pth(path, {"student": student, "teacher": teacher, "epoch": 7})


def start_of(source: pathlib.Path, **changes: Any) -> tuple[Run, dict[str, np.ndarray], list[str]]:
    """Returns a run that starts from `source`, the leaves of its first state, and its messages."""
    config = small_config(**SHORT, init_from=str(source), **changes)
    run = assemble(config, make_mesh(1), images=100)
    fresh = run.init(jax.random.key(config.seed))
    state, words = train.start_from(config, run, fresh)
    assert jax.tree.leaves(state.carried)[0] is jax.tree.leaves(fresh.carried)[0]
    leaves = {
        f"{name}/{path}": np.asarray(leaf)
        for name, part in (("student", state.student), ("teacher", state.teacher))
        for path, leaf in named_leaves(part).items()
    }
    return run, leaves, words


def test_student_and_teacher_start_from_the_teacher_of_a_file(tmp_path: pathlib.Path) -> None:
    arrays = checkpoints.ibot(depth=1, hidden=32)
    _, leaves, words = start_of(ibot_file(tmp_path / "f.pth"))
    for network in ("student", "teacher"):
        for name, path in (
            ("backbone.cls_token", "cls_token"),
            ("backbone.norm.bias", "norm/bias"),
        ):
            np.testing.assert_array_equal(
                leaves[f"{network}/backbone/{path}"], arrays[name].ravel()
            )
        kernel = leaves[f"{network}/head/fc2/kernel"]
        np.testing.assert_array_equal(kernel, arrays["head.mlp.2.weight"].T)
    assert words[0] == f"starts from {tmp_path / 'f.pth'}"
    told = "\n".join(words)
    assert "loaded: 0.0176 M parameters in 25 leaves, by the names of ibot" in told
    assert "not needed: head.last_layer.weight_g, head.last_layer.weight_v" in told
    assert "resized" not in told and "initial values" not in told


def test_positions_of_another_grid_are_resized_and_missing_parts_start_by_themselves(
    tmp_path: pathlib.Path,
) -> None:
    arrays = checkpoints.vit(depth=1, rows=1 + 7 * 7)
    run, leaves, words = start_of(save_pth(tmp_path / "f.pth", arrays))
    table = arrays["pos_embed"][0]
    expected = resize_positions(jnp.asarray(table[1:].reshape(7, 7, 32)), (4, 4), "ibot").reshape(
        16, 32
    )
    found = leaves["student/backbone/pos_embed"]
    np.testing.assert_array_equal(found[0], table[0])
    np.testing.assert_allclose(found[1:], expected, atol=1e-6)
    told = "\n".join(words)
    assert "resized: pos_embed from 7x7 to 4x4" in told
    assert "initial values: backbone/mask_token, head/fc1/bias, head/fc1/kernel" in told
    fresh = run.init(jax.random.key(0)).student
    np.testing.assert_array_equal(leaves["teacher/head/fc1/kernel"], fresh["head"]["fc1"]["kernel"])


def test_a_converted_folder_gives_what_its_file_does(tmp_path: pathlib.Path) -> None:
    file = save_pth(tmp_path / "f.pth", checkpoints.vit(depth=1))
    convert(file, tmp_path / "net", heads=2)
    convert(tmp_path / "net", tmp_path / "again")
    settings = {"head.hidden": 40, "model.positions": "size"}
    _, expected, words = start_of(file, **settings)
    assert (
        "missing, so kept at their initial values: backbone/mask_token, head/fc1/bias" in words[2]
    )
    for folder in (tmp_path / "net", tmp_path / "again"):
        _, found, told = start_of(folder, **settings)
        for path, leaf in expected.items():
            np.testing.assert_array_equal(found[path], leaf)
        assert told[1].split(", ")[0] == words[1].split(", ")[0]  # the number of parameters
        assert told[2] == words[2]
        assert (
            "it has model.positions=ibot, but this network has size, so its features will"
            in told[3]
        )
    assert len(told) == len(words)


def test_training_from_a_file_resumes_without_it(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, whole, stopped = (tmp_path / name for name in ("f.pth", "whole", "stopped"))
    config = small_config(**SHORT, init_from=str(ibot_file(file)))
    train.train(config, whole)
    assert f"starts from {file}" in capfd.readouterr().err
    shutil.copytree(whole, stopped)
    (stopped / "summary.json").unlink()
    shutil.rmtree(stopped / "checkpoints" / "4")
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(lines[:2]))
    file.unlink()
    train.train(config, stopped)
    assert "starts from" not in capfd.readouterr().err
    assert_same_run(whole, stopped)

    # A run can start from the teacher of another run, or from the network converted from it.
    teacher = named_leaves(pretrained.load_network(whole)[2])
    convert(whole, tmp_path / "slim", step=2)
    convert(whole, tmp_path / "slim4")
    assert checkpoint.steps(tmp_path / "slim") == [2]
    for source in (whole, tmp_path / "slim4"):
        _, leaves, words = start_of(source)
        assert "of the teacher of step 4" in "\n".join(words)
        for path, leaf in teacher.items():
            np.testing.assert_array_equal(leaves[f"student/{path}"], leaf)
    student = pretrained.load_network(whole, network="student")[2]["backbone"]["cls_token"]
    assert (student != teacher["backbone/cls_token"]).any()

    other = small_config(**SHORT, init_from=str(whole), **{"model.heads": 4})
    with pytest.raises(UserError, match="init_from=.*heads=2.*, but this one .*heads=4"):
        train.train(other, tmp_path / "other")
    wide = small_config(**SHORT, init_from=str(whole), **{"model.width": 64})
    with pytest.raises(UserError, match="width=32.*, but this one .*width=64"):
        train.train(wide, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "damage, words",
    [
        ("truncated", "cannot be read"),
        ("absent", "there is no file"),
        ("another", r"patch_embed.proj.weight is \[32, 3, 8, 8\], expected \[32, 3, 4, 4\]"),
    ],
)
def test_bad_file_is_reported_before_anything_is_written(
    tmp_path: pathlib.Path, damage: str, words: str
) -> None:
    file = tmp_path / "f.pth"
    if damage == "another":
        save_pth(file, checkpoints.vit(depth=1, patch=8))
    elif damage == "truncated":
        ibot_file(file).write_bytes(file.read_bytes()[:4000])
    with pytest.raises(UserError, match=f"init_from={file}: .*(.|\n)*{words}"):
        train.train(small_config(**SHORT, init_from=str(file)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_family_is_named(tmp_path: pathlib.Path) -> None:
    file = pretrained.read_file(save_pth(tmp_path / "f.pth", checkpoints.vit(depth=1)))
    settings = small_config(**SHORT, **{"model.family": "swin"}).model
    with pytest.raises(
        UserError, match="its names are those of a vit of ibot, but this network is a swin"
    ):
        pretrained.of_arrays(file, {}, settings)


@pytest.mark.parametrize("kind", checkpoints.MISSHAPEN)
def test_misshapen_weights_are_reported(tmp_path: pathlib.Path, kind: str) -> None:
    file = save_pth(tmp_path / "f.pth", checkpoints.misshapen(kind, depth=1))
    with pytest.raises(UserError) as error:
        train.train(small_config(**SHORT, init_from=str(file)), tmp_path / "run")
    for words in checkpoints.MISSHAPEN[kind][1]:
        assert words in str(error.value)
