"""Runs from start to end, and everything that can go wrong in between."""

import contextlib
import errno
import functools
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from etils import epath
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sop_jax
from sop_jax import config as config_lib
from sop_jax import pretrained, train
from sop_jax.compiled.device_memory import GIB, Fit
from sop_jax.convert import convert
from sop_jax.data.pipeline import train_batches
from sop_jax.data.sources import open_source
from sop_jax.errors import Interrupted, UserError
from sop_jax.monitor import metrics
from sop_jax.monitor.pace import Pace, PaceKeeper
from sop_jax.monitor.sentences import curves_text, run_text, summary_text, warnings_of
from sop_jax.objectives.sop.health import PATIENCE
from sop_jax.parallel.interruption import Answer, Interruption
from sop_jax.parallel.mesh import make_mesh
from sop_jax.schedules import Length
from sop_jax.settings import flatten
from sop_jax.training import assemble as assembly
from sop_jax.training import checkpoint, owner, resume
from sop_jax.training.assemble import assemble

pytestmark = pytest.mark.medium

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "digits.py"

STEPS = 16
SMALL = {
    "steps": STEPS,
    "batch_size": 16,
    "log_every": 2,
    "eval_every": 7,
    "checkpoint_every": 3,
    "checkpoint.keep_last": 2,
    "checkpoint.keep_every": 6,
    "data.source": "digits",
    "data.workers": 0,
    "data.threads": 1,
    "augment.global_size": 16,
    "augment.local_size": 8,
    "augment.local_crops": 2,
    "model.size": "custom",
    "model.width": 32,
    "model.depth": 1,
    "model.heads": 2,
    "model.patch": 4,
    "model.dtype": "float32",
    "head.hidden": 32,
    "head.dim": 16,
    "sop.cls.memory": 64,
    "sop.cls.anchors": 16,
    "sop.cls.supports": 2,
    "sop.cls.tasks": 1,
    "sop.patch.memory": 64,
    "sop.patch.anchors": 16,
    "sop.temperature_warmup_steps": 2,
    "optim.warmup_steps": 2,
    "eval.resize": 16,
    "eval.crop": 16,
    "eval.batch_size": 512,
    "mesh.data": 1,
}
TIMINGS = ("wall_s", "images_per_s", "idle_share", "compile_s")


def small_config(**changes: Any) -> ml_collections.ConfigDict:
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.update_from_flattened_dict(SMALL | changes)
    return config


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of an uninterrupted run; tests that change it make a copy."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train.train(small_config(), workdir)
    return workdir


@pytest.fixture
def stopped(finished: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """The workdir of the same run as if it had been killed in step 15."""
    workdir = tmp_path / "stopped"
    shutil.copytree(finished, workdir)
    (workdir / "summary.json").unlink()
    for step in (15, 16):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 14]
    (workdir / "metrics.jsonl").write_text("".join(kept))
    return workdir


