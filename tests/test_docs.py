"""The documents name what the package has: every file, every task and every setting."""

import pathlib
import re
import runpy
from typing import Any

import pytest

from sop_jax.config import paper
from sop_jax.evaluation.tasks import TASKS
from sop_jax.evaluation.views import VIEW_RULES
from sop_jax.objectives.methods import METHODS
from sop_jax.objectives.prototypical.settings import RULES as SHARED_RULES
from sop_jax.settings import flatten

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sop_jax"
IN_WORDS = {("linear", "rates")}  # defaults that are too long for a table


def sections() -> dict[str, str]:
    """Returns the text of each section of docs/evaluation.md by its title."""
    text = (ROOT / "docs" / "evaluation.md").read_text()
    return dict(part.split("\n", 1) for part in re.split(r"^## ", text, flags=re.M)[1:])


def rows(text: str) -> dict[str, str]:
    """Returns the defaults of a table of settings by name."""
    return dict(re.findall(r"^\| `([\w.]+)` \| ([^|]+) \|", text, flags=re.M))


def shown(value: Any) -> str:
    """Returns a default as the document writes it."""
    if value is None or value == "" or value == ():
        return "-"
    if isinstance(value, tuple | list):
        return ",".join(map(shown, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_every_task_has_a_section():
    assert [title for title in sections() if title in TASKS] == list(TASKS)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "finetune"])
def test_settings_and_defaults_are_those_of_the_task(name: str) -> None:
    settings = TASKS[name].settings()
    common = rows(sections()["What the features are"])
    assert set(common) == set(VIEW_RULES)
    if not set(VIEW_RULES) <= set(settings):
        common = {}
    found = common | rows(sections()[name])
    assert set(found) == set(settings)
    for key, default in settings.items():
        if (name, key) not in IN_WORDS:
            assert found[key] == shown(default), key


@pytest.mark.parametrize("name", TASKS)
def test_commands_have_only_settings_of_their_task(name: str) -> None:
    text = "\n".join(sections().values()).replace("\\\n", " ")
    commands = re.findall(rf"--task={name}\b.*", text)
    assert commands
    for command in commands:
        assert set(re.findall(r"--eval\.(\w+)", command)) <= set(TASKS[name].settings())
    used = set(re.findall(r"--eval\.(\w+)", sections()[name]))
    assert used <= set(TASKS[name].settings()) | {"KEY"}


def test_folders_below_a_root_are_those_of_the_tasks():
    table = re.findall(r"^\| `ROOT/(\w+)` \| (.+) \|", sections()["The command"], flags=re.M)
    assert {task: place for place, tasks in table for task in re.findall(r"`(\w+)`", tasks)} == {
        name: task.place for name, task in TASKS.items()
    }


def test_tasks_of_a_run_are_named():
    text = sections()["The command"].split("### During training")[1]
    named = {name for name in re.findall(r"`(\w+)`", text) if name in TASKS}
    assert named == {name for name, task in TASKS.items() if task.during_training}


def test_every_file_has_a_row_in_the_layout():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = []
    for cell in re.findall(r"^\| (`.+?`) \| ", text, flags=re.M):
        folder = ""
        for name in re.findall(r"`([\w/]+\.py)`", cell):
            folder = name.rpartition("/")[0] or folder
            named.append(f"{folder}/{name.rpartition('/')[2]}".lstrip("/"))
    files = [str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py")]
    assert sorted(named) == sorted(name for name in files if not name.endswith("__init__.py"))


@pytest.mark.parametrize("file", ["README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_links_lead_somewhere(file: str) -> None:
    def anchors(path: pathlib.Path) -> set[str]:
        titles = re.findall(r"^#+ (.+)", path.read_text(), flags=re.M)
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}

    path = ROOT / file
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if link.startswith("http"):
            continue
        target, _, anchor = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


# Methods that the document describes as variants of others, and the defaults that differ.
VARIANTS = {"pmsn": ("msn", {"prior": "power", "prior_weight": "5"}), "decoupled": ("carp", {})}


def sections_of_methods() -> dict[str, str]:
    """Returns the text of each section of docs/method.md by its title."""
    text = (ROOT / "docs" / "method.md").read_text()
    return dict(part.split("\n", 1) for part in re.split(r"^## ", text, flags=re.M)[1:])


def test_every_method_has_a_section():
    assert [title for title in sections_of_methods() if title in METHODS] == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_settings_and_defaults_are_those_of_the_method(name: str) -> None:
    settings, text = flatten(METHODS[name].settings()), sections_of_methods()
    # Whole names are in a table of where papers and codes disagree.
    found = {key: x for key, x in rows(text[name]).items() if not key.startswith(f"{name}.")}
    if set(SHARED_RULES) <= set(settings):
        table = text["The settings of methods with prototypes"].split("\n### ")[0]
        shared = rows(table)
        assert set(shared) == set(SHARED_RULES)
        own = dict(re.findall(r"`(\w+)=([^`]+)`", " ".join(text[name].split())))
        found = shared | {key: own[key] for key in own.keys() & shared.keys()} | found
        if name in VARIANTS:
            other, changes = VARIANTS[name]
            others = dict(re.findall(r"`(\w+)=([^`]+)`", " ".join(text[other].split())))
            found |= {key: others[key] for key in others.keys() & shared.keys()} | changes
    assert set(found) == set(settings)
    for key, default in settings.items():
        assert found[key] == shown(default), key


def test_settings_of_heads_and_optimizers_are_those_of_a_run():
    found, config = rows(sections_of_methods()["Heads and optimizers"]), paper()
    expected = {
        key: config.optim[key] for key in ("kind", "sgd_momentum", "trust", "clip", "clip_kind")
    }
    expected |= dict(config.head.items())
    assert found == {key: shown(default) for key, default in expected.items()}


def test_the_page_of_settings_is_that_of_the_code():
    settings = runpy.run_path(str(ROOT / "docs" / "settings.py"))
    text = (ROOT / "docs" / "settings.md").read_text()
    assert text == settings["page"](), "run python docs/settings.py"
    assert len(re.findall(r"^\| `", text, flags=re.M)) == len(flatten(paper()))
    assert "|  |" not in text and "| |" not in text  # every setting has a meaning


def test_tests_that_documents_name_exist() -> None:
    named = re.findall(
        r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "reliability.md").read_text()
    )
    assert named
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file} has no {test}"
