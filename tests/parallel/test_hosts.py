"""Several processes find each other, agree, stop and fail together, and never hang."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import time
from typing import Any

import jax
import processes
import pytest

from sop_jax.errors import UserError
from sop_jax.parallel import hosts

# A command whose main function is given by a test.
COMMAND = """
import json, multiprocessing, os, pathlib, time
import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from sop_jax import cli
from sop_jax.parallel import hosts
from sop_jax.errors import Interrupted, UserError
from sop_jax.parallel.interruption import Interruption

hosts.HEARTBEAT_TIMEOUT, hosts.START_TIMEOUT = {heartbeat}, {start}
flags.DEFINE_string("workdir", "runs", "As the commands have it.")


def together():
    multihost_utils.process_allgather(np.array(1))


def refusal(call, *args):
    try:
        call(*args)
    except UserError as error:
        return str(error)


def main():
{body}


if __name__ == "__main__":
    cli.run(main)
"""

HOST = socket.gethostname()
START, HEARTBEAT = 6, 4  # seconds, short so that tests of timeouts are fast


def command(
    folder: pathlib.Path,
    body: str,
    start: int = hosts.START_TIMEOUT,
    heartbeat: int = hosts.HEARTBEAT_TIMEOUT,
) -> str:
    """Writes a command whose main function has this body, and returns its name."""
    text = textwrap.indent(textwrap.dedent(body), " " * 4)
    text = COMMAND.replace("{body}", text)
    text = text.replace("{heartbeat}", str(heartbeat)).replace("{start}", str(start))
    (folder / "command.py").write_text(text)
    return "command.py"


def run_pair(folder: pathlib.Path, body: str) -> list[processes.Ended]:
    name = command(folder, body)
    return processes.run([[name, *flags] for flags in processes.among(2)], folder)


def last_line(ended: processes.Ended) -> Any:
    """Returns the last line that a process printed, as JSON; lines above it are from Gloo."""
    assert ended.code == 0, ended.err
    return json.loads(ended.out.splitlines()[-1])


def test_jax_keeps_its_state_of_processes_where_it_is_read() -> None:
    """It is private to JAX: with a version that moves it, this test fails first."""
    state = hosts.distributed()
    for name in ("process_id", "num_processes", "coordinator_address", "client"):
        assert hasattr(state, name), name


# One process.

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.medium
def test_a_single_process_starts_at_once(tmp_path: pathlib.Path) -> None:
    name = command(
        tmp_path,
        """
        print(json.dumps([jax.distributed.is_initialized(), jax.process_count(), began]))
        """,
    )
    file = tmp_path / name
    file.write_text(
        file.read_text().replace(
            "def main():",
            "start = hosts.start\n"
            "def timed(*args):\n"
            "    global began\n"
            "    before = time.monotonic()\n"
            "    start(*args)\n"
            "    began = time.monotonic() - before\n"
            "hosts.start = timed\n"
            "def main():",
        )
    )
    flags = [[], ["--processes=1"], []]
    environments = [{}, SLURM, SLURM | {"SLURM_NTASKS": "1"}]
    for ended in processes.run([[name, *some] for some in flags], tmp_path, environments):
        initialised, count, seconds = last_line(ended)
        assert (initialised, count) == (False, 1)
        assert seconds < 0.1


def test_a_single_process_agrees_with_itself() -> None:
    hosts.check_agreement({"a": 1})
    hosts.check_shared("/nowhere/at/all")
    hosts.stop()
    assert hosts.agree(3) == 3
    assert not hosts.several()


@pytest.mark.parametrize("flag", [True, False])
def test_in_a_single_process_anywhere_is_here(flag: bool) -> None:
    with jax.transfer_guard("disallow"):
        answer = hosts.anywhere(flag, True)
        assert answer.sharding.device_set == set(jax.devices())
        assert jax.device_get(answer).tolist() == [flag, True]


def test_versions_are_of_what_computes() -> None:
    found = hosts.versions()
    assert found["jax"] == jax.__version__
    assert "not installed" not in {found[name] for name in ("flax", "optax", "orbax-checkpoint")}


# The command line.


@pytest.mark.parametrize(
    "given, message",
    [
        (("h:1", 2, None), "--process is missing: .* a different number from 0 to N-1"),
        ((None, 2, 0), "--coordinator is missing: .*HOST:PORT"),
        (("h:1", None, 0), "--processes is missing"),
        ((None, 2, None), "--coordinator and --process are missing"),
        ((None, None, 0), "--coordinator and --processes are missing"),
        ((None, 1, 1), "--coordinator is missing"),
        (
            ("h:1", 2, 2),
            "--process=2 is not one of the --processes=2: they are numbered from 0 to 1",
        ),
        (("h", 2, 0), "--coordinator must be HOST:PORT, .* not 'h'"),
        (("h:", 2, 0), "--coordinator must be HOST:PORT, .* not 'h:'"),
    ],
)
def test_flags_that_do_not_fit(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        hosts.check_flags(*given)


@pytest.mark.parametrize(
    "given", [(None, None, None), (None, 1, None), (None, 1, 0), ("h:1", 1, 0), ("[::1]:1", 2, 1)]
)
def test_flags_that_fit(given: tuple[Any, ...]) -> None:
    hosts.check_flags(*given)


# Several processes.


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Two processes, and what each prints for every function of `hosts`."""
    folder = tmp_path_factory.mktemp("talk")
    ended = run_pair(
        folder,
        """
        me = jax.process_index()
        here, there = pathlib.Path("here"), pathlib.Path(f"only-{me}")
        said = dict(who=[me, jax.process_count(), jax.local_device_count(), jax.device_count()])
        said["process 0's"] = [hosts.agree(10 * step + me) for step in range(12)]
        hosts.check_agreement(dict(same=1))
        mine = dict(batch_size=32, extra=[2]) if me else dict(batch_size=64)
        said["disagreement"] = refusal(hosts.check_agreement, dict(same=1) | mine)
        said["many"] = refusal(hosts.check_agreement, {f"{i}": me for i in range(20)})
        hosts.check_shared(here / "deep")
        said["left behind"] = here.exists()
        hosts.agree(0)
        here.mkdir(exist_ok=True)
        hosts.check_shared(here)
        said["left inside"] = [path.name for path in here.iterdir()]
        hosts.SHARED_TIMEOUT = 1
        said["unseen"] = refusal(hosts.check_shared, there / "deep")
        said["left unseen"] = there.exists()
        said["unwritable"] = refusal(hosts.check_shared, "/proc/runs" if me == 0 else here)
        with jax.transfer_guard("disallow"):
            answers = [hosts.anywhere(me == who) for who in (0, 1, 2)] + [hosts.anywhere(True)]
            said["anywhere"] = [answer.tolist() for answer in jax.device_get(answers)]
        with Interruption(ahead=1) as interruption:
            said["saves"], began = [], 0
            for step in range(8):
                if interruption.poll(save=me == 0 and step - began >= 2).save:
                    said["saves"].append(step)
                    began = step
                    interruption.saved()
        print(json.dumps(said))
        """,
    )
    return [last_line(each) for each in ended]


