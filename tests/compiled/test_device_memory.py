"""The memory that a program needs and a device has, and the message if it does not fit."""

import pathlib
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sop_jax.compiled import device_memory
from sop_jax.compiled.device_memory import (
    available_bytes,
    bytes_limit,
    compile_and_compare,
    exhausted,
    held_bytes,
)

GIB = 2**30
NO_LIMIT = 2**63 - 4096  # in version 1 of control groups


def machine(root: pathlib.Path, files: dict[str, object], groups: str) -> pathlib.Path:
    """Makes a root with 20 GiB available and these files of control groups."""
    given = {
        "proc/meminfo": f"MemTotal: 30000000 kB\nMemAvailable:   {20 * 2**20} kB\n",
        "proc/self/cgroup": groups,
    } | {f"sys/fs/cgroup/{name}": value for name, value in files.items()}
    for name, value in given.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{value}\n")
    return root


def version_1(folder: str, limit: int, usage: int, files: int = 0) -> dict[str, object]:
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": usage,
        f"{folder}/memory.stat": f"inactive_file 7\ntotal_inactive_file {files}",
    }


def version_2(folder: str, limit: object, usage: int, files: int = 0) -> dict[str, object]:
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": usage,
        f"{folder}/memory.stat": f"anon 5\ninactive_file {files}",
    }


@pytest.mark.parametrize(
    ("files", "groups", "expected"),
    [
        ({}, "0::/", 20),
        (version_2("a/b", "max", GIB), "0::/a/b", 20),
        (version_2("a/b", 8 * GIB, 3 * GIB, files=GIB), "0::/a/b", 6),
        (version_2("a", 8 * GIB, 3 * GIB) | version_2("a/b", "max", GIB), "0::/a/b", 5),
        (version_2("", 4 * GIB, GIB), "0::/as/the/host/calls/it", 3),
        (version_1("memory/a", NO_LIMIT, GIB), "4:memory:/a\n0::/", 20),
        (version_1("memory/a", 8 * GIB, 3 * GIB, files=GIB), "4:cpu:/\n3:memory:/a\n0::/", 6),
        (version_1("memory", 4 * GIB, GIB), "3:hugetlb,memory:/as/the/host/calls/it", 3),
        (version_1("memory", 4 * GIB, 5 * GIB), "3:memory:/", 0),
    ],
    ids=str,
)
def test_memory_is_what_machine_and_control_groups_leave(
    tmp_path: pathlib.Path, files: dict[str, object], groups: str, expected: int
) -> None:
    assert available_bytes(machine(tmp_path, files, groups)) == expected * GIB


def test_a_system_that_does_not_say_gives_no_limit(tmp_path: pathlib.Path) -> None:
    assert available_bytes(tmp_path) is None


def test_processors_share_what_is_left_and_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "available_bytes", lambda: 8 * GIB)
    monkeypatch.setattr(device_memory, "held_bytes", lambda: GIB)
    assert bytes_limit(jax.devices()[:1]) == 9 * GIB
    assert bytes_limit(jax.devices()[:4]) == 9 * GIB / 4
    monkeypatch.setattr(device_memory, "available_bytes", lambda: None)
    assert bytes_limit(jax.devices()) is None


def test_other_devices_report_their_own_limit() -> None:
    def device(kind: str, stats: dict[str, int] | None) -> Any:
        return SimpleNamespace(
            device_kind=kind,
            platform="gpu",
            client=SimpleNamespace(runtime_type="tfrt"),
            process_index=0,
            memory_stats=lambda: stats,
        )

    assert bytes_limit([device("NVIDIA H100", {"bytes_limit": 60 * GIB})]) == 60 * GIB
    assert bytes_limit([device("NVIDIA H100", None)]) is None
    assert bytes_limit([device("TPU v4", None)]) == 30.75 * GIB


def test_the_memory_of_another_process_is_that_of_ones_own() -> None:
    """A device of another process does not say how much it has."""

    def device(process: int, stats: Any) -> Any:
        client = SimpleNamespace(runtime_type="tfrt")
        return SimpleNamespace(
            device_kind="NVIDIA H100",
            platform="gpu",
            client=client,
            process_index=process,
            memory_stats=stats,
        )

    others = device(1, lambda: pytest.fail("not addressable"))
    assert bytes_limit([others, device(0, lambda: {"bytes_limit": GIB})]) == GIB


def test_arrays_count_on_every_device_that_has_them() -> None:
    before = held_bytes()
    mesh = jax.make_mesh((8,), ("data",))
    array = np.zeros((64, 4), np.float32)
    spread = jax.device_put(array, jax.NamedSharding(mesh, jax.P("data")))
    assert held_bytes() - before == array.nbytes
    copied = jax.device_put(array, jax.NamedSharding(mesh, jax.P()))
    assert held_bytes() - before == 9 * array.nbytes
    del spread, copied


def test_a_program_takes_what_it_is_given_gives_and_needs_between() -> None:
    def product(x: jax.Array) -> jax.Array:
        return jnp.sin(x @ x.T).sum(1)

    size = 2048
    lowered = jax.jit(product).lower(jax.ShapeDtypeStruct((size, 4), jnp.float32))
    fit = compile_and_compare(lowered, jax.devices()[:1])
    assert fit.fits is True and fit.compiled is not None
    assert isinstance(fit.wanted, int)
    assert 4 * size * size < fit.wanted < 3 * 4 * size * size


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (40.50G) exceeds available HBM (15.75G).",
            round(40.5 * GIB),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 812.25M of 15.75G hbm.",
            round(812.25 * 2**20),
        ),
        ("RESOURCE_EXHAUSTED: no room\nat all", "RESOURCE_EXHAUSTED: no room"),
    ],
)
def test_what_a_program_wanted_is_read_from_the_refusal(error: str, wanted: int | str) -> None:
    assert exhausted(error) == wanted
