"""The task video: clips from start to end, its files, interruptions and errors."""

import dataclasses
import json
import pathlib
import shutil
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from datasets import write_clip
from etils import epath
from small import small_config
from test_evaluate import make_run

from sop_jax import models
from sop_jax.data import davis
from sop_jax.errors import Interrupted, UserError
from sop_jax.evaluate import Asked, evaluate
from sop_jax.evaluation import video
from sop_jax.evaluation.tables import text_of
from sop_jax.evaluation.task import Subject
from sop_jax.evaluation.tools import Toolbox
from sop_jax.parallel import hosts
from sop_jax.parallel.mesh import make_mesh, put, replicated

pytestmark = pytest.mark.medium

PATCH, SHORT_SIDE = 8, 64
SCORES = [f"{measure}_{name}" for measure in "JF" for name in ("mean", "recall", "decay")]


@pytest.fixture(scope="module")
def subject() -> Subject:
    config = small_config(model=dict(patch=PATCH))
    model = models.build(config, 32)
    params = jax.tree.map(
        lambda leaf: put(np.asarray(leaf), replicated(make_mesh())), model.init(jax.random.key(0))
    )
    return Subject("small", config, model, params, "fingerprint", None)


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    write_clip(tmp_path / "DAVIS", "bear", 3)
    write_clip(tmp_path / "DAVIS", "swan", 5)
    return tmp_path / "DAVIS"


@dataclasses.dataclass
class Checked(Toolbox):
    """Tools that call a function where a task can be interrupted."""

    check: Callable[[], Any] = lambda: None

    def between(self, save: bool = False) -> bool:
        self.check()
        return save