@pytest.mark.medium
def test_flags_make_one_run(talk: list[Any]) -> None:
    assert [each["who"] for each in talk] == [[0, 2, 2, 4], [1, 2, 2, 4]]


@pytest.mark.medium
def test_all_get_the_value_of_process_0(talk: list[Any]) -> None:
    for each in talk:
        assert each["process 0's"] == list(range(0, 120, 10))


@pytest.mark.medium
def test_differences_are_named_on_all(talk: list[Any]) -> None:
    one, other = (each["disagreement"] for each in talk)
    assert one == other
    assert f"process 1 ({HOST}): batch_size is 32, process 0 ({HOST}) has 64" in one
    assert f"process 1 ({HOST}): extra is [2], process 0 ({HOST}) has none" in one
    assert "same" not in one.replace("the same settings", "").replace(
        "the same command", ""
    ).replace("the same environment", "")


@pytest.mark.medium
def test_many_differences_are_counted(talk: list[Any]) -> None:
    for each in talk:
        assert each["many"].count("process 1") == 10 and "and 10 more" in each["many"]


@pytest.mark.medium
def test_a_folder_that_all_see_stays_as_it_was(talk: list[Any]) -> None:
    for each in talk:
        assert each["left behind"] is False and each["left inside"] == []


@pytest.mark.medium
def test_a_folder_that_one_does_not_see(talk: list[Any]) -> None:
    for each in talk:
        assert each["unseen"].startswith(f"process 1 ({HOST}) cannot see what process 0 writes")
        assert "network file system" in each["unseen"]
        assert each["left unseen"] is False


