"""The memory that a compiled program needs on each device, and whether the device has it."""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sop_jax.compiled.gpus import WITHOUT_DEVICE, described_limit

GIB = 2**30


class Chip(NamedTuple):
    """The capacity of a chip.

    Attributes:
        memory: the bytes that a program may use, which are fewer than the chip has. These are the
            numbers that libtpu's compiler reports when they do not suffice.
        rate: the peak rate of matrix products in bfloat16, in operations per second.
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
    """A compiled program and the memory of its devices, in bytes per device.

    Attributes:
        compiled: the program; None if the compiler gave up for lack of memory.
        wanted: the bytes that the program needs; the compiler's own message if it gave up without
            naming a number.
        temporary: the bytes of `wanted` for intermediate results such as activations; None if the
            compiler gave up.
        limit: the bytes that the program may use; None if the device does not report them.
    """

    compiled: Any | None
    wanted: int | str
    temporary: int | None
    limit: float | None

    @property
    def fits(self) -> bool | None:
        """Whether the program fits; None if that is not known."""
        if self.compiled is None:
            return False
        assert isinstance(self.wanted, int)
        return None if self.limit is None else self.wanted <= self.limit


def compile_and_compare(lowered: Any, devices: list[Any]) -> Fit:
    """Compiles a program and compares the memory that it needs with that of its devices.

    Args:
        lowered: from `jax.jit(...).lower(...)`; of the same size on every device.
        devices: the devices that the program is for.

    Raises:
        jax.errors.JaxRuntimeError: the compiler failed for another reason than lack of memory.
    """
    limit = bytes_limit(devices)
    try:
        compiled = lowered.compile(WITHOUT_DEVICE if is_described_gpu(devices[0]) else None)
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
    """Returns the bytes that programs may use on each of some devices of the same kind.

    For TPUs, this is the number in CHIPS. CPU devices share the memory of their machine, so each
    has an equal share of what is available now plus what JAX's arrays already take. A GPU that is
    only described has what JAX's allocator would take of it. Other devices report the number
    themselves; None if they do not.

    Raises:
        UserError: for a described GPU, the environment is one with which no run starts.
    """
    device = devices[0]
    if device.device_kind in CHIPS:
        return CHIPS[device.device_kind].memory
    if device.platform == "cpu":
        free = available_bytes()
        here = sum(device.process_index == jax.process_index() for device in devices)
        return None if free is None else (free + held_bytes()) / max(1, here)
    if is_described_gpu(device):
        return described_limit(device.device_kind)
    here = [device for device in devices if device.process_index == jax.process_index()]
    limit = (here[0].memory_stats() or {}).get("bytes_limit")  # other processes' do not report it
    return None if limit is None else float(limit)


def is_described_gpu(device: Any) -> bool:
    """Whether a device is a GPU that is only described, see `gpus.described_gpus`."""
    return device.platform == "gpu" and device.client.runtime_type == "compile_only_runtime"


def held_bytes() -> int:
    """Returns the bytes of the arrays that JAX holds on the devices of this process."""
    return sum(
        math.prod(array.sharding.shard_shape(array.shape))
        * array.dtype.itemsize
        * len(array.sharding.addressable_devices)
        for array in jax.live_arrays()
        if not jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)
    )


def available_bytes(root: Path = Path("/")) -> int | None:
    """Returns the bytes that this process can still allocate.

    This is the least of what is available on the machine and within the limits of its control
    groups.

    Args:
        root: the folder that holds `proc` and `sys`.

    Returns:
        The bytes; None if the system does not report them, as on systems other than Linux.
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
        # A container may see its own group as the root, whatever path it is given.
        inner = mount / path.lstrip("/")
        for folder in [inner, *inner.parents]:
            if folder.is_relative_to(mount):
                found += _left_in_group(folder, *names)
    return min(found, default=None)


# Files of a control group: its limit, its usage, and the part of the usage that is droppable cache.
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")


def _left_in_group(folder: Path, limit: str, usage: str, files: str) -> list[int]:
    """Returns the bytes left of the group's limit, or nothing if it has no limit."""
    try:
        most = int((folder / limit).read_text())  # ValueError for "max", which means no limit
        used = int((folder / usage).read_text())
        stat = (folder / "memory.stat").read_text()
    except (OSError, ValueError):
        return []
    dropped = re.search(rf"^{files} (\d+)$", stat, re.MULTILINE)
    return [max(0, most - used + (int(dropped[1]) if dropped else 0))]


def exhausted(error: str) -> int | str:
    """Returns the bytes that a program needed, from the compiler's error, or its first line."""
    # The wording depends on whether the compiler gave up before or after it assigned memory.
    match = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMGT])", error)
    if match is None:
        return error.splitlines()[0]
    return round(float(match[1]) * 1024 ** (" KMGT".index(match[2])))


def in_gib(size: int | float | str) -> str:
    """Returns bytes in GiB for people; the message of a compiler that names no number is kept."""
    return size if isinstance(size, str) else f"{size / GIB:.2f} GiB"
