"""Errors of the commands: one short message that says what to do, without a traceback."""

import getpass
import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from documented import example

pytestmark = pytest.mark.medium

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECIPE_FILES = sorted((ROOT / "configs").glob("*.py"))
RECIPES = f"Recipes by name, in {ROOT / 'configs'}: " + ", ".join(
    file.stem for file in RECIPE_FILES
)

COMMAND = """
import atexit, errno, gc, logging, os, signal, sys, threading, time, weakref
from absl import flags
from ml_collections import config_flags
from sop_jax import cli, errors
from sop_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
cli.define_path("workdir", "The folder of the run.", required=True)
flags.DEFINE_integer("step", None, "Of which checkpoint.")
cli.define_data(train_split='', test_split='')
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
    if how == "python memory":
        raise MemoryError("Unable to allocate 9.5 GiB for an array")
    if how == "device memory":
        JaxRuntimeError = type("JaxRuntimeError", (RuntimeError,), {})
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 51039674304 bytes.")
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "interrupt a collection":
        sent = []

        def callback(*_):
            if not sent:
                sent.append(True)
                os.kill(os.getpid(), signal.SIGINT)

        gc.callbacks.append(callback)
        gc.collect()
        time.sleep(60)
    if how == "interrupt a weak reference":
        class Interrupting(dict):
            def __delitem__(self, key):
                os.kill(os.getpid(), signal.SIGINT)
                super().__delitem__(key)

        known = weakref.WeakKeyDictionary()
        known.data = Interrupting()
        known[thing := type("Thing", (), {})()] = 0
        del thing
        time.sleep(60)
    if how == "interrupt the end":
        atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60)))
        return
    if how == "interrupt an end":
        fail("interrupt the end")
        fail("interrupt")
    if how == "interrupt again and again":
        sys.setswitchinterval(1e-6)

        def interrupt():
            while True:
                os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        time.sleep(60)
    if how == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    if how == "lost":
        raise errors.Lost("a worker was killed")
    if how == "bug":
        raise ZeroDivisionError("a bug")


def main():
    fail(flags.FLAGS.fail)
    logging.getLogger("library").info("news that nobody asked for")
    if CONFIG.value:
        print(CONFIG.value.to_dict())
    if flags.FLAGS.step:
        print(flags.FLAGS.workdir)
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
        init_from="",
        data=dict(path="~/data/", source="folder", name="", test_split="val"),
    ))
"""


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Lets commands be interrupted even if the tests run in the background of a shell script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def command(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "command.py").write_text(COMMAND)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits.py").write_text(CONFIG)
    return tmp_path / "command.py"


def run(command: pathlib.Path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PYTHONPATH": str(pathlib.Path(__file__).parents[1]),
        "HOME": "/home/me",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    return subprocess.run(
        [sys.executable, command.name, *flags],
        cwd=command.parent,
        env=environment,
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
        "{'augment': {'global_scale': (0.5, 1.0)}, 'batch_size': 8, "
        "'data': {'name': '', 'path': '/home/me/data', 'source': 'folder', 'test_split': 'val'}, "
        "'epochs': 5.0, 'init_from': '', 'kind': 'large', 'model': {'scan': False, 'width': 16}, "
        "'steps': 7}\nFalse\n"
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
            "there is no config file 'configs/digit.py'; did you mean configs/digits.py? "
            + RECIPES,
        ),
        (
            ["--config=digitz", WORKDIR],
            f"there is no config file 'digitz'; did you mean digits? {RECIPES}",
        ),
        (
            ["--config=nowhere/cifar_10.py", WORKDIR],
            f"there is no config file 'nowhere/cifar_10.py'; did you mean cifar10? {RECIPES}",
        ),
        (["--config=x", WORKDIR], f"there is no config file 'x'. {RECIPES}"),
        (
            ["--config=", WORKDIR],
            "--config is empty; give it a value (is a shell variable not set?)",
        ),
        ([CONFIG_FLAG], "--workdir is required: give --workdir=value"),
        (
            [CONFIG_FLAG, WORKDIR, "--data_path=/x"],
            "Unknown command line flag 'data_path'. Did you mean: data.path ?",
        ),
        (
            [CONFIG_FLAG, WORKDIR, "--data.train_spilt=x"],
            "Unknown command line flag 'data.train_spilt'. Did you mean: data.train_split ?",
        ),
        (
            [CONFIG_FLAG, "--workdri=a"],
            "Unknown command line flag 'workdri'. Did you mean: workdir ?",
        ),
        (
            [CONFIG_FLAG, WORKDIR, "config.batch_size=3"],
            "unexpected argument 'config.batch_size=3': flags are written --name=value, settings "
            "--config.name=value",
        ),
        (
            [CONFIG_FLAG, WORKDIR, "--config.augment=3"],
            "config.augment is a section of settings; set one of them, such as "
            "--config.augment.global_scale",
        ),
    ],
)
def test_an_error_of_the_command_line(
    command: pathlib.Path, flags: list[str], message: str
) -> None:
    result = run(command, *flags)
    assert result.stderr == f"error: {message}\n"
    assert result.returncode == 2


