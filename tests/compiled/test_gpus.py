"""Descriptions of GPUs: names and sizes, the memory that a run has, and what is missing."""

import importlib.metadata
import re

import pytest

from sop_jax.compiled import gpus
from sop_jax.compiled.gpus import (
    GPUS,
    check_wheels,
    described_limit,
    memory_share,
    parse_topology,
    target_config,
)
from sop_jax.errors import UserError


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("h100:8", ("NVIDIA H100 80GB HBM3", 1, 8)),
        ("h200:2x8", ("NVIDIA H200", 2, 8)),
        ("a100_40:16", ("NVIDIA A100-SXM4-40GB", 1, 16)),
        ("rtx6000pro:1", ("NVIDIA RTX PRO 6000 Blackwell", 1, 1)),
    ],
)
def test_a_topology_is_a_kind_and_hosts_of_gpus(
    topology: str, expected: tuple[str, int, int]
) -> None:
    gpu, *sizes = parse_topology(topology)
    assert (gpu.description, *sizes) == expected


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        (
            "h10:8",
            r"names a GPU that is not known here; did you mean h100\?; choose one of a100_40",
        ),
        (
            "h100",
            "has no size; expected a number of GPUs or hosts x GPUs, such as h100:8 or h100:2x8",
        ),
        ("h100:0", "has the size '0'; expected"),
        ("h100:2x8x2", "has the size '2x8x2'; expected"),
        ("h100:16", "does not exist: a host has at most 8 of these GPUs; .*such as h100:2x8"),
        ("h100:2x16", "does not exist: .*such as h100:4x8"),
    ],
)
def test_a_topology_that_does_not_exist_is_refused(topology: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_topology(topology)


def with_packages(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        if name.replace("-", "_") not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    monkeypatch.setattr(gpus.importlib.metadata, "version", version)


def test_missing_wheels_are_named_with_the_install(monkeypatch: pytest.MonkeyPatch) -> None:
    with_packages(monkeypatch, jax_cuda13_plugin="0.10.2")
    words = (
        r"nvidia-cudnn-cu13, nvidia-cuda-runtime are not installed; .*: pip install -e '\.\[cuda\]'"
    )
    with pytest.raises(UserError, match=words):
        check_wheels("h100:8")
    with_packages(monkeypatch, jax_cuda12_plugin="0.10.2")
    with pytest.raises(UserError, match="needs the wheels of CUDA 13.*those of CUDA 12 are"):
        check_wheels("h100:8")


def test_a_description_has_the_figures_and_the_installed_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_packages(monkeypatch, nvidia_cudnn_cu13="9.28.1.4", nvidia_cuda_runtime="13.5.37")
    words = target_config(GPUS["b300"])
    assert "cuda_compute_capability { major: 10 minor: 3 }" in words
    assert "memory_bandwidth: 7936000000000 " in words
    assert "dnn_version_info { major: 9 minor: 28 patch: 1 }" in words
    assert words.count("{") == words.count("}")


def test_rates_are_those_of_data_sheets() -> None:
    assert GPUS["h100"].scalar == pytest.approx(67e12, rel=0.01)
    assert GPUS["a100_80"].scalar == pytest.approx(19.5e12, rel=0.01)


FRACTION, OLD = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (FRACTION, OLD, "XLA_PYTHON_CLIENT_ALLOCATOR"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("settings", "share", "planned"),
    [
        ({}, 0.75, 0.75),
        ({FRACTION: "0.9"}, 0.9, 0.9),
        ({OLD: ".5"}, 0.5, 0.5),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, 0.75, 0.75),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, 1.0, 0.8),  # which reports no limit to XLA
    ],
)
def test_the_memory_is_what_a_run_would_have(
    settings: dict[str, str], share: float, planned: float, unset: pytest.MonkeyPatch
) -> None:
    """XLA plans with 80 % of the memory that is described to it."""
    for name, value in settings.items():
        unset.setenv(name, value)
    assert described_limit("NVIDIA H100 80GB HBM3") == share * 84_942_979_072
    assert described_limit("NVIDIA T4") is None
    described = re.search(r"device_memory_size: (\d+) ", target_config(GPUS["h100"]))
    assert described and 0.8 * int(described[1]) == pytest.approx(planned * 84_942_979_072)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {FRACTION: "0.9", OLD: "0.9"},
            "both .* are set, with which no run starts; unset the latter",
        ),
        ({FRACTION: "75 %"}, "XLA_CLIENT_MEM_FRACTION is '75 %'; expected the share"),
        ({FRACTION: "0"}, "expected the share"),
    ],
)
def test_an_environment_in_which_no_run_starts_is_refused(
    settings: dict[str, str], words: str, unset: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        unset.setenv(name, value)
    with pytest.raises(UserError, match=words):
        memory_share()