@pytest.mark.medium
def test_a_folder_that_nobody_can_write(talk: list[Any]) -> None:
    one, other = (each["unwritable"] for each in talk)
    assert one == other
    assert one.startswith(f"process 0 ({HOST}) cannot write to /proc/runs")


@pytest.mark.medium
def test_one_flag_anywhere_is_known_to_all(talk: list[Any]) -> None:
    for each in talk:
        assert each["anywhere"] == [[True], [True], [False], [True]]


def test_all_save_at_the_steps_that_process_0_decides(talk: list[Any]) -> None:
    for each in talk:
        assert each["saves"] == [3, 6]


@pytest.mark.medium
@pytest.mark.parametrize(
    "nodes, shown, visible",
    [
        ("1", {}, ["0", "1"]),
        ("2", {}, ["all"] * 2),
        ("1", {"CUDA_VISIBLE_DEVICES": "3"}, ["all"] * 2),
    ],
    ids=["tasks of one node", "a node each", "one GPU shown to each"],
)
def test_a_slurm_job_needs_no_flags(
    tmp_path: pathlib.Path, nodes: str, shown: dict[str, str], visible: list[str]
) -> None:
    name = command(
        tmp_path,
        """
        gpus = jax.config.read("jax_cuda_visible_devices")
        print(json.dumps([jax.process_index(), jax.process_count(), gpus]))
        """,
    )
    job = SLURM | {
        "SLURM_STEP_NUM_NODES": nodes,
        "JAX_COORDINATOR_PORT": str(processes.free_port()),
    }
    environments = [job | shown | {"SLURM_PROCID": i, "SLURM_LOCALID": i} for i in "01"]
    ended = processes.run([[name], [name]], tmp_path, environments)
    assert [last_line(each) for each in ended] == [[0, 2, visible[0]], [1, 2, visible[1]]]


@pytest.mark.medium
def test_other_flags_and_settings_are_named(tmp_path: pathlib.Path) -> None:
    name = command(tmp_path, "print('started')")
    one, other = processes.among(2)
    ended = processes.run([[name, *one], [name, *other, "--workdir=elsewhere"]], tmp_path)
    for i, each in enumerate(ended):
        assert each.code == 1 and "started" not in each.out
        assert f"process {i} ({HOST}): error: " in each.err
        assert f'process 1 ({HOST}): --workdir is "elsewhere", process 0 ({HOST}) has "runs"' in (
            each.err
        )


@pytest.mark.slow
def test_other_versions_are_named(tmp_path: pathlib.Path) -> None:
    name = command(tmp_path, "print('started')")
    older = "import runpy, sop_jax.parallel.hosts as hosts; found = hosts.versions(); "
    older += "hosts.versions = lambda: found | {'optax': '0.0.1'}; "
    older += f"runpy.run_path({name!r}, run_name='__main__')"
    one, other = processes.among(2)
    for i, each in enumerate(processes.run([[name, *one], ["-c", older, *other]], tmp_path)):
        assert each.code == 1 and "started" not in each.out
        assert f"process {i} ({HOST}): error: " in each.err
        mine, expected = '"0.0.1"', json.dumps(hosts.versions()["optax"])
        difference = f"process 1 ({HOST}): optax is {mine}, process 0 ({HOST}) has {expected}"
        assert difference in each.err


# Stopping.

STEPS = """
    with Interruption(ahead={ahead}) as interruption:
        for step in range(10_000):
            together()
            if step == 3:
                print("under way", flush=True)
            if interruption.poll().stop:
                print(json.dumps(step))
                raise Interrupted("saved")
            time.sleep(0.01)
"""

