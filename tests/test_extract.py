"""Features of a folder of images, as a file."""

import csv
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from datasets import colours
from PIL import Image
from runs import make_run

from sop_jax.data.folders import folder_source
from sop_jax.errors import UserError
from sop_jax.evaluation.features import make_extractor
from sop_jax.extract import export, open_data, open_images
from sop_jax.parallel.mesh import make_mesh
from sop_jax.pretrained import load_network

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("run")
    make_run(workdir)
    return workdir


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
    colours(tmp_path / "data", labelled=True)
    return tmp_path / "data" / "val"


def test_writes_features_names_and_labels(run: pathlib.Path, tree: pathlib.Path) -> None:
    out = tree.parent / "new" / "folder" / "f.npz"
    export(run, open_images([str(tree)]), out)
    assert [p.name for p in out.parent.iterdir()] == ["f.npz"]
    with np.load(out) as file:
        found = dict(file)
    assert sorted(found) == ["class_names", "features", "labels", "names", "step"]
    assert found["step"] == 7
    names = [f"{c}/{c}{i}.png" for c in ("green", "red") for i in range(5)]
    assert found["names"].tolist() == names
    assert found["labels"].tolist() == [0] * 5 + [1] * 5
    assert found["class_names"].tolist() == ["green", "red"]
    config, model, params, _ = load_network(run)
    mesh = make_mesh()
    expected = make_extractor(model, config, mesh)(params, folder_source(str(tree)))
    assert found["features"].dtype == np.float32
    np.testing.assert_allclose(found["features"], expected.vectors, atol=1e-5)


def test_unlabelled_folders_have_no_labels(run: pathlib.Path, tree: pathlib.Path) -> None:
    export(run, open_images([str(tree / "red")]), tree / "f.npz", step=3)
    with np.load(tree / "f.npz") as found:
        assert sorted(found) == ["features", "names", "step"]
        assert found["names"].tolist() == [f"red{i}.png" for i in range(5)]
        assert found["step"] == 3


def test_corrupt_images_are_left_out_and_listed(
    run: pathlib.Path, tree: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tree / "red" / "red1.png").write_bytes(b"no image")
    (tree / "green" / "green4.png").write_bytes((tree / "green" / "green3.png").read_bytes()[:90])
    export(run, open_images([str(tree)]), tree / "f.npz", patches=True)
    with np.load(tree / "f.npz") as found:
        assert found["features"].shape == (8, 32)
        assert found["patch_features"].shape == (8, 16, 32)
        assert found["patch_features"].dtype == np.float16
        assert found["labels"].tolist() == [0] * 4 + [1] * 4
        assert "red/red1.png" not in found["names"] and "green/green4.png" not in found["names"]
    shown = capfd.readouterr().err
    assert "2 images cannot be read" in shown
    assert "red/red1.png: it is not an image in a format" in shown
    assert "green/green4.png: image file is truncated" in shown


