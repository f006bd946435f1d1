"""A dry run says what a run would do, draws its views, and begins nothing."""

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import processes
import pytest
from etils import epath
from PIL import Image
from small import small_config

from sop_jax import config as config_lib
from sop_jax import preview
from sop_jax.data.sources import DigitsSource
from sop_jax.errors import UserError
from sop_jax.own_images.choices import Seen
from sop_jax.own_images.machine import Machine
from sop_jax.own_images.survey import Header, Survey
from sop_jax.parallel.mesh import make_mesh
from sop_jax.training.assemble import assemble

ROOT = pathlib.Path(__file__).resolve().parents[1]
SEEN = Seen(
    Survey(
        name="digits",
        images=1437,
        test=360,
        classes={"0": 1437},
        headers={0: Header("pixels", 32, 32, False)},
        decoded=1,
        unreadable={},
        share=0.0,
        seconds=1e-4,
        equal=None,
        notes=[],
    ),
    Machine("cpu", "cpu", 8, 2.0**33, 2, 1e10),
)


def config(**changes: Any) -> Any:
    digits = {"source": "digits", "workers": 0, "threads": 1}
    return small_config(
        data=digits,
        batch_size=16,
        steps=100,
        eval_every=50,
        checkpoint_every=30,
        augment={"global_size": 16, "local_size": 8, "local_crops": 2},
        sop={"cls": {"memory": 64, "anchors": 8}, "patch": {"memory": 64, "anchors": 8}},
        optim={"warmup_steps": 10},
        eval={"resize": 16, "crop": 16},
        **changes,
    )


@pytest.mark.medium
def test_says_what_a_run_would_do_and_begins_nothing(tmp_path: pathlib.Path) -> None:
    lines: list[str] = []
    workdir = epath.Path(tmp_path / "run")
    preview.show(config(), workdir, SEEN, tell=lines.append)
    text = "\n".join(lines)
    run = assemble(config(), make_mesh(), 1437)
    total = sum(leaf.size for leaf in jax.tree.leaves(run.abstract.student))
    assert f"{total:,}" in text
    assert re.search(r"backbone/blocks/qkv/kernel +2 x 16 x 48 +1,536\n", text)
    assert "16 x 2 x 16 x 16 x 3  uint8" in text
    assert "100 steps, 1.1 epochs of 89.81 steps" in text
    assert "evaluated every 50 steps, 2 times" in text
    assert "saved every 30 steps, 3 times" in text
    assert "time: about" in text and "memory: about" in text
    assert "The same command without --dry_run begins the run" in text
    assert [file.name for file in workdir.iterdir()] == ["views.png"]
    with Image.open(workdir / "views.png") as picture:
        assert picture.width > 7 * 128 and picture.height > 6 * 128


@pytest.mark.medium
def test_says_that_a_run_would_resume_and_refuses_other_settings(tmp_path: pathlib.Path) -> None:
    workdir = epath.Path(tmp_path)
    config_lib.save(config(), workdir)
    with pytest.raises(UserError, match="belongs to a run with other settings:\n  batch_size"):
        other = config()
        other.batch_size = 32
        preview.show(other, workdir, SEEN, tell=lambda line: None)


@pytest.mark.parametrize("inside", ["", "runs/mine"])
def test_no_picture_is_drawn_among_the_images(tmp_path: pathlib.Path, inside: str) -> None:
    own = config()
    own.data.update(source="folder", path=str(tmp_path))
    with pytest.raises(UserError, match="name another folder"):
        preview.show(own, epath.Path(tmp_path / inside), SEEN, tell=lambda line: None)
    assert not list(tmp_path.iterdir())


def test_schedules_are_shown_where_they_change() -> None:
    run = assemble(config(), make_mesh(), 1437)
    table = {line.split()[0]: line.split()[1:] for line in preview.milestones(config(), run)}
    assert table["step"] == ["0", "10", "50", "100"]
    peak = 5e-4 * 16 / 256
    assert [float(value) for value in table["lr"]][:2] == pytest.approx([0.0, peak], rel=1e-3)
    assert table["teacher_temperature"][0] == "0.04"


