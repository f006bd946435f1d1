"""NVIDIA GPUs that programs are compiled for on machines without them: their sizes and rates."""

import importlib.metadata
import os
import re
from typing import Any, NamedTuple

import jax

from sop_jax.errors import UserError, nearest


class Gpu(NamedTuple):
    """A kind of GPU.

    Attributes:
        description: its `jax.Device.device_kind`.
        capability: its compute capability, major and minor.
        cores: the number of streaming multiprocessors.
        lanes: the float32 operations that each of them begins per clock.
        clock: the boost clock in GHz.
        memory: the bytes of memory.
        bandwidth: the bytes per second between memory and cores.
        cache: the bytes of the L2 cache.
        shared: the bytes of shared memory per core, and at most per block.
        threads: the threads that a core holds.
        matrix: the peak rate of matrix products in bfloat16, in operations per second and without
            sparsity; TF32 has half of it.
        link: the bytes per second that it sends to the GPUs of its host.
        host: the largest number of these GPUs in a host.
    """

    description: str
    capability: tuple[int, int]
    cores: int
    lanes: int
    clock: float
    memory: int
    bandwidth: float
    cache: int
    shared: tuple[int, int]
    threads: int
    matrix: float
    link: float
    host: int = 8

    @property
    def scalar(self) -> float:
        """The float32 operations per second, where a multiply-add counts as two."""
        return 2 * self.cores * self.lanes * self.clock * 1e9


