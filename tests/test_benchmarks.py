"""Each benchmark runs in its smallest case, and that of the step measures what was requested."""

import importlib
import json
import math
import os
import pathlib
import runpy
import shutil
import subprocess
import sys
from types import ModuleType
from typing import Any

import numpy as np
import processes
import pytest
from etils import epath
from PIL import Image
from runs import APART, make_config, make_run

from sop_jax.config import save
from sop_jax.data.masks import most_masked
from sop_jax.errors import UserError

pytestmark = pytest.mark.medium

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"


SMALL = (
    *("--arch=vit_tiny", "--batch=2", "--dtype=float32", "--local-crops=1"),
    *("--config.model.size=custom", "--config.model.width=32", "--config.model.depth=1"),
    *(
        "--config.model.heads=2",
        "--config.augment.global_size=32",
        "--config.augment.local_size=16",
    ),
    *("--config.sop.cls.memory=64", "--config.sop.cls.anchors=16", "--config.sop.patch.memory=32"),
    *("--config.sop.patch.anchors=8", "--config.head.hidden=16", "--config.head.dim=8"),
    "--config.mesh.data=1",
)


def environment() -> dict[str, str]:
    """Returns the variables of a benchmark, whose programs are optimized as for users."""
    one = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": processes.flags(devices=1)}
    return os.environ | one


