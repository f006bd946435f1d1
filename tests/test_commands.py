"""The commands in the documents have flags, settings and files that exist."""

import ast
import pathlib
import re
import shlex
from collections.abc import Iterator

import pytest

from sop_jax.config import paper
from sop_jax.settings import flatten

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMON = {"help", "coordinator", "processes", "process"}
DATA = {"path", "source", "name", "orientation", "white", "max_pixels", "retry_seconds"}


def commands(document: pathlib.Path) -> Iterator[list[str]]:
    """Yields the words of each command in the blocks of a document, without comments."""
    text = document.read_text().replace("\\\n", " ")
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", text, re.DOTALL)
    indented = re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
    for line in [*indented, *(line for block in blocks for line in block.splitlines())]:
        line = re.sub(r"[\[\]]", " ", line.strip())  # optional parts
        if re.match(r"(python|bash launch/|launch/|sbatch) ?", line):
            yield shlex.split(line, comments=True)


def strings_of_calls(file: pathlib.Path, prefix: str) -> set[str]:
    """Returns the first strings of the calls of functions whose names begin with a prefix."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name.lower().startswith(prefix):
                args = [
                    a.elts[0]
                    for a in node.args
                    if isinstance(a, ast.Starred | ast.Tuple) and hasattr(a, "elts")
                ] or node.args
                found |= {a.value for a in args[:1] if isinstance(a, ast.Constant)}
                if name == "define_data":
                    found |= {f"data.{key}" for key in DATA}
                    found |= {f"data.{word.arg}" for word in node.keywords}
    return found


def known_flags(module: str) -> set[str]:
    """Returns the flags of `python -m MODULE`."""
    file = ROOT / f"{module.replace('.', '/')}.py"
    assert file.exists(), module
    found = strings_of_calls(file, "define") | COMMON
    return found | ({"config"} if "define_config(" in file.read_text() else set())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_commands_can_be_given(document: pathlib.Path) -> None:
    settings = flatten(paper())
    for words in commands(document):
        line = " ".join(words)
        flags = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
        for flag in flags:
            if flag.startswith("config.") and flag != "config.KEY":
                assert flag.removeprefix("config.") in settings, line
        own = [f for f in flags if not f.startswith(("config.", "eval."))]
        for recipe in re.findall(r"--config=(configs/\w+\.py)", line):
            assert (ROOT / recipe).exists(), line
        if words[:2] == ["python", "-m"] and words[2].startswith("sop_jax"):
            known = known_flags(words[2])
            known |= {f"no{flag}" for flag in known}
            assert set(own) <= known, (line, set(own) - known)
        elif words[0] == "python" and words[1].startswith("benchmarks/"):
            known = strings_of_calls(ROOT / words[1], "add_argument")
            assert {f"--{flag}" for flag in own} <= known, line
        elif script := next((w for w in words if w.startswith("launch/")), None):
            text = (ROOT / script).read_text()
            theirs = own[: own.index("config")] if "config" in own else own
            if words[0] != "sbatch":
                assert all(f"--{flag}" in text or flag == "workdir" for flag in theirs), line


def test_the_documents_have_commands():
    assert sum(1 for document in DOCUMENTS for _ in commands(document)) > 50
