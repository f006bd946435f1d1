"""Training in two processes with two devices each: the same run, however it is stopped."""

import pathlib
import signal
import time
from typing import Any

import layouts
import numpy as np
import processes
import pytest
import two_hosts
from test_train import CONFIG, SMALL, STEPS, TIMINGS, paint, rows, saved_state, small_config

from sop_jax import train
from sop_jax.monitor.metrics import read_metrics
from sop_jax.training import checkpoint

pytestmark = pytest.mark.slow

HERE = pathlib.Path(__file__).parents[1]
TOGETHER = {"mesh.data": 0, "eval_every": 0, "log_every": 1}


def command(workdir: pathlib.Path, **changes: Any) -> list[object]:
    settings = SMALL | TOGETHER | changes
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return ["-m", "sop_jax.train", f"--config={CONFIG}", f"--workdir={workdir}", *flags]


def pair(tmp_path: pathlib.Path, *commands: list[object]) -> Any:
    """Starts two processes of one run with the same command, and kills them at the end."""
    both = zip(commands * (2 // len(commands)), processes.among(2), strict=True)
    return processes.start([[*given, *among] for given, among in both], tmp_path / "log")


def finish(tmp_path: pathlib.Path, *commands: list[object]) -> list[processes.Ended]:
    with pair(tmp_path, *commands) as running:
        return running.end(240)


def wait_for_step(running: processes.Processes, workdir: pathlib.Path, step: int) -> None:
    until = time.monotonic() + 200
    while not any(row["step"] >= step for row in read_metrics(workdir)):
        assert time.monotonic() < until, running.end(0)
        assert all(popen.poll() is None for popen in running.running), running.end(5)
        time.sleep(0.01)


def assert_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
    """Asserts that steps, metrics, parameters and memories have the same bits."""
    first, second = saved_state(one), saved_state(other)
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)
    assert rows(one, TIMINGS) == rows(other, TIMINGS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    ended = finish(folder, command(folder / "run"))
    assert [process.code for process in ended] == [0, 0], ended
    return folder / "run"


def test_two_processes_of_four_devices_compute_what_one_device_does(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On eight devices, each with all parameters, and on four pairs that shard them."""
    task = [HERE / "two_hosts.py", "trajectory", tmp_path]
    both = [[*task, *among] for among in processes.among(2)]
    ended = processes.run(both, tmp_path / "log", devices=4, timeout=240)
    assert [process.code for process in ended] == [0, 0], ended
    expected = layouts.trajectory(monkeypatch)
    for fsdp in (1, 2):
        with np.load(tmp_path / f"{fsdp}.npz") as found:
            layouts.assert_same(dict(found), expected)


def test_devices_of_two_processes_by_turns_hold_the_batch_in_order(tmp_path: pathlib.Path) -> None:
    """In the order of a mesh, the devices of a process need not be adjacent."""
    out = tmp_path / "out.npz"
    ended = finish(tmp_path, [HERE / "two_hosts.py", "shuffle", out])
    assert [process.code for process in ended] == [0, 0], ended
    rows = {
        "0213": [[0, 1, 4, 5], [2, 3, 6, 7]],
        "3021": [[2, 3, 6, 7], [0, 1, 4, 5]],
    }
    with np.load(out) as found:
        for order, expected in rows.items():
            assert found[f"{order}/rows"].tolist() == expected
            assert found[order].tolist() == np.arange(24).reshape(8, 3).tolist()


def test_only_the_first_process_writes_and_prints(whole: pathlib.Path) -> None:
    said, silent = (
        (whole.parent / "log" / f"{process}.{stream}").read_text().splitlines()
        for process, stream in ((0, "err"), (1, "err"))
    )
    assert any("on 4 cpu devices of 2 processes" in line for line in said)
    assert not [line for line in silent if "step" in line]
    assert [row["step"] for row in rows(whole)] == list(range(1, STEPS + 1))
    assert (whole / "summary.json").exists()


def test_the_number_of_processes_may_change(
    whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state saved by two processes is restored, with the same next batch, on any layout."""
    found = []
    out = tmp_path / "two.npz"
    ended = finish(tmp_path, [HERE / "two_hosts.py", "restore", out, whole])
    assert [process.code for process in ended] == [0, 0], ended
    two_hosts.restore(str(tmp_path / "one.npz"), str(whole))  # one process of eight devices
    for name in ("one", "two"):
        with np.load(tmp_path / f"{name}.npz") as arrays:
            found.append(dict(arrays))
    assert found[0].keys() == found[1].keys()
    for name, array in found[0].items():
        assert array.tobytes() == found[1][name].tobytes(), name
    assert found[0]["batch/index"].shape == (16,)


def test_one_process_of_eight_devices_saves_for_two(tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "run"
    train.train(small_config(**TOGETHER), workdir)  # on eight devices
    two_hosts.restore(str(tmp_path / "one.npz"), str(workdir))
    ended = finish(tmp_path, [HERE / "two_hosts.py", "restore", tmp_path / "two.npz", workdir])
    assert [process.code for process in ended] == [0, 0], ended
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        for name in one.files:
            assert one[name].tobytes() == two[name].tobytes(), name


def test_a_signal_to_one_process_stops_both_at_one_step(
    whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    workdir = tmp_path / "run"
    with pair(tmp_path, command(workdir)) as running:
        wait_for_step(running, workdir, 4)
        running.signal(1, signal.SIGTERM)
        ended = running.end(120)
    assert [process.code for process in ended] == [130, 130], ended
    saved = checkpoint.latest_step(workdir)
    assert saved is not None and 4 <= saved < STEPS
    for process in ended:
        assert f"interrupted; step {saved} of {STEPS} is saved" in process.err
    assert not (workdir / "summary.json").exists()
    again = finish(tmp_path, command(workdir))
    assert [process.code for process in again] == [0, 0], again
    assert f"steps {saved} to {STEPS}" in again[0].err
    assert_same_run(workdir, whole)


def test_a_signal_stops_both_in_an_evaluation(tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "run"
    slowly = {"eval_every": 2, "eval.batch_size": 16}
    with pair(tmp_path, command(workdir, **slowly)) as running:
        wait_for_step(running, workdir, 1)  # the evaluation of step 2 comes next
        running.signal(0, signal.SIGTERM)
        ended = running.end(120)
    assert [process.code for process in ended] == [130, 130], ended
    saved = checkpoint.latest_step(workdir)
    assert saved is not None
    assert all(f"step {saved} of {STEPS} is saved" in process.err for process in ended)


def test_after_a_kill_the_same_command_resumes(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Process 1 dies; the other ends by itself, and both resume from the last checkpoint."""
    workdir = tmp_path / "run"
    with pair(tmp_path, command(workdir)) as running:
        wait_for_step(running, workdir, 7)
        running.signal(1, signal.SIGKILL)
        died = time.monotonic()
        ended = running.end(120)
    assert time.monotonic() - died < 100
    assert ended[0].code != 0 and ended[1].code == -signal.SIGKILL
    assert checkpoint.latest_step(workdir) in (3, 6, 9, 12, 15)
    again = finish(tmp_path, command(workdir))
    assert [process.code for process in again] == [0, 0], again
    assert_same_run(workdir, whole)


# Trains; one process dies in the middle of its second save, and the other notices it soon.
DIES = """
import os, runpy, signal, sys, time
import tensorstore
from sop_jax.parallel import hosts
from sop_jax.training import checkpoint

hosts.HEARTBEAT_TIMEOUT = 10
workdir, where = sys.argv.pop(1), sys.argv.pop(1)
folder, save = os.path.join(workdir, "checkpoints"), checkpoint.Checkpoints.save


def deadly(*args, **kwargs):
    while len(os.listdir(folder)) < 2:  # until the temporary folder exists
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def save_or_die(self, step, state):
    if step == 6:
        self.wait()
        if where == "in its part":
            tensorstore.open = deadly
        if where == "before the commit":
            os.rename = deadly
    save(self, step, state)


checkpoint.Checkpoints.save = save_or_die
runpy.run_module("sop_jax.train", run_name="__main__")
"""


@pytest.mark.parametrize("dead, where", [(0, "before the commit"), (1, "in its part")])
def test_a_kill_in_mid_save_leaves_the_save_before(
    whole: pathlib.Path, tmp_path: pathlib.Path, dead: int, where: str
) -> None:
    workdir = tmp_path / "run"
    _, _, *flags = command(workdir)
    both = [
        ["-c", DIES, workdir, where if process == dead else "nowhere", *flags] for process in (0, 1)
    ]
    ended = finish(tmp_path, *both)
    assert ended[dead].code == -signal.SIGKILL, ended
    assert ended[1 - dead].code not in (0, -signal.SIGKILL), ended
    folder = workdir / "checkpoints"
    assert len(list(folder.iterdir())) == 2, "the save was not under way"
    assert checkpoint.latest_step(workdir) == 3
    saved_state(workdir)
    again = finish(tmp_path, command(workdir))
    assert [process.code for process in again] == [0, 0], again
    assert f"steps 3 to {STEPS}" in again[0].err
    assert_same_run(workdir, whole)
    rewritten, expected = saved_state(workdir, 6), saved_state(whole, 6)
    for name, array in rewritten.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    kept = [{path.name for path in (run / "checkpoints").iterdir()} for run in (workdir, whole)]
    assert kept[0] == kept[1], "the rest is cleaned up"


# Trains; a process that compiles for longer fails if the other did not wait for it.
SLOW = """
import os, runpy, sys, time
from sop_jax.training import assemble

workdir, slow = sys.argv.pop(1), sys.argv.pop(1)
compiled_step = assemble.compiled_step


def slowly(*arguments):
    step = compiled_step(*arguments)
    if slow == "slow":
        time.sleep(5)
        assert not os.path.exists(os.path.join(workdir, "config.json")), "process 0 did not wait"
    return step


assemble.compiled_step = slowly
runpy.run_module("sop_jax.train", run_name="__main__")
"""


def test_a_process_that_compiles_for_longer_is_waited_for(tmp_path: pathlib.Path) -> None:
    """A collective waits for 30 s only, and then fails."""
    workdir = tmp_path / "run"
    _, _, *flags = command(workdir)
    ended = finish(tmp_path, *(["-c", SLOW, workdir, pace, *flags] for pace in ("fast", "slow")))
    assert [process.code for process in ended] == [0, 0], ended


def apart(tmp_path: pathlib.Path, given: list[object]) -> list[processes.Ended]:
    """The same command has relative paths, and each process runs in another folder."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    commands = [[*given, *among] for among in processes.among(2)]
    with processes.start(commands, tmp_path / "log", folders=folders) as running:
        return running.end(120)


def test_other_images_on_one_host_are_named(tmp_path: pathlib.Path) -> None:
    for folder, count in (("a", 12), ("b", 11)):
        paint(tmp_path / folder / "images", count)
    given = command(tmp_path / "run", **{"data.source": "folder", "data.path": "images"})
    for ended in apart(tmp_path, given):
        assert ended.code == 1
        assert "train images is 11, process 0" in ended.err and "has 12" in ended.err
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_another_folder_on_one_host_is_named(tmp_path: pathlib.Path) -> None:
    impatient = "import runpy, sop_jax.parallel.hosts as hosts; hosts.SHARED_TIMEOUT = 2; "
    _, module, *flags = command(pathlib.Path("run"))
    start = impatient + f"runpy.run_module({module!r}, run_name='__main__')"
    for ended in apart(tmp_path, ["-c", start, *flags]):
        assert ended.code == 1
        assert "process 1" in ended.err and "cannot see what process 0 writes to run" in ended.err
    assert not (tmp_path / "a" / "run").exists() and not (tmp_path / "b" / "run").exists()


def test_a_batch_that_the_processes_cannot_share_is_reported_once_each(
    tmp_path: pathlib.Path,
) -> None:
    for ended in finish(tmp_path, command(tmp_path / "run", batch_size=18)):
        assert ended.code == 1 and "Traceback" not in ended.err
        assert "batch_size 18 cannot be split over 4 devices; choose a multiple of 4" in ended.err
