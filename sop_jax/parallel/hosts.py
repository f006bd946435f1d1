"""Several processes as one run: how they find each other, agree, stop and end together.

A process is what a launcher starts: one for each host of a TPU pod, one for each GPU or each node
of a SLURM job. They talk through JAX's coordination service, which lives in process 0 and is
there before any device is; only `anywhere`, asked at every step, goes through the devices. All
functions but `anywhere` do nothing, at no cost, where one process runs alone.
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

# JAX shows its client of the coordination service nowhere else.
from jax._src.distributed import global_state
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sop_jax import __version__
from sop_jax.errors import LOST, UserError

# All in seconds.
START = 300  # until all processes have joined, or come to the same point of their start
HEARTBEAT = 60  # without a sign of life, until a process is taken for dead and the others end
END = 24 * 3600  # that a process waits for the others at its end; a dead one ends this sooner
SHARED = 60  # for a file to be seen elsewhere: what NFS may remember that a folder was not there
POLL = 0.5  # between two questions whether another process has failed
LINGER = 4 * POLL  # of a failed process, whose end is an error to those that know nothing yet
PATIENCE = 15  # of a person who sees nothing happen

THREADS = 4  # of XLA for each virtual device, see `enough_threads`
_VIRTUAL = r"--xla_force_host_platform_device_count=(\d+)"

_FAILURE = "sop_jax/failure"
_SHOWN = 10  # differences

_call = itertools.count()
_watch: threading.Thread | None = None
_over = threading.Event()  # all processes have come to an end in good order
_leaving = threading.Lock()  # held by the thread that ends this process


def check(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Checks what the command line says of the processes: all of it, nothing, or one process.

    Raises:
        UserError: a part is missing or wrong.
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
            "need --coordinator=HOST:PORT and --processes=N, the same for all, and --process=I, "
            "each its own from 0 to N-1; --processes=1 alone is one process"
        )
    if not re.fullmatch(r"\S+:[0-9]+", coordinator):
        raise UserError(
            "--coordinator must be HOST:PORT, the host of process 0 and a port that is free there, "
            f"not {coordinator!r}"
        )
    if not 0 < int(coordinator.rpartition(":")[2]) < 2**16:
        raise UserError(f"--coordinator={coordinator}: a port is a number from 1 to 65535")
    if process not in range(processes):
        raise UserError(
            f"--process={process} is none of the --processes={processes}: they count from 0 to "
            f"{processes - 1}"
        )


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Makes this process one of a run's, before anything else is asked of JAX.

    With nothing given JAX looks for a cluster (a TPU pod, SLURM, Open MPI, Kubernetes); where
    there is none, and with `processes` 1 wherever it is, this process stays alone.

    Args:
        coordinator: `HOST:PORT` of process 0.
        processes: how many there are.
        process: which one this is, from 0.

    Raises:
        UserError: `check` says no, the others did not come within START seconds, or they have
            other versions.
    """
    check(coordinator, processes, process)
    enough_threads()
    if processes == 1:
        return
    # JAX would catch SIGTERM for a service of its own; `Interruption` is this project's.
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
        except Exception as error:  # whatever a cluster's own library raises
            if str(error) == "coordinator_address should be defined.":
                return  # there is no cluster
            raise UserError(
                f"this looks like a cluster, but not like one of several processes: "
                f"{str(error).rstrip('.')}. Give --coordinator, --processes and --process, or "
                "--processes=1 to run this one alone"
            ) from error
    if not several():
        return
    global _watch
    _watch = threading.Thread(target=_leave_with_others, daemon=True)
    _watch.start()
    check_agreement({"--processes": global_state.num_processes} | versions())


def enough_threads() -> None:
    """Has XLA make more threads where virtual CPU devices are more than cores.

    It makes one for each device, all of which may wait in collectives for work that would need
    one more; XLA then ends the process. What NPROC says already stays. Threads are made with the
    first device, and this has no effect after that.
    """
    asked = re.findall(_VIRTUAL, os.environ.get("XLA_FLAGS", ""))  # the last of them counts
    devices = int(asked[-1]) if asked else jax.config.values["jax_num_cpu_devices"]
    if devices > (os.cpu_count() or 1):
        os.environ.setdefault("NPROC", str(THREADS * devices))


def several() -> bool:
    """Whether this process is one of several."""
    return (global_state.num_processes or 1) > 1


def name() -> str:
    """What a person calls this process: its number and its host."""
    return f"process {global_state.process_id} ({socket.gethostname()})"


def is_first() -> bool:
    """Whether this is process 0, which writes and speaks for all; touches no device."""
    return not global_state.process_id