def test_labels_are_not_the_names_of_splits(
    run: pathlib.Path, tree: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tree.parent.parent / "f.npz"
    export(run, open_images([str(tree.parent)]), out)  # train and val, with red and green in both
    with np.load(out) as found:
        assert found["class_names"].tolist() == ["green", "red"]
        folders = [name.split("/")[1] for name in found["names"]]
        assert [found["class_names"][label] for label in found["labels"]] == folders
        assert {name.split("/")[0] for name in found["names"]} == {"train", "val"}
    assert "inside the splits: train, val" in capfd.readouterr().err
    export(run, open_images([str(tree.parent)], splits=False), out, overwrite=True)
    with np.load(out) as found:
        assert found["class_names"].tolist() == ["train", "val"]
    (tree / "red").rename(tree.parent / "red")
    with pytest.raises(UserError, match="train, val, which are names of splits, and in red"):
        export(run, open_images([str(tree.parent)]), out)


def test_names_that_are_not_utf8_come_back_byte_for_byte(
    run: pathlib.Path, tree: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    red, blue = os.fsencode(tree / "red"), os.fsencode(tree) + b"/bl\xfce"
    os.rename(red, blue)
    os.rename(blue + b"/red0.png", blue + b"/caf\xe9.png")
    with open(blue + b"/\xff.png", "wb") as file:
        file.write(b"no image")
    export(run, open_images([str(tree)]), tree / "f.npz")
    with np.load(tree / "f.npz") as found:  # without pickle
        names = [os.fsencode(name) for name in found["names"].tolist()]
        classes = [os.fsencode(name) for name in found["class_names"].tolist()]
    assert classes == [b"bl\xfce", b"green"] and b"bl\xfce/caf\xe9.png" in names
    assert all(os.path.exists(os.fsencode(tree) + b"/" + name) for name in names)
    assert r"/bl\xfce/\xff.png" in capfd.readouterr().err


def test_replaces_a_file_only_by_a_whole_one(run: pathlib.Path, tree: pathlib.Path) -> None:
    out = tree.parent / "f.npz"
    out.write_bytes(b"an earlier one")
    for file in tree.rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 10 images"):
        export(run, open_images([str(tree)]), out, overwrite=True)
    assert out.read_bytes() == b"an earlier one"
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tree / "one.png")
    with pytest.raises(UserError, match="f.npz already exists.*--overwrite"):
        export(run, open_images([str(tree)]), out)
    assert out.read_bytes() == b"an earlier one"
    export(run, open_images([str(tree)]), out, overwrite=True)
    with np.load(out) as found:
        assert found["names"].tolist() == ["one.png"]
    assert not list(out.parent.glob("*.tmp"))


def test_the_ending_says_what_is_written(run: pathlib.Path, tree: pathlib.Path) -> None:
    (tree / "red" / "red0.png").rename(tree / "red" / 'a "comma",\n and a line.png')
    red = os.fsencode(tree / "red")
    os.rename(red + b"/red1.png", red + b"/caf\xe9.png")
    source = open_images([str(tree)])
    out = tree.parent / "f.npz"
    for ending in (".npz", ".csv", ".parquet"):
        export(run, source, out.with_suffix(ending))
    with np.load(out) as file:
        expected = dict(file)
    labels = [str(expected["class_names"][label]) for label in expected["labels"]]

    with out.with_suffix(".csv").open(newline="", errors="surrogateescape") as text:
        head, *rows = csv.reader(text)
    assert head == ["name", "label", *(f"feature_{i}" for i in range(32))]
    assert [row[0] for row in rows] == expected["names"].tolist()
    assert [row[1] for row in rows] == labels
    numbers = np.array([row[2:] for row in rows], np.float32)
    np.testing.assert_array_equal(numbers, expected["features"])

    table = pyarrow.parquet.read_table(out.with_suffix(".parquet"))
    assert table.column_names == ["name", "label", "features"]
    assert table["label"].to_pylist() == labels
    assert r"red/caf\xe9.png" in table["name"].to_pylist()
    assert len(set(table["name"].to_pylist())) == 10
    np.testing.assert_array_equal(np.array(table["features"].to_pylist()), expected["features"])
    assert table.schema.metadata == {b"step": b"7"}

    with pytest.raises(UserError, match=r"f.txt must end in .npz, .csv, .parquet"):
        export(run, source, out.with_suffix(".txt"))
    with pytest.raises(UserError, match="cannot store --patches; give an --out that ends in .npz"):
        export(run, source, tree.parent / "g.csv", patches=True)


def test_single_files_and_several_folders_are_images_too(
    run: pathlib.Path, tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = open_images([str(tree / "red" / "red0.png")])
    assert (one.root, one.files) == (str(tree / "red"), ["red0.png"])
    paths = [str(tree / "red" / "red0.png"), str(tree / "green"), str(tree / "red" / "red0.png")]
    some = open_images(paths)
    names = [f"green/green{i}.png" for i in range(5)] + ["red/red0.png"]
    assert (some.root, some.files, some.labels) == (str(tree), names, None)
    export(run, some, tree / "f.npz")
    with np.load(tree / "f.npz") as found:
        assert found["names"].tolist() == names and "labels" not in found
    monkeypatch.chdir(tree)
    relative = open_images(["red/red0.png", "green/green0.png"])
    assert relative.files == ["green/green0.png", "red/red0.png"]
    assert relative[1] == (tree / "red" / "red0.png").read_bytes()
    with pytest.raises(UserError, match="all as relative paths, or all as absolute"):
        open_images(["red/red0.png", str(tree / "green")])
    with pytest.raises(UserError, match="no file or folder red/a.png,b.png; .*once for each"):
        open_images(["red/a.png,b.png"])


def test_images_of_any_data_by_the_flags_of_data(run: pathlib.Path, tree: pathlib.Path) -> None:
    given = {"path": str(tree.parent), "train_split": "val"}
    source = open_data(run, given)
    assert len(source) == 10 and source.class_names == ["green", "red"]
    with pytest.raises(UserError, match="--data.name=x would have no effect"):
        open_data(run, given | {"source": "folder", "name": "x"})
    with pytest.raises(UserError, match=r"none called 'test'\. Set --data\.train_split"):
        open_data(run, given | {"train_split": "test"})
    assert len(open_data(run, {"source": "digits"})) == 1437


def test_errors_say_what_to_do(run: pathlib.Path, tree: pathlib.Path) -> None:
    out = tree.parent / "f.npz"
    with pytest.raises(UserError, match="--images"):
        export(run, open_images([str(tree / "nowhere")]), out)
    (tree / "empty").mkdir()
    with pytest.raises(UserError, match="contains no images"):
        export(run, open_images([str(tree / "empty")]), out)
    with pytest.raises(UserError, match="is not the folder of a run"):
        export(tree, open_images([str(tree)]), out)
    with pytest.raises(UserError, match="no checkpoint of step 4"):
        export(run, open_images([str(tree)]), out, step=4)
    for unwritable in (tree, tree / "red" / "red0.png" / "f.npz"):
        with pytest.raises(UserError, match="--out"):
            export(run, open_images([str(tree)]), unwritable)
    assert not list(tree.parent.glob("f.npz*"))


def test_command(run: pathlib.Path, tree: pathlib.Path) -> None:
    out = tree.parent / "f.npz"
    command = [sys.executable, "-m", "sop_jax.extract", f"--workdir={run}", f"--out={out}"]
    done = subprocess.run(
        [*command, f"--images={tree}", "--patches"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
    assert "10/10" in done.stderr
    with np.load(out) as found:
        assert found["patch_features"].shape == (10, 16, 32)
    failed = subprocess.run(
        [*command, "--images=nowhere", "--overwrite"], capture_output=True, text=True, timeout=300
    )
    assert failed.returncode == 1
    assert "--images" in failed.stderr and "Traceback" not in failed.stderr


def test_fewer_images_at_a_time_can_be_asked_for(
    run: pathlib.Path, tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When memory runs out, the message names this flag."""

    def refuse(model: Any, config: Any, mesh: Any, patches: bool) -> None:
        raise UserError(f"{config.eval.batch_size} at a time")

    monkeypatch.setattr("sop_jax.extract.make_extractor", refuse)
    with pytest.raises(UserError, match="^3 at a time"):
        export(run, open_images([str(tree)]), tree / "f.npz", batch_size=3)