BATCHES = """
    with Interruption() as interruption:
        for batch in range(10_000):
            print("under way" if batch == 3 else json.dumps(batch), flush=True)
            time.sleep(0.01 + jax.process_index() / 50)
            interruption.check()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "body, number, asked, message",
    [
        (STEPS.replace("{ahead}", "2"), signal.SIGTERM, [1], "saved"),
        (STEPS.replace("{ahead}", "0"), signal.SIGTERM, [0], "saved"),
        (BATCHES, signal.SIGTERM, [1], "interrupted"),
        (BATCHES, signal.SIGINT, [0, 1], "interrupted"),
    ],
    ids=["one of two", "process 0", "in an evaluation", "Ctrl-C to all"],
)
def test_all_stop_at_the_same_step(
    tmp_path: pathlib.Path, body: str, number: signal.Signals, asked: list[int], message: str
) -> None:
    name = command(tmp_path, body)
    with processes.start([[name, *flags] for flags in processes.among(2)], tmp_path) as running:
        for process in (0, 1):
            running.wait_for(process, "under way")
        for process in asked:
            running.signal(process, number)
        ended = running.end(30)
    assert [each.code for each in ended] == [130, 130], ended
    one, other = (each.out.splitlines()[-1] for each in ended)
    assert one == other and int(one) > 3
    for i, each in enumerate(ended):
        assert each.err == f"process {i} ({HOST}): {message}\n"


@pytest.mark.slow
def test_a_signal_during_the_start_of_one_ends_all_at_once(tmp_path: pathlib.Path) -> None:
    body = """
    with Interruption() as interruption:
        interruption.starting = "interrupted during the start"
        print("under way", flush=True)
        time.sleep(600)
    """
    name = command(tmp_path, body)
    with processes.start([[name, *flags] for flags in processes.among(2)], tmp_path) as running:
        for process in (0, 1):
            running.wait_for(process, "under way")
        running.signal(1, signal.SIGTERM)
        ended = running.end(30)
    assert [each.code for each in ended] == [130, 130], ended
    assert ended[1].err == f"process 1 ({HOST}): interrupted during the start\n"
    assert ended[0].err.startswith(f"process 0 ({HOST}): process 1 ({HOST}) has ended: interrupted")


@pytest.mark.slow
def test_whoever_is_done_first_waits_for_the_other(tmp_path: pathlib.Path) -> None:
    ended = run_pair(
        tmp_path,
        """
        time.sleep(2 * jax.process_index())
        (pathlib.Path.cwd() / f"done-{jax.process_index()}").touch()
        """,
    )
    assert [each.code for each in ended] == [0, 0], ended
    assert [each.err for each in ended] == ["", ""]
    assert (tmp_path / "done-1").exists()


# Failing.


@pytest.mark.slow
@pytest.mark.parametrize("bad, place", [(0, "time.sleep(0.1)"), (1, "together()")])
def test_one_that_fails_ends_all(tmp_path: pathlib.Path, bad: int, place: str) -> None:
    began = time.monotonic()
    ended = run_pair(
        tmp_path,
        f"""
        together()
        if jax.process_index() == {bad}:
            raise UserError("the moon is not full")
        while True:
            {place}
        """,
    )
    assert [each.code for each in ended] == [1, 1], ended
    assert ended[bad].err == f"process {bad} ({HOST}): error: the moon is not full\n"
    other, news = 1 - bad, f"process {bad} ({HOST}) has ended: the moon is not full"
    assert ended[other].err == f"process {other} ({HOST}): error: {news}\n"
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_workers_end_with_their_process(tmp_path: pathlib.Path) -> None:
    name = command(
        tmp_path,
        """
        for _ in range(1 - jax.process_index()):
            worker = multiprocessing.Process(target=wait, daemon=True)
            worker.start()
        while not pathlib.Path("waiting").exists():
            time.sleep(0.1)
        assert not jax.process_index(), "the moon is not full"
        time.sleep(100)
        """,
    )
    file = tmp_path / name
    wait = """
def wait():
    while True:
        pathlib.Path("waiting").touch()
        time.sleep(0.1)
