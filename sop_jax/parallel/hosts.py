"""Several processes as one run: how they find each other, agree, stop and end together.

A process is what a launcher starts: one per host of a TPU pod, or one per GPU or per node of a
SLURM job. Processes communicate through JAX's coordination service, which runs in process 0 and is
available before any device is; only `anywhere`, which is called at every step, uses the devices.
In a run of a single process all functions except `anywhere` return at once.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from importlib import metadata
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool

from sop_jax import __version__
from sop_jax.errors import LOST, UserError

# All in seconds.
START_TIMEOUT = 300  # for all processes to join, or to reach the same point of their start
HEARTBEAT_TIMEOUT = 60  # without a heartbeat, a process counts as dead and the others end
END_TIMEOUT = 24 * 3600  # for the others to finish; the death of one ends the wait sooner
SHARED_TIMEOUT = 60  # for a file to appear on other hosts: NFS caches that a folder was absent
POLL_INTERVAL = 0.5  # between two checks whether another process has failed
LINGER = 4 * POLL_INTERVAL  # a failing process stays so long, so that the others read why first
QUIET = 15  # before a message says that this process is waiting for the others

THREADS = 4  # of XLA per virtual device, see `enough_threads`
_VIRTUAL = r"--xla_force_host_platform_device_count=(\d+)"

_FAILURE = "sop_jax/failure"  # the key under which a failing process says why
_SHOWN = 10  # differences listed in an error

_call = itertools.count()  # numbers the calls of `gather`, equally on all processes
_watch: threading.Thread | None = None  # runs `_leave_with_others`
_over = threading.Event()  # set when all processes have finished normally
_leaving = threading.Lock()  # held by the thread that ends this process


def check_flags(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Checks the flags that describe the processes: all three, none, or a single process.

    Args:
        coordinator: `HOST:PORT` of process 0.
        processes: the number of processes.
        process: the number of this process, from 0.

    Raises:
        UserError: a flag is missing or invalid.
    """
    if processes == 1 and process in (None, 0):
        return
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if coordinator is None or processes is None or process is None:
        raise UserError(
            f"{' and '.join(missing)} {'are' if missing[1:] else 'is'} missing: several processes "
            "need --coordinator=HOST:PORT and --processes=N, the same for all of them, and "
            "--process=I, a different number from 0 to N-1 for each. For a single process, give "
            "only --processes=1"
        )
    if not re.fullmatch(r"\S+:[0-9]+", coordinator):
        raise UserError(
            "--coordinator must be HOST:PORT, the host of process 0 and a port that is free there, "
            f"not {coordinator!r}; correct it"
        )
    if not 0 < int(coordinator.rpartition(":")[2]) < 2**16:
        raise UserError(
            f"--coordinator={coordinator} has no valid port: expected a number from 1 to 65535; "
            "choose a port that is free on the host of process 0"
        )
    if process not in range(processes):
        raise UserError(
            f"--process={process} is not one of the --processes={processes}: they are numbered "
            f"from 0 to {processes - 1}; give each process a number of its own"
        )


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins this process to its run; must be called before anything else uses JAX.

    Without arguments, JAX looks for a cluster (a TPU pod, SLURM, Open MPI or Kubernetes). If there
    is none, or if `processes` is 1, this process is a run of its own.

    Args:
        coordinator: `HOST:PORT` of process 0.
        processes: the number of processes.
        process: the number of this process, from 0.

    Raises:
        UserError: the arguments are invalid (see `check_flags`), the other processes did not join
            within START_TIMEOUT seconds, or they have other versions.
    """
    check_flags(coordinator, processes, process)
    enough_threads()
    if processes == 1:
        return
    # JAX would catch SIGTERM for a service of its own, but `Interruption` handles signals here.
    jax.config.update("jax_enable_preemption_service", False)
    if coordinator is not None:
        if process == 0:
            _check_port(coordinator)
        _join(
            coordinator_address=coordinator,
            num_processes=processes,
            process_id=process,
            cluster_detection_method="deactivate",
        )
    elif not _one_task():
        try:
            _join(local_device_ids=_devices_of_task())
        except UserError:
            raise
        except Exception as error:  # the libraries of clusters raise many kinds
            if str(error) == "coordinator_address should be defined.":
                return  # there is no cluster
            raise UserError(
                "this looks like a cluster, but the processes of the run could not be determined: "
                f"{str(error).rstrip('.')}. Give --coordinator, --processes and --process, or "
                "--processes=1 for a run of this process only"
            ) from error
    if not several():
        return
    global _watch
    _watch = threading.Thread(target=_leave_with_others, daemon=True)
    _watch.start()
    check_agreement({"--processes": distributed().num_processes} | versions())


def enough_threads() -> None:
    """Makes XLA start more threads if there are more virtual CPU devices than cores.

    By default XLA starts one thread per device. All of them may then wait in collectives for work
    that needs another thread, until XLA aborts the process. A value of NPROC in the environment
    takes precedence. XLA starts its threads with the first device, so this has no effect later.
    """
    asked = re.findall(_VIRTUAL, os.environ.get("XLA_FLAGS", ""))  # the last one takes effect
    devices = int(asked[-1]) if asked else jax.config.values["jax_num_cpu_devices"]
    if devices > (os.cpu_count() or 1):
        os.environ.setdefault("NPROC", str(THREADS * devices))


def several() -> bool:
    """Whether the run has several processes."""
    return (distributed().num_processes or 1) > 1


def name() -> str:
    """Returns a human-readable name of this process: its number and its host."""
    return f"process {distributed().process_id} ({socket.gethostname()})"


def distributed() -> Any:
    """Returns JAX's state of this process among the others, such as its coordination client.

    JAX makes none of it public without starting devices.
    """
    from jax._src.distributed import global_state

    return global_state


def is_first() -> bool:
    """Whether this is process 0, which writes and prints for all; uses no device."""
    return not distributed().process_id


def gather(text: str, timeout: int = START_TIMEOUT) -> list[str]:
    """Returns the texts of all processes in their order; all call this at the same points.

    Args:
        text: the text of this process.
        timeout: the seconds to wait for the slowest process; END_TIMEOUT after work that takes
            them different times.

    Raises:
        UserError: a process did not come in time.
    """
    if not several():
        return [text]
    client, place = _client(), f"sop_jax/{next(_call)}"
    client.key_value_set(f"{place}/{distributed().process_id}", text)
    try:
        client.wait_at_barrier(place, timeout * 1000)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"{name()} waited {timeout} s for the others to reach the same point of their "
            f"start: {str(error).partition(chr(10))[0]}. The longest step of a start is to list "
            "the images; check that every process can read them, and start all of them again"
        ) from error
    values = {int(key.rpartition("/")[2]): value for key, value in client.key_value_dir_get(place)}
    return [values[process] for process in sorted(values)]


def agree(value: int) -> int:
    """Returns process 0's value on all processes, which call this at the same points."""
    return int(broadcast(str(value)))