@pytest.mark.parametrize(
    "flags, name",
    [
        ([CONFIG_FLAG, "--workdir="], "workdir"),
        ([CONFIG_FLAG, "--workdir", ""], "workdir"),
        ([CONFIG_FLAG, "--workdir= "], "workdir"),
        ([CONFIG_FLAG, WORKDIR, "--step="], "step"),
        ([CONFIG_FLAG, WORKDIR, "--fail="], "fail"),
        ([CONFIG_FLAG, WORKDIR, "--config.batch_size="], "config.batch_size"),
        ([CONFIG_FLAG, WORKDIR, "--config.augment.global_scale="], "config.augment.global_scale"),
        ([CONFIG_FLAG, WORKDIR, "--config.data.source", ""], "config.data.source"),
        # These are empty by default, so an empty value would have no effect.
        ([CONFIG_FLAG, WORKDIR, "--config.init_from="], "config.init_from"),
        ([CONFIG_FLAG, WORKDIR, "--config.data.name="], "config.data.name"),
    ],
)
def test_an_empty_value_of_any_flag_is_refused(
    command: pathlib.Path, flags: list[str], name: str
) -> None:
    result = run(command, *flags)
    assert result.stderr == (
        f"error: --{name} is empty; give it a value (is a shell variable not set?)\n"
    )
    assert result.returncode == 2


def test_a_setting_that_may_be_empty_can_be_made_so(command: pathlib.Path) -> None:
    result = run(
        command, CONFIG_FLAG, WORKDIR, "--config.data.path=", "--config.data.test_split", ""
    )
    assert result.returncode == 0, result.stderr
    assert "'path': ''" in result.stdout and "'test_split': ''" in result.stdout


def test_a_recipe_is_found_by_its_name_from_any_folder(command: pathlib.Path) -> None:
    (command.parent / "configs" / "digits.py").unlink()
    for flags in (["--config=digits"], ["--config", "digits"], ["--config=digits.py"]):
        result = run(command, *flags, WORKDIR, "--config.batch_size=8")
        assert result.returncode == 0, result.stderr
        assert "'batch_size': 8" in result.stdout and "'source': 'digits'" in result.stdout