def test_what_has_no_accuracy_is_said() -> None:
    run = assemble(config(), make_mesh(), 1437)
    unsplit = SEEN._replace(survey=SEEN.survey._replace(test=None))
    assert "no k-NN accuracy, because there is no split" in preview.plan(config(), run, unsplit)[2]
    unlabelled = SEEN._replace(survey=SEEN.survey._replace(classes=None))
    assert "because the images have no labels" in preview.plan(config(), run, unlabelled)[2]
    never = config()
    never.eval_every = 0
    assert "evaluated never" in preview.plan(never, run, SEEN)[2]


def test_masked_patches_are_grey() -> None:
    view = np.full((8, 8, 3), 200, np.uint8)
    mask = np.array([[True, False], [False, False]])
    hidden = preview.hide(view, mask, 4)
    assert (hidden[:4, :4] != 200).all() and (hidden[4:] == 200).all()
    assert (hidden[:, 4:] == 200).all()


def test_the_picture_shows_the_first_batch(tmp_path: pathlib.Path) -> None:
    path = epath.Path(tmp_path / "views.png")
    preview.draw_views(config(), DigitsSource("train"), 4, path)
    before = path.read_bytes()
    preview.draw_views(config(), DigitsSource("train"), 4, path)
    assert path.read_bytes() == before


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("own") / "my photos"
    folder.mkdir()
    for number in range(32):
        pixels = np.random.default_rng(number).integers(256, size=(40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "empty.jpg").write_bytes(b"")
    return folder


def train(workdir: pathlib.Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sop_jax.train", f"--workdir={workdir}", *flags]
    one = os.environ | {"XLA_FLAGS": processes.flags(devices=1)}
    return subprocess.run(command, env=one, capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.mark.medium
def test_a_dry_run_of_own_images_begins_nothing(
    photos: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    flags = [f"--images={photos}", "--config.steps=2", "--dry_run", "--check=full"]
    dry = train(tmp_path / "run", *flags)
    assert dry.returncode == 0, dry.stderr
    assert "unreadable: 1 (of all images)" in dry.stderr and "near-duplicates: none" in dry.stderr
    assert "given: steps=2" in dry.stderr
    assert (dry.stderr + dry.stdout).count("time: about") == 1
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["views.png"]


@pytest.mark.slow
def test_own_images_train_by_one_flag_and_resume(
    photos: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    workdir, other = tmp_path / "run", tmp_path / "others"
    flags = [f"--images={photos}", "--config.steps=2"]
    first = train(workdir, *flags)
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["steps"] == 2
    made = json.loads((workdir / "config.json").read_text())
    assert (made["data"]["path"], made["steps"]) == (str(photos), 2)

    again = train(workdir, *flags)
    assert again.returncode == 0, again.stderr
    assert "nothing is chosen again" in again.stderr and "is finished" in again.stdout

    other.mkdir()
    for number in range(31):
        (other / f"{number}.png").write_bytes((photos / f"{number}.png").read_bytes())
    moved = train(workdir, f"--images={other}", "--config.steps=2")
    assert moved.returncode == 1
    assert "is not the data that the run" in moved.stderr
    checked = train(workdir, *flags, "--check=full")
    assert checked.returncode == 1
    assert "--check=full would have no effect, because" in checked.stderr


@pytest.mark.medium
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images=photos", "--config=digits"], "--images and --config are both given"),
        (["--config=digits", "--check=full"], "--check=full would have no effect"),
    ],
)
def test_flags_that_contradict_each_other_are_an_error(
    tmp_path: pathlib.Path, flags: list[str], message: str
) -> None:
    found = train(tmp_path / "run", *flags)
    assert found.returncode in (1, 2)
    assert message in found.stderr and "Traceback" not in found.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.medium
def test_a_workdir_that_cannot_be_written_is_told_before_images_are_looked_at(
    photos: pathlib.Path,
) -> None:
    found = train(pathlib.Path("/proc/run"), f"--images={photos}", "--dry_run")
    assert found.returncode == 1 and "/proc/run" in found.stderr
    assert "images" not in found.stderr.replace("--images", "")
