"""The notebooks run, are those of their text sources, and can be installed on Colab."""

import json
import os
import pathlib
import re
import subprocess
import sys
from importlib import metadata
from typing import Any

import processes
import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).resolve().parents[1]
COLABS = ROOT / "colabs"
NAMES = sorted(path.stem for path in COLABS.glob("*.md"))

# Small settings in place of those in the cell tagged `parameters`. `{here}` is a new folder.
RUN_OF_TWO_STEPS = """
command = "-m sop_jax.train --config=digits --config.steps=2 --config.eval_every=0".split()
subprocess.run([sys.executable, *command, r"--workdir={here}/run"], check=True)
"""
SMALL = {
    "features": RUN_OF_TWO_STEPS + "WEIGHTS = PROTOTYPES = r'{here}/run'",
    "own_images": "WORKDIR = r'{here}/run'; SETTINGS = '--config.steps=4 --config.eval_every=0'",
    "quickstart": "WORKDIR = r'{here}/digits'; STEPS = 4",
    "pod": "CONFIG = 'digits'; TOPOLOGY = 'v5e:2x2'; OVERRIDES = '--config.model.depth=1'; "
    "WORKDIR = 'gs://BUCKET/digits'",
}
# What a run of a notebook prints or draws at its end.
SHOWN = {
    "features": ["12 images, 64 numbers each", "image/png", "unique"],
    "own_images": ["120 files in sample", "image/png", "srcdoc", "features.npz", "exported"],
    "quickstart": ["k-NN accuracy after 4 steps", "image/png", "srcdoc"],
    "pod": ["fits", "queued-resources create", "kind: Job", "Set WATCHED"],
}

RUN = """
import sys
import nbclient, nbformat
book = nbformat.read(sys.argv[1], 4)
client = nbclient.NotebookClient(book, timeout=900, resources={"metadata": {"path": sys.argv[2]}})
client.execute()
nbformat.write(book, sys.argv[1])
"""


def notebook(name: str) -> dict[str, Any]:
    return json.loads((COLABS / f"{name}.ipynb").read_text())


def cells(book: Any) -> list[tuple[str, str, list[str]]]:
    """Returns kind, text and tags of each cell."""
    return [
        (cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", []))
        for cell in book["cells"]
    ]


def test_every_notebook_has_a_source_and_a_small_run():
    assert NAMES == sorted(path.stem for path in COLABS.glob("*.ipynb"))
    assert set(NAMES) == set(SMALL) == set(SHOWN)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_that_of_its_source_without_outputs(name: str) -> None:
    jupytext = pytest.importorskip("jupytext", reason="needs jupytext: pip install -e '.[test]'")
    book = notebook(name)
    source = jupytext.read(COLABS / f"{name}.md")
    assert cells(book) == cells(source), "run jupytext --update --to ipynb colabs/*.md"
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_opens_in_colab_and_installs_itself(name: str) -> None:
    book = cells(notebook(name))
    badges = re.findall(r"\((https://colab\.research\.google\.com/github/[^)]+)\)", book[0][1])
    assert [badge.rpartition("/")[2] for badge in badges] == [f"{name}.ipynb"]
    repository = re.findall(r'url = "https://github\.com/(.+)"', book[1][1])
    assert repository and repository[0] in badges[0]
    first = cells(notebook(NAMES[0]))[1]
    assert book[1] == first and first[2] == ["setup"]  # all install themselves alike
    assert [tags for *_, tags in book].count(["parameters"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name: str, tmp_path: pathlib.Path) -> None:
    for package in ("jupytext", "nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(package, reason=f"needs {package}: pip install -e '.[test]'")
    book = notebook(name)
    here = tmp_path / "work"
    here.mkdir()
    place = COLABS if name == "quickstart" else here  # where they lie, and in an empty folder
    cell = next(c for c in book["cells"] if c["metadata"].get("tags") == ["parameters"])
    cell["source"] = "".join(cell["source"]) + "\n" + SMALL[name].format(here=here)
    path = tmp_path / f"{name}.ipynb"
    path.write_text(json.dumps(book))
    before = sorted(COLABS.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path), str(place)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "XLA_FLAGS": processes.flags(devices=1),  # as on Colab
        },
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert sorted(COLABS.rglob("*")) == before  # nothing is left beside the notebooks
    outputs = [o for c in json.loads(path.read_text())["cells"] for o in c.get("outputs", [])]
    text = json.dumps(outputs)
    for shown in SHOWN[name]:
        assert shown in text


def test_what_colab_has_is_kept_but_for_what_is_too_old():
    # An older version of what is not listed here would be replaced on Colab as well, in sessions
    # that may have imported it. Bring colabs/preinstalled.txt up to date before adding to the list.
    replaced = {"absl-py", "flax", "jax", "numpy"}
    lines = (COLABS / "preinstalled.txt").read_text().splitlines()
    versions = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert any(re.search(r"\d{4}-\d{2}-\d{2}", line) for line in lines if line.startswith("#"))
    found = [one for one in map(Requirement, metadata.requires("sop_jax") or ()) if not one.marker]
    by_name = {re.sub(r"[-_.]+", "-", one.name).lower(): one.specifier for one in found}
    assert len(by_name) > 20 and set(versions) <= set(by_name)
    assert {n for n, version in versions.items() if version not in by_name[n]} == replaced