def broadcast(text: str) -> str:
    """Returns process 0's text on all processes, which call this at the same points."""
    return gather(text)[0]


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Checks that facts are the same on all processes, which all call this.

    Args:
        facts: values by name, which are compared as JSON, or as their `str` if they have none.

    Raises:
        UserError: on every process, with the same message: which process differs from process 0,
            and in what.
    """
    mine = {fact: json.dumps(value, default=str) for fact, value in facts.items()}
    first, *rest = (json.loads(text) for text in gather(json.dumps([name(), mine])))
    different = [
        f"{who}: {fact} is {theirs.get(fact, 'absent')}, {first[0]} has "
        f"{first[1].get(fact, 'none')}"
        for who, theirs in rest
        for fact in sorted(theirs.keys() | first[1].keys())
        if theirs.get(fact) != first[1].get(fact)
    ]
    if different:
        more = [f"and {len(different) - _SHOWN} more"] if len(different) > _SHOWN else []
        raise UserError(
            "the processes of a run must have the same settings, versions and data, but these "
            "differ:\n  "
            + "\n  ".join(different[:_SHOWN] + more)
            + "\nStart the same command in the same environment on every host."
        )


def versions() -> dict[str, str]:
    """Returns the versions of Python, of this package, and of packages that affect results."""
    found = {"Python": f"{sys.version_info.major}.{sys.version_info.minor}", "sop_jax": __version__}
    packages = ("flax", "grain", "jax", "jaxlib", "numpy", "opencv-python-headless", "optax")
    compilers = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
    for package in (*packages, "orbax-checkpoint", *compilers):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    code = hashlib.sha256()
    root = pathlib.Path(__file__).parents[1]  # the package
    for file in sorted(root.rglob("*.py")):
        code.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return found | {"the code of sop_jax": code.hexdigest()[:12]}


def check_shared(folder: epath.PathLike) -> None:
    """Checks that all processes see the same folder, and leaves the file system as it was.

    Args:
        folder: the folder, local or remote (`gs://`); it need not exist yet.

    Raises:
        UserError: on every process, with the same message: process 0 cannot write there, or some
            processes did not see what it wrote within SHARED_TIMEOUT seconds.
    """
    if not several():
        return
    folder = epath.Path(folder)
    with contextlib.ExitStack() as traces:
        trouble, probe = "", f".seen-by-all-{uuid.uuid4().hex}"
        if distributed().process_id == 0:
            try:
                _write(folder / probe, traces)
            except OSError as error:
                trouble = f"{name()} cannot write to {folder}: {error}; choose another --workdir"
        trouble, probe = json.loads(gather(json.dumps([trouble, probe]))[0])
        seen = not trouble and _appears(folder / probe)
        answers = (json.loads(text) for text in gather(json.dumps([name(), seen])))
        blind = [who for who, sees in answers if not sees]
    gather("")  # no process continues before the probe is removed
    if trouble or blind:
        raise UserError(
            trouble
            or f"{', '.join(blind)} cannot see what process 0 writes to {folder}: all hosts of a "
            "run need the same folder. Choose one on a network file system that all of them mount, "
            "or in a gs:// bucket"
        )


def anywhere(*flags: bool) -> Bool[jax.Array, " flags"]:
    """Returns which flags are set on any process, as replicated bools, without waiting for them.

    The result is ready when the devices have finished the work that they were given before. All
    processes call this at the same points. They must read each answer, with `jax.device_get`, a
    few calls later, because CPUs deadlock when dozens of answers are pending.
    """
    split, reduce = _reduction()
    mine = [jax.device_put(np.array([flags]), device) for device in split.mesh.local_devices]
    shape = (split.num_devices, len(flags))
    return reduce(jax.make_array_from_single_device_arrays(shape, split, mine))


def stop() -> None:
    """Waits at the end of a command for all processes, which may then exit in any order."""
    if _watch is None:
        return
    _client().wait_at_barrier("sop_jax/end", END_TIMEOUT * 1000)
    _over.set()
    _watch.join()  # a thread that still uses the service when Python exits would abort the process


def leave(code: int, message: str, words: str) -> NoReturn:
    """Prints why, ends this process at once, and makes the others end soon with the same reason.

    A normal exit would hang: in it JAX waits for the other processes, and they wait for this one.

    Args:
        code: the exit code of this process. The others exit with the same code if it is 1 (an
            error that a person must fix) or 130 (an interruption), and with LOST otherwise.
        message: what this process prints to stderr.
        words: what the others print about it.
    """
    with _leaving:
        print(f"{name()}: {message}" if several() else message, file=sys.stderr, flush=True)
        if _watch is not None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one failed earlier
                _client().key_value_set(_FAILURE, f"{code} {name()} has ended: {words}")
            _linger()
        _end(code)


def _leave_with_others() -> None:
    """Waits until another process calls `leave`, then ends this process."""
    while not _over.wait(POLL_INTERVAL):
        try:
            code, _, words = _client().key_value_try_get(_FAILURE).partition(" ")
        except jax.errors.JaxRuntimeError:
            continue  # no process has failed, or the service is gone and JAX ends this process
        if _leaving.acquire(blocking=False):
            kind = "" if code == "130" else "error: "
            print(f"{name()}: {kind}{words}", file=sys.stderr, flush=True)
            _end(int(code) if code in ("1", "130") else LOST)
        return


def _linger() -> None:
    """Waits for the others; a launcher such as mpirun that signals to end stops this wait only."""
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(LINGER)


def _end(code: int) -> NoReturn:
    if distributed().process_id == 0 and _watch is not None:
        _linger()  # the service ends with this process, and lingering ones still need it
    for child in multiprocessing.active_children():  # a normal exit would end these workers
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _join(**arguments: Any) -> None:
    """Calls `jax.distributed.initialize` in a thread, since it aborts the process on a timeout."""
    joined: concurrent.futures.Future[None] = concurrent.futures.Future()

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=START_TIMEOUT + 60,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            )
        except Exception as error:
            joined.set_exception(error)
        else:
            joined.set_result(None)

    threading.Thread(target=initialize, daemon=True).start()
    quiet = min(QUIET, START_TIMEOUT)
    with contextlib.suppress(concurrent.futures.TimeoutError):
        return joined.result(quiet)
    coordinator = distributed().coordinator_address
    place = f" at {coordinator}" if coordinator else ""
    print(f"{name()} is waiting for the others{place}", file=sys.stderr, flush=True)
    try:
        joined.result(START_TIMEOUT - quiet)
    except concurrent.futures.TimeoutError:
        raise UserError(_why_not_joined(coordinator)) from None


def _why_not_joined(coordinator: str | None) -> str:
    """Returns a message that says why the processes did not join each other."""
    if coordinator is None:
        return (
            f"the cluster did not name a coordinator within {START_TIMEOUT} s: process 0 names it "
            "when it starts. Check that process 0 was started"
        )
    host, _, port = coordinator.rpartition(":")
    if distributed().process_id != 0:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            return (
                f"the coordinator {coordinator} could not be reached within {START_TIMEOUT} s: "
                f"{error}. Process 0 must run on that host. Start it there, and open the port to "
                "this host"
            )
    return (
        f"not all of the {distributed().num_processes} processes joined the coordinator "
        f"{coordinator} within {START_TIMEOUT} s. Start every one of them with a number of its "
        "own, or give --processes=1 for a run of this process only"
    )


def _check_port(coordinator: str) -> None:
    """Raises UserError if the coordinator's port is taken on this host, where JAX would crash."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"the port {port} of --coordinator cannot be used on {socket.gethostname()}, the "
                f"host of process 0: {error}; choose another port"
            ) from error


