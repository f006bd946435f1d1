"""The environment of all tests: eight virtual CPU devices, checked types and parsed flags."""

import collections
import ctypes
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

# These are set before JAX is imported, and inherited by the processes that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Where virtual devices outnumber cores, XLA's concurrent scheduler may start collectives in
        # a different order on each device, and they then wait for each other for ever. A few runs
        # with NPROC as below and without this flag passed, which does not show that it is not
        # needed.
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    ]
).strip()
# Without the newer emitters of fusions, XLA compiles a small step in a third of the time. A version
# of XLA that does not know the flag would end the process, so another process tries it first.
QUICK = "--xla_cpu_use_fusion_emitters=false"
if QUICK not in os.environ["XLA_FLAGS"]:
    quick = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {QUICK}"}
    trial = [sys.executable, "-c", "import jax; jax.devices()"]
    if subprocess.run(trial, env=os.environ | quick, capture_output=True).returncode == 0:
        os.environ |= quick
# Collectives wait for ever, too, if they occupy all threads of XLA: this many leave some free. See
# `sop_jax.parallel.hosts.enough_threads`, which does the same for the commands.
os.environ.setdefault("NPROC", "32")
# The workers and processes of the tests share compiled programs, because many are the same.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")  # as `keep_compiled` does
# XLA would spend most of the time of small tests on optimizing programs that run for milliseconds.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# The test processes already use all cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax  # noqa: E402
import optax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

LARGE_KIB = 3 * 2**20  # of memory

# No number changes its type unless code converts it explicitly.
jax.config.update("jax_numpy_dtype_promotion", "strict")


# Roughly the seconds that a test takes, by its mark. All others take a fraction of a second.
SECONDS = {"slow": 20.0, "medium": 4.0}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives all tests of a file to one worker, so that fixtures and programs are made once.

    Files that take long come first, so that the workers end at about the same time.
    """
    seconds = collections.Counter[str]()
    groups = {}
    for item in items:
        own = item.get_closest_marker("xdist_group")
        groups[item] = own.args[0] if own else item.path.name
        if not own:
            item.add_marker(pytest.mark.xdist_group(groups[item]))
        marked = [SECONDS[name] for name in SECONDS if item.get_closest_marker(name)]
        seconds[groups[item]] += max(marked, default=0.2)
    items.sort(key=lambda item: -seconds[groups[item]])  # which keeps the order within a file


@pytest.fixture(scope="session", autouse=True)
def parsed_flags() -> None:
    """Marks the flags of absl as parsed, as in a command, because Grain's workers read them."""
    flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session", autouse=True)
def runs_without_reports() -> Iterator[None]:
    """Lets runs in the test process write no report, which takes longer than their few steps.

    `tests/test_report.py` tests the reports of runs.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        if train := sys.modules.get("sop_jax.train"):  # which a test that trains has imported
            monkeypatch.setattr(train, "reporter", lambda *_: lambda last: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_module() -> Iterator[None]:
    """Frees the compiled programs of a module if the process has grown to several gigabytes.

    The programs of all tests together do not fit the memory of a small machine. Those that took
    long to compile come back from the cache on disk.
    """
    yield
    if sys.platform == "linux" and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > LARGE_KIB:
        jax.clear_caches()
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what is freed otherwise


@pytest.fixture(scope="session", autouse=True)
def libraries_promote() -> Iterator[None]:
    """Exempts library functions that promote types: steps in Adam, and bfloat16 scores."""

    def exempt(function: Callable[..., Any]) -> Callable[..., Any]:
        def promoting(*args: Any, **kwargs: Any) -> Any:
            with jax.numpy_dtype_promotion("standard"):
                return function(*args, **kwargs)

        return promoting

    with pytest.MonkeyPatch.context() as monkeypatch:
        for module, name in [(optax.tree, "bias_correction"), (jax.nn, "dot_product_attention")]:
            monkeypatch.setattr(module, name, exempt(getattr(module, name)))
        yield


@pytest.fixture
def promotion() -> Iterator[None]:
    """Exempts a test, because gradients of JAX's attention in bfloat16 promote types."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of reference data; skips the test if it does not exist, and names its path."""
    beside = pathlib.Path(__file__).resolve().parents[2] / "shared"
    folder = pathlib.Path(os.environ.get("SOP_SHARED_DIR", beside))
    if not folder.is_dir():
        pytest.skip(f"needs the reference data, but {folder} is not a folder; set SOP_SHARED_DIR")
    return folder


@pytest.fixture
def read_only() -> Iterator[pathlib.Path]:
    """A folder that this process cannot write to; a superuser becomes another user for it."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "file").write_text("")
        folder.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(user)
            folder.chmod(0o755)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of an untrained network that maps different images to different features."""
    from runs import APART, make_run  # here, because types are checked in later imports only

    workdir = tmp_path_factory.mktemp("small") / "run"
    make_run(workdir, **APART, **{"eval.batch_size": 16})
    return workdir


@pytest.fixture(scope="session")
def small_network(small_run: pathlib.Path) -> Any:
    """The network of `small_run`."""
    from sop_jax.network import load

    return load(small_run)


@pytest.fixture
def colour_tree(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with red and green images, each in a folder of its class."""
    from datasets import colours

    colours(tmp_path / "data", labelled=True)
    return tmp_path / "data" / "val"
