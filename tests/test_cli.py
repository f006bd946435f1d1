"""The commands' errors: one short message that says what to do, and no traceback."""

import pathlib
import subprocess
import sys

import pytest

COMMAND = """
import errno, logging, sys
from absl import flags
from ml_collections import config_flags
from sop_jax import cli
from sop_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
flags.DEFINE_string("workdir", None, "The folder of the run.", required=True)
flags.DEFINE_string("fail", None, "How to fail.")


def fail(how):
    if how == "user":
        raise UserError("the moon is not full: wait a week")
    if how == "wrapped":
        try:
            fail("user")
        except UserError as error:
            raise RuntimeError("a worker died") from error
    if how == "disk":
        raise OSError(errno.ENOSPC, "No space left on device")
    if how == "tensorstore":
        try:
            raise ValueError("Failed to write: No space left on device [os_error_code='28']")
        except ValueError:
            raise RuntimeError("the save failed")
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "bug":
        raise ZeroDivisionError("a bug")


def main(argv):
    fail(flags.FLAGS.fail)
    logging.getLogger("library").info("news that nobody asked for")
    if CONFIG.value:
        print(CONFIG.value.to_dict())
    print("jax" in sys.modules)


if __name__ == "__main__":
    cli.run(main, devices=False)
"""

CONFIG = """
from ml_collections import ConfigDict, config_dict


def get_config(kind="small"):
    return ConfigDict(dict(
        batch_size=64,
        epochs=3.0,
        steps=config_dict.placeholder(int),
        kind=kind,
        model=dict(width=192, scan=True),
        augment=dict(global_scale=(0.25, 1.0)),
    ))
"""


@pytest.fixture
def command(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "command.py").write_text(COMMAND)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits.py").write_text(CONFIG)
    return tmp_path / "command.py"


def run(command: pathlib.Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, command.name, *flags],
        cwd=command.parent,
        env={"PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_settings_reach_the_command(command: pathlib.Path) -> None:
    result = run(
        command,
        "--config=configs/digits.py:large",
        "--workdir=runs/a",
        "--config.batch_size=8",
        "--config.epochs=5",
        "--config.steps=7",
        "--noconfig.model.scan",
        "--config.model.width",
        "16",
        "--config.augment.global_scale=(0.5, 1.0)",
    )
    assert result.stderr == "" and result.returncode == 0
    assert result.stdout == (
        "{'augment': {'global_scale': (0.5, 1.0)}, 'batch_size': 8, 'epochs': 5.0, "
        "'kind': 'large', 'model': {'scan': False, 'width': 16}, 'steps': 7}\nFalse\n"
    )


CONFIG_FLAG, WORKDIR = "--config=configs/digits.py", "--workdir=runs/a"


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            [CONFIG_FLAG, WORKDIR, "--config.widht=3"],
            "unknown setting config.widht; did you mean config.model.width?",
        ),
        (
            [CONFIG_FLAG, WORKDIR, "--config.batchsize", "3"],
            "unknown setting config.batchsize; did you mean config.batch_size?",
        ),
        (
            [CONFIG_FLAG, WORKDIR, "--config.modle.width=3"],
            "unknown setting config.modle.width; did you mean config.model.width?",
        ),
        ([CONFIG_FLAG, WORKDIR, "--config.qqqq=3"], "unknown setting config.qqqq"),
        (
            [CONFIG_FLAG, WORKDIR, "--config.batch_size=many"],
            "config.batch_size must be of type int, such as 64, not 'many'",
        ),
        (
            [CONFIG_FLAG, WORKDIR, "--config.batch_size=1.5"],
            "config.batch_size must be of type int, such as 64, not '1.5'",
        ),
        (
            [CONFIG_FLAG, WORKDIR, "--config.steps=many"],
            "config.steps must be of type int, not 'many'",
        ),
        (
            [CONFIG_FLAG, WORKDIR, "--config.model.scan=perhaps"],
            "config.model.scan must be of type bool, such as True, not 'perhaps'",
        ),
        (
            [CONFIG_FLAG, WORKDIR, "--config.augment.global_scale=wide"],
            "config.augment.global_scale must be of type tuple, such as (0.25, 1.0), not ('wide',)",
        ),
        (
            ["--config=configs/digit.py", WORKDIR],
            "there is no config file 'configs/digit.py'; did you mean configs/digits.py?",
        ),
        (["--config=nowhere/x.py", WORKDIR], "there is no config file 'nowhere/x.py'"),
        (["--config=", WORKDIR], "there is no config file ''"),
        ([CONFIG_FLAG], "--workdir is required: give --workdir=value"),
        (
            [CONFIG_FLAG, "--workdri=a"],
            "Unknown command line flag 'workdri'. Did you mean: workdir ?",
        ),
        (
            [CONFIG_FLAG, WORKDIR, "config.batch_size=3"],
            "unexpected argument 'config.batch_size=3': flags are written --name=value, settings "
            "--config.name=value",
        ),
    ],
)
def test_an_error_of_the_command_line(
    command: pathlib.Path, flags: list[str], message: str
) -> None:
    result = run(command, *flags)
    assert result.stderr == f"error: {message}\n"
    assert result.returncode == 2