def run(
    subject: Subject,
    root: pathlib.Path,
    folder: pathlib.Path | None,
    check: Callable[[], Any] = lambda: None,
    **changes: Any,
) -> dict[str, Any]:
    settings = video.settings()
    settings.update(short_side=SHORT_SIDE, neighbourhood=3, **changes)
    config = subject.config.copy_and_resolve_references()
    inputs = video.open_clips(config, settings, {"path": str(root)})
    place = None if folder is None else epath.Path(folder)
    tools = Checked(subject, make_mesh(), place, check=check, shown=False)
    result = video.measure_clips(subject, inputs, settings, tools)
    assert video.table(result, settings)
    assert json.loads(json.dumps(result)) == result
    return result


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The frames that have been read, in order."""
    names: list[str] = []
    read = davis.read_frame

    def noting(path: epath.Path) -> np.ndarray:
        names.append(f"{path.parent.name}/{path.stem}")
        return read(path)

    monkeypatch.setattr(davis, "read_frame", noting)
    return names


def test_moving_objects_are_followed(subject: Subject, root: pathlib.Path) -> None:
    folder = root.parent / "out"
    result = run(subject, root, folder)
    assert list(result["clips"]) == ["bear", "swan"] and result["objects"] == 4
    assert result["J_mean"] > 0.6 and result["J_recall"] == 1
    assert result["JF_mean"] == (result["J_mean"] + result["F_mean"]) / 2
    objects = [row for clip in result["clips"].values() for row in clip["scores"]]
    for name in SCORES:  # over objects, and not over clips
        assert result[name] == pytest.approx(np.mean([row[name] for row in objects]))
    assert sorted(path.name for path in folder.iterdir()) == ["bear", "swan"]
    for clip in davis.open_davis(str(root)):
        masks = [davis.read_mask(epath.Path(folder) / clip.name / m.name) for m in clip.masks]
        np.testing.assert_array_equal(masks[0], davis.read_mask(clip.masks[0]))
        assert all(np.unique(mask).tolist() == [0, 1, 2] for mask in masks)
    assert result["files"] == ["bear", "swan"]
    assert run(subject, root, None) == {**result, "files": []}  # writes nothing


def test_settings_change_the_result(subject: Subject, root: pathlib.Path) -> None:
    vague = dict(top_k=30, temperature=10.0)  # masks that hard ones differ from
    first = run(subject, root, None, **vague)
    for changes in (dict(masks="hard"), dict(last_frames=1), dict(top_k=10), dict(temperature=0.1)):
        assert run(subject, root, None, **{**vague, **changes}) != first, changes


def test_red_is_divided_by_the_setting(subject: Subject) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    pixels, float32, red = jnp.asarray(frame), jnp.dtype("float32"), models.STD[0]
    own = subject.model.features(subject.params, pixels[None])[0][0, 1:].reshape(3, 4, -1)
    found = video.make_look(subject, red)(np.pad(frame, ((0, 7), (0, 7), (0, 0))))
    np.testing.assert_allclose(found, own, atol=1e-5)  # what is not a whole token is left out
    seen = models.normalize(video.recoloured(pixels, 0.1)[None], float32)[0]
    expected = np.asarray(models.normalize(pixels[None], float32)[0]) * [red / 0.1, 1, 1]
    np.testing.assert_allclose(seen, expected, atol=1e-5)


def test_finished_clips_are_not_computed_again(
    subject: Subject, root: pathlib.Path, looked: list[str]
) -> None:
    folder = root.parent / "out"
    expected = {**run(subject, root, None), "files": ["bear", "swan"]}
    looked.clear()

    def interrupt() -> None:
        if looked and looked[-1] == "bear/00001":
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        run(subject, root, folder, interrupt)
    assert looked == [*(f"swan/{i:05d}" for i in range(5)), "bear/00000", "bear/00001"]
    assert (folder / "swan.json").exists()
    looked.clear()
    assert run(subject, root, folder) == expected
    assert looked == [f"bear/{i:05d}" for i in range(3)]
    looked.clear()
    assert run(subject, root, folder) == expected  # asked for again
    assert len(looked) == 8


def test_records_of_other_masks_or_damaged_ones_are_not_used(
    subject: Subject, root: pathlib.Path, looked: list[str]
) -> None:
    folder = root.parent / "out"
    expected = run(subject, root, folder)
    looked.clear()
    (folder / "swan.json").write_text('{"versions": {}, "clip": [5, 5, 2, 64, 128], "record": 1}')
    (folder / "bear.json").write_text("{")
    assert run(subject, root, folder) == expected
    assert len(looked) == 8


def test_processes_share_the_clips(
    subject: Subject, root: pathlib.Path, looked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(root, "wolf", 2)
    expected = run(subject, root, None)
    said: list[str] = []
    checks = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "gather", lambda text, timeout: said.append(text) or [text, *said])
    for place, frames in ((1, 3), (0, 5 + 2)):
        monkeypatch.setattr(jax, "process_index", lambda place=place: place)
        looked.clear()
        calls: list[None] = []
        try:
            result = run(subject, root, None, lambda calls=calls: calls.append(None))
        except KeyError:  # the first one to run knows its own clips only
            assert place == 1
        checks.append(len(calls))
        assert len(looked) == frames
    assert checks == [7, 7]  # all processes check for interruptions equally often
    assert result == expected


def test_objects_that_are_too_small_are_reported(subject: Subject, root: pathlib.Path) -> None:
    path = root / davis.MASKS / "swan" / "00000.png"
    mask = davis.read_mask(epath.Path(path)).copy()
    mask[0, 0] = 3
    path.write_bytes(davis.encode_mask(mask))
    result = run(subject, root, None)
    swan = result["clips"]["swan"]
    assert swan["lost"] == [3] and swan["objects"] == 3 and result["objects"] == 5
    assert [row["J_mean"] > 0.5 for row in swan["scores"]][:2] == [True, True]
    settings = video.settings()
    lost = "swan: too small for the grid of tokens, and lost: object 3"
    assert lost in video.table(result, settings)


def test_clips_without_masks_or_of_two_frames_have_no_scores(
    subject: Subject, tmp_path: pathlib.Path
) -> None:
    write_clip(tmp_path / "DAVIS", "bear", 4, masks=1)
    write_clip(tmp_path / "DAVIS", "swan", 2)
    result = run(subject, tmp_path / "DAVIS", tmp_path / "out")
    assert {result[name] for name in ("JF_mean", *SCORES)} == {None}
    assert result["clips"]["bear"]["scores"] == [] and result["objects"] == 4
    assert len(list((tmp_path / "out" / "bear").iterdir())) == 4


@pytest.mark.parametrize("clip, count", [("car-shadow", 4), ("tennis", 2)])
def test_real_clips(
    subject: Subject, shared: pathlib.Path, tmp_path: pathlib.Path, clip: str, count: int
) -> None:
    fixtures = shared / "data" / "fixtures"
    source = fixtures / ("davis_multiobject_tennis2" if clip == "tennis" else "davis/DAVIS")
    for folder, suffix in ((davis.FRAMES, "jpg"), (davis.MASKS, "png")):
        (tmp_path / folder / clip).mkdir(parents=True)
        for number in range(count):
            file = f"{folder}/{clip}/{number:05d}.{suffix}"
            shutil.copyfile(source / file, tmp_path / file)
    if clip == "tennis":  # its first mask is void in places, which is an error
        path = epath.Path(tmp_path / davis.MASKS / clip / "00000.png")
        mask = davis.read_mask(path)
        path.write_bytes(davis.encode_mask(np.where(mask == davis.VOID, 0, mask).astype(np.uint8)))
    result = run(subject, tmp_path, tmp_path / "out")
    found = davis.read_mask(epath.Path(tmp_path / "out" / clip / f"{count - 1:05d}.png"))
    assert found.shape == (480, 854)
    if clip == "tennis":
        assert result["objects"] == 2 and result["JF_mean"] is None
        assert set(np.unique(found)) <= {0, 1, 2}
    else:
        assert 0.2 < result["J_mean"] < 1 and 0 < result["F_mean"] < 1


def error(config: Any, data: dict[str, Any], **changes: Any) -> str:
    settings = video.settings()
    settings.update(changes)
    with pytest.raises(UserError) as raised:
        video.open_clips(config, settings, data)
    return str(raised.value)


def test_errors_before_any_work(root: pathlib.Path) -> None:
    config, data = small_config(), {"path": str(root)}
    resnet = small_config(model=dict(family="resnet", size="50"))
    assert "a resnet has no tokens of patches" in error(resnet, data)
    assert "no folder is named. Expected DAVIS-2017 at 480p" in error(config, {})
    assert "--data.source=tfds would have no effect" in error(config, {**data, "source": "tfds"})
    assert "eval.short_side=32 leaves no room" in error(config, data, short_side=32)
    assert "there is no folder" in error(config, {"path": str(root / "other")})
    message = error(config, {**data, "test_split": "val"})
    assert "val.txt; there is no such folder. Name a split that exists" in message


def test_the_folder_cannot_be_written(subject: Subject, root: pathlib.Path) -> None:
    (root.parent / "file").write_text("")
    with pytest.raises(UserError, match="swan/00000.png cannot be written.*which resumes"):
        run(subject, root, root.parent / "file" / "out")


@pytest.mark.parametrize(
    "size, expected",
    [((480, 854), (480, 832)), ((480, 910), (480, 896)), ((854, 480), (832, 480))],
)
def test_the_longer_side_is_a_multiple_of_64(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert video.grid_size(size, 480) == expected


def test_the_table_has_the_numbers_of_the_paper() -> None:
    scores = dict.fromkeys(("JF_mean", *SCORES), 0.5)
    clip = {"frames": 3, "objects": 1, "lost": [], **scores}
    result = {**scores, "objects": 1, "clips": {"bear": clip, "swan": clip | {"JF_mean": None}}}
    lines = text_of(video.table(result, video.settings())).splitlines()
    assert lines[1].split() == ["bear", "50.00", "50.00", "50.00"]
    assert lines[2].split() == ["swan", "-", "50.00", "50.00"]
    assert lines[-1].split() == ["SOP", "ViT-B/16", "63.30", "61.70", "65.00"]


def test_changed_or_deleted_masks_are_measured_again(
    root: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", (3,))
    data = {"path": str(root)}

    def measure() -> dict[str, Any]:
        changes = {"short_side": SHORT_SIDE}
        return evaluate(Asked(tmp_path / "run"), "video", changes, data)

    first = measure()
    assert first["data"]["path"] == str(root) and first["data"]["frames"]["images"] == 8
    assert measure() == first and "measured before" in capsys.readouterr().out
    (folder,) = (tmp_path / "run" / "evaluations").glob("video*/")
    shutil.rmtree(folder / "swan")
    assert measure()["results"] == first["results"]
    assert "measured before" not in capsys.readouterr().out
    assert (folder / "swan" / "00004.png").exists()
    path = root / davis.MASKS / "swan" / "00002.png"
    path.write_bytes(davis.encode_mask(np.flipud(davis.read_mask(epath.Path(path)))))
    assert measure()["results"]["J_mean"] < first["results"]["J_mean"]


def evaluated(out: str) -> dict[str, Any]:
    """Returns the results in the last line that the command printed."""
    return json.loads(out.splitlines()[-1])["results"]


@pytest.mark.slow
def test_the_command_gives_the_same_on_two_processes_and_after_an_interruption(
    tmp_path: pathlib.Path,
) -> None:
    make_run(tmp_path / "run")
    clips = ("bear", "swan", "wolf")
    for name in clips:
        write_clip(tmp_path / "DAVIS", name, 40)
    command = [
        *("-m", "sop_jax.evaluate", f"--workdir={tmp_path / 'run'}", "--task=video"),
        *(f"--data.path={tmp_path / 'DAVIS'}", f"--eval.short_side={SHORT_SIDE}"),
    ]

    def flags(out: str) -> list[str]:
        return [*command, f"--out={tmp_path / out}"]

    (one,) = processes.run([flags("one")], tmp_path / "logs_one", devices=1)
    assert one.code == 0, one.err
    assert "bear" in one.out and "SOP ViT-B/16" in one.out
    two = processes.run(
        [[*flags("two"), *among] for among in processes.among(2)], tmp_path / "logs_two", devices=4
    )
    assert [ended.code for ended in two] == [0, 0], two
    assert evaluated(two[0].out) == evaluated(one.out)

    def finished() -> list[pathlib.Path]:
        """Returns the records of clips; the folder also has a file that says who writes there."""
        files = (tmp_path / "resumed").glob("evaluations/*/*.json")
        return [path for path in files if path.stem in clips]

    with processes.start([flags("resumed")], tmp_path / "logs", devices=1) as started:
        until = time.monotonic() + 60
        while not finished():
            assert time.monotonic() < until and started.running[0].poll() is None, started.end(0)
            time.sleep(0.002)
        started.signal(0, signal.SIGTERM)
        (ended,) = started.end()
    assert ended.code == 130, ended
    (record,) = finished()
    masks = sorted(record.with_suffix("").iterdir())
    before = [path.stat().st_mtime_ns for path in masks]
    (ended,) = processes.run([flags("resumed")], tmp_path / "logs_resumed", devices=1)
    assert ended.code == 0, ended.err
    assert evaluated(ended.out) == evaluated(one.out)
    assert [path.stat().st_mtime_ns for path in masks] == before and len(masks) == 40