def rows(workdir: pathlib.Path, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    return [{name: row[name] for name in row if name not in without} for row in parsed]


def saved_state(workdir: pathlib.Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Returns every leaf of a checkpoint, by default the newest."""
    abstract = assemble(config_lib.read_config(workdir), make_mesh(1), images=100).abstract
    state = checkpoint.restore(workdir, abstract, step)
    named, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        jax.tree_util.keystr(path): np.asarray(
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        )
        for path, leaf in named
    }


def assert_same_state(one: pathlib.Path, other: pathlib.Path) -> None:
    """Asserts that the last states have the same bits."""
    states = [saved_state(workdir) for workdir in (one, other)]
    bits = [{name: leaf.tobytes() for name, leaf in state.items()} for state in states]
    assert [name for name in bits[0] if bits[0][name] != bits[1][name]] == []
    assert bits[0].keys() == bits[1].keys()


def assert_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
    """Asserts that the last states and all rows, except for timings, have the same bits."""
    assert checkpoint.steps(one) == checkpoint.steps(other)
    assert_same_state(one, other)
    assert rows(one, TIMINGS) == rows(other, TIMINGS)


def snapshot(folder: pathlib.Path) -> dict[str, tuple[int, bytes]]:
    """Returns the modification time and content of every file in a folder."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in [folder, *folder.rglob("*")]
    }


def paint(folder: pathlib.Path, count: int, broken: tuple[int, ...] = ()) -> None:
    """Makes a folder of images of coloured noise, some of which are truncated."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        file = folder / f"{i:03}.png"
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(file)
        if i in broken:
            file.write_bytes(file.read_bytes()[:200])


def test_labels_of_a_packed_file_without_class_names_are_announced(tmp_path: pathlib.Path) -> None:
    pixel = io.BytesIO()
    Image.new("RGB", (4, 4)).save(pixel, "PNG")
    arrays = {}
    for split in ("train", "test"):
        arrays[f"{split}_blob"] = np.frombuffer(4 * pixel.getvalue(), np.uint8)
        arrays[f"{split}_offsets"] = np.arange(5) * len(pixel.getvalue())
        arrays[f"{split}_labels"] = np.arange(4) % 2
    np.savez(tmp_path / "p.npz", **arrays)
    config = small_config(**{"data.source": "packed", "data.path": str(tmp_path / "p.npz")})
    config.data.update(train_split="train", test_split="test")
    source, test = (open_source(config.data, split) for split in ("train", "test"))
    assert source is not None
    devices, length = np.array(jax.devices()[:1]), Length(steps=10, epoch=5.0)
    words = run_text(config, source, test, 2_600_000, devices, 3, length)
    assert "4 images, " in words and "; 2.6 M parameters; " in words
    assert words.endswith("; steps 3 to 10 (2.0 epochs); k-NN on 4 test images.")


def test_what_was_told_of_the_images_is_not_told_again(tmp_path: pathlib.Path) -> None:
    paint(tmp_path / "images", 4)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    config = folder_config(tmp_path / "images")
    workdir = epath.Path(tmp_path / "run")
    status = resume.check_workdir(config, workdir)
    (note,) = train.prepare(status, workdir, told=()).notes
    assert "notes.txt" in note or ".txt" in note
    assert train.prepare(status, workdir, told=[note]).notes == []


# The files of a run


def test_a_run_writes_its_settings_and_checkpoints(finished: pathlib.Path) -> None:
    saved = json.loads((finished / "config.json").read_text())
    assert saved.pop("version") == sop_jax.__version__
    assert saved == json.loads(json.dumps(small_config().to_dict()))
    # The last two of 3, 6, ..., 15, 16, and every sixth.
    assert checkpoint.steps(finished) == [6, 12, 15, 16]
    assert not list(finished.glob("*.tmp"))


def test_each_logged_step_is_one_row(finished: pathlib.Path) -> None:
    logged = rows(finished)
    # Every second step; for the k-NN accuracy every seventh step, the first and the last.
    assert [row["step"] for row in logged] == [0, 2, 4, 6, 7, 8, 10, 12, 14, 16]
    health = {
        *("log_k", "entropy", "entropy_of_mean", "winning_sops", "support_cosine"),
        *("embedding_std", "effective_rank", "agreement", "memory_filled"),
    }
    schedule = {"student_temperature", "teacher_temperature", "lr", "weight_decay", "momentum"}
    expected = health | schedule | {"loss", "cls", "mim", "grad_norm", "corrupt", "images_per_s"}
    expected |= {"idle_share"}
    for row in logged:
        if row["step"] % 2 == 0 and row["step"]:
            assert expected <= row.keys()
            assert all(math.isfinite(row[name]) for name in expected)
            assert row["loss"] == pytest.approx(row["cls"] + row["mim"], rel=1e-6)
            assert row["log_k"] == pytest.approx(math.log(16))
            assert row["memory_filled"] == min(1.0, row["step"] / 4)
        else:
            assert not expected & row.keys()
        assert ("knn_top1" in row) == (row["step"] in (0, 7, 14, 16))


def test_tensorboard_has_the_same_curves(finished: pathlib.Path) -> None:
    board = EventAccumulator(str(finished / "tensorboard")).Reload()
    for name in ("loss", "agreement", "lr", "knn_top1"):
        curve = [(event.step, event.value) for event in board.Scalars(name)]
        expected = [(row["step"], np.float32(row[name])) for row in rows(finished) if name in row]
        assert curve == expected


def test_the_summary_is_the_end_of_the_run(finished: pathlib.Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    first, last = rows(finished)[0], rows(finished)[-1]
    speeds = [row["images_per_s"] for row in rows(finished) if "images_per_s" in row]
    assert summary == {
        "knn_top1": last["knn_top1"],
        "knn_top1_untrained": first["knn_top1"],
        "knn_k": last["knn_k"],
        "loss": last["loss"],
        "steps": STEPS,
        "images_per_s": np.median(speeds),
        "wall_s": last["wall_s"],
        "compile_s": summary["compile_s"],
    }
    assert 0 < summary["compile_s"] < 600
    assert first["step"] == 0 and first["knn_top1"] > 0.2  # chance is 0.1
    walls = [row["wall_s"] for row in rows(finished)]
    assert walls == sorted(walls) and walls[0] > 0


def test_training_changes_the_network_and_the_memories(finished: pathlib.Path) -> None:
    early, late = saved_state(finished, 6), saved_state(finished)
    still = {name for name in late if np.array_equal(early[name], late[name])}
    # Both memories were full at step 4. The key is folded with the step, so it never changes.
    assert still == {".key", ".carried['cls'].filled", ".carried['patch'].filled"}


def test_a_finished_run_says_so_and_stays_as_it_is(
    finished: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(finished)
    summary = train.train(small_config(), finished)
    assert snapshot(finished) == before
    assert summary == json.loads((finished / "summary.json").read_text())
    shown = capsys.readouterr()
    assert f"{finished} is finished" in shown.out and f'"steps": {STEPS}' in shown.out
    assert shown.err == ""


def test_the_progress_shows_loss_accuracy_speed_and_time_left(
    tmp_path: pathlib.Path,
    fake_step: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(PaceKeeper, "look", lambda self: Pace(1.0, 0.0, 2))
    train.train(small_config(**{"optim.warmup_steps": 320}), tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("1437 images, views 2x16 + 2x8;")
    assert "batch 16 on 1 cpu device; steps 0 to 16" in lines[0]
    assert lines[1].startswith("warning: optim.warmup is 320 steps, but the run has only 16, so ")
    steps = [line for line in lines if line.startswith("step ")]
    assert re.match(r"step 0/16  knn 0\.\d+  ", steps[0])
    assert re.fullmatch(r"step 2/16  loss 3  images/s \d.*  \d\d:\d\d left", steps[1])
    assert re.fullmatch(r"step 16/16  loss 3  knn .*  images/s .*  00:00 left", steps[-1])


# Runs of other kinds


def test_a_folder_without_labels_trains_without_knn(
    tmp_path: pathlib.Path, fake_step: None
) -> None:
    paint(tmp_path / "images", 24)
    config = small_config(**{"data.source": "folder", "data.path": str(tmp_path / "images")})
    summary = train.train(config, tmp_path / "run")
    assert summary["knn_top1"] is summary["knn_top1_untrained"] is summary["knn_k"] is None
    assert summary["loss"] == 3 and summary["steps"] == STEPS
    first, *_, last = rows(tmp_path / "run")
    assert first["step"] == 0 and first["knn_top1"] is None
    assert last["knn_top1"] is None and last["knn_top1_k10"] is None


def test_a_data_set_smaller_than_the_batch_is_repeated(
    tmp_path: pathlib.Path, fake_step: None
) -> None:
    paint(tmp_path / "images", 5)
    folder = {"data.source": "folder", "data.path": str(tmp_path / "images")}
    config = small_config(steps=None, epochs=9.0, **folder)
    assert train.train(config, tmp_path / "run")["steps"] == 3  # 45 images, 16 per step


def test_steps_win_over_epochs(tmp_path: pathlib.Path, fake_step: None) -> None:
    assert train.train(small_config(epochs=0.1), tmp_path / "a")["steps"] == STEPS
    config = small_config(steps=None, epochs=0.1)
    assert train.train(config, tmp_path / "b")["steps"] == 9  # 143.7 images, 16 per step


@pytest.mark.parametrize("every", ["log_every", "eval_every", "checkpoint_every"])
def test_what_never_happens_happens_at_the_end(
    tmp_path: pathlib.Path, fake_step: None, every: str
) -> None:
    summary = train.train(small_config(**{every: 0}), tmp_path)
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == {
        "log_every": [0, 7, 14, 16],
        "eval_every": [2, 4, 6, 8, 10, 12, 14, 16],
        "checkpoint_every": [0, 2, 4, 6, 7, 8, 10, 12, 14, 16],
    }[every]
    assert "loss" in logged[-1] and summary["loss"] == 3
    assert checkpoint.steps(tmp_path) == ([16] if every == "checkpoint_every" else [6, 12, 15, 16])
    assert ("knn_top1" in logged[-1]) == (every != "eval_every")
    assert (summary["knn_top1"] is None) == (every == "eval_every")


def test_a_run_without_local_crops_and_masked_patches(tmp_path: pathlib.Path) -> None:
    changes = {"augment.local_crops": 0, "sop.patch.tasks": 0, "eval_every": 0, "steps": 3}
    summary = train.train(small_config(**changes), tmp_path)
    assert math.isfinite(summary["loss"])
    last = rows(tmp_path)[-1]
    assert "mim" not in last and last["loss"] == last["cls"]


def test_three_global_views_train_and_learn_from_one_another(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(**{"augment.global_crops": 3, "eval_every": 0, "steps": 3})
    assert math.isfinite(train.train(config, tmp_path)["loss"])
    assert "views 3x16 + 2x8" in capsys.readouterr().err
    run = assemble(config, make_mesh(1), images=100)
    assert run.batch["global_views"].shape == (16, 3, 16, 16, 3)
    assert run.batch["mask"].shape == (16, 3, 4, 4)
    assert run.objective.teacher_views == (0, 1, 2)
    assert run.objective.student_views == (0, 1, 2, 3, 4)


def test_a_run_by_the_mean_of_patches_is_evaluated_extracted_and_converted_by_it(
    tmp_path: pathlib.Path,
) -> None:
    config = small_config(**{"model.pool": "mean", "eval_every": 2, "steps": 2})
    summary = train.train(config, tmp_path / "run")
    assert math.isfinite(summary["loss"]) and summary["knn_top1"] is not None
    convert(tmp_path / "run", tmp_path / "net")
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    for workdir in (tmp_path / "run", tmp_path / "net"):
        loaded, model, params, _ = pretrained.load_network(workdir)
        assert loaded.model.pool == "mean"
        (tokens,) = jax.jit(model.features)(params, images)
        expected = np.asarray(tokens, np.float64)[:, 1:].mean(1)
        np.testing.assert_allclose(tokens[:, 0], expected, atol=1e-6)
    words = convert(tmp_path / "run", tmp_path / "timm.safetensors", "timm")
    assert (
        "this network has model.pool=mean, but timm uses cls; average its patch tokens after the "
        "final norm instead" in words
    )
    with pytest.raises(UserError, match="model.pool: the run has 'mean', but 'cls' was requested"):
        train.train(
            small_config(**{"model.pool": "cls", "eval_every": 2, "steps": 2}), tmp_path / "run"
        )


# Resume


def command(workdir: pathlib.Path, **changes: Any) -> list[str]:
    settings = SMALL | changes
    if "method" in changes:  # which refuses the settings of SOP
        settings = {name: settings[name] for name in settings if not name.startswith("sop.")}
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return [
        *(sys.executable, "-m", "sop_jax.train"),
        *(f"--config={CONFIG}", f"--workdir={workdir}", *flags),
    ]


def start(workdir: pathlib.Path, **changes: Any) -> subprocess.Popen[str]:
    """Starts the command in its own process group, as a shell does."""
    return subprocess.Popen(
        command(workdir, **changes),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_step(process: subprocess.Popen[str], workdir: pathlib.Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while not any(row["step"] >= step for row in metrics.read_metrics(workdir)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


# A method whose state has parameters, centers and an optimizer that waits.
WITH_PROTOTYPES = {
    "method": "ibot",
    "ibot.prototypes": 64,
    "ibot.patch_prototypes": 32,
    "ibot.freeze_steps": 5,
    "ibot.koleo_prototypes": 0.1,
    "ibot.layer": "vmf",
    "ibot.marginal": "probability_centering",
}


@pytest.mark.slow
@pytest.mark.parametrize("method", [{}, WITH_PROTOTYPES], ids=["sop", "ibot"])
def test_after_a_kill_the_same_command_ends_with_the_same_bits(
    method: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    # The k-NN accuracy of each step takes longer than the step.
    slowly = {"eval_every": 1, **method}
    train.train(small_config(**slowly), tmp_path / "whole")

    killed = tmp_path / "killed"
    process = start(killed, **slowly)
    wait_for_step(process, killed, random.randint(7, 10))  # by then step 3 is saved
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    saved = checkpoint.latest_step(killed)
    assert saved is not None and 3 <= saved < STEPS
    assert not (killed / "summary.json").exists()

    again = subprocess.run(command(killed, **slowly), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"steps {saved} to {STEPS}" in again.stderr
    assert [row["step"] for row in rows(killed)] == list(range(STEPS + 1))
    assert_same_run(killed, tmp_path / "whole")
    assert json.loads(again.stdout) == json.loads((killed / "summary.json").read_text())


BACKBONES: dict[str, dict[str, Any]] = {
    "swin": {
        "augment.global_size": 64,
        "augment.local_size": 32,
        "model.family": "swin",
        "model.width": 8,
        "model.stage_depths": (2, 2, 2, 2),
        "model.stage_heads": (1, 2, 2, 2),
        "model.window": 8,
        "eval.resize": 32,
        "eval.crop": 32,
    },
    "vit": {"model.registers": 2, "model.layer_scale": 0.5, "model.positions": "antialiased"},
}


@pytest.mark.parametrize(
    ("backbone", "dtype"),
    [
        ("vit", "float32"),
        *(pytest.param(name, "bfloat16", marks=pytest.mark.slow) for name in BACKBONES),
    ],
)
def test_every_backbone_learns_by_both_losses_and_resumes_exactly(
    backbone: str, dtype: str, tmp_path: pathlib.Path
) -> None:
    changes = {"steps": 6, "log_every": 1, "eval_every": 0, "model.drop_path": 0.2}
    changes |= {"mask.ratio": (0.5, 0.5), "mask.start_steps": 4, "model.dtype": dtype}
    config = small_config(**changes | BACKBONES[backbone])
    # The gradient of JAX's attention in bfloat16 promotes.
    promotion = jax.numpy_dtype_promotion("strict" if dtype == "float32" else "standard")
    with promotion:
        train.train(config, tmp_path / "whole")
    logged = rows(tmp_path / "whole")
    assert [row["mim"] > 0 for row in logged if "mim" in row] == [False] * 4 + [True] * 2
    assert all(row["cls"] > 0 for row in logged if "cls" in row)
    early, late = saved_state(tmp_path / "whole", 3), saved_state(tmp_path / "whole")
    still = [name for name in late if np.array_equal(early[name], late[name])]
    # The memories were full at step 4; everything else must change.
    assert still == [".key"], still

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "6")
    with promotion:
        train.train(config, tmp_path / "cut")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 0), (signal.SIGTERM, 2)])
def test_a_signal_to_all_processes_saves_the_step_and_says_so_in_one_line(
    tmp_path: pathlib.Path, finished: pathlib.Path, number: signal.Signals, workers: int
) -> None:
    """Signals the whole process group, as Ctrl-C in a terminal and some clusters do."""
    process = start(tmp_path, eval_every=1, log_every=0, **{"data.workers": workers})
    wait_for_step(process, tmp_path, 4)
    os.killpg(process.pid, number)
    _, err = process.communicate()
    saved = checkpoint.latest_step(tmp_path)
    assert saved is not None and 4 <= saved < STEPS
    last = next(line for line in err.splitlines() if line.startswith("interrupted"))
    assert f"interrupted; step {saved} of {STEPS} is saved" in last and "same command" in last
    assert process.returncode == 130 and "Traceback" not in err
    train.train(small_config(), tmp_path)
    assert_same_state(tmp_path, finished)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("open_source", {}),
        ("assemble", {}),
        ("compiled_step", {}),
        ("measure", {}),
        ("train_batches", {"eval_every": 0, "data.workers": 1}),
        ("to_devices", {"eval_every": 0}),
    ],
    ids=["listing", "building", "compiling", "first evaluation", "starting workers", "first batch"],
)
def test_a_signal_at_any_stage_of_the_start_ends_it_at_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, stage: str, changes: dict[str, Any]
) -> None:
    signal_after(monkeypatch, stage)
    with pytest.raises(UserError, match=r"interrupted.* nothing was trained yet.* same command"):
        train.train(small_config(**changes), tmp_path)
    assert checkpoint.latest_step(tmp_path) is None
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["open_source", "compiled_step", "to_devices"])
def test_a_signal_while_a_run_resumes_says_what_is_saved(
    stopped: pathlib.Path, finished: pathlib.Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    saved = checkpoint.steps(stopped)
    signal_after(monkeypatch, stage)
    with pytest.raises(UserError, match=f"interrupted.* step {saved[-1]} is saved.* same command"):
        train.train(small_config(), stopped)
    assert checkpoint.steps(stopped) == saved
    monkeypatch.undo()
    train.train(small_config(), stopped)
    assert_same_run(stopped, finished)


def signal_after(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Makes one stage of the start end with a signal."""
    whole = getattr(train, stage)

    def signalled(*args: Any, **kwargs: Any) -> Any:
        result = whole(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(train, stage, signalled)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 7, 14, 16])