def test_flags_of_processes_are_those_of_commands_that_compute(command: pathlib.Path) -> None:
    assert "Unknown command line flag 'processes'" in run(command, WORKDIR, "--processes=2").stderr
    command.write_text(command.read_text().replace("devices=False", "devices=True"))
    half = run(command, WORKDIR, "--processes=2", "--process=1")
    assert half.stderr.startswith("error: --coordinator is missing: several processes need ")
    assert len(half.stderr.splitlines()) == 1
    assert half.returncode == 2
    alone = run(command, WORKDIR, "--processes=1")
    assert alone.stdout == "True\n" and alone.returncode == 0
    failed = run(command, WORKDIR, "--fail=user")
    assert failed.stderr == "error: the moon is not full: wait a week\n"
    assert failed.returncode == 1


@pytest.mark.parametrize(
    "content, message",
    [
        (
            "import nothing_of_that_name",
            "ModuleNotFoundError: No module named 'nothing_of_that_name'",
        ),
        ("def get_config(:", "SyntaxError: invalid syntax"),
        ("x = 1", "has no attribute 'get_config'"),
        ("def get_config(): return 1 / 0", "ZeroDivisionError: division by zero"),
        ("def get_config(): pass", "must return a ConfigDict, not None"),
    ],
)
def test_a_config_file_that_does_not_load(
    command: pathlib.Path, content: str, message: str
) -> None:
    (command.parent / "bad.py").write_text(content)
    result = run(command, "--config=bad.py", WORKDIR)
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.splitlines()) == 1 and "'bad.py'" in result.stderr
    assert result.returncode == 2


@pytest.mark.parametrize(
    "how, message, code",
    [
        ("user", "error: the moon is not full: wait a week", 1),
        ("wrapped", "error: the moon is not full: wait a week", 1),
        *(
            (
                how,
                "error: the disk is full: no space was left while writing to runs/a. Free some "
                "space and run the same command again: it goes on from the last good checkpoint.",
                1,
            )
            for how in ("disk", "tensorstore")
        ),
        ("interrupt", "interrupted", 130),
    ],
)
def test_an_error_of_the_run(command: pathlib.Path, how: str, message: str, code: int) -> None:
    result = run(command, WORKDIR, f"--fail={how}")
    assert result.stderr == f"{message}\n"
    assert result.returncode == code


def test_an_error_of_the_program_keeps_its_traceback(command: pathlib.Path) -> None:
    result = run(command, WORKDIR, "--fail=bug")
    assert "Traceback" in result.stderr and "ZeroDivisionError: a bug" in result.stderr
    assert result.returncode == 1
