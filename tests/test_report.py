"""The report of runs: the command, the page in a browser, and what a run that trains writes."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from begun import save, settings
from runs import make_config

from sop_jax import report, train
from sop_jax.errors import UserError
from sop_jax.objectives.memory import push
from sop_jax.parallel.mesh import make_mesh
from sop_jax.report import Asked
from sop_jax.training.assemble import assemble

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODULES = pathlib.Path(os.environ.get("SOP_BROWSER_MODULES", ROOT / ".browser"))

SIGNS = {
    "loss": 6.0,
    "cls": 1.5,
    "mim": 1.0,
    "log_k": 1.79,
    "entropy": 1.0,
    "entropy_of_mean": 1.7,
    "winning_sops": 0.5,
    "support_cosine": 0.9,
    "embedding_std": 0.6,
    "effective_rank": 5.0,
    "agreement": 0.9,
    "memory_filled": 1.0,
    "teacher_temperature": 0.02,
    "student_temperature": 0.1,
    "grad_norm": 1.0,
    "lr": 0.1,
    "images_per_s": 100.0,
    "idle_share": 0.01,
}


def write_rows(workdir: pathlib.Path, count: int = 12) -> None:
    workdir.mkdir(exist_ok=True, parents=True)
    rows = [{"step": 0, "knn_top1": 0.5, "wall_s": 0.1}]
    rows += [{"step": n} | SIGNS | {"loss": 6 - n / 9, "wall_s": n} for n in range(1, count + 1)]
    rows[-1]["knn_top1"] = 0.75
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (workdir / "metrics.jsonl").write_text(text + '{"step": 99, "lo')


def begun(workdir: pathlib.Path, method: str = "sop", **changes: Any) -> pathlib.Path:
    """Makes a run with rows, a checkpoint and, for SOP, full memories of the first images."""
    config = settings(method, **changes)
    run = assemble(config, make_mesh(1), images=1000)
    state = run.init(jax.random.key(0))
    if method == "sop":
        carried, rng = dict(state.carried), np.random.default_rng(0)
        for name in ("cls", "patch"):
            lanes, slots, dim = carried[name].rows.shape
            rows = rng.normal(size=(lanes * slots, dim)).astype(np.float32)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            index = jnp.arange(lanes * slots)
            carried[name] = push(carried[name], jnp.asarray(rows), index)
        state = state._replace(carried=carried)
    save(workdir, config, {12: state})
    write_rows(workdir)
    return workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return begun(tmp_path_factory.mktemp("runs") / "a run")


@pytest.fixture(scope="module")
def page(workdir: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(report.report(Asked([str(workdir)], shown=3, embedded=40)))


def headings(text: str) -> list[str]:
    return re.findall(r"<h2[^>]*>(.*?)</h2>", text)


@pytest.mark.medium
def test_a_report_has_all_parts(page: pathlib.Path, workdir: pathlib.Path) -> None:
    assert page == workdir / "report.html"
    text = page.read_text()
    assert headings(text) == [
        *("Summary", "Health", "Curves", "Speed", "Evaluations"),
        *("Collapse of prototypes", "Pictures"),
    ]
    for words in (
        "Prototypes of [CLS], as the next step could draw them",
        "Prototypes of patches",
        "Nearest images of some test images",
        "Map of the features of 40 test images",
        "Then the attention of [CLS]",
        "Masked images, and what the loss",
        "50.0 % before training and is 75.0 %",
        "support 2: digits:train[",
        "vote 0.",
    ):
        assert words in text, words
    assert "http" not in text and len(text) < 2e6
    assert not [name for name in os.listdir(workdir) if name.endswith(".tmp")]


@pytest.mark.medium
def test_a_report_in_a_browser(page: pathlib.Path) -> None:
    found = seen_in_browser(page)
    assert found["errors"] == [] and set(found["requests"]) == {page.as_uri()}
    assert found["violations"] == {"dark": [], "light": []}
    assert found["background"]["dark"] != found["background"]["light"]
    assert found["broken"] == [] and found["figures"] == page.read_text().count("<figure")
    assert not found["wide"] and not found["wideOnPhone"]
    names = [label for _, _, label, _ in found["focused"]]
    assert names[:3] == ["Skip to the content", "Summary", "Health"]
    assert any("Numbers: Loss" in name for name in names) and any("Map of 40" in x for x in names)
    assert re.fullmatch(r"digits:test\[\d+\], class \d", found["spoken"])
    assert found["hovered"][0] is False and "digits:test[" in found["hovered"][1]
    assert found["thumbnail"] > 1000
    assert found["printed"] == ["rgb(255, 255, 255)", "none"]


def seen_in_browser(page: pathlib.Path) -> dict[str, Any]:
    """Returns what `browser.mjs` sees; skips the test where there is no browser."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if browser is None or shutil.which("node") is None:
        pytest.skip("needs chromium and node; .ci/browser.sh installs chromium")
    if not (MODULES / "node_modules" / "axe-core").is_dir():
        pytest.skip(f"needs puppeteer-core and axe-core in {MODULES}; .ci/browser.sh installs them")
    command = ["node", str(ROOT / "tests" / "browser.mjs"), str(MODULES), browser, str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.medium
def test_several_runs_of_different_methods_and_lengths(
    workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    other = begun(tmp_path / "other <b>", "dino")
    write_rows(other, 5)
    out = tmp_path / "both.html"
    asked = Asked([str(workdir), str(other)], str(out), shown=2, embedded=20)
    assert report.report(asked) == out
    text = out.read_text()
    assert "Report of a run, other &lt;b&gt;" in text and "<b>" not in text.replace("<b>Att", "")
    assert "Settings that differ" in text and "other &lt;b&gt;: loss from" not in text
    assert "other &lt;b&gt;: There are no anchors with supports: prototypes of method=dino" in text
    assert text.count("Nearest images of some test images") == 2 * 2  # captions and labels
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(set(ids)) == len(ids)


@pytest.mark.medium
def test_a_resnet_without_labels_says_what_is_missing(tmp_path: pathlib.Path) -> None:
    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    os.rename(images / "0.png", os.path.join(os.fsencode(images), b"caf\xe9<i>.png"))
    changes = {
        "data.source": "folder",
        "data.path": str(images),
        "model.family": "resnet",
        "model.stage_depths": (1, 1, 1, 1),
        "sop.patch.memory": 0,
        "sop.patch.tasks": 0,
        "mask.ratio": (0.0, 0.0),
    }
    workdir = begun_resnet(tmp_path / "run", changes)
    place = report.report(Asked([str(workdir)]))
    text = place.read_text()
    missing = text.split('id="missing"')[1]
    assert "Principal components of patches are not shown: a resnet has no tokens" in missing
    assert "Masked images are not shown: a resnet" in missing
    assert "Nearest images of some train images" in text  # there is no test split
    assert str(images) not in text
    assert "caf\\xe9&lt;i&gt;.png" in text and "<i>.png" not in text


def begun_resnet(workdir: pathlib.Path, changes: dict[str, Any]) -> pathlib.Path:
    config = settings("sop")
    config.update_from_flattened_dict(changes)
    state = assemble(config, make_mesh(1), images=6).init(jax.random.key(0))
    save(workdir, config, {12: state})
    write_rows(workdir)
    return workdir


def test_images_that_moved_are_told(tmp_path: pathlib.Path) -> None:
    config = settings("sop")
    config.data.update(source="folder", path=str(tmp_path / "gone"))
    save(tmp_path / "run", config, {})
    write_rows(tmp_path / "run")
    said: list[str] = []
    text = report.report(Asked([str(tmp_path / "run")]), said.append).read_text()
    assert "There are no pictures" in text and "gone" in text and "Curves" in headings(text)
    assert any(line.startswith("not shown: There are no pictures: ") for line in said)
    assert "Unique prototypes are not counted" in text and "no checkpoint" in text


def test_a_folder_with_nothing_but_settings(tmp_path: pathlib.Path) -> None:
    save(tmp_path / "run", settings("sop"), {})
    text = report.report(Asked([str(tmp_path / "run")], pictures=False)).read_text()
    assert "there are no curves" in text and "Curves" not in headings(text)
    assert "No pictures were asked for." in text


def test_results_of_a_diagnosis_are_shown(tmp_path: pathlib.Path) -> None:
    from sop_jax.diagnosis.diagnosis import diagnose

    save(tmp_path / "run", settings("sop"), {})
    folder = tmp_path / "run" / "evaluations"
    folder.mkdir()
    rows = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    content = {"subjects": [{"name": "step 7 <i>", "result": diagnose(rows, rows)}]}
    (folder / "diagnosis_7_ab.json").write_text(json.dumps(content))
    (folder / "diagnosis_8_ab.json").write_text("[")
    text = report.report(Asked([str(tmp_path / "run")], pictures=False)).read_text()
    assert "step 7 &lt;i&gt;" in text and "Average share of the data" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(workdirs=[]), "give --workdir"),
        (dict(workdirs=["{run}", "{run}/"]), "given twice"),
        (dict(workdirs=["{run}/none"]), "not a folder"),
        (dict(step=7), r"no checkpoint of step 7 in .*, only of \[3\]"),
        (dict(data={"path": "{run}/none"}), "--data.path={run}/none does not exist"),
        (dict(pictures=False, step=3), "--step would have no effect"),
        (dict(pictures=False, data={"path": "x"}), "--data.path would have no effect"),
    ],
)
def test_what_cannot_be_reported(
    tmp_path: pathlib.Path, changes: dict[str, Any], message: str
) -> None:
    run = tmp_path / "run"
    save(run, settings("sop"), {3: {"leaf": np.ones(1)}})
    (run / "report.html").write_text("of before")
    asked = Asked([str(run)])._replace(**changes)
    asked = asked._replace(
        workdirs=[path.format(run=run) for path in asked.workdirs],
        data={name: value.format(run=run) for name, value in asked.data.items()},
    )
    with pytest.raises(UserError, match=message.replace("{run}", str(run))):
        report.report(asked)
    assert (run / "report.html").read_text() == "of before"


