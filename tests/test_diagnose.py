"""The command that diagnoses prototypes: what it writes and prints, and what it refuses."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import checkpoints
import numpy as np
import processes
import pytest
from begun import Saved, settings
from checkpoints import numbers, save_pth
from etils import epath
from PIL import Image

from sop_jax import config as config_lib
from sop_jax import diagnose, paths
from sop_jax.diagnose import Asked
from sop_jax.diagnosis import figures, in_training, uniqueness
from sop_jax.errors import UserError

DISTINCT = np.eye(12, 16, dtype=np.float32)
# 12 prototypes, of which 5 are unique, the first of them with the redundancy 8.
COLLAPSED = np.repeat(DISTINCT[:5], [8, 1, 1, 1, 1], axis=0)


def planted(tmp_path: pathlib.Path, rows: np.ndarray = COLLAPSED, name: str = "f.pth") -> str:
    return str(save_pth(tmp_path / name, {"prototypes": rows}))


def record(asked: Asked) -> dict[str, Any]:
    return json.loads(diagnose.run(asked).read_text())


def command(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sop_jax.diagnose", *flags], capture_output=True, text=True
    )


# Files


def test_planted_duplicates_are_counted(tmp_path: pathlib.Path, capsys: Any) -> None:
    found = record(Asked(weights=[planted(tmp_path)]))
    (subject,) = found["subjects"]
    assert (subject["layer"], subject["step"], subject["knn_top1"]) == ("prototypes", None, None)
    for entry in subject["result"]["eps"]:
        assert (entry["unique"], entry["share"], entry["factors"]) == (5, 5 / 12, [1, 8])
    assert subject["result"]["dead"] is None
    assert "a file names no images; give some with --data.path" in subject["without_images"]
    shown = capsys.readouterr()
    table, papers = shown.out.split("Unique prototypes at eps 0.025 in papers:")
    assert "41.67" in table and "DINO ViT-S/16 1078 of 65536" in papers
    assert "no shares of images" in shown.err


def test_too_few_unique_prototypes_for_a_map_are_told(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install -e '.[plot]'")
    found = record(Asked(weights=[planted(tmp_path)], tsne=True))
    assert "tsne.png" not in found["files"]
    said = "prototypes: no map, because only 5 prototypes are unique at eps 0.025, and t-SNE needs"
    assert said in capsys.readouterr().err


def test_the_results_are_next_to_the_file_or_where_out_says(tmp_path: pathlib.Path) -> None:
    path = diagnose.run(Asked(weights=[planted(tmp_path)]))
    assert path.parent == epath.Path(tmp_path) / "evaluations"
    assert path.name.startswith("diagnosis_f_") and path.suffix == ".json"
    folder = path.with_suffix("")
    assert {"unique.png", "diagnosis.html"} <= {file.name for file in folder.iterdir()}
    assert sorted(json.loads(path.read_text())["files"]) == sorted(x.name for x in folder.iterdir())
    assert path == diagnose.run(Asked(weights=[planted(tmp_path)]))
    other = diagnose.run(Asked(weights=[planted(tmp_path)], eps=(0.1,), out=str(tmp_path / "out")))
    assert other.parent == epath.Path(tmp_path) / "out" / "evaluations" and other.name != path.name


def test_several_files_are_told_apart(tmp_path: pathlib.Path) -> None:
    asked = [planted(tmp_path), planted(tmp_path, DISTINCT, "g.pth")]
    found = record(Asked(weights=asked, out=str(tmp_path)))
    shares = {x["name"]: x["result"]["eps"][0]["share"] for x in found["subjects"]}
    assert shares == {"f.pth": 5 / 12, "g.pth": 1.0}


def test_a_map_is_drawn_of_enough_unique_prototypes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def map_of(rows: np.ndarray, cover: Any, seed: int) -> figures.Map:
        asked.append((len(cover.representatives), cover.eps, seed))
        at = np.zeros((len(cover.representatives), 2))
        return figures.Map(at, cover.redundancy, cover.eps, len(cover.representatives))

    monkeypatch.setattr(figures, "map_of", map_of)
    found = record(Asked(weights=[planted(tmp_path)], tsne=True, seed=3))
    assert asked == [(5, 0.025, 3)] and "tsne.png" in found["files"]


def test_without_matplotlib_there_are_numbers_but_no_plots(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def missing() -> None:
        raise UserError("figures need matplotlib")

    monkeypatch.setattr(figures, "check_plots", missing)
    path = diagnose.run(Asked(weights=[planted(tmp_path)]))
    assert "no plots are drawn: figures need matplotlib" in capsys.readouterr().err
    assert not path.with_suffix("").exists()
    with pytest.raises(UserError, match="figures need matplotlib"):
        diagnose.run(Asked(weights=[planted(tmp_path)], tsne=True))


@pytest.mark.slow
def test_a_checkpoint_of_the_size_of_dinos(tmp_path: pathlib.Path) -> None:
    """A file with the names and shapes of DINO's public checkpoint of ViT-S/16 has the planted M.

    1078 is the paper's count for it.
    """
    rng = np.random.default_rng(0)
    centers = checkpoints.numbers(1078, 256, seed=5)
    of = np.concatenate([np.arange(1078), rng.integers(1078, size=65536 - 1078)])
    rows = centers[of] + 0.02 * rng.normal(size=(65536, 256)).astype(np.float32)
    lengths = rng.uniform(0.5, 2, (65536, 1)).astype(np.float32)
    head = {"mlp.0.weight": numbers(4, 4), "last_layer.weight_g": lengths}
    teacher = {f"head.{name}": array for name, array in head.items()}
    teacher["head.last_layer.weight_v"] = rows
    teacher["backbone.norm.weight"] = numbers(384)
    student = {f"module.{name}": array for name, array in teacher.items()}
    path = save_pth(tmp_path / "full_checkpoint.pth", {"student": student, "teacher": teacher})
    found = record(Asked(weights=[str(path)], eps=(0.025,)))
    (subject,) = found["subjects"]
    assert subject["layer"] == "teacher.head.last_layer"
    (entry,) = subject["result"]["eps"]
    assert subject["result"]["prototypes"] == 65536 and entry["unique"] == 1078
    redundancy = np.bincount(np.bincount(of))
    assert entry["factors"] == np.flatnonzero(redundancy).tolist()
    assert entry["representatives"] == redundancy[redundancy > 0].tolist()


@pytest.mark.medium
def test_images_are_embedded_by_the_network_of_a_file(tmp_path: pathlib.Path, capsys: Any) -> None:
    for i in range(3):
        image = np.random.default_rng(i).integers(256, size=(16, 16, 3), dtype=np.uint8)
        (tmp_path / "images" / "one").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "images" / "one" / f"{i}.png")
    data = {"path": str(tmp_path / "images"), "train_split": ""}
    path = str(save_pth(tmp_path / "f.pth", {"teacher": checkpoints.ibot()}))
    found = record(Asked(weights=[path], data=data, heads=2))
    (subject,) = found["subjects"]
    assert subject["without_images"] is None and found["data"][path]["images"] == 3
    assert (subject["result"]["images"], subject["result"]["prototypes"]) == (3, 8)
    assert sum(subject["result"]["images_per_class"]) == 3
    (subject,) = record(Asked(weights=[path], data=data))["subjects"]
    assert "its network cannot be used: " in subject["without_images"]
    assert "give --heads=N" in subject["without_images"]
    # Of a head that is not known there are prototypes, but no embeddings.
    other = {f"backbone.{name}": array for name, array in checkpoints.vit().items()}
    other["prototypes.weight"] = numbers(5, 16)
    path = str(save_pth(tmp_path / "g.pth", {"teacher": other}))
    (subject,) = record(Asked(weights=[path], data=data, heads=2))["subjects"]
    assert subject["result"]["images"] is None
    assert "its head has other layers" in subject["without_images"]
    assert "no shares of images" in capsys.readouterr().err


# Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    folder = tmp_path_factory.mktemp("runs")
    found = {name: Saved(folder / name, name) for name in ("ibot", "sop", "capi")}
    rows = [
        {"step": 0, "knn_top1": 0.4, "prototypes_count": 24, "prototypes_share": None},
        {"step": 3, "knn_top1": 0.5} | counted(24, 12),
        {"step": 5, "loss": 1.0},
        {"step": 6, "knn_top1": 0.7} | counted(24, 6),
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "ibot" / "metrics.jsonl").write_text(lines)
    return found


def counted(count: int, unique: int) -> dict[str, Any]:
    share = unique / count
    row = {"prototypes_count": count, "prototypes_unique": unique, "prototypes_share": share}
    return row | {f"prototypes_share_eps{eps:g}": share for eps in uniqueness.EPS}


@pytest.mark.medium
def test_a_run_is_diagnosed_with_its_own_images(runs: dict[str, Saved], capsys: Any) -> None:
    workdir = str(runs["ibot"].workdir)
    found = record(Asked([workdir], images=50))
    assert [x["layer"] for x in found["subjects"]] == ["cls", "patch"]
    for subject, count in zip(found["subjects"], (24, 20), strict=True):
        result = subject["result"]
        assert (result["prototypes"], result["images"]) == (count, 50)
        assert sum(result["images_per_class"]) == 50 and subject["without_images"] is None
        assert subject["knn_top1"] == 0.5  # of the row of its step
    assert found["data"][workdir]["images"] == 50
    table = capsys.readouterr().out
    assert "images by the redundancy of their prototype, patch:" in table and "50.00" in table
    again = record(Asked([workdir], images=50, layer="cls"))["subjects"]
    assert [x["result"] for x in again] == [found["subjects"][0]["result"]]


@pytest.mark.medium
def test_clusters_of_patches_are_compared_with_features(runs: dict[str, Saved]) -> None:
    workdir = str(runs["capi"].workdir)
    (taught,) = record(Asked([workdir], images=20))["subjects"]
    assert (taught["layer"], taught["result"]["images"]) == ("clustering", 20)
    (learnt,) = record(Asked([workdir], images=20, network="student"))["subjects"]
    assert learnt["result"]["images"] is None and "depends on masks" in learnt["without_images"]


@pytest.mark.medium
def test_anchors_and_memories_of_sop_are_diagnosed(runs: dict[str, Saved]) -> None:
    found = record(Asked([str(runs["sop"].workdir)], images=0))["subjects"]
    assert [x["layer"] for x in found] == [
        *("cls_anchors", "patch_anchors", "cls_memory", "patch_memory")
    ]
    assert {x["without_images"] for x in found} == {"--images=0"}
    # Rows of a memory that has just begun are random, and from no image.
    assert [x["result"]["eps"][0]["same_image"] for x in found] == [0, 0, 0, 0]


@pytest.mark.medium
def test_recorded_counts_are_drawn_without_a_checkpoint(
    runs: dict[str, Saved], tmp_path: pathlib.Path, capsys: Any
) -> None:
    workdir = str(runs["ibot"].workdir)
    found = record(Asked([workdir], step="recorded", out=str(tmp_path)))
    shares = {x["name"]: x["result"]["eps"][3]["share"] for x in found["subjects"]}
    assert shares == {"step 3": 0.5, "step 6": 0.25}
    assert "knn.png" in found["files"] and "70.00" in capsys.readouterr().out
    with pytest.raises(UserError, match="recorded no counts of prototypes; expected some in"):
        diagnose.run(Asked([str(runs["sop"].workdir)], step="recorded"))


def test_recorded_counts_of_runs_have_the_short_names_that_tell_them_apart(
    tmp_path: pathlib.Path,
) -> None:
    workdirs = [tmp_path / "first" / "a", tmp_path / "first" / "b", tmp_path / "second" / "a"]
    row = json.dumps({"step": 4, **in_training.counts(COLLAPSED)})
    for workdir in workdirs:
        workdir.mkdir(parents=True)
        config_lib.save(settings("dino"), epath.Path(workdir))
        paths.write_whole(epath.Path(workdir) / "metrics.jsonl", row + "\n")
    first, second, third = map(str, workdirs)
    assert list(diagnose.recorded([first, second])[0]) == ["a, step 4", "b, step 4"]
    assert list(diagnose.recorded([first, third])[0]) == [f"{first}, step 4", f"{third}, step 4"]


@pytest.mark.slow
def test_two_processes_find_what_one_does(runs: dict[str, Saved], tmp_path: pathlib.Path) -> None:
    command = ["-m", "sop_jax.diagnose", f"--workdir={runs['sop'].workdir}", "--images=50"]
    found = []
    for flags in (processes.among(2), [[]]):
        out = tmp_path / f"out{len(flags)}"
        every = [[*command, f"--out={out}", *own] for own in flags]
        ended = processes.run(every, tmp_path / f"log{len(flags)}", timeout=300)
        assert [one.code for one in ended] == [0] * len(flags), ended
        (path,) = (out / "evaluations").glob("*.json")
        assert ended[0].out.endswith(f"{path}\n")
        assert not any("unique prototypes" in one.out for one in ended[1:])
        found.append(json.loads(path.read_text())["subjects"])
    for two, one in zip(*found, strict=True):
        assert two["layer"] == one["layer"] and two["result"]["images"] == 50
        for name in ("marginal", "images_per_class", "uniformity", "effective_rank"):
            np.testing.assert_allclose(two["result"][name], one["result"][name], rtol=1e-4)
        assert two["result"]["eps"][0]["share_total"] == one["result"]["eps"][0]["share_total"]


# What is refused


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked(), "give --workdir=DIR or --weights=FILE; either can be repeated"),
        (Asked(weights=["a", "b"]), "name the folder of the results with --out"),
        (Asked(weights=["f.pth", "./f.pth"], out="o"), "f.pth is given twice"),
        (Asked(weights=["."]), "--weights=. is a folder; give --workdir=."),
        (Asked(weights=["f.pth"], step="3"), "--step=3 is for --workdir"),
        (Asked(weights=["f.pth"], eps=(0.1, 2.0)), r"eps is 2, outside of \(0, 2\)"),
        (Asked(weights=["f.pth"], eps=(0.0,)), r"eps is 0, outside of \(0, 2\)"),
        (Asked(weights=["f.pth"], eps=(-0.1,)), r"eps is -0.1, outside of \(0, 2\)"),
        (Asked(weights=["f.pth"], images=0, data={"path": "x"}), "--data.path would have no eff"),
        (Asked(weights=["f.pth"], images=0, batch_size=8), "--batch_size would have no effect"),
        (Asked(weights=["f.pth"], heads=3), "--heads=3 would have no effect"),
        (Asked(["x"], step="recorded", layer="cls"), "--layer would have no effect: --step=rec"),
        (Asked(["x"], step="recorded", tsne=True), "--tsne would have no effect: --step=rec"),
        (Asked(["x"], step="recorded", seed=1), "--seed would have no effect: --step=rec"),
        (Asked(["x"]), "x/config.json does not exist, so x is not the folder of a run"),
        (Asked(weights=["f.pth"]), "there is no file f.pth; give the path of a file"),
    ],
)
def test_what_is_asked_for_is_checked(
    asked: Asked, message: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        diagnose.run(asked)
    assert not list(tmp_path.iterdir())


def test_a_backbone_has_no_prototypes(tmp_path: pathlib.Path) -> None:
    path = save_pth(tmp_path / "dino_deitsmall16_pretrain.pth", checkpoints.vit())
    with pytest.raises(UserError, match=r"pretrain.pth: it has no prototypes.*_full_checkpoint"):
        diagnose.run(Asked(weights=[str(path)]))


def test_nan_among_the_prototypes_is_an_error(tmp_path: pathlib.Path) -> None:
    rows = COLLAPSED.copy()
    rows[3, 2] = np.nan
    with pytest.raises(UserError, match=r"f.pth: .*rows of prototypes"):
        diagnose.run(Asked(weights=[planted(tmp_path, rows)]))
    assert not list((tmp_path / "evaluations").glob("*"))


def test_a_converted_folder_has_no_prototypes(tmp_path: pathlib.Path) -> None:
    config_lib.save(settings("dino"), epath.Path(tmp_path))
    paths.write_whole(epath.Path(tmp_path) / "converted.json", '{"source": "f.pth", "absent": []}')
    with pytest.raises(UserError, match=r"was converted from f.pth: .*Give the file itself with"):
        diagnose.run(Asked([str(tmp_path)]))


@pytest.mark.medium
def test_images_that_are_gone_are_named_before_anything_is_computed(
    runs: dict[str, Saved], tmp_path: pathlib.Path
) -> None:
    asked = Asked([str(runs["ibot"].workdir)], data={"path": str(tmp_path / "gone")})
    with pytest.raises(UserError, match="gone.*--images=0 diagnoses the prototypes without images"):
        diagnose.run(asked)


@pytest.mark.medium
def test_the_last_line_is_the_path_and_errors_are_one_line(tmp_path: pathlib.Path) -> None:
    path = planted(tmp_path)
    done = command(f"--weights={path}", "--eps=0.025,0.1")
    assert done.returncode == 0, done.stderr
    found = json.loads(pathlib.Path(done.stdout.splitlines()[-1]).read_text())
    assert [x["eps"] for x in found["subjects"][0]["result"]["eps"]] == [0.025, 0.1]
    for flags, message in {
        ("--eps=0.1,no",): "--eps=0.1,no is not a list of numbers; expected distances",
        ("--epz=0.1",): "Unknown command line flag 'epz'. Did you mean: eps ?",
        ("--layer=prototipes",): "'prototipes'; did you mean prototypes?",
    }.items():
        done = command(f"--weights={path}", *flags)
        assert done.returncode and message in done.stderr, done.stderr
        assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
