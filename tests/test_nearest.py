"""The nearest images of one image."""

import pathlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sop_jax
from sop_jax.errors import UserError
from sop_jax.nearest import main
from sop_jax.network import Network

pytestmark = pytest.mark.medium


def test_neighbours_are_those_of_the_largest_cosines(
    small_network: Network, colour_tree: pathlib.Path
) -> None:
    of = np.asarray(Image.open(colour_tree / "red" / "red2.png"))
    found = sop_jax.neighbours(small_network, colour_tree, of, k=4)
    features, names = small_network.features(colour_tree, names=True)
    wanted = small_network.features(of)[0]
    cosines = features @ wanted / np.linalg.norm(features, axis=1) / np.linalg.norm(wanted)
    order = np.argsort(-cosines, kind="stable")[:4]
    assert [x.row for x in found] == order.tolist()
    assert [x.name for x in found] == [names[row] for row in order]
    np.testing.assert_allclose([x.similarity for x in found], cosines[order], atol=1e-6)
    assert found[0].name == "red/red2.png" and found[0].similarity == pytest.approx(1)


def test_a_file_is_not_its_own_neighbour(
    small_run: pathlib.Path,
    small_network: Network,
    colour_tree: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = sop_jax.neighbours(small_run, colour_tree, colour_tree / "red" / "red2.png", k=50)
    assert len(found) == 9 and "red/red2.png" not in [x.name for x in found]
    files = sorted(colour_tree.rglob("*.png"))
    monkeypatch.chdir(colour_tree / "red")
    among = sop_jax.neighbours(small_network, files, "./red2.png", k=50)
    assert [x.row for x in among] == [x.row for x in found]
    assert all(pathlib.Path(x.name).is_file() for x in among)


def test_names_that_begin_with_a_tilde_are_found(
    small_network: Network, tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "~").mkdir()
    for name in ("a.png", "~/b.png"):
        Image.fromarray(np.full((20, 20, 3), len(name), np.uint8)).save(folder / name)
    found = sop_jax.neighbours(small_network, folder, folder / "~" / "b.png")
    assert [x.name for x in found] == ["a.png"]


def test_an_array_of_paths_is_searched(small_network: Network, colour_tree: pathlib.Path) -> None:
    files = np.array([str(file) for file in sorted(colour_tree.rglob("*.png"))])
    found = sop_jax.neighbours(small_network, files, files[0], k=50)
    assert sorted(x.row for x in found) == list(range(1, 10))


@pytest.mark.parametrize("k", [0, -1, True])
def test_k_is_a_count(k: int) -> None:
    with pytest.raises(UserError, match=f"k is {k!r}; expected .* a whole number of 1 or more"):
        sop_jax.neighbours("nowhere", "nowhere", "nowhere", k=k)


def test_nonsense_is_refused(small_network: Network, colour_tree: pathlib.Path) -> None:
    red = colour_tree / "red" / "red2.png"
    for one in (red, str(red), np.asarray(Image.open(red))):
        with pytest.raises(UserError, match="images is one image; give those to search"):
            sop_jax.neighbours("nowhere", one, red)
    with pytest.raises(UserError, match="no file or folder .*nowhere"):
        sop_jax.neighbours(small_network, colour_tree / "nowhere", red)
    with pytest.raises(UserError, match="images has no image other than of"):
        sop_jax.neighbours(small_network, [red], red)
    with pytest.raises(UserError, match="of has 10 images; give one"):
        sop_jax.neighbours(small_network, colour_tree, colour_tree)


def test_command_prints_and_draws(small_run: pathlib.Path, colour_tree: pathlib.Path) -> None:
    out = colour_tree.parent / "new" / "grid.png"
    command = [sys.executable, "-m", "sop_jax.nearest", f"--images={colour_tree}", "--k=3"]

    def call(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300)

    of = [f"--of={colour_tree}/red/red2.png", f"--of={colour_tree}/green/green0.png"]
    done = call(f"--workdir={small_run}", *of, f"--out={out}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"nearest to {colour_tree}/red/red2.png:" and lines[8] == str(out)
    values = [float(line.split("  ")[0]) for line in lines[1:4]]
    assert values == sorted(values, reverse=True)
    assert all((colour_tree / line.split("  ")[1]).is_file() for line in lines[1:4] + lines[5:8])
    with Image.open(out) as picture:
        assert picture.width > 4 * 128 and picture.height > 2 * 128
    failed = call(f"--workdir={small_run}", *of, f"--out={out}")
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
    changes: dict[str, Any],
    message: str,
    colour_tree: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {
        "workdir": "nowhere",
        "weights": None,
        "images": str(colour_tree),
        "k": 5,
        "step": None,
    }
    given |= {
        "of": [f"{colour_tree}/red/red2.png"],
        "out": None,
        "overwrite": False,
        "batch_size": None,
    }
    monkeypatch.setattr("sop_jax.nearest.flags.FLAGS", SimpleNamespace(**given | changes))
    with pytest.raises(UserError, match=message):
        main()