def run(name: str, *words: str) -> dict[str, Any]:
    """Runs a benchmark from the command line, and returns the JSON that it prints last."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_parts_of_the_step_are_timed() -> None:
    found = run("step", *SMALL, "--steps=2", "--warmup=0", "--parts", "--trace")
    assert set(found["parts_s"]) == {"teacher", "targets", "losses", "update", "student"}
    assert sum(found["parts_s"].values()) == pytest.approx(found["step_s"], abs=1e-4)
    assert found["flops"] > 0 and math.isfinite(found["loss"])
    traced = found["trace_s"]
    assert traced["student"] > traced["losses"] > 0 and traced["teacher"] > 0
    assert sum(traced.values()) < 5 * found["step_s"]
    assert (found["attention"], found["estimate_s"]) == ("xla", None)


def rehearse(folder: pathlib.Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [BENCHMARKS / "gpu.sh", "--rehearse", f"--out={folder / 'out'}", *words]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("timeout") is None, reason="needs timeout, of GNU coreutils")
def test_the_measurements_of_a_gpu_go_on_where_they_stopped(tmp_path: pathlib.Path) -> None:
    """Two of them are rehearsed; the others are the commands of other tests here."""
    names = ("vitb", "vitb_xla", "vitb_full", "vitb_loop", "vitb_triton", "vitl", "vits", "train")
    done = [*names, "precision_bfloat16", "precision_float32", "input"]
    results = tmp_path / "out" / "results.jsonl"
    results.parent.mkdir()
    results.write_text("".join(f'{{"name": "{name}", "seconds": 1}}\n' for name in done))
    first = rehearse(tmp_path, "--seconds=9999")
    assert first.returncode == 0, first.stdout + first.stderr
    rows = [json.loads(line) for line in results.read_text().splitlines()][len(done) :]
    assert [row["name"] for row in rows] == ["smoke", "search"]
    assert rows[0]["attention"] == "xla" and rows[0]["distances"]["37"]["q"] < 0.02
    assert rows[1]["searches"][0]["recall"] == 1
    again = rehearse(tmp_path)
    assert "==" not in again.stdout and again.stdout.startswith("took ")
    assert sorted(file.name for file in results.parent.iterdir()) == ["gpu.log", "results.jsonl"]


def test_a_measurement_that_does_not_exist_is_refused(tmp_path: pathlib.Path) -> None:
    ended = rehearse(tmp_path, "--only=vitb,vitz")
    assert ended.returncode == 2
    assert "there is no measurement vitz; expected one of: smoke vitb" in ended.stderr


@pytest.mark.slow
def test_the_precision_of_a_step_is_compared() -> None:
    found = run("precision", *SMALL[:1], "--dtype=bfloat16", *SMALL[3:], "--limit=0.2")
    assert all(0 < found[name] < 0.2 for name in ("losses", "gradients", "memories"))


@pytest.mark.slow
def test_the_search_is_timed() -> None:
    sizes = ("--rows=256", "--anchors=32", "--supports=2", "--steps=1", "--quick")
    found = run("search", *sizes)["searches"]
    assert [row["precision"] for row in found] == ["float32", "high", "bfloat16"]
    assert all(row["limit_ms"] > 0 and row["ms"] > 0 for row in found)
    assert found[0]["recall"] == 1


@pytest.mark.slow
def test_the_recall_of_precisions_is_measured() -> None:
    found = run("recall", "--rows=256", "--anchors=64", "--supports=2")
    assert set(found) == {"random", "clusters of 0.3", "clusters of 0.05"}
    assert all(shares["float32"] == 1 for shares in found.values())
    for shares in found.values():
        assert shares["bfloat16"] <= shares["TF32, emulated"] <= 1


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux, to bind to cores")
def test_the_input_is_timed() -> None:
    found = run("input", "--count=8", "--rounds=1")
    assert found["speed_ratio"] > 0 and found["parallel_efficiency"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux, to bind to cores")
def test_the_propagation_of_masks_is_timed() -> None:
    found = run("video", "--patch=64", "--times=1")
    assert found["tokens"] == [7, 13]
    assert found["propagation_s"]["ours"] > 0 and found["whole_s"]["ours"] > 0


@pytest.mark.slow
def test_baselines_are_compared_once(tmp_path: pathlib.Path) -> None:
    make_run(tmp_path / "run", (3,), **APART)
    command = [sys.executable, str(BENCHMARKS / "baselines.py"), f"--workdir={tmp_path / 'run'}"]
    command += [f"--out={tmp_path / 'rows'}", "--tasks=knn", "--set=knn.k=(1, 10)"]
    tables = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        tables.append(done.stdout)
    assert tables[0] == tables[1] and "| `knn` top1 |" in tables[0]
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["network"] for row in rows] == ["pixels", "untrained", "trained"]
    assert rows[0]["results"]["top1"] > 0.9 > rows[1]["results"]["top1"] > 0.3


@pytest.fixture
def neighbours(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("neighbours")


def test_the_class_of_an_image_is_compared_with_that_of_its_nearest(neighbours: ModuleType) -> None:
    angles = np.radians([0, 1, 3, 90, 92, 170])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    features *= np.arange(1, 7, dtype=np.float32)[:, None]  # only directions matter
    classes = np.array(["a", "a", "b", "b", "b", "a"])
    # The nearest of each: 1, 0, 1, 4, 3 and 4.
    assert neighbours.same_class(features, classes, 1) == pytest.approx(4 / 6)
    assert neighbours.same_class(features, classes, 5) == pytest.approx(2 / 5)


@pytest.mark.slow
def test_the_neighbours_of_a_run_are_compared_with_those_of_its_beginning(
    neighbours: ModuleType, tmp_path: pathlib.Path
) -> None:
    make_run(tmp_path / "run", (3,), **APART)
    for number in range(8):
        folder = tmp_path / "images" / ("dark", "light")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        grey = np.full((40, 40, 3), 20 + 180 * (number % 2) + number, np.uint8)
        Image.fromarray(grey).save(folder / f"{number}.png")
    twin = tmp_path / "images" / "dark" / "copy.png"
    twin.write_bytes((tmp_path / "images" / "dark" / "0.png").read_bytes())
    found = neighbours.measure(str(tmp_path / "run"), tmp_path / "images", 3)
    assert found["images"] == 8
    assert 0 <= found["untrained"] <= 100
    assert found["gain"] == pytest.approx(found["trained"] - found["untrained"])
    with pytest.raises(UserError, match="expected more than 8, all of them in two or more folders"):
        neighbours.measure(str(tmp_path / "run"), tmp_path / "images", 8)


def test_curves_are_kept_by_run_and_compared_with_the_first(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    curves = importlib.import_module("curves")

    def tabulate(*runs: pathlib.Path) -> list[str]:
        words = ["curves.py", f"--out={tmp_path / 'rows'}", "--workdir", *map(str, runs)]
        monkeypatch.setattr("sys.argv", words)
        curves.main()
        return capsys.readouterr().out.splitlines()[2:]

    def add(name: str, lines: list[dict[str, float]], **changes: Any) -> pathlib.Path:
        (tmp_path / name).mkdir(exist_ok=True)
        config = make_config(batch_size=8, **changes)
        save(config, epath.Path(tmp_path / name))
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
        return tmp_path / name

    start = {"step": 0, "knn_top1": 0.25, "wall_s": 6.0}
    later = {"step": 50, "knn_top1": 0.5, "images_per_s": 20.0, "wall_s": 90.0}
    first = add("first", [start, {"step": 25, "images_per_s": 30.0, "wall_s": 9.0}, later])
    second = add("second", [start], **{"model.drop_path": 0.25})
    expected = ["| first | - | 25.0 | 1.5 | 25.0 | 400: 50.0 |"]
    changed = "| second | `model.drop_path=0.25` |"
    assert tabulate(first, second) == [*expected, f"{changed} None | 0.1 | 25.0 |  |"]
    add("second", [start, later], **{"model.drop_path": 0.25})
    expected.append(f"{changed} 20.0 | 1.5 | 25.0 | 400: 50.0 |")
    assert tabulate(second) == expected  # it has gone on
    assert tabulate() == expected
    with pytest.raises(SystemExit, match="has measured no accuracy: eval.tasks must have knn"):
        tabulate(add("third", []))


def test_counting_unique_prototypes_is_timed() -> None:
    rows = run("uniqueness", "--prototypes=3000", "--dim=256")["cases"]
    assert [row["case"] for row in rows] == ["distinct", "close", "collapsed"]
    assert all(row["seconds"] > 0 and row["peak_bytes"] > row["grown_bytes"] for row in rows)
    distinct, close, collapsed = (row["unique"] for row in rows)
    assert set(distinct.values()) == {3000} and collapsed["0.025"] == 3
    assert 0.09 < rows[1]["pairs_within_widest"] < 0.11
    assert close["0.001"] == 3000 > close["0.5"] > 1


@pytest.mark.slow
def test_evaluations_are_timed() -> None:
    size = ("--arch=vit_tiny", "--batch=2", "--pairs=1", "--side=32")
    assert run("evaluation", "--part=sweep", *size, "--classes=5")["ratio"] > 0
    assert run("evaluation", "--part=features", *size, "--images=8")["ratio"] > 0
    memory = run("evaluation", "--part=memory", "--rows=2000")
    assert memory["bytes"] == 2000 * 768 * 4 and memory["growth"] > 0
    assert run("evaluation", "--part=knn", "--rows=4096", "--pairs=1")["seconds"] > 0


@pytest.mark.slow
def test_a_variant_is_trained_and_shown(tmp_path: pathlib.Path) -> None:
    found = run("collapse", f"--out={tmp_path}", "--steps=60", "--variant=ratio 0.7")
    assert list(found) == ["ratio 0.7"]
    assert 0.1 < found["ratio 0.7"] <= 1


@pytest.mark.slow
def test_the_runs_of_a_claim_are_trained_once(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "claims.py"), "--only=table_3", "--steps=2"]
    command += [f"--out={tmp_path / 'rows'}", f"--workdirs={tmp_path}"]
    tables = []
    for _ in range(2):
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        tables.append(done.stdout[done.stdout.index("table_3: ") :])
    assert tables[0] == tables[1] and "-> 1 seed, not judged" in tables[0]
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [len(row["knn"]) for row in rows] == [3, 3] and rows[0]["prototypes"] == 512
    for row in rows:
        assert 0.3 < row["transfer"] <= 1 and 0.1 < row["fewshot"]["1"] < row["fewshot"]["5"]
        assert row["unique"]["0.025"][0] == [0, 1.0] and row["step_bytes"] > 1e6
    assert not list(tmp_path.glob("ibot_*"))  # the workdirs of finished runs


@pytest.mark.slow
@pytest.mark.filterwarnings(  # without devices JAX cannot read the cache
    "ignore:Error reading persistent compilation cache entry"
)
def test_the_tables_of_scale_have_no_gaps(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("libtpu", reason="needs the compiler of TPUs: pip install -e '.[tpu]'")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    scale = importlib.import_module("scale")
    config = runpy.run_path(str(BENCHMARKS.parent / "configs" / "digits.py"))["get_config"]()
    row = scale.planned(config, "v5e:2x2")  # one row only, because all rows take hours

    def planned(*_: Any) -> dict[str, Any]:
        return row

    def largest(*_: Any) -> dict[str, Any]:
        return {"images": 128, "bound": True}

    monkeypatch.setattr(scale, "planned", planned)
    monkeypatch.setattr(scale, "largest", largest)
    monkeypatch.setattr(sys, "argv", ["scale.py", f"--out={tmp_path / 'scale.jsonl'}"])
    scale.main()
    printed = capsys.readouterr().out
    assert "ViT-L/16 | v5e-256, fsdp 16" in printed and "128*" in printed
    assert "nan" not in printed
    scale.main()  # again, from the stored results
    assert capsys.readouterr().out == printed


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("step")


def parse(step: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple:
    monkeypatch.setattr(sys, "argv", ["step.py", *words])
    return step.parse()


def test_the_yardsticks_method_is_one_task_of_smoothed_votes(
    step: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = step.settings(*parse(step, monkeypatch, "--batch=4", "--dtype=float32"))
    cls = config.sop.cls
    assert (cls.tasks, cls.votes, config.sop.pool) == (1, "smoothed", "all")
    assert (cls.anchors, 1 + cls.supports, cls.memory) == (4096, 9, 65536)
    assert (config.batch_size, config.model.dtype, config.model.size) == (4, "float32", "ti")


def test_a_setting_of_the_command_line_wins(
    step: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--config.sop.cls.tasks=2", "--config.mask.ratio=(0.1,0.5)", "--method", "paper")
    words += ("--config.sop.search_precision=float32", "--config.model.remat=full")
    for method in ("yardstick", "paper"):
        args, changes = parse(step, monkeypatch, *words)
        args.method = method
        config = step.settings(args, changes)
        assert config.sop.cls.tasks == 2 and config.sop.search_precision == "float32"
        assert config.mask.ratio == (0.1, 0.5) and config.model.remat == "full"


@pytest.mark.parametrize(
    "word", ["--bogus=3", "--config.model.remt=full", "--config.model.remat=some", "--batch=0"]
)
def test_nonsense_is_one_line(step: ModuleType, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    args, changes = parse(step, monkeypatch, word)
    with pytest.raises(SystemExit, match="error: "):
        step.settings(args, changes)


def test_both_sides_get_the_same_shapes(step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        "--arch=vit_small",
        "--batch",
        "8",
        "--steps=3",
        "--peer",
        "theirs.py",
        "--rounds",
        "5",
    )
    words += ("--closed-form", "--device", "cpu", "--parts", "--config.model.remat=full")
    commands = step.commands(*parse(step, monkeypatch, *words))
    same = {"--arch=vit_small", "--batch=8", "--steps=3", "--dtype=bfloat16", "--local-crops=10"}
    assert same < set(commands["ours"]) and same < set(commands["peer"])
    assert {"--parts", "--config.model.remat=full"} < set(commands["ours"])
    assert {"theirs.py", "--closed-form", "--device=cpu"} < set(commands["peer"])
    assert not any("peer" in word or "rounds" in word for word in commands["ours"][2:])


def test_masks_and_pixels_are_as_training_has_them(
    step: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = step.settings(*parse(step, monkeypatch, "--batch=3"))
    run = step.assemble(config, step.make_mesh(1), step.IMAGES)
    batch = step.random_batch(config, run)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in run.batch.items()
    }
    most = most_masked(batch["mask"].shape[2:], config.mask)
    assert 0 < batch["mask"].sum((2, 3)).max() <= most


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("family")


def test_numbers_of_runs_that_are_none_are_refused(
    family: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--table", "--seeds=0"], ["--finite=-1"], ["--steps", "--rounds=0"]):
        monkeypatch.setattr(sys, "argv", ["family.py", "--methods=dino", "--out=none", *words])
        with pytest.raises(SystemExit, match="2"):
            family.main()
        assert "must be 1 or more" in capsys.readouterr().err


def test_the_methods_are_tabulated_from_rows_of_their_present_settings(family: ModuleType):
    digest = family.settings_digest(family.recipe("dino"))
    key = {"method": "dino", "settings": digest, "wall_s": 90.0, "cores": 2}
    rows = [
        *(key | {"seed": seed, "knn_top1": 0.9 + 0.01 * seed} for seed in range(3)),
        key | {"seed": 0, "settings": "others", "knn_top1": 0.1},
    ]
    assert family.current(rows) == rows[:3]
    assert "| dino | 90.0, 91.0, 92.0 | **91.0** | 0.6 | 1.5 | 2 |" in family.table(rows[:3])
    changed = family.recipe("dino")
    changed.seed = 5
    changed.swav.prototypes = 7  # of another method
    assert family.settings_digest(changed) == digest
    changed.dino.prototypes += 1
    assert family.settings_digest(changed) != digest


@pytest.mark.slow
@pytest.mark.usefixtures("promotion")
def test_the_finite_steps_of_methods_are_counted(
    family: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = family.recipe("dino")
    recipe.model.depth = 1
    monkeypatch.setattr(family, "recipe", lambda _: recipe)
    assert family.print_finite(["dino"], 3)
    *_, single, half = capsys.readouterr().out.splitlines()
    assert single.startswith("| dino | float32 | ") and single.endswith(" | 3 of 3 |")
    assert half.startswith("| dino | bfloat16 | ") and half.endswith(" | 3 of 3 |")
    recipe.optim.update(dict(lr=1e30, warmup_steps=0))
    first, _, count = family.finite(recipe, 3)
    assert math.isfinite(first) and count < 3


@pytest.mark.slow
def test_the_steps_of_methods_are_compared_with_that_of_sop(family: ModuleType):
    lines = family.compare(["massl"], rounds=1, repeats=1).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| sop", "| massl"]
    assert "| 1.00 |" in lines[2]