def agree(value: int) -> int:
    """Process 0's value, on all processes."""
    return int(tell(str(value)))


def tell(text: str) -> str:
    """Process 0's text, on all processes; all call it at the same places."""
    return _gather(text)[0]


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Checks that what must be the same everywhere is; all processes call it.

    Args:
        facts: by name, as JSON or with a `str` that says it all.

    Raises:
        UserError: on every process, the same: which one differs in what from process 0.
    """
    mine = {fact: json.dumps(value, default=str) for fact, value in facts.items()}
    first, *rest = (json.loads(text) for text in _gather(json.dumps([name(), mine])))
    different = [
        f"{who}: {fact} is {theirs.get(fact, 'not there')}, {first[0]} has "
        f"{first[1].get(fact, 'none')}"
        for who, theirs in rest
        for fact in sorted(theirs.keys() | first[1].keys())
        if theirs.get(fact) != first[1].get(fact)
    ]
    if different:
        more = [f"and {len(different) - _SHOWN} more"] if len(different) > _SHOWN else []
        raise UserError(
            "the processes of a run must have the same settings, versions and data, and these "
            "differ:\n  "
            + "\n  ".join(different[:_SHOWN] + more)
            + "\nStart the same command in the same environment on every host."
        )


def versions() -> dict[str, str]:
    """Of Python, of this package and its code, and of the packages that decide what is computed."""
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
    """Checks that all processes see one folder, and leaves it, or its absence, as it was.

    Args:
        folder: local or remote (`gs://`); need not be there yet.

    Raises:
        UserError: on every process, the same: process 0 cannot write there, or which ones did not
            see within SHARED seconds what it wrote.
    """
    if not several():
        return
    folder = epath.Path(folder)
    with contextlib.ExitStack() as traces:
        trouble, probe = "", f".seen-by-all-{uuid.uuid4().hex}"
        if global_state.process_id == 0:
            try:
                _write(folder / probe, traces)
            except OSError as error:
                trouble = f"{name()} cannot write to {folder}: {error}; choose another --workdir"
        trouble, probe = json.loads(_gather(json.dumps([trouble, probe]))[0])
        seen = not trouble and _comes(folder / probe)
        answers = (json.loads(text) for text in _gather(json.dumps([name(), seen])))
        blind = [who for who, sees in answers if not sees]
    _gather("")  # nobody goes on before the traces are gone
    if trouble or blind:
        raise UserError(
            trouble
            or f"{', '.join(blind)} cannot see what process 0 writes to {folder}: all hosts of a "
            "run need the same folder. Name one on a network file system that all of them mount, "
            "or a gs:// bucket"
        )


def anywhere(flag: bool) -> jax.Array:
    """Whether any process says so: a replicated bool, which is not waited for here.

    It is ready when the devices have done what they were given before. All processes call this at
    the same places, and read each answer some calls later: CPUs lock up when dozens are under way.
    No transfer is implicit; `jax.device_get` reads it.
    """
    split, reduce = _reduction()
    mine = [jax.device_put(np.array([flag]), device) for device in split.mesh.local_devices]
    return reduce(jax.make_array_from_single_device_arrays((split.num_devices,), split, mine))


def stop() -> None:
    """Waits at the end of a command for the other processes; after it all may end, in any order."""
    if _watch is None:
        return
    _client().wait_at_barrier("sop_jax/end", END * 1000)
    _over.set()
    _watch.join()  # a thread that still asks when Python ends would abort it


def leave(code: int, message: str, words: str) -> NoReturn:
    """Prints why, ends this process at once and the others soon, saying what happened here.

    Python's own end is no way out: there JAX waits for the others, and these for this one.

    Args:
        code: the exit code; of the others too if it is 1, which a person must mend, or 130, a wish
            to stop; else they end with LOST.
        message: for stderr.
        words: what the others say of it.
    """
    with _leaving:
        print(f"{name()}: {message}" if several() else message, file=sys.stderr, flush=True)
        if _watch is not None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one has failed before
                _client().key_value_set(_FAILURE, f"{code} {name()} has ended: {words}")
            time.sleep(LINGER)
        _end(code)


def _leave_with_others() -> None:
    """Waits for another process's `leave`, and ends this one."""
    while not _over.wait(POLL):
        try:
            code, _, words = _client().key_value_try_get(_FAILURE).partition(" ")
        except jax.errors.JaxRuntimeError:
            continue  # nobody has; or the service is gone, on which JAX itself ends this process
        if _leaving.acquire(blocking=False):
            kind = "" if code == "130" else "error: "
            print(f"{name()}: {kind}{words}", file=sys.stderr, flush=True)
            _end(int(code) if code in ("1", "130") else LOST)
        return


