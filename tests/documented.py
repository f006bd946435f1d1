"""The commands in the documents, block by block, as they stand there."""

import ast
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    path
    for path in sorted((ROOT / "sop_jax").rglob("*.py"))
    if re.search(r"^    cli\.run\(main", path.read_text(), re.M)
]
PROGRAMS = "python|bash|sbatch|mpirun|docker|kubectl|xpk|scontrol|scancel|tail|pkill|pip|source"
BEGINS = rf"(?:[A-Z_]+=\S+ )*(?:{PROGRAMS}|(?:launch|benchmarks)/\w+\.sh|onnx/bin/pip) \S"
NAME = r"python -m [\w.]+|pip install|scontrol requeue"  # in a sentence, a name and no command

# What a synopsis leaves to the reader: an optional part, or a choice for which no file can stand.
CHOSEN = {
    "[--config.KEY=VALUE ...]": "--config.seed=1",
    "[--eval.KEY=VALUE ...]": "--eval.k=3,5",
    "[OTHER ...]": "OTHER",
    "--task=TASK": "--task=knn",
}


class Block(NamedTuple):
    """Commands that follow each other in a document.

    Attributes:
        place: the document and the line of the first one.
        lines: the commands.
    """

    place: str
    lines: list[str]


def blocks(document: pathlib.Path) -> Iterator[Block]:
    """Yields the blocks of a document, and the commands in its tables and sentences."""
    text = document.read_text()
    spans = [(found.start(1), found[1]) for found in re.finditer(r"```bash\n(.*?)```", text, re.S)]
    rest = re.sub(r"```.*?```", lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.S)
    indented = list(re.finditer(r"(?:^ {4}.*\n)+", rest, re.M))
    spans += [(found.start(), found[0]) for found in indented]
    for found in indented:
        rest = rest[: found.start()] + " " * len(found[0]) + rest[found.end() :]
    for found in re.finditer(r"`([^`]+)`", rest):  # a sentence may break a command
        if not re.fullmatch(NAME, found[1]):
            spans.append((found.start(1), " ".join(found[1].split())))
    for start, span in sorted(spans):
        lines = [line.strip() for line in re.sub(r"\\\n\s*", "", span).splitlines()]
        if commands := [chosen(line) for line in lines if re.match(BEGINS, line)]:
            yield Block(f"{document.stem}:{text[:start].count(chr(10)) + 1}", commands)


def example(module: pathlib.Path) -> Block:
    """Returns the example in the help of a command, which is the docstring of its module."""
    text = ast.get_docstring(ast.parse(module.read_text())) or ""
    after = text.partition("\nFor example")[2]
    lines = [line.strip() for line in after.partition(":\n\n")[2].splitlines()]
    return Block(f"{module.stem}.py", lines)


def chosen(line: str) -> str:
    """Returns a command with every optional part, and without a comment."""
    for part, choice in CHOSEN.items():
        line = line.replace(part, choice)
    line = re.sub(r"\[(--[^\]]*)\]", r"\1", line)
    return re.sub(r"\s+#\s.*$", "", line)