# Plain names are the SXM parts. The figures are those of XLA's public descriptions
# (xla/backends/gpu/target_config/specs); the rates of matrix products that these lack, and the
# links, are from NVIDIA's data sheets.
GPUS = {
    "a100_40": Gpu(
        *("NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 1.41, 42_331_013_120, 1.5552e12, 41_943_040),
        *((167_936, 166_912), 2048, 312e12, 300e9, 16),
    ),
    "a100_80": Gpu(
        *("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 85_100_068_864, 2.03904e12, 41_943_040),
        *((167_936, 166_912), 2048, 312e12, 300e9),
    ),
    "a6000": Gpu(
        *("NVIDIA RTX A6000", (8, 6), 84, 128, 1.8, 51_041_271_808, 0.768096e12, 6_291_456),
        *((102_400, 101_376), 1536, 154.8e12, 32e9),
    ),
    "h100": Gpu(
        *("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 84_942_979_072, 3.35232e12, 52_428_800),
        *((233_472, 232_448), 2048, 989e12, 450e9),
    ),
    "h100_pcie": Gpu(
        *("NVIDIA H100 PCIe", (9, 0), 114, 128, 1.755, 84_942_979_072, 2.03904e12, 52_428_800),
        *((233_472, 232_448), 2048, 757e12, 64e9),
    ),
    "h200": Gpu(
        *("NVIDIA H200", (9, 0), 132, 128, 1.98, 151_397_597_184, 4.8e12, 52_428_800),
        *((233_472, 232_448), 2048, 989e12, 450e9),
    ),
    "b200": Gpu(
        *("NVIDIA B200", (10, 0), 148, 128, 1.965, 191_514_411_008, 7.67232e12, 132_644_864),
        *((233_472, 232_448), 2048, 2225e12, 900e9),
    ),
    "b300": Gpu(
        *("NVIDIA B300", (10, 3), 158, 128, 1.965, 297_021_865_984, 7.936e12, 135_528_448),
        *((233_472, 232_448), 2048, 2376e12, 900e9),
    ),
    "rtx6000pro": Gpu(
        *("NVIDIA RTX PRO 6000 Blackwell", (12, 0), 188, 128, 2.6, 103_079_215_104, 1.792e12),
        *(134_217_728, (131_072, 101_376), 1536, 503.8e12, 64e9),
    ),
}

NETWORK = 50e9  # bytes per second that a GPU sends to other hosts: 400 Gbit/s for each, as is usual

# The wheels of the extra `cuda`: its version of CUDA, and those whose versions the compiler needs.
CUDA, CUDNN, RUNTIME = 13, "nvidia-cudnn-cu13", "nvidia-cuda-runtime"

# The autotuner, which needs a device, chooses the tiles of Triton's matrix products. Without it
# they do not compile, so that cuBLAS computes all products here. The program does not run, so no
# time is spent on the machine code of its kernels.
WITHOUT_DEVICE = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_disable_gpuasm_optimizations": True,
    "xla_backend_optimization_level": 0,
}


def described_gpus(topology: str) -> list[Any]:
    """Returns the GPUs of a topology such as h100:8 or h200:2x8 (hosts x GPUs); none need exist.

    Raises:
        UserError: the topology does not exist, the wheels for GPUs are not installed or fail, or
            the environment is one with which a run would not start.
    """
    gpu, hosts, count = parse_topology(topology)
    check_wheels(topology)
    # Otherwise JAX's plugin would look for a driver.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    from jax.experimental import topologies

    try:
        described: Any = topologies.get_topology_desc(
            platform="cuda", topology=f"1x{hosts}x{count}", target_config=target_config(gpu)
        )
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise UserError(
            f"--topology={topology} needs JAX's plugin for CUDA {CUDA}, which is installed but "
            f"failed: {str(error).splitlines()[0]}. Install it again, in an environment of its "
            "own: pip install -e '.[cuda]'"
        ) from error
    return list(described.devices)


def parse_topology(topology: str) -> tuple[Gpu, int, int]:
    """Returns the kind of GPU, the number of hosts, and the number of GPUs in each of them.

    Raises:
        UserError: there is no such topology.
    """
    name, _, sizes = topology.partition(":")
    if name not in GPUS:
        raise UserError(
            f"--topology={topology} names a GPU that is not known here"
            f"{nearest(name, list(GPUS))}; choose one of {', '.join(GPUS)}"
        )
    gpu, numbers = GPUS[name], re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", sizes)
    if numbers is None:
        given = f"the size {sizes!r}" if sizes else "no size"
        raise UserError(
            f"--topology={topology} has {given}; expected a number of GPUs or hosts x GPUs, such "
            f"as {name}:{gpu.host} or {name}:2x{gpu.host}"
        )
    hosts, count = int(numbers[1] or 1), int(numbers[2])
    if count > gpu.host:
        raise UserError(
            f"--topology={topology} does not exist: a host has at most {gpu.host} of these GPUs; "
            f"write hosts x GPUs, such as {name}:{-(-hosts * count // gpu.host)}x{gpu.host}"
        )
    return gpu, hosts, count


def check_wheels(topology: str) -> None:
    """Raises UserError unless the wheels of the extra `cuda` are installed."""
    install = "pip install -e '.[cuda]' (4.6 GB; no GPU or driver is needed)"
    missing = [name for name in (f"jax-cuda{CUDA}-plugin", CUDNN, RUNTIME) if not _version(name)]
    if missing:
        others = [n for n in (12, 14) if _version(f"jax-cuda{n}-plugin")]
        absent = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not"
        found = f"those of CUDA {others[0]} are" if others else absent
        raise UserError(
            f"--topology={topology} needs the wheels of CUDA {CUDA}, which have the compiler for "
            f"GPUs, and {found} installed; run, in an environment of its own: {install}"
        )


def _version(package: str) -> str | None:
    """Returns the version of a package, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def target_config(gpu: Gpu) -> str:
    """Returns XLA's description of a GPU, a GpuTargetConfigProto as text.

    Raises:
        UserError: as in `described_limit`.
    """
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": gpu.shared[0],
        "shared_memory_per_block_optin": gpu.shared[1],
        "threads_per_core_limit": gpu.threads,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.lanes,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(gpu.bandwidth),
        "l2_cache_size": gpu.cache,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": round(described_memory(gpu)),
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    numbers = " ".join(f"{name}: {value}" for name, value in device.items())
    major, minor = gpu.capability
    return (
        f"gpu_device_info {{ {numbers} cuda_compute_capability {{ major: {major} minor: {minor} }} "
        f'}} platform_name: "CUDA" dnn_version_info {{ {_as_proto(CUDNN)} }} '
        f"runtime_version {{ {_as_proto(RUNTIME)} }} "
        f'device_description_str: "{gpu.description}"'
    )


def _as_proto(package: str) -> str:
    """Returns the version of an installed package as a proto with major, minor and patch."""
    numbers = (_version(package) or "0").split(".")
    return " ".join(
        f"{name}: {number}"
        for name, number in zip(("major", "minor", "patch"), numbers, strict=False)
    )


def described_limit(kind: str) -> float | None:
    """Returns the bytes that a run has of a GPU of some kind, None if the kind is not known here.

    A run's allocator takes a share of the memory when it starts, as the environment says that JAX
    reads (docs/launch.md). XLA_PYTHON_CLIENT_PREALLOCATE does not change how much it may take.

    Raises:
        UserError: the environment is one with which a run would not start.
    """
    memory = next((gpu.memory for gpu in GPUS.values() if gpu.description == kind), None)
    return None if memory is None else memory_share() * memory


def described_memory(gpu: Gpu) -> float:
    """Returns the bytes of memory with which XLA compiles as it does for a run on a GPU.

    XLA recomputes arrays to stay below the limit of a run. In a run, JAX tells it the limit of the
    allocator (jaxlib/py_client.cc). Without a device, XLA assumes a limit of 80 % of the memory.
    """
    if os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR") == "platform":  # it reports no limit
        return float(gpu.memory)
    return memory_share() * gpu.memory / 0.8


def memory_share() -> float:
    """Returns the share of a GPU's memory that JAX lets a run use, from the environment.

    Raises:
        UserError: the environment is one with which a run would not start.
    """
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if len(given) == 2:
        raise UserError(
            f"both {names[0]} and {names[1]} are set, with which no run starts; unset the latter, "
            "which is deprecated"
        )
    if os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR") == "platform":
        return 1.0  # allocates directly, and only what is needed
    for name, text in given.items():
        try:
            share = float(text)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise UserError(
                f"{name} is {text!r}; expected the share of the memory that a run may use, above "
                "0 and up to 1"
            )
        return share
    return 0.75  # XLA's default
