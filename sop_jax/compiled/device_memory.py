"""What a compiled program takes of a device's memory, and whether the device has it."""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax

GIB = 2**30


class Chip(NamedTuple):
    """What a chip offers.

    Attributes:
        memory: bytes that a program may use: less than the chip has, and as libtpu's compiler
            names them when they do not suffice.
        rate: of matrix products in bfloat16, operations a second at best.
    """

    memory: float
    rate: float


CHIPS = {  # by `jax.Device.device_kind`
    "TPU v4": Chip(30.75 * GIB, 275e12),
    "TPU v5 lite": Chip(15.75 * GIB, 197e12),
    "TPU v5": Chip(95.74 * GIB, 459e12),
    "TPU v6 lite": Chip(31.25 * GIB, 918e12),
}


class Fit(NamedTuple):
    """A program, compiled, beside the memory of its devices. Bytes are those of one device.

    Attributes:
        compiled: None where the compiler gave up for lack of memory.
        wanted: bytes in all; the compiler's own words for it where it gave up without a number.
        temporary: bytes of `wanted` that hold what is computed on the way, such as activations;
            None where the compiler gave up.
        limit: bytes that the program may use; None when the device does not say.
    """

    compiled: Any | None
    wanted: int | str
    temporary: int | None
    limit: float | None

    @property
    def fits(self) -> bool | None:
        """None when that is not known."""
        if self.compiled is None:
            return False
        assert isinstance(self.wanted, int)
        return None if self.limit is None else self.wanted <= self.limit


def compile_and_compare(lowered: Any, devices: list[Any]) -> Fit:
    """Compiles a program and compares what it takes with what its devices have.

    Args:
        lowered: from `jax.jit(...).lower(...)`, of the same size on every device.
        devices: those that it is for.
    """
    limit = bytes_limit(devices)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Fit(None, exhausted(str(error)), None, limit)
    analysis = compiled.memory_analysis()
    wanted = (
        analysis.argument_size_in_bytes
        + max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
        + analysis.temp_size_in_bytes
        + analysis.generated_code_size_in_bytes
    )
    return Fit(compiled, wanted, analysis.temp_size_in_bytes, limit)


def bytes_limit(devices: list[Any]) -> float | None:
    """Bytes that programs may use on each of some equal devices.

    Of a TPU as known. Of CPU devices, which share the memory of their machine, an equal part of
    what is available now and what arrays of JAX take already. Of other devices as they say, and
    None if they do not.
    """
    device = devices[0]
    if device.device_kind in CHIPS:
        return CHIPS[device.device_kind].memory
    if device.platform == "cpu":
        free = available_bytes()
        here = sum(device.process_index == jax.process_index() for device in devices)
        return None if free is None else (free + held_bytes()) / max(1, here)
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return None if limit is None else float(limit)


def held_bytes() -> int:
    """Bytes of the arrays that JAX holds on the devices of this process."""
    return sum(
        math.prod(array.sharding.shard_shape(array.shape))
        * array.dtype.itemsize
        * len(array.sharding.addressable_devices)
        for array in jax.live_arrays()
        if not jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)
    )


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still get: of the machine, and of its control groups' limits.

    Args:
        root: holds `proc` and `sys`.

    Returns:
        None where the system does not say, as outside Linux.
    """
    try:
        text = (root / "proc/meminfo").read_text()
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    machine = re.search(r"^MemAvailable: +(\d+) kB", text, re.MULTILINE)
    found = [] if machine is None else [1024 * int(machine[1])]
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        names = _VERSION_1 if controllers else _VERSION_2
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        # A container may see its own group as the root, whatever path it is told.
        inner = mount / path.lstrip("/")
        for folder in [inner, *inner.parents]:
            if folder.is_relative_to(mount):
                found += _left_in_group(folder, *names)
    return min(found, default=None)


# Of a control group: its limit, what it uses, and which part of that is files it can drop.
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")


def _left_in_group(folder: Path, limit: str, usage: str, files: str) -> list[int]:
    """What is left of the group's limit, if it has one."""
    try:
        most = int((folder / limit).read_text())  # "max" is none
        used = int((folder / usage).read_text())
        stat = (folder / "memory.stat").read_text()
    except (OSError, ValueError):
        return []
    dropped = re.search(rf"^{files} (\d+)$", stat, re.MULTILINE)
    return [max(0, most - used + (int(dropped[1]) if dropped else 0))]


def exhausted(error: str) -> int | str:
    """The bytes that a program wanted that was too large, or the compiler's first line."""
    # It puts this in two ways, by whether it gave up before or after it assigned memory.
    match = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMGT])", error)
    if match is None:
        return error.splitlines()[0]
    return round(float(match[1]) * 1024 ** (" KMGT".index(match[2])))


def in_gib(size: int | float | str) -> str:
    """Bytes for a person; the words of a compiler that gives no number stay."""
    return size if isinstance(size, str) else f"{size / GIB:.2f} GiB"
