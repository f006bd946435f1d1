"""How Sphinx makes a site of these pages.

pip install -e '.[docs]'
sphinx-build -W docs site
"""

import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sop_jax  # noqa: E402

project = "sop_jax"
author = "the sop_jax authors"
version = release = sop_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
default_role = "code"  # of backticks in docstrings
html_theme = "furo"
html_title = f"sop_jax {release}"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "separated"
napoleon_use_ivar = True
maximum_signature_line_length = 90

# Links to what is not a page, and what they are on the site.
PAGES = {
    "(CONTRIBUTING.md": "(contributing.md",
    "(CHANGELOG.md": "(changelog.md",
    "[colabs](colabs)": "`colabs/`",
}


def link_pages(app: Sphinx, path: Path, name: str, content: list[str]) -> None:
    """Replaces links in an included file, see `PAGES`."""
    del app, path, name
    for file, page in PAGES.items():
        content[0] = content[0].replace(file, page)


def skip_fields(app: Sphinx, kind: str, name: str, member: Any, skip: bool, options: Any) -> bool:
    """Leaves out the fields of named tuples, which the text of the tuple describes."""
    del app, kind, name, options
    return skip or type(member).__name__ == "_tuplegetter"


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("include-read", link_pages)
    app.connect("autodoc-skip-member", skip_fields)