def test_a_checkpoint_that_was_asked_for_and_cannot_be_read(tmp_path: pathlib.Path) -> None:
    save(tmp_path / "run", settings("sop"), {3: {"leaf": np.ones(1)}})
    with pytest.raises(UserError, match="is of another architecture"):
        report.report(Asked([str(tmp_path / "run")], step=3))
    assert not (tmp_path / "run" / "report.html").exists()


def test_the_first_evaluation_needs_labels(tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    save(run, settings("sop"), {})
    asked = Asked([str(run)], pictures=False)
    text = report.report(asked).read_text()
    assert f"--workdir={run} --task=knn --data.path=IMAGES measures the first." in text
    write_rows(run)  # with k-NN accuracies, so that its images have labels
    text = report.report(asked).read_text()
    assert f"--workdir={run} --task=knn measures the first." in text and "IMAGES" not in text


def test_a_page_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    save(tmp_path / "run", settings("sop"), {})
    (tmp_path / "file").write_text("")
    asked = Asked([str(tmp_path / "run")], out=str(tmp_path / "file" / "r.html"), pictures=False)
    with pytest.raises(UserError, match="choose another --out"):
        report.report(asked)


def hide_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )


def test_without_matplotlib(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "run", settings("sop"), {})
    hide_matplotlib(monkeypatch)
    with pytest.raises(UserError, match=r"pip install -e '.\[plot\]'"):
        report.report(Asked([str(tmp_path / "run")]))


