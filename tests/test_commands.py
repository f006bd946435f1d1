"""The commands in the documents and in the help of commands run as they stand there."""

import ast
import os
import pathlib
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

import processes
import pytest
import scratch
from documented import COMMANDS, DOCUMENTS, ROOT, Block, blocks, example
from forked import Forked, Running, shell

from sop_jax.config import paper
from sop_jax.settings import flatten

COMMON = {"help", "coordinator", "processes", "process"}
DATA = {"path", "source", "name", "orientation", "white", "max_pixels", "retry_seconds"}


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
    placeholders = [f"configs/{name}.py" for name in scratch.RECIPES]
    for line in (line for block in blocks(document) for line in block.lines):
        words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
        flags = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
        for flag in flags:
            if flag.startswith("config.") and flag != "config.KEY":
                assert flag.removeprefix("config.") in settings, line
        own = [f for f in flags if not f.startswith(("config.", "eval."))]
        for recipe in re.findall(r"--config=(configs/\w+\.py)", line):
            assert (ROOT / recipe).exists() or recipe in placeholders, line
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


class Rule(NamedTuple):
    """How the tests run commands.

    Attributes:
        pattern: what these commands contain.
        how: `ends`: it ends without an error. `works`: it takes long, so it is ended when it has
            begun to compute. `trains`: it is interrupted in its first steps, and must save. `dry`:
            with --dry-run or --dry_run. `parsed`: its syntax and its --help. `not run`: not at all.
        why: why it is not run as it stands.
        seen: what it prints when it computes.
    """

    pattern: str
    how: str
    why: str = ""
    seen: str = r"Compiling jit\("


RULES = [
    Rule(r"^bash launch/test\.sh", "parsed", "it runs these tests"),
    Rule(r"^benchmarks/gpu\.sh", "parsed", "it needs a GPU and has no dry run"),
    Rule(r"launch/(gpu_local|gpu_slurm|tpu_pod|kubernetes)\.sh", "dry", "it needs accelerators"),
    Rule(r"train --config=configs/imagenet_", "dry", "its network is too large for a CPU"),
    Rule(r"^mpirun", "not run", "it needs the hosts A and B; see tests/real/test_open_mpi.py"),
    Rule(r"^(scontrol|scancel|tail -f slurm)", "not run", "it needs a job of SLURM"),
    Rule(r"^pkill", "not run", "it would also end runs that are not of the tests"),
    Rule(r"^(docker|kubectl|xpk) ", "not run", "it needs a cluster and a registry of images"),
    Rule(r"^(pip|onnx/bin/pip) install|^python -m venv", "not run", "tests install nothing"),
    Rule(r"--data\.path=TFDS_DIR", "not run", "TFDS downloads its sets; see data/test_transfer.py"),
    Rule(r"^SOP_ONNX_PYTHON=", "not run", "it needs jax2onnx; see tests/exports/test_onnx.py"),
    Rule(r"--(peer|official)=", "not run", "it needs PyTorch and the code of another project"),
    Rule(r"^source |^bash -c|--dry_run|--help|docs/settings\.py|^python -c", "ends"),
    Rule(r"quickstart\.sh|sop_jax\.train ", "trains", seen=r"about .* left, at |\nstep [1-9]\d*/"),
    Rule(r"sop_jax\.plan |--eval\.head=upernet", "works", seen=r"Compiling jit\((train_)?step\)"),
    Rule(r"--eval\.weights=", "ends"),
    Rule(r"--task=(linear|finetune|segment)", "trains", seen=r"0/\d+ \[.*step/s"),
    Rule(r"sop_jax\.(evaluate|report|diagnose|extract|nearest|convert|data\.prepare) ", "ends"),
    Rule(r"benchmarks/input\.py", "works", seen=r"KB, \d+ on average"),
    Rule(r"benchmarks/uniqueness\.py", "works", seen=r"pairs within the widest"),
    Rule(r"benchmarks/\w+\.py", "works"),
]
OUTPUTS = {  # which do not exist yet
    "quickstart.sh": "runs/digits",
    "sop_jax.train ": r"--workdir=(\S+)",
    "sop_jax.convert ": r"--to=(\S+)",
}
WAIT = 300  # seconds, at most
LIGHT = ("dry", "parsed", "not run")
BLOCKS = [
    *(block for document in DOCUMENTS for block in blocks(document)),
    *(example(module) for module in COMMANDS),
]


def rule_of(line: str) -> Rule:
    """Returns the first rule for a command; a command without one is an error."""
    found = [rule for rule in RULES if re.search(rule.pattern, line)]
    assert found, f"the tests do not know how to run this command: {line}"
    return found[0]


def several_times(block: Block) -> bool:
    """Returns whether the same command stands in an earlier place too."""
    earlier = BLOCKS[: BLOCKS.index(block)]
    return len(block.lines) == 1 and any(block.lines[0] in other.lines for other in earlier)


def is_light(block: Block) -> bool:
    """Returns whether no command of a block needs Python."""
    return all(rule_of(x).how in LIGHT and "sop_jax.train" not in x for x in block.lines)