def test_an_evaluation_ends_at_a_signal_and_is_repeated_on_resume(
    tmp_path: pathlib.Path, finished: pathlib.Path, monkeypatch: pytest.MonkeyPatch, asked: int
) -> None:
    """Interrupts the evaluations of the untrained network, of two steps, and of the last one."""
    evaluate, evaluated = train.measure, [0, 7, 14, 16]

    def interrupted(*args: Any) -> Any:
        if len([row for row in rows(tmp_path) if "knn_top1" in row]) == evaluated.index(asked):
            os.kill(os.getpid(), signal.SIGTERM)
        found = evaluate(*args)
        assert evaluated.index(asked) > len([row for row in rows(tmp_path) if "knn_top1" in row])
        return found

    monkeypatch.setattr(train, "measure", interrupted)
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    saved = f"step {asked} of 16 is saved" if asked else "nothing was trained"
    with pytest.raises(UserError, match=saved):
        train.train(small_config(), tmp_path)
    assert checkpoint.latest_step(tmp_path) == (asked or None)
    assert not (tmp_path / "summary.json").exists()
    assert handlers == [signal.getsignal(number) for number in numbers]
    monkeypatch.undo()
    train.train(small_config(), tmp_path)
    assert_same_state(tmp_path, finished)
    assert rows(tmp_path, TIMINGS) == rows(finished, TIMINGS)