# Reports of a run that trains


def make_reporter(
    workdir: pathlib.Path, clock: Callable[[], float], said: list[str]
) -> Callable[[bool], None]:
    return report.reporter(workdir, lambda rows: None, said.append, clock)


def test_a_run_spends_little_of_its_time_on_reports(tmp_path: pathlib.Path) -> None:
    write_rows(tmp_path)
    now, said = [0.0], list[str]()
    write = make_reporter(tmp_path, lambda: now[0], said)
    file = tmp_path / "report.html"
    now[0] = 200.0
    write(False)
    assert not file.exists()  # 3 seconds are more than 1 % of 200
    now[0] = 400.0
    write(False)
    assert file.exists() and "python -m sop_jax.report --workdir=" in file.read_text()
    file.unlink()
    now[0] = 1.0
    write(True)  # at the end, whatever it takes
    assert file.exists() and not said


def test_a_report_that_fails_is_only_told(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path)
    said = list[str]()
    write = make_reporter(tmp_path, lambda: 1e6, said)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(report, "page", fail)
    write(True)
    assert said == ["no report is written: ZeroDivisionError: a bug"]
    assert not (tmp_path / "report.html").exists()


def test_a_run_without_matplotlib_goes_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path)
    said = list[str]()
    hide_matplotlib(monkeypatch)
    make_reporter(tmp_path, lambda: 1e6, said)(True)
    assert len(said) == 1 and "pip install -e '.[plot]'" in said[0]


@pytest.mark.medium
def test_a_run_writes_its_report(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(report, "SHARE", 1e6)  # at every evaluation
    monkeypatch.setattr(train, "reporter", report.reporter)
    pages = []
    write = report.write_whole
    monkeypatch.setattr(
        report, "write_whole", lambda path, text: (pages.append(text), write(path, text))
    )
    config = make_config(**{"steps": 4, "eval_every": 2, "log_every": 1, "data.workers": 0})
    train.train(config, tmp_path / "run")
    assert len(pages) == 2 and (tmp_path / "run" / "report.html").read_text() == pages[-1]
    assert "is training or was interrupted" in pages[0] and "has ended" in pages[1]
    assert "no report" not in capsys.readouterr().err


@pytest.mark.medium
def test_the_command(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = tmp_path / "other"
    write_rows(other)
    command = [sys.executable, "-m", "sop_jax.report", "--nopictures", f"--out={tmp_path}"]
    command += [f"--workdir={workdir}", str(other)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "report.html")
    assert "Report of a run, other" in (tmp_path / "report.html").read_text()
