"""Features of a folder of images, as a file."""

import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_evaluate import colours, make_run

from sop_jax.data.folders import folder_source
from sop_jax.errors import UserError
from sop_jax.extract import export
from sop_jax.features import make_extractor
from sop_jax.mesh import make_mesh
from sop_jax.pretrained import load


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
    export(run, str(tree), out)
    assert [p.name for p in out.parent.iterdir()] == ["f.npz"]
    with np.load(out) as file:
        found = dict(file)
    assert sorted(found) == ["class_names", "features", "labels", "names", "step"]
    assert found["step"] == 7
    names = [f"{c}/{c}{i}.png" for c in ("green", "red") for i in range(5)]
    assert found["names"].tolist() == names
    assert found["labels"].tolist() == [0] * 5 + [1] * 5
    assert found["class_names"].tolist() == ["green", "red"]
    config, model, params, _ = load(run)
    mesh = make_mesh()
    expected = make_extractor(model, config, mesh)(params, folder_source(str(tree)))
    assert found["features"].dtype == np.float32
    np.testing.assert_allclose(found["features"], expected.vectors, atol=1e-5)


def test_unlabelled_folders_have_no_labels(run: pathlib.Path, tree: pathlib.Path) -> None:
    export(run, str(tree / "red"), tree / "f.npz", step=3)
    with np.load(tree / "f.npz") as found:
        assert sorted(found) == ["features", "names", "step"]
        assert found["names"].tolist() == [f"red{i}.png" for i in range(5)]
        assert found["step"] == 3


def test_corrupt_images_are_left_out_and_listed(
    run: pathlib.Path, tree: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tree / "red" / "red1.png").write_bytes(b"no image")
    (tree / "green" / "green4.png").write_bytes((tree / "green" / "green3.png").read_bytes()[:90])
    export(run, str(tree), tree / "f.npz", patches=True)
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
    export(run, str(tree.parent), out)  # train and val, with red and green in both
    with np.load(out) as found:
        assert found["class_names"].tolist() == ["green", "red"]
        folders = [name.split("/")[1] for name in found["names"]]
        assert [found["class_names"][label] for label in found["labels"]] == folders
        assert {name.split("/")[0] for name in found["names"]} == {"train", "val"}
    assert "train, val are splits" in capfd.readouterr().err
    export(run, str(tree.parent), out, splits=False)
    with np.load(out) as found:
        assert found["class_names"].tolist() == ["train", "val"]
    (tree / "red").rename(tree.parent / "red")
    with pytest.raises(UserError, match="train, val, as splits are called, and in red"):
        export(run, str(tree.parent), out)


def test_names_that_are_not_utf8_come_back_byte_for_byte(
    run: pathlib.Path, tree: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    red, blue = os.fsencode(tree / "red"), os.fsencode(tree) + b"/bl\xfce"
    os.rename(red, blue)
    os.rename(blue + b"/red0.png", blue + b"/caf\xe9.png")
    with open(blue + b"/\xff.png", "wb") as file:
        file.write(b"no image")
    export(run, str(tree), tree / "f.npz")
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
        export(run, str(tree), out)
    assert out.read_bytes() == b"an earlier one"
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tree / "one.png")
    export(run, str(tree), out)
    with np.load(out) as found:
        assert found["names"].tolist() == ["one.png"]
    assert not list(out.parent.glob("*.tmp"))


def test_errors_say_what_to_do(run: pathlib.Path, tree: pathlib.Path) -> None:
    out = tree.parent / "f.npz"
    with pytest.raises(UserError, match="--images"):
        export(run, str(tree / "nowhere"), out)
    (tree / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        export(run, str(tree / "empty"), out)
    with pytest.raises(UserError, match="no folder of a training run"):
        export(tree, str(tree), out)
    with pytest.raises(UserError, match="no checkpoint of step 4"):
        export(run, str(tree), out, step=4)
    for unwritable in (tree, tree / "red" / "red0.png" / "f.npz"):
        with pytest.raises(UserError, match="--out"):
            export(run, str(tree), unwritable)
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
        [*command, "--images=nowhere"], capture_output=True, text=True, timeout=300
    )
    assert failed.returncode == 1
    assert "--images" in failed.stderr and "Traceback" not in failed.stderr


def test_fewer_images_at_a_time_can_be_asked_for(
    run: pathlib.Path, tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory runs out, whose message says so."""

    def refuse(model: Any, config: Any, mesh: Any, patches: bool) -> None:
        raise UserError(f"{config.eval.batch_size} at a time")

    monkeypatch.setattr("sop_jax.extract.make_extractor", refuse)
    with pytest.raises(UserError, match="^3 at a time"):
        export(run, str(tree), tree / "f.npz", batch_size=3)
