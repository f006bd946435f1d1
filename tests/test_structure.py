"""Which file can import which: the rules that keep the rooms of the project apart."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sop_jax"

# A module imports only from the layers above its own, or from its own package.
LAYERS = [
    {"errors", "rules", "schedules", "settings", "signals"},
    {"paths", "compiled"},
    {"data", "weights", "parallel"},
    {"models", "monitor"},
    {"objectives"},
    {"config", "cli"},
    {"recipes"},
    {"training"},
    {"evaluation"},
    {"check"},
    {"pretrained"},
    {"pictures"},
    {"page"},
    {"diagnosis", "network", "exports"},
    {"own_images"},
    {"preview"},
    {"evaluate", "extract", "convert", "diagnose", "nearest", "report"},
    {"train", "plan"},
    {"pretraining"},
]

FILES = sorted(PACKAGE.rglob("*.py"))


def imports(file: pathlib.Path) -> set[str]:
    """Returns the modules that a file imports, including imports in functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full"
            assert node.module
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(file: pathlib.Path) -> set[str]:
    """Returns the modules of sop_jax that a file imports, without that prefix."""
    return {name for name in map(_module_of_import, imports(file)) if name}


def _module_of_import(name: str) -> str:
    parts = name.split(".")
    if parts[0] != "sop_jax":
        return ""
    while not (
        ROOT.joinpath(*parts).with_suffix(".py").is_file() or ROOT.joinpath(*parts).is_dir()
    ):
        parts.pop()
    return ".".join(parts[1:])


def module(file: pathlib.Path) -> str:
    name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix("__init__").removesuffix(".")


def imports_any(file: pathlib.Path, *packages: str) -> bool:
    return any(name.split(".")[0] in packages for name in imports(file))


@pytest.mark.parametrize("file", FILES, ids=module)
def test_imports_run_one_way(file: pathlib.Path) -> None:
    layer = {name: depth for depth, names in enumerate(LAYERS) for name in names}
    room = module(file).split(".")[0]
    if not room:  # what programs use, which is imported when it is first used
        assert ours(file) <= {"errors", "network", "nearest", "pretraining"}
        return
    assert room in layer, f"{room} has no layer: give it one in LAYERS"
    for other in {name.split(".")[0] for name in ours(file)} - {room}:
        if module(file) == "data.prepare" and other == "cli":
            continue  # a command, which no module imports
        assert layer[other] < layer[room], f"{room} may not import {other}"


def test_no_import_goes_in_a_circle() -> None:
    graph = {module(file): ours(file) for file in FILES}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join([*path, name])}"
        for other in graph.get(name, ()):
            visit(other, (*path, name))

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("file", [f for f in FILES if f.parent.name == "data"], ids=module)
def test_data_knows_neither_jax_nor_the_rest(file: pathlib.Path) -> None:
    assert not imports_any(file, "jax", "jaxlib", "flax", "optax", "chex", "orbax")
    rest = {name for name in ours(file) if name.split(".")[0] not in ("data", "errors", "paths")}
    assert rest <= ({"cli"} if module(file) == "data.prepare" else set())


def test_scikit_learn_is_imported_only_where_it_is_needed() -> None:
    """It takes a second, which the start of a training saves."""
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "sklearn" for name in names), module(file)


def test_one_room_knows_flax_and_one_file_orbax() -> None:
    assert {f.parent.name for f in FILES if imports_any(f, "flax")} <= {"models"}
    assert {module(f) for f in FILES if imports_any(f, "orbax")} == {"training.checkpoint"}


def test_only_a_method_itself_knows_its_settings() -> None:
    for file in FILES:
        if file.is_relative_to(PACKAGE / "objectives" / "sop") or module(file) in (
            "config",
            "recipes",
        ):
            continue
        read = {
            node.attr
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Attribute)
        }
        assert "sop" not in read, file.name
        if module(file) != "objectives.methods":
            assert not any(name.startswith("objectives.sop") for name in ours(file)), file.name


SHARED = ("blocks", "checks", "health", "losses", "memory", "objective", "patches", "temperatures")


@pytest.mark.parametrize("name", SHARED)
def test_what_methods_share_knows_none_of_them(name: str) -> None:
    others = {other for other in ours(PACKAGE / "objectives" / f"{name}.py") if "objec" in other}
    assert others <= {f"objectives.{shared}" for shared in SHARED}


def test_sop_does_not_know_the_parts_of_methods_that_learn_prototypes() -> None:
    for file in (PACKAGE / "objectives" / "sop").glob("*.py"):
        assert not any(name.startswith("objectives.prototypical") for name in ours(file)), file.name


def test_configs_import_only_the_settings() -> None:
    for file in (ROOT / "configs").glob("*.py"):
        assert ours(file) <= {"config", "recipes"}, file.name


@pytest.mark.parametrize("file", FILES, ids=module)
def test_module_says_what_it_is_for(file: pathlib.Path) -> None:
    assert file.stem not in ("utils", "util", "helpers", "misc", "common")
    assert ast.get_docstring(ast.parse(file.read_text())), "no docstring"
    assert not imports_any(file, "tensorflow", "torch")


def test_files_of_tests_have_different_names() -> None:
    """Pytest imports them by their names, whatever folder they are in."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