def is_run(block: Block) -> bool:
    return any(rule_of(line).how != "not run" for line in block.lines)


def test_every_command_is_run_in_a_way_that_suits_it() -> None:
    used = {rule_of(line) for block in BLOCKS for line in block.lines}
    assert used == set(RULES)
    assert all(rule.why for rule in RULES if rule.how in LIGHT)


def test_extras_that_are_installed_exist() -> None:
    lines = [line for block in BLOCKS for line in block.lines]
    extras = {extra for line in lines for extra in re.findall(r"pip install .*\.\[(\w+)\]", line)}
    assert {"cuda", "tpu", "plot"} <= extras
    assert extras <= set(metadata.metadata("sop_jax").get_all("Provides-Extra") or ())


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    """Starts commands of a checkout."""
    root = tmp_path_factory.mktemp("documents") / "checkout"
    root.mkdir()
    scratch.make_checkout(root)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # commands inherit no other
    with Forked(root, plain_environment(root)) as forked:
        yield forked
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def checkout(forked: Forked) -> pathlib.Path:
    """A checkout with what the documents name, in which the run in DIR is finished."""
    root = forked.folder
    scratch.write_images(root)
    begin = ["-m", "sop_jax.train", "--config=X", "--workdir=DIR"]
    running = forked.python(begin, root)
    assert running.end(WAIT) == 0, running.text()
    scratch.write_weights(root)
    scratch.copy_runs(root)
    return root


def plain_environment(root: pathlib.Path) -> dict[str, str]:
    """Returns the variables of a user of a checkout, with one device and a home of their own."""
    changes = {
        "PATH": f"{root}/.venv/bin:{os.environ['PATH']}",
        "HOME": str(root.parent),
        "XLA_FLAGS": processes.flags(devices=1),
        "JAX_LOG_COMPILES": "1",  # tells when a command begins to compute
        "PYTHONUNBUFFERED": "1",
    }
    return {name: x for name, x in (os.environ | changes).items() if name != "PYTHONPATH"}


def start(forked: Forked | None, line: str, folder: pathlib.Path) -> Running:
    """Starts a command as it stands in a document."""
    parts = shlex.split(line)
    if forked and parts[0] == "python" and parts[1] != "-c":
        return forked.python(parts[1:], folder)
    return shell(line, folder, plain_environment(folder))


def try_command(forked: Forked | None, line: str, folder: pathlib.Path) -> None:
    """Runs a command as its rule says."""
    rule = rule_of(line)
    if "--topology=v" in line:
        pytest.importorskip("libtpu", reason="needs libtpu: pip install -e '.[test]'")
    elif "--topology" in line:
        pytest.importorskip("jax_cuda13_plugin", reason="needs 4.6 GB: pip install -e '.[cuda]'")
    if rule.how in ("works", "trains"):
        try_long_command(forked, line, folder, rule)
    elif rule.how != "not run":
        if rule.how == "parsed":
            script = next(word for word in line.split() if word.endswith(".sh"))
            line = f"bash -n {script} && bash {script} --help"
        elif rule.how == "dry":
            option = "--dry_run" if "sop_jax.train" in line else "--dry-run"
            line = f"{re.sub(r'^(sbatch .*?)?(?=launch/)', 'bash ', line)} {option}"
        running = start(forked, line, folder)
        assert running.end(WAIT) == 0, f"{line}\n{running.text()[-3000:]}"


def try_long_command(forked: Forked | None, line: str, folder: pathlib.Path, rule: Rule) -> None:
    """Starts a command, sees that it computes, and stops it; a training saves before it ends."""
    running = start(forked, line, folder)
    try:
        if not running.wait_for(rule.seen, WAIT):  # it was short
            assert running.poll() == 0, f"{line}\n{running.text()[-3000:]}"
        elif rule.how == "trains":
            running.signal(signal.SIGINT)
            assert running.end(WAIT) == 130, f"{line}\n{running.text()[-3000:]}"
            assert "is saved, and the same command resumes" in running.text(), line
    finally:
        running.kill()


@pytest.mark.parametrize(
    "block",
    [pytest.param(block, id=block.place) for block in BLOCKS if is_light(block) and is_run(block)],
)
def test_commands_for_other_machines_are_complete(block: Block, tmp_path: pathlib.Path) -> None:
    scratch.make_checkout(tmp_path)
    for line in block.lines:
        try_command(None, line, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=block.place)
        for block in BLOCKS
        if not is_light(block) and is_run(block) and not several_times(block)
    ],
)
def test_commands_run_as_they_stand(
    block: Block, forked: Forked, checkout: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    here = tmp_path / "here"
    shutil.copytree(checkout, here, symlinks=True)
    for line in block.lines:
        for command, pattern in OUTPUTS.items():
            if command in line:
                made = re.search(pattern, line)
                shutil.rmtree(here / (made[1] if made else pattern), ignore_errors=True)
    try:
        for line in block.lines:
            try_command(forked, line, here)
    finally:
        forked.stop()
        shutil.rmtree(here)
