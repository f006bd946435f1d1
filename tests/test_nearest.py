"""The nearest images of one image."""

import pathlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import APART, make_run
from test_evaluate import colours

import sop_jax
from sop_jax.errors import UserError
from sop_jax.nearest import main
from sop_jax.network import Network, load

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("run")
    make_run(workdir, **APART, **{"eval.batch_size": 16})
    return workdir


@pytest.fixture(scope="module")
def network(run: pathlib.Path) -> Network:
    return load(run)


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
    colours(tmp_path / "data", labelled=True)
    return tmp_path / "data" / "val"


def test_neighbours_are_those_of_the_largest_cosines(network: Network, tree: pathlib.Path) -> None:
    of = np.asarray(Image.open(tree / "red" / "red2.png"))
    found = sop_jax.neighbours(network, tree, of, k=4)
    features, names = network.features(tree, names=True)
    wanted = network.features(of)[0]
    cosines = features @ wanted / np.linalg.norm(features, axis=1) / np.linalg.norm(wanted)
    order = np.argsort(-cosines, kind="stable")[:4]
    assert [x.row for x in found] == order.tolist()
    assert [x.name for x in found] == [names[row] for row in order]
    np.testing.assert_allclose([x.similarity for x in found], cosines[order], atol=1e-6)
    assert found[0].name == "red/red2.png" and found[0].similarity == pytest.approx(1)


def test_a_file_is_not_its_own_neighbour(
    run: pathlib.Path, network: Network, tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = sop_jax.neighbours(run, tree, tree / "red" / "red2.png", k=50)
    assert len(found) == 9 and "red/red2.png" not in [x.name for x in found]
    files = sorted(tree.rglob("*.png"))
    monkeypatch.chdir(tree / "red")
    among = sop_jax.neighbours(network, files, "./red2.png", k=50)
    assert [x.row for x in among] == [x.row for x in found]
    assert all(pathlib.Path(x.name).is_file() for x in among)


def test_names_that_begin_with_a_tilde_are_found(network: Network, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "~").mkdir()
    for name in ("a.png", "~/b.png"):
        Image.fromarray(np.full((20, 20, 3), len(name), np.uint8)).save(folder / name)
    found = sop_jax.neighbours(network, folder, folder / "~" / "b.png")
    assert [x.name for x in found] == ["a.png"]


def test_an_array_of_paths_is_searched(network: Network, tree: pathlib.Path) -> None:
    files = np.array([str(file) for file in sorted(tree.rglob("*.png"))])
    found = sop_jax.neighbours(network, files, files[0], k=50)
    assert sorted(x.row for x in found) == list(range(1, 10))


@pytest.mark.parametrize("k", [0, -1, True])
def test_k_is_a_count(k: int) -> None:
    with pytest.raises(UserError, match=f"k is {k!r}; expected .* a whole number of 1 or more"):
        sop_jax.neighbours("nowhere", "nowhere", "nowhere", k=k)


def test_nonsense_is_refused(network: Network, tree: pathlib.Path) -> None:
    red = tree / "red" / "red2.png"
    for one in (red, str(red), np.asarray(Image.open(red))):
        with pytest.raises(UserError, match="images is one image; give those to search"):
            sop_jax.neighbours("nowhere", one, red)
    with pytest.raises(UserError, match="no file or folder .*nowhere"):
        sop_jax.neighbours(network, tree / "nowhere", red)
    with pytest.raises(UserError, match="images has no image other than of"):
        sop_jax.neighbours(network, [red], red)
    with pytest.raises(UserError, match="of has 10 images; give one"):
        sop_jax.neighbours(network, tree, tree)


def test_command_prints_and_draws(run: pathlib.Path, tree: pathlib.Path) -> None:
    out = tree.parent / "new" / "grid.png"
    command = [sys.executable, "-m", "sop_jax.nearest", f"--images={tree}", "--k=3"]

    def call(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300)

    of = [f"--of={tree}/red/red2.png", f"--of={tree}/green/green0.png"]
    done = call(f"--workdir={run}", *of, f"--out={out}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"nearest to {tree}/red/red2.png:" and lines[8] == str(out)
    values = [float(line.split("  ")[0]) for line in lines[1:4]]
    assert values == sorted(values, reverse=True)
    assert all((tree / line.split("  ")[1]).is_file() for line in lines[1:4] + lines[5:8])
    with Image.open(out) as picture:
        assert picture.width > 4 * 128 and picture.height > 2 * 128
    failed = call(f"--workdir={run}", *of, f"--out={out}")
    assert failed.returncode == 1 and "already exists; give a new file" in failed.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": "a.jpg"}, "--out=a.jpg must end in .png"),
        ({"out": "."}, "must end in .png"),
        ({"of": ["nowhere.png"]}, "--of=nowhere.png is not a file; give an image"),
        ({"images": "nowhere"}, "--images=nowhere is not a folder"),
        ({"workdir": None}, "give either --workdir=DIR or --weights=FILE"),
        ({"weights": "f.pth"}, "give either --workdir=DIR or --weights=FILE"),
    ],
)
def test_flags_are_checked_before_the_network_is_loaded(
    changes: dict[str, Any], message: str, tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"workdir": "nowhere", "weights": None, "images": str(tree), "k": 5, "step": None}
    given |= {"of": [f"{tree}/red/red2.png"], "out": None, "overwrite": False, "batch_size": None}
    monkeypatch.setattr("sop_jax.nearest.flags.FLAGS", SimpleNamespace(**given | changes))
    with pytest.raises(UserError, match=message):
        main()