def test_paths_that_mean_the_same_folder_are_the_same(command: pathlib.Path) -> None:
    flags = ["--step=1", "--config.data.path=~/data", "--config.init_from=./old//run/"]
    result = run(command, CONFIG_FLAG, *flags, "--workdir=~/runs/a/")
    assert result.returncode == 0, result.stderr
    assert "'path': '/home/me/data'" in result.stdout
    assert "'init_from': 'old/run'" in result.stdout
    assert result.stdout.splitlines()[1] == "/home/me/runs/a"
    home = pathlib.Path(f"~{getpass.getuser()}").expanduser()
    for workdir, expected in (
        ("./runs/a", "runs/a"),
        ("runs/a/", "runs/a"),
        (f"~{getpass.getuser()}/a", f"{home}/a"),
        ("./~/a", "~/a"),
        ("/data/~/a", "/data/~/a"),
    ):
        assert run(command, "--step=1", f"--workdir={workdir}").stdout == f"{expected}\nFalse\n"


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--workdir=~nobody_of_this_name/a", "there is no user 'nobody_of_this_name'"),
        ("--config.data.path=~nobody_of_this_name/a", "there is no user 'nobody_of_this_name'"),
        ("--workdir=s3://bucket/a", "use a local path, or gs://BUCKET/PATH"),
        ("--config.data.path=hf://data", "use a local path, or gs://BUCKET/PATH"),
        ("--workdir=gs:/bucket/a", "use a local path, or gs://BUCKET/PATH"),
    ],
)
def test_a_path_that_cannot_be_one_is_refused(command: pathlib.Path, flag: str, words: str) -> None:
    result = run(command, CONFIG_FLAG, WORKDIR, flag)
    assert result.stderr.startswith(f"error: {flag}: ") and words in result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.returncode == 2


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
                "space and run the same command again, which resumes from the last good "
                "checkpoint.",
                1,
            )
            for how in ("disk", "tensorstore")
        ),
        *(
            (
                how,
                f"error: out of memory: {reason}. If this happened in a step, increase "
                "--config.accumulate (the microbatches per step), which is possible in a resumed "
                "run too, or decrease --config.batch_size; if in an evaluation, decrease "
                "--config.eval.batch_size. --config.model.remat=full also saves memory.",
                1,
            )
            for how, reason in (
                ("python memory", "Unable to allocate 9.5 GiB for an array"),
                ("device memory", "Out of memory allocating 51039674304 bytes"),
            )
        ),
        ("interrupt", "interrupted", 130),
        ("interrupt a collection", "interrupted", 130),
        ("interrupt a weak reference", "interrupted", 130),
        ("terminate", "interrupted", 130),
        ("lost", "error: a worker was killed", 75),
    ],
)
def test_an_error_of_the_run(command: pathlib.Path, how: str, message: str, code: int) -> None:
    result = run(command, WORKDIR, f"--fail={how}")
    assert result.stderr == f"{message}\n"
    assert result.returncode == code


@pytest.mark.parametrize(
    ("how", "message", "code"),
    [("interrupt the end", "", 0), ("interrupt an end", "interrupted\n", 130)],
)
def test_ctrl_c_while_python_exits_ends_the_command(
    command: pathlib.Path, how: str, message: str, code: int
) -> None:
    result = run(command, WORKDIR, f"--fail={how}")
    assert (result.stderr, result.returncode) == (message, code)


def test_many_interruptions_print_no_traceback(command: pathlib.Path) -> None:
    result = run(command, WORKDIR, "--fail=interrupt again and again")
    assert result.returncode in (130, -signal.SIGINT)
    assert result.stderr in ("interrupted\n", "")  # the second may come before the message


def test_an_error_of_the_program_keeps_its_traceback(command: pathlib.Path) -> None:
    result = run(command, WORKDIR, "--fail=bug")
    assert "Traceback" in result.stderr and "ZeroDivisionError: a bug" in result.stderr
    assert result.returncode == 1


HELP = """
import os, runpy, sys
from sop_jax import convert, diagnose, evaluate, extract, nearest, plan, report, train
from sop_jax.data import prepare

for module in (
    "train", "plan", "evaluate", "report", "diagnose", "extract", "nearest", "convert",
    "data.prepare",
):
    print(f"<{module}>", flush=True)
    if not os.fork():
        sys.argv[1:] = ["--help"]
        runpy.run_module(f"sop_jax.{module}", run_name="__main__", alter_sys=True)
    print(os.wait()[1], flush=True)
"""