"""
    file.write_text(file.read_text().replace("def main", f"{wait}\n\ndef main"))
    ended = processes.run([[name, *flags] for flags in processes.among(2)], tmp_path)
    assert [each.code for each in ended] == [1, 1], ended
    last = (tmp_path / "waiting").stat().st_mtime
    time.sleep(1)
    assert (tmp_path / "waiting").stat().st_mtime == last


@pytest.mark.slow
def test_a_bug_keeps_its_traceback(tmp_path: pathlib.Path) -> None:
    ended = run_pair(tmp_path, "together() if jax.process_index() else 1 / 0")
    assert [each.code for each in ended] == [1, 1], ended
    assert "Traceback" in ended[0].err and "1 / 0" in ended[0].err
    assert ended[1].err == (
        f"process 1 ({HOST}): error: process 0 ({HOST}) has ended: ZeroDivisionError: division by "
        "zero\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "dead, number, place",
    [
        (0, signal.SIGKILL, "together()"),
        (1, signal.SIGKILL, "together()"),
        (1, signal.SIGKILL, "time.sleep(0.1)"),
        (0, signal.SIGKILL, "time.sleep(0.1)"),
    ],
)
def test_one_that_dies_ends_all(
    tmp_path: pathlib.Path, dead: int, number: signal.Signals, place: str
) -> None:
    name = command(
        tmp_path,
        f"""
        together()
        print("under way", flush=True)
        while True:
            {place}
        """,
        heartbeat=HEARTBEAT,
    )
    with processes.start([[name, *flags] for flags in processes.among(2)], tmp_path) as running:
        for process in (0, 1):
            running.wait_for(process, "under way")
        running.signal(dead, number)
        died = time.monotonic()
        ended = running.end(30)
    assert time.monotonic() - died < 3 * HEARTBEAT
    survivor = ended[1 - dead]
    assert ended[dead].code == -number and survivor.code not in (0, -signal.SIGKILL)
    assert "another task died" in survivor.err or "Gloo" in survivor.err


@pytest.mark.slow
def test_others_that_do_not_come(tmp_path: pathlib.Path) -> None:
    name = command(tmp_path, "print('started')", start=START)
    apart = [processes.among(2)[process] for process in (0, 1)]  # each uses a port of its own
    expected = "not all of the 2 processes joined", f"could not be reached within {START} s"
    for i, ended in enumerate(processes.run([[name, *flags] for flags in apart], tmp_path)):
        assert ended.code == 1 and "started" not in ended.out
        waiting, error = ended.err.splitlines()
        assert "is waiting for the others at 127.0.0.1:" in waiting
        assert error.startswith(f"process {i} ({HOST}): error: ") and expected[i] in error


@pytest.mark.medium
def test_a_port_that_is_taken(tmp_path: pathlib.Path) -> None:
    name = command(tmp_path, "print('started')")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        flags = [f"--coordinator=127.0.0.1:{port}", "--processes=2", "--process=0"]
        (ended,) = processes.run([[name, *flags]], tmp_path)
    assert ended.code == 1
    assert ended.err.startswith(f"error: the port {port} of --coordinator cannot be used on {HOST}")


@pytest.mark.medium
def test_half_a_cluster(tmp_path: pathlib.Path) -> None:
    name = command(tmp_path, "print('started')")
    (ended,) = processes.run([[name]], tmp_path, [{"JAX_COORDINATOR_ADDRESS": "localhost:1"}])
    assert ended.code == 1
    assert ended.err.startswith("error: this looks like a cluster")
    assert "--processes=1" in ended.err


@pytest.mark.parametrize(
    ("flags", "given", "expected"),
    [
        ("--xla_force_host_platform_device_count=8", None, "32"),
        ("--a=1 --xla_force_host_platform_device_count=8 --b=2", "5", "5"),
        ("--xla_force_host_platform_device_count=1", None, None),
        ("", None, None),
    ],
)
def test_virtual_devices_beyond_the_cores_get_threads_to_spare(
    flags: str, given: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread per device is too few: XLA waits for another one, and aborts."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("NPROC", given or "")
    if given is None:
        monkeypatch.delenv("NPROC")
    hosts.start(processes=1)
    assert os.environ.get("NPROC") == expected


@pytest.mark.medium
def test_the_threads_are_there_when_devices_are() -> None:
    program = (
        "import os, jax; from sop_jax.parallel import hosts; os.cpu_count = lambda: 2; "
        "hosts.start(processes=1); jax.devices(); print(len(os.listdir('/proc/self/task')))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "NPROC"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 32  # there are 8 devices
