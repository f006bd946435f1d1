"""An installation has the package, and the recipes where `--config` finds them."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.medium

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_the_recipes_are_installed_and_found_by_name(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("setuptools", reason="builds the package with setuptools")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout)
    for name in ("sop_jax", "configs"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    built = tmp_path / "built"
    build = [sys.executable, "setup.py", "-q", "build", f"--build-lib={built}"]
    subprocess.run(build, cwd=checkout, check=True, capture_output=True)
    shutil.rmtree(checkout)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "sop_jax.train", "--config=digits", "--help"],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(built)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "--config.data.source=digits" in done.stdout
    assert f"in {built / 'sop_jax' / 'configs'}: " in " ".join(done.stdout.split())
    assert {file.name for file in (built / "sop_jax" / "configs").glob("*.py")} == {
        file.name for file in (ROOT / "configs").glob("*.py")
    }


def test_groups_of_tests_reach_the_workers(request: pytest.FixtureRequest) -> None:
    """Pytest-xdist 3.8 gives the tests of a group to all workers if pytest is 9.2, silently.

    Tests then compute what they share several times, and real programs get into each other's way.
    """
    if not request.config.getoption("loadgroup", default=False):
        pytest.skip("needs workers: --numprocesses=2 --dist=loadgroup, as in launch/test.sh")
    assert request.node.nodeid.endswith(f"@{pathlib.Path(__file__).name}")