PROCESSES = "coordinator processes process"
FLAGS = {  # the flags of every command
    "train": f"config workdir {PROCESSES}",
    "plan": "config topology largest_batch",
    "evaluate": "workdir task step data.path data.source data.name data.train_split "
    f"data.test_split {PROCESSES}",
    "extract": "workdir images out step patches splits overwrite data.path data.source data.name "
    f"data.train_split {PROCESSES}",
    "diagnose": "workdir weights step network layer eps images tsne seed out",
    "report": "workdir out pictures images step shown seed data.path",
    "nearest": "workdir weights images of k out step",
    "convert": "from workdir to export key prefix step heads positions",
    "data.prepare": "images out name splits",
}


def test_help_of_every_command_lists_its_flags_and_is_no_error() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=120)
    shown = dict(re.findall(r"^<([\w.]+)>\n(.*?)^0$", done.stdout, re.DOTALL | re.MULTILINE))
    assert shown.keys() == FLAGS.keys(), done.stdout + done.stderr
    for command, flags in FLAGS.items():
        found = re.findall(r"^  --(?:\[no\])?([\w.]+)", shown[command], re.MULTILINE)
        assert set(flags.split()) <= set(found), command
        assert f"python -m sop_jax.{command}" in shown[command]
        main = shown[command].partition("\nFlags:\n")[2].partition("\nMore flags:")[0]
        assert 3 <= len(re.findall(r"^  --", main, re.MULTILINE)) <= 5
        file = ROOT / "sop_jax" / f"{command.replace('.', '/')}.py"
        assert example(file).lines and all(line in shown[command] for line in example(file).lines)
        assert max(map(len, shown[command].splitlines())) <= 100
        assert "repeat this option" not in shown[command] and "ENUM" not in shown[command]
    assert "--network=teacher|student\n      Which network" in shown["evaluate"]
    assert "--k=INT; default: 5\n" in shown["nearest"]
    assert "--splits=A,B,...; default: train,val\n" in shown["data.prepare"]
    assert "--[no]splits; on by default\n" in shown["extract"]
    for command in ("train", "plan"):
        assert "--config.KEY=VALUE" in shown[command] and "sop_jax/config.py" in shown[command]
        assert ", ".join(file.stem for file in RECIPE_FILES) in " ".join(shown[command].split())


def test_help_with_a_recipe_lists_its_settings(command: pathlib.Path) -> None:
    result = run(command, CONFIG_FLAG, "--config.batch_size=8", "--help")
    assert result.returncode == 0, result.stderr
    assert "  --config.model.width=192\n" in result.stdout
    assert "  --config.augment.global_scale=(0.25, 1.0)\n" in result.stdout


def test_paths_that_are_not_utf8_are_printed_byte_for_byte() -> None:
    program = (
        "import os, sys\nfrom sop_jax import cli\n"
        "cli.run(lambda: print(os.fsdecode(b'caf\\xe9.npz')), devices=False)"
    )
    environment = {
        **os.environ,
        "PYTHONUTF8": "0",
        "LC_ALL": "C.UTF-8",
        "PYTHONIOENCODING": "utf-8",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=environment, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, b"caf\xe9.npz\n"), done.stderr


def test_a_command_without_flags_says_what_is_required() -> None:
    command = [sys.executable, "-m", "sop_jax.data.prepare"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "is required" in done.stderr


def test_ctrl_c_while_jax_is_imported_ends_the_command_at_once(tmp_path: pathlib.Path) -> None:
    (tmp_path / "jax.py").write_text(
        """
import gc, time
gc.callbacks.append(lambda *_: [time.sleep(0.01) for _ in range(2000)])  # as JAX's, but long
print("importing", flush=True)
gc.collect()
"""
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    with subprocess.Popen(
        [sys.executable, "-m", "sop_jax.train", "--config=digits", f"--workdir={tmp_path / 'run'}"],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == -signal.SIGINT
        assert process.stderr.read() == ""
    assert not (tmp_path / "run").exists()


def test_lists_of_words_are_separated_by_commas(tmp_path: pathlib.Path) -> None:
    flags = ("--config=digits", f"--workdir={tmp_path}", "--config.eval.tasks=knn,prototipes")
    done = subprocess.run(
        [sys.executable, "-m", "sop_jax.train", *flags], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "eval.tasks is ('knn', 'prototipes'); expected one or more values" in done.stderr
