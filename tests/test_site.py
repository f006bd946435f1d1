"""The site of the documents: it builds without warnings, and has what people look for."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason=f"needs {package}: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going"]
    built = subprocess.run(
        [*command, "-d", str(folder / "doctrees"), str(ROOT / "docs"), str(folder / "html")],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder / "html"


@pytest.mark.medium
def test_every_document_has_a_page_that_the_start_leads_to(site: pathlib.Path) -> None:
    start = (site / "index.html").read_text()
    for document in (ROOT / "docs").glob("*.md"):
        page = f"{document.stem}.html"
        assert (site / page).exists()
        assert document.stem == "index" or f'href="{page}' in start, page


@pytest.mark.medium
def test_the_reference_has_the_docstrings(site: pathlib.Path) -> None:
    page = (site / "api.html").read_text()
    for name in ("sop_jax.network.load", "sop_jax.train.train", "sop_jax.config.paper"):
        assert f'id="{name}"' in page
    assert "The summary, as in summary.json." in page