def _one_task() -> bool:
    """Whether a launcher started this process only, to which JAX would then show only one GPU."""
    tasks = os.environ.get("SLURM_NTASKS")
    return os.environ.get("OMPI_COMM_WORLD_SIZE", tasks) == "1"


def _devices_of_task() -> list[int] | None:
    """Returns the GPUs that JAX may use: [] for all visible ones, None for JAX's own rule.

    JAX's rule is the GPU with the number of the task on its node. A SLURM task that has a node to
    itself, or to which SLURM shows only one GPU, uses all that are visible.
    """
    environ = os.environ
    if "SLURM_PROCID" not in environ:
        return None
    alone = environ.get("SLURM_NTASKS") == environ.get("SLURM_STEP_NUM_NODES")
    shown = environ.get("CUDA_VISIBLE_DEVICES", "")
    return [] if alone or re.fullmatch(r"[^,]+", shown) else None


def _client() -> Any:
    return distributed().client


@functools.cache
def _reduction() -> tuple[NamedSharding, Any]:
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), ("all",), axis_types=(AxisType.Auto,), devices=devices)
    reduce = functools.partial(jnp.any, axis=0)
    return NamedSharding(mesh, P("all")), jax.jit(reduce, out_shardings=NamedSharding(mesh, P()))


def _write(file: epath.Path, traces: contextlib.ExitStack) -> None:
    """Makes a file and the folders above it; closing `traces` removes them again."""
    if "://" not in str(file):  # buckets have no folders
        for folder in reversed(file.parents):
            if not folder.exists():
                folder.mkdir()
                traces.callback(_remove, folder)
    file.write_text("")
    traces.callback(file.unlink, missing_ok=True)  # see `paths.check_writable`


def _remove(folder: epath.Path) -> None:
    with contextlib.suppress(OSError):  # another program has written something there
        folder.rmdir()


def _appears(file: epath.Path) -> bool:
    """Whether a file that another host wrote appears within SHARED_TIMEOUT seconds."""
    until = time.monotonic() + SHARED_TIMEOUT
    while not (there := file.exists()) and time.monotonic() < until:
        time.sleep(0.5)
    return there