def _end(code: int) -> NoReturn:
    if global_state.process_id == 0 and _watch is not None:
        time.sleep(LINGER)  # with it goes the service, which those need that linger themselves
    for child in multiprocessing.active_children():  # workers, which Python would end at its own
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _join(**arguments: Any) -> None:
    """`jax.distributed.initialize`, in a thread: where it waits in vain it aborts the process."""
    joined: concurrent.futures.Future[None] = concurrent.futures.Future()

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=START + 60,
                heartbeat_timeout_seconds=HEARTBEAT,
            )
        except Exception as error:
            joined.set_exception(error)
        else:
            joined.set_result(None)

    threading.Thread(target=initialize, daemon=True).start()
    patience = min(PATIENCE, START)
    with contextlib.suppress(concurrent.futures.TimeoutError):
        return joined.result(patience)
    coordinator = global_state.coordinator_address
    place = f" at {coordinator}" if coordinator else ""
    print(f"{name()} waits for the others{place}", file=sys.stderr, flush=True)
    try:
        joined.result(START - patience)
    except concurrent.futures.TimeoutError:
        raise UserError(_nobody(coordinator)) from None


def _nobody(coordinator: str | None) -> str:
    """Why the processes did not come together."""
    if coordinator is None:
        return f"the cluster did not name a coordinator within {START} s; is process 0 started?"
    host, _, port = coordinator.rpartition(":")
    if global_state.process_id != 0:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            return (
                f"the coordinator {coordinator} could not be reached within {START} s: {error}. "
                "Process 0 must run on that host, and the port must be open to this one"
            )
    return (
        f"not all of {global_state.num_processes} processes came to the coordinator {coordinator} "
        f"within {START} s. Start every one, each with its own number; --processes=1 runs this one "
        "alone"
    )


def _check_port(coordinator: str) -> None:
    """Raises UserError if the coordinator's port is taken on this host: JAX would crash."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"the port {port} of --coordinator cannot be used on {socket.gethostname()}, the "
                f"host of process 0: {error}; choose another"
            ) from error


def _one_task() -> bool:
    """Whether a launcher says that it started this process alone; JAX would show it one GPU."""
    tasks = os.environ.get("SLURM_NTASKS")
    return os.environ.get("OMPI_COMM_WORLD_SIZE", tasks) == "1"


def _devices_of_task() -> list[int] | None:
    """The GPUs that JAX may use: [] for all that it sees, None for its own rule.

    That is the GPU of the task's number on the node. A SLURM task with a node for itself, and one
    to which SLURM shows one GPU, take what they see.
    """
    environ = os.environ
    if "SLURM_PROCID" not in environ:
        return None
    alone = environ.get("SLURM_NTASKS") == environ.get("SLURM_STEP_NUM_NODES")
    shown = environ.get("CUDA_VISIBLE_DEVICES", "")
    return [] if alone or re.fullmatch(r"[^,]+", shown) else None


def _client() -> Any:
    return global_state.client


def _gather(value: str) -> list[str]:
    """Every process's value, in their order; all call it at the same places."""
    if not several():
        return [value]
    client, place = _client(), f"sop_jax/{next(_call)}"
    client.key_value_set(f"{place}/{global_state.process_id}", value)
    try:
        client.wait_at_barrier(place, START * 1000)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"{name()} waited {START} s for the others to come as far in their start, which read "
            f"the list of images last if at all: {str(error).partition(chr(10))[0]}"
        ) from error
    values = {int(key.rpartition("/")[2]): value for key, value in client.key_value_dir_get(place)}
    return [values[process] for process in sorted(values)]


@functools.cache
def _reduction() -> tuple[NamedSharding, Any]:
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), ("all",), axis_types=(AxisType.Auto,), devices=devices)
    return NamedSharding(mesh, P("all")), jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))


def _write(file: epath.Path, traces: contextlib.ExitStack) -> None:
    """Makes a file and the folders above it, which go again with `traces`."""
    if "://" not in str(file):  # buckets know no folders
        for folder in reversed(file.parents):
            if not folder.exists():
                folder.mkdir()
                traces.callback(_remove, folder)
    file.write_text("")
    traces.callback(file.unlink)


def _remove(folder: epath.Path) -> None:
    with contextlib.suppress(OSError):  # somebody else has put something there
        folder.rmdir()


def _comes(file: epath.Path) -> bool:
    """Whether a file that another host wrote appears."""
    until = time.monotonic() + SHARED
    while not (there := file.exists()) and time.monotonic() < until:
        time.sleep(0.5)
    return there