def test_a_signal_while_images_are_waited_for_saves_the_last_step(
    tmp_path: pathlib.Path, fake_step: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = train.train_batches

    class Stalled:
        """Yields batches until the sixth, which never comes, as if a disk were gone."""

        def __init__(self, *args: Any) -> None:
            self.batches, self.made = make(*args), 0

        def __next__(self) -> Any:
            self.made += 1
            if self.made == 6:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(20)
            return next(self.batches)

        def close(self) -> None:
            self.batches.close()

    monkeypatch.setattr(train, "train_batches", Stalled)
    with pytest.raises(Interrupted, match="step 5 of 16 is saved"):
        train.train(small_config(eval_every=0), tmp_path)
    assert checkpoint.latest_step(tmp_path) == 5


def test_a_run_killed_after_its_last_checkpoint_gets_its_summary(
    finished: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "summary.json").unlink()
    summary = train.train(small_config(), workdir)
    expected = json.loads((finished / "summary.json").read_text())
    assert summary | {"compile_s": 0} == expected | {"compile_s": 0}
    assert rows(workdir) == rows(finished)


@pytest.mark.parametrize(
    "changes",
    [
        {"log_every": 5, "eval_every": 0, "checkpoint_every": 4},
        {"data.workers": 2, "data.threads": 3},
    ],
    ids=str,
)
def test_settings_that_may_change_on_resume_change_no_bit(
    stopped: pathlib.Path, finished: pathlib.Path, changes: dict[str, Any]
) -> None:
    train.train(small_config(**changes), stopped)
    assert_same_state(stopped, finished)
    assert config_lib.read_config(stopped).to_dict() == small_config(**changes).to_dict()


def test_devices_may_change_on_resume(stopped: pathlib.Path, finished: pathlib.Path) -> None:
    train.train(small_config(**{"mesh.data": 2, "eval_every": 0}), stopped)
    expected = {row["step"]: row for row in rows(finished)}
    resumed = [row for row in rows(stopped) if row["step"] > 12]
    assert [row["step"] for row in resumed] == [14, 16]
    for row in resumed:
        for name in ("loss", "cls", "mim"):
            assert row[name] == pytest.approx(expected[row["step"]][name], rel=1e-5)


@pytest.mark.slow
def test_a_run_whose_devices_change_every_ten_steps_is_the_same_but_for_rounding(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8, 2, 4 and again 8: the order of images and what is in the memories are the same exactly."""
    changes = {"steps": 40, "checkpoint_every": 0, "eval_every": 0, "log_every": 40}
    changes |= {"checkpoint.keep_every": 10}
    # Low temperatures, and Adam where gradients are tiny, multiply rounding errors.
    changes |= {"optim.kind": "sgd", "sop.student_temperature": 0.3, "optim.lr": 0.5}
    changes |= {"sop.teacher_temperature": (0.2, 0.25)}
    seen = dict[pathlib.Path, list[list[int]]]()
    put = train.to_devices

    def train_to(stop: int, workdir: pathlib.Path, devices: int) -> None:
        """Goes on with the run until it has done step `stop`."""

        def to_devices(mesh: Any, batch: dict[str, np.ndarray]) -> Any:
            seen.setdefault(workdir, []).append(batch["index"].tolist())
            return put(mesh, batch)

        def poll(self: Interruption, save: bool = False) -> Answer:
            return Answer(stop=len(seen[workdir]) == stop, save=save)

        monkeypatch.setattr(train, "to_devices", to_devices)
        monkeypatch.setattr(Interruption, "poll", poll)
        with pytest.raises(Interrupted) if stop < 40 else contextlib.nullcontext():
            train.train(small_config(**changes | {"mesh.data": devices}), workdir)

    changing, fixed = tmp_path / "changing", tmp_path / "fixed"
    for stop, devices in ((10, 8), (20, 2), (30, 4), (40, 8)):
        train_to(stop, changing, devices)
    train_to(40, fixed, 8)
    assert len(seen[fixed]) == 40 and seen[changing] == seen[fixed]
    found, expected = saved_state(changing), saved_state(fixed)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if np.issubdtype(array.dtype, np.floating):
            scale = np.abs(array).max(initial=0)
            np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-4 * scale, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], array, name)
    # What is tolerated is less than what the steps on other devices have changed.
    early = saved_state(changing, 10)
    moved = {
        name: np.abs(array - early[name]).max() > 1e-3 * np.abs(array).max()
        for name, array in expected.items()
        if name.startswith((".student", ".carried")) and np.issubdtype(array.dtype, np.floating)
    }
    assert np.mean(list(moved.values())) > 0.5, moved


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("seed", 0, 1),
        ("batch_size", 16, 32),
        ("sop.cls.supports", 2, 3),
        ("augment.flip", None, 0.25),
    ],
)
@pytest.mark.parametrize("state", ["stopped", "finished"])
def test_another_setting_is_named_and_changes_nothing(
    request: pytest.FixtureRequest, state: str, key: str, old: Any, new: Any
) -> None:
    workdir = request.getfixturevalue(state)
    before = snapshot(workdir)
    old = flatten(small_config())[key] if old is None else old
    with pytest.raises(UserError) as caught:
        train.train(small_config(**{key: new}), workdir)
    message = str(caught.value)
    assert f"{key}: the run has {old!r}, but {new!r} was requested" in message
    assert "another --workdir" in message and "checkpoint_every" in message
    assert len(message.splitlines()) == 3  # no other setting is named
    assert snapshot(workdir) == before


# One run at a time


def test_a_second_start_in_a_running_workdir_is_refused_and_changes_nothing(
    tmp_path: pathlib.Path, fake_step: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, refused = checkpoint.Checkpoints.save, []

    def start_again(self: checkpoint.Checkpoints, step: int, state: Any) -> None:
        save(self, step, state)
        if step == 6:
            self.wait()
            half_written = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp"
            half_written.mkdir()
            before = snapshot(tmp_path)
            with pytest.raises(UserError, match=f"process {os.getpid()} on .* one run at a time"):
                train.train(small_config(), tmp_path)
            refused.append(snapshot(tmp_path) == before)
            half_written.rmdir()

    monkeypatch.setattr(checkpoint.Checkpoints, "save", start_again)
    assert train.train(small_config(), tmp_path)["steps"] == STEPS
    assert refused == [True]
    assert [row["step"] for row in rows(tmp_path)] == [0, 2, 4, 6, 7, 8, 10, 12, 14, 16]
    assert not list(tmp_path.glob("owner*"))


def test_a_run_whose_workdir_was_taken_over_writes_nothing_more(
    tmp_path: pathlib.Path, fake_step: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "SURE", 0)
    save = checkpoint.Checkpoints.save

    def taken_over(self: checkpoint.Checkpoints, step: int, state: Any) -> None:
        save(self, step, state)
        self.wait()
        store = owner.Disk(tmp_path)
        assert store.take(store.look(), "{}")

    monkeypatch.setattr(checkpoint.Checkpoints, "save", taken_over)
    with pytest.raises(UserError, match="this run has stopped, because another process has taken"):
        train.train(small_config(), tmp_path)
    assert checkpoint.steps(tmp_path) == [3]
    assert [row["step"] for row in rows(tmp_path)] == [0, 2]
    assert [path.name for path in tmp_path.glob("owner*")] == ["owner-2.json"]


@pytest.mark.slow
def test_a_job_that_comes_back_waits_for_the_one_that_still_saves(
    tmp_path: pathlib.Path, finished: pathlib.Path
) -> None:
    first = start(tmp_path, eval_every=1)
    wait_for_step(first, tmp_path, 4)
    waiting = [*command(tmp_path), "--wait=240"]
    with subprocess.Popen(waiting, cwd=ROOT, stderr=subprocess.PIPE, text=True) as second:
        assert second.stderr
        said = second.stderr.readline()
        assert f"process {first.pid} on " in said and "waiting for up to 240 s" in said
        first.terminate()
        _, words = first.communicate()
        assert first.returncode == 130, words
        rest = second.stderr.read()
    saved = re.search(r"step (\d+) of 16 is saved", words)
    assert second.returncode == 0 and saved and f"steps {saved[1]} to 16" in rest, rest
    assert_same_state(tmp_path, finished)


# The record of the settings and the data


def folder_config(images: pathlib.Path | str, **changes: Any) -> ml_collections.ConfigDict:
    """Returns the settings of a short run on a folder of images, without evaluations."""
    folder = {"data.source": "folder", "data.path": str(images), "eval_every": 0}
    return small_config(**folder | {"checkpoint_every": 2} | changes)


def stop_after(monkeypatch: pytest.MonkeyPatch, config: Any, workdir: pathlib.Path) -> int:
    """Trains until the first save, and leaves the workdir as if the run was then killed."""
    with monkeypatch.context() as patch:

        def killed(*_: Any, **__: Any) -> None:
            raise ZeroDivisionError

        patch.setattr(checkpoint.Checkpoints, "save", killed_after(1, killed))
        with pytest.raises(ZeroDivisionError):
            train.train(config, workdir)
    (step,) = checkpoint.steps(workdir)
    return step


def killed_after(times: int, kill: Callable[..., None]) -> Callable[..., None]:
    save, calls = checkpoint.Checkpoints.save, iter(range(times))

    def saves(self: checkpoint.Checkpoints, step: int, state: Any) -> None:
        save(self, step, state) if next(calls, None) is not None else kill()

    return saves


@pytest.mark.parametrize("change", ["added", "deleted", "renamed"])
@pytest.mark.parametrize("state", ["stopped", "finished"])
def test_other_images_are_reported_when_a_run_resumes(
    tmp_path: pathlib.Path,
    fake_step: None,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    state: str,
) -> None:
    images, workdir = tmp_path / "images", tmp_path / "run"
    paint(images, 24)
    config = folder_config(images, steps=None, epochs=9.0)
    if state == "stopped":
        stop_after(monkeypatch, config, workdir)
    else:
        train.train(config, workdir)
    before = snapshot(workdir)
    if change == "added":
        for i in range(20):
            shutil.copy(images / "000.png", images / f"more{i}.png")
    elif change == "deleted":
        for i in range(1, 24):
            (images / f"{i:03}.png").unlink()
    else:
        (images / "000.png").rename(images / "zero.png")
    told = {
        "added": "train: 24 images then, 44 now",
        "deleted": "train: 24 images then, 1 now",
        "renamed": "train: the same number of images, 24, but other names",
    }
    with pytest.raises(UserError, match=told[change]):
        train.train(config, workdir)
    assert snapshot(workdir) == before


def test_images_and_first_weights_may_be_moved(
    tmp_path: pathlib.Path, fake_step: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint(tmp_path / "images", 24)
    step = stop_after(monkeypatch, folder_config(tmp_path / "images"), tmp_path / "run")
    (tmp_path / "images").rename(tmp_path / "moved")
    config = folder_config(tmp_path / "moved", init_from="/scratch/gone.npz")
    assert train.train(config, tmp_path / "run")["steps"] == STEPS > step


def test_paths_with_a_tilde_or_a_slash_at_the_end_are_the_same_folders(
    tmp_path: pathlib.Path, fake_step: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    paint(tmp_path / "images", 24)
    summary = train.train(folder_config("~/images/"), "~/run/")
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert train.train(folder_config(tmp_path / "images"), tmp_path / "run") == summary


def test_a_relative_path_of_data_is_kept_as_the_folder_that_it_was(
    tmp_path: pathlib.Path, fake_step: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint(tmp_path / "images", 24)
    monkeypatch.chdir(tmp_path)
    train.train(folder_config("images"), "run")
    monkeypatch.chdir("/")
    assert config_lib.read_config(tmp_path / "run").data.path == str(tmp_path / "images")


def test_a_run_does_not_write_among_its_images(tmp_path: pathlib.Path, fake_step: None) -> None:
    paint(tmp_path / "images", 24)
    (tmp_path / "link").symlink_to(tmp_path / "images")
    with pytest.raises(UserError, match="is also data.path.*another folder"):
        train.train(folder_config(tmp_path / "images"), tmp_path / "link")


def test_the_images_of_a_run_without_a_record_are_recorded(
    tmp_path: pathlib.Path,
    fake_step: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paint(tmp_path / "images", 24)
    config = folder_config(tmp_path / "images")
    stop_after(monkeypatch, config, tmp_path / "run")
    (tmp_path / "run" / "data.json").unlink()
    train.train(config, tmp_path / "run")
    assert "no record of the data that the run began with" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "data.json").read_text())["train"]["images"] == 24


def test_a_finished_run_needs_no_images(
    tmp_path: pathlib.Path, fake_step: None, capsys: pytest.CaptureFixture[str]
) -> None:
    paint(tmp_path / "images", 24)
    config = folder_config(tmp_path / "images")
    summary = train.train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "images")
    assert train.train(config, tmp_path / "run") == json.loads(json.dumps(summary))
    assert "Its data was not compared with what the run used" in capsys.readouterr().err


def test_a_length_in_epochs_is_the_same_in_steps(
    tmp_path: pathlib.Path, fake_step: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(steps=None, epochs=0.1, eval_every=0)
    config.optim.warmup_steps, config.optim.warmup_epochs = None, 0.02
    stop_after(monkeypatch, config, tmp_path)
    same = small_config(steps=9, eval_every=0, **{"optim.warmup_steps": 2})
    assert train.train(same, tmp_path)["steps"] == 9


def test_a_finished_run_that_is_asked_for_more_says_how_to_continue(
    tmp_path: pathlib.Path, fake_step: None
) -> None:
    train.train(small_config(steps=None, epochs=0.1), tmp_path / "run")
    with pytest.raises(UserError) as caught:
        train.train(small_config(), tmp_path / "run")
    message = str(caught.value)
    assert "steps: the run has 9 (epochs=0.1), but 16 was requested" in message
    assert f"--config.init_from={tmp_path / 'run'} --workdir=NEW" in message


def test_more_corrupt_images_may_be_allowed_on_resume(
    tmp_path: pathlib.Path, fake_step: None
) -> None:
    paint(tmp_path / "images", 12, broken=(3, 7))
    with pytest.raises(UserError, match="--config.data.max_corrupt_share=0.17 to the same comm"):
        train.train(folder_config(tmp_path / "images"), tmp_path / "run")
    config = folder_config(tmp_path / "images", **{"data.max_corrupt_share": 0.17})
    assert train.train(config, tmp_path / "run")["steps"] == STEPS


def test_a_run_of_an_earlier_version_continues_as_it_began(
    stopped: pathlib.Path,
    finished: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = json.loads((stopped / "config.json").read_text())
    del made["version"], made["sop"]["pool"]
    (stopped / "config.json").write_text(json.dumps(made))
    assert small_config().sop.pool == "non_anchors"
    monkeypatch.setitem(config_lib.BEFORE["0.2.0"], "sop.pool", "all")
    with pytest.raises(UserError, match="lacks sop.pool"):  # this version has the setting
        (stopped / "config.json").write_text(json.dumps(made | {"version": "0.2.0"}))
        train.train(small_config(), stopped)
    (stopped / "config.json").write_text(json.dumps(made))
    for _ in range(2):  # a resumed run keeps the version that created it
        train.train(small_config(steps=STEPS), stopped)
        assert config_lib.read_config(stopped).sop.pool == "all"
        assert config_lib.version_of(stopped) == "0.1.0"
    assert "sop_jax 0.1.0 began this run, which continues as before" in capsys.readouterr().err
    with pytest.raises(UserError, match="sop.smoothing: the run has 0.1, but 0.2 was requested"):
        train.train(small_config(**{"sop.smoothing": 0.2}), stopped)


# Bad input


BAD = {
    "more anchors than rows": ({"sop.cls.anchors": 65}, "sop.cls.anchors 65 .*memory 64"),
    "a batch larger than a memory": ({"batch_size": 128}, "batch_size 128 .*memory 64"),
    "broken patches": ({"augment.global_size": 18}, "18 is not a multiple of model.patch 4"),
    "a batch that devices cannot split": ({"mesh.data": 3}, "16 cannot be split over 3 devices"),
    "too many devices": ({"mesh.data": 16}, "16 devices, but 8 are available"),
    "no steps": ({"steps": 0}, "steps is 0; .*--config.steps"),
    "an empty folder": ({"data.source": "folder", "data.path": "empty"}, "empty"),
    "no folder": ({"data.source": "folder", "data.path": "missing"}, "missing"),
    "no path": ({"data.source": "packed", "data.path": ""}, "data.path"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_reported_before_anything_is_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    changes, message = BAD[case]
    with pytest.raises(UserError, match=message) as caught:
        train.train(small_config(**changes), tmp_path / "run")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def fits(*of_steps: tuple[float, float], limit: float) -> Callable[[Any], Fit]:
    """Returns a `fit_of_step` for steps of these sizes in GiB, in total and of temporary arrays."""
    left = iter(of_steps)

    def compiled(run: Any) -> Fit:
        wanted, temporary = (round(size * GIB) for size in next(left))
        return Fit(object(), wanted, temporary, limit * GIB)

    return compiled


def test_a_step_that_does_not_fit_is_reported_before_the_first_batch(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message suggests a compiled `accumulate`: the first estimate is 4, the second 8."""
    steps = (10, 8), (5, 3), (3.5, 1.5)
    monkeypatch.setattr(assembly, "fit_of_step", fits(*steps, limit=4))
    with pytest.raises(UserError) as caught:
        train.train(small_config(batch_size=64), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert str(caught.value) == (
        "the train step needs 10.00 GiB of memory per device, more than the 4.00 GiB available. "
        "These would fit (3.50 GiB when compiled): --config.accumulate=8, which splits the same "
        "batch of 64 into 8 microbatches, or --config.batch_size=8, which learns from fewer images "
        "per step. --config.model.remat=full also needs less memory"
    )


def test_a_step_that_never_fits_names_other_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(batch_size=4)
    made = assemble(config, make_mesh(1), images=100)
    told: list[str] = []
    monkeypatch.setattr(assembly, "fit_of_step", fits((10, 8), limit=1))
    with pytest.raises(UserError, match="would not fit with one image per device at a time"):
        assembly.compiled_step(config, made, told.append)
    assert told == [
        "the train step needs 10.00 GiB of memory per device, more than the 1.00 GiB "
        "available; looking for a smaller one that fits ..."
    ]


def test_a_step_of_several_processes_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(batch_size=64)
    made = assemble(config, make_mesh(1), images=100)
    fit = fits((10, 8), limit=4)(made)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    words = assembly.too_large(config, made, fit, lambda text: None)
    assert "(by estimate): --config.accumulate=4, " in words  # 2 GiB, and 8/4 GiB in addition
    assert "or --config.batch_size=16, " in words


def test_errors_of_the_command_line_are_one_line(tmp_path: pathlib.Path) -> None:
    for changes, message in [
        ({"sop.cls.anchor": 16}, "error: unknown setting config.sop.cls.anchor; did you mean "),
        ({"batch_size": 128}, "error: batch_size 128 does not fit sop.cls.memory 64"),
    ]:
        run = command(tmp_path / "run", **changes)
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert done.returncode != 0 and done.stdout == ""
        assert done.stderr.startswith(message) and len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_can_be_left_out(
    stopped: pathlib.Path, finished: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = stopped / "checkpoints" / "12"
    for file in damaged.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    before = snapshot(stopped)
    with pytest.raises(UserError, match=rf"cannot be read.*\[6\] remain.*delete.*{damaged}"):
        train.train(small_config(), stopped)
    assert snapshot(stopped) == before
    shutil.rmtree(damaged)
    train.train(small_config(), stopped)
    assert "steps 6 to 16" in capsys.readouterr().err
    assert_same_run(stopped, finished)


def test_a_checkpoint_of_another_architecture_names_its_leaves(stopped: pathlib.Path) -> None:
    deeper = small_config(**{"model.depth": 2})
    (stopped / "config.json").write_text(json.dumps(deeper.to_dict()))
    before = snapshot(stopped)
    with pytest.raises(UserError, match="another architecture.*\n.*student/backbone/blocks"):
        train.train(deeper, stopped)
    assert snapshot(stopped) == before


def test_checkpoints_of_unknown_settings_are_left_alone(stopped: pathlib.Path) -> None:
    (stopped / "config.json").unlink()
    before = snapshot(stopped)
    with pytest.raises(UserError, match="no config.json.*another --workdir"):
        train.train(small_config(), stopped)
    assert snapshot(stopped) == before


def test_a_disk_without_space_for_checkpoints_is_reported_first(
    tmp_path: pathlib.Path,
    stopped: pathlib.Path,
    finished: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = sum(leaf.nbytes for leaf in saved_state(stopped).values())

    def disk(_: Any) -> Any:
        return shutil._ntuple_diskusage(10**9, 10**9, 2 * state)  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "disk_usage", disk)
    with pytest.raises(UserError, match="need .* MB, and the disk .*Free some space"):
        train.train(small_config(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    train.train(small_config(), stopped)  # its checkpoints already have most of the space
    assert_same_run(stopped, finished)


@pytest.mark.slow
def test_a_disk_that_fills_up_loses_nothing(
    tmp_path: pathlib.Path, finished: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = metrics.Writer.write

    def write_to_full_disk(self: metrics.Writer, step: int, scalars: Any) -> None:
        if step == 10:
            assert self._file is not None
            self._file.close()
            self._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
        write(self, step, scalars)

    monkeypatch.setattr(metrics.Writer, "write", write_to_full_disk)
    with pytest.raises(OSError) as caught:
        train.train(small_config(), tmp_path)
    assert caught.value.errno == errno.ENOSPC  # `cli` has a message for it
    assert checkpoint.latest_step(tmp_path) == 9
    monkeypatch.undo()
    train.train(small_config(), tmp_path)
    assert_same_run(tmp_path, finished)


# Values that are not finite


Metrics = dict[str, jax.Array]


def patch_step(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, Metrics], Any]) -> None:
    """Replaces the step by one that compiles at once and learns nothing.

    Args:
        monkeypatch: undoes it.
        change: what to make of the next state and its metrics.
    """

    def make_train_step(*_: Any) -> Any:
        def step(state: Any, batch: Any, measure: Any) -> Any:
            health = {"agreement": 0.5, "entropy": 1.0, "entropy_of_mean": 2.0, "log_k": 2.5}
            temperatures = {"teacher_temperature": 0.02, "student_temperature": 0.1}
            values = {"loss": 3.0, "cls": 1.0, "mim": 2.0, "grad_norm": 1.0, "embedding_std": 1.0}
            given = {
                name: jnp.float32(value) for name, value in (health | temperatures | values).items()
            }
            state = state._replace(step=state.step + 1)
            return change(state, given | {"corrupt": batch["corrupt"]})

        return step

    monkeypatch.setattr(assembly, "make_train_step", make_train_step)


@pytest.fixture
def fake_step(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_step(monkeypatch, lambda state, given: (state, given))


@pytest.mark.parametrize(
    ("minutes", "every", "saved"),
    [(4.0, 0, [4, 8, 12, 16]), (4.0, 6, [4, 6, 10, 12, 16]), (0.0, 0, [16])],
)
def test_a_checkpoint_is_saved_when_its_minutes_have_passed(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_step: None,
    minutes: float,
    every: int,
    saved: list[int],
) -> None:
    """The clock of this test advances one minute per step."""
    ticks = itertools.count(0, 60)
    monkeypatch.setattr(train, "Saver", functools.partial(train.Saver, clock=ticks.__next__))
    never = {"eval_every": 0, "checkpoint_every": every, "checkpoint.keep_last": 9}
    train.train(small_config(**never | {"checkpoint.minutes": minutes}), tmp_path)
    assert checkpoint.steps(tmp_path) == saved


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("term", ["cls", "mim", "loss", "grad_norm"])
def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, term: str, value: float
) -> None:
    def spoil(state: Any, given: Metrics) -> Any:
        return state, given | {term: jnp.where(state.step >= 11, value, given[term])}

    patch_step(monkeypatch, spoil)
    with pytest.raises(UserError) as caught:
        train.train(small_config(eval_every=0), tmp_path)
    message = str(caught.value)
    assert message.startswith(f"step 11: {term} is not finite")
    assert f"{term} {value}" in message
    assert "last good checkpoint is step 9" in message and "lower optim.lr" in message
    assert checkpoint.steps(tmp_path) == [6, 9]
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 6, 8, 10]


def test_a_state_that_is_not_finite_is_not_saved(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(state: Any, given: Metrics) -> Any:
        head = state.student["head"]
        head = jax.tree.map(lambda leaf: jnp.where(state.step >= 5, np.nan, leaf), head)
        return state._replace(student=state.student | {"head": head}), given

    patch_step(monkeypatch, spoil)
    with pytest.raises(UserError, match="state of step 6 is not finite.*student/head"):
        train.train(small_config(eval_every=0), tmp_path)
    assert checkpoint.steps(tmp_path) == [3]


def test_a_learning_rate_that_explodes_is_reported(tmp_path: pathlib.Path) -> None:
    changes = {"optim.lr": 1e30, "eval_every": 0, "checkpoint_every": 1}
    config = small_config(**changes | {"augment.local_crops": 0, "sop.patch.tasks": 0})
    with pytest.raises(UserError, match=r"step (\d+)\D.* is not finite") as caught:
        train.train(config, tmp_path)
    told = re.search(r"step (\d+)", str(caught.value))
    saved = checkpoint.latest_step(tmp_path)
    assert told and saved is not None and saved < int(told[1])
    assert all(np.isfinite(leaf).all() for leaf in saved_state(tmp_path).values())


@pytest.mark.parametrize("collapsing", [True, False])
def test_a_collapse_is_reported_in_words_once_and_marked_on_every_line(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    collapsing: bool,
) -> None:
    signs = {"embedding_std": 0.01, "agreement": 0.05} if collapsing else {}

    def collapse(state: Any, given: Metrics) -> Any:
        now = {name: jnp.where(state.step >= 3, signs[name], given[name]) for name in signs}
        return state, given | now

    patch_step(monkeypatch, collapse)
    train.train(small_config(), tmp_path)
    lines = capsys.readouterr().err.splitlines()
    logged = [4, 6, 8, 10, 12, 14, 16] if collapsing else []  # not logged: 0 and 7
    steps = logged[PATIENCE - 1 :]
    marked = [line for line in lines if "health collapsing" in line]
    assert [line.split("/")[0] for line in marked] == [f"step {step}" for step in steps]
    told = [line for line in lines if "collapsing:" in line]
    assert [line.split(":")[0] for line in told] == [f"step {step}" for step in steps[:1]]
    assert all(
        "agreement of views is 0.05" in line and "sop.teacher_temperature" in line for line in told
    )


# Images that cannot be read


def test_what_is_left_out_of_a_folder_is_reported_at_the_start(
    tmp_path: pathlib.Path, fake_step: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test", "valid"):
        paint(tmp_path / "images" / split, 8)
        (tmp_path / "images" / split / "readme.txt").write_text("no image")
    folder = {"data.source": "folder", "data.path": str(tmp_path / "images")}
    train.train(small_config(eval_every=0, steps=1, **folder), tmp_path / "run")
    told = capsys.readouterr().err
    images = tmp_path / "images"
    for note in (
        f"{images}: splits: train, valid; not used: test",
        f"{images}/train: ignored 1 file that is not an image (1 .txt)",
        f"{images}/valid: ignored 1 file that is not an image (1 .txt)",
    ):
        assert told.count(note) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_listing_of_a_folder(
    tmp_path: pathlib.Path,
    fake_step: None,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    paint(tmp_path / "images" / "a", 8)
    scandir = os.scandir

    def signalled(path: Any) -> Any:
        if str(path) == str(tmp_path / "images"):
            os.kill(os.getpid(), number)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", signalled)
    folder = {"data.source": "folder", "data.path": str(tmp_path / "images")}
    with pytest.raises(Interrupted, match="interrupted"):
        train.train(small_config(**folder), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_corrupt_images_are_replaced_counted_and_named_once(
    tmp_path: pathlib.Path, fake_step: None, capsys: pytest.CaptureFixture[str]
) -> None:
    paint(tmp_path / "images", 12, broken=(3, 7))
    changes = {"data.source": "folder", "data.path": str(tmp_path / "images"), "log_every": 1}
    changes |= {"data.max_corrupt_share": 0.2, "mesh.data": 2, "eval_every": 0}
    config = small_config(**changes)
    train.train(config, tmp_path / "run")

    named = [line for line in capsys.readouterr().err.splitlines() if "cannot be read" in line]
    assert sorted(re.findall(r"(\d+\.png): image file is truncated", " ".join(named))) == [
        "003.png",
        "007.png",
    ]

    source = open_source(config.data, "train")
    assert source is not None
    batches = train_batches(source, config, 4)
    corrupt = [int((next(batches)["corrupt"] >= 0).sum()) for _ in range(STEPS)]
    batches.close()
    assert [row["corrupt"] for row in rows(tmp_path / "run")] == corrupt and sum(corrupt) > 16


def test_too_many_corrupt_images_stop_the_run_with_a_list(
    tmp_path: pathlib.Path, fake_step: None
) -> None:
    paint(tmp_path / "images", 12, broken=(3, 7))
    config = small_config(**{"data.source": "folder", "data.path": str(tmp_path / "images")})
    with pytest.raises(UserError) as caught:
        train.train(config, tmp_path / "run")
    message = str(caught.value)
    assert "2 of 12 images cannot be read" in message
    assert "003.png" in message and "007.png" in message and "000.png" not in message
    assert "--config.data.max_corrupt_share" in message


# Speed


def test_traces_the_steps_that_are_asked_for(
    tmp_path: pathlib.Path, fake_step: None, capfd: pytest.CaptureFixture[str]
) -> None:
    train.train(small_config(profile_steps=(3, 4), eval_every=0), tmp_path)
    assert "steps 3 to 4 are traced in" in capfd.readouterr().err
    assert list(tmp_path.glob("tensorboard/plugins/profile/*/*.xplane.pb"))


def test_says_when_the_input_keeps_up_again(
    tmp_path: pathlib.Path,
    fake_step: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    paces = iter([Pace(1.0, 1.0, 1), *[Pace(1.0, 0.0, 1)] * 20])
    monkeypatch.setattr(PaceKeeper, "look", lambda self: next(paces))
    train.train(small_config(eval_every=0, checkpoint_every=0, log_every=4), tmp_path)
    shown = capfd.readouterr().err
    assert shown.count("input bottleneck, 50 % waiting") == shown.count("input keeps up") == 1


def test_says_that_the_input_is_the_bottleneck(
    tmp_path: pathlib.Path,
    fake_step: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def slowly(*args: Any) -> Any:
        batches = train_batches(*args)
        for batch in batches:
            time.sleep(0.05)
            yield batch

    config = small_config(eval_every=0, checkpoint_every=0, log_every=8)
    monkeypatch.setattr(train, "train_batches", slowly)
    train.train(config, tmp_path)
    shown = capfd.readouterr().err
    assert shown.count("the input is the bottleneck: devices wait for images") == 1
    assert shown.count("input bottleneck, ") == 2
    assert all(row["idle_share"] > 0.5 for row in rows(tmp_path))


def test_fewer_images_than_a_batch_and_a_trace_that_is_over_are_reported() -> None:
    config = small_config(batch_size=32, profile_steps=(3, 4))
    few, over = warnings_of(config, 3, start=4)
    assert few.startswith("warning: there are only 3 images, fewer than the batch of 32")
    assert "the steps of profile_steps=3,4 are done" in over
    assert warnings_of(config, 32, start=3) == []


def test_a_read_only_workdir_is_reported_before_anything_else(read_only: pathlib.Path) -> None:
    for workdir in (read_only, read_only / "run"):
        with pytest.raises(UserError, match=f"{read_only}: .*choose another --workdir"):
            train.train(small_config(**{"data.source": "folder", "data.path": "/no"}), workdir)


def test_the_command_for_the_curves_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    summary = {"steps": 1, "wall_s": 1.0, "knn_top1": None, "knn_top1_untrained": None}
    workdir = epath.Path("runs/it's mine; & more")
    words = summary_text(summary, curves_text("tensorboard", workdir))
    command = words.partition("curves: ")[2]
    assert shlex.split(command) == ["tensorboard", "--logdir", str(workdir)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert summary_text(summary, curves_text("tensorboard", workdir)).endswith(
        "(after pip install tensorboard)"
    )
