"""Whether a step fits, what it costs, and what is reported if that cannot be known."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import layouts
import ml_collections
import pytest
from small import small_config

from sop_jax import plan as plan_lib
from sop_jax.compiled.collectives import Collective
from sop_jax.compiled.gpus import GPUS
from sop_jax.compiled.roofline import Operation
from sop_jax.errors import UserError
from sop_jax.objectives.methods import METHODS
from sop_jax.plan import GIB, Plan, largest_batch, plan, record, table, traffic

ROOT = pathlib.Path(__file__).resolve().parents[1]

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the compiler of TPUs: pip install -e '.[tpu]'",
)


def make_config(batch_size: int = 16, fsdp: int = 1) -> ml_collections.ConfigDict:
    return small_config(
        batch_size=batch_size,
        mesh=dict(fsdp=fsdp),
        augment=dict(global_size=16, local_size=8, local_crops=2),
        eval=dict(resize=16, crop=16),
        model=dict(width=128, patch=8),
        head=dict(hidden=128, dim=128),
        sop=dict(
            cls=dict(memory=64, anchors=8, supports=2, tasks=1),
            patch=dict(memory=32, anchors=4),
        ),
    )


def made(**changes: object) -> Plan:
    """Returns a plan without compiling anything."""
    values = dict(
        mesh={"data": 4, "fsdp": 2},
        kind="TPU v5 lite",
        batch_size=64,
        accumulate=1,
        bound=(8192, "sop.patch.memory"),
        memory={"parameters": 2 * GIB, "activations": 3 * GIB},
        wanted=5 * GIB,
        limit=16 * GIB,
        fits=True,
        flops={"teacher": 1e12, "student": 3e12, "prototypes": 0.0, "health": 0.0, "": 0.0},
        rate=1e12,
        collectives=[],
        compile_s=1.0,
        estimate=[],
        model_flops=None,
    )
    return Plan(**values | changes)


@pytest.fixture(scope="module")
def one() -> Plan:
    with layouts.usual_passes():
        return plan(make_config(), jax.devices()[:1])


@pytest.fixture(scope="module")
def eight() -> Plan:
    with layouts.usual_passes():
        return plan(make_config(fsdp=4), jax.devices())


@pytest.mark.medium
def test_parameters_and_optimizer_take_what_their_numbers_take(one: Plan) -> None:
    # A layer has 12 D^2 weights; besides two layers there are embeddings, head, biases and norms.
    layers = 2 * 12 * 128**2 * 4
    assert 2 * layers < one.memory["parameters"] < 2 * 1.6 * layers
    assert one.memory["optimizer"] == pytest.approx(one.memory["parameters"], abs=16)
    rows = 64 + 32
    assert one.memory["carried"] == rows * (128 * 4 + 4) + 4 * 4
    pixels = 2 * 16 * 16 * 3 + 2 * 8 * 8 * 3
    assert one.memory["batch"] == 16 * (pixels + 2 * 4 + 4 + 4)
    assert one.memory["activations"] > one.memory["batch"]
    assert one.wanted == sum(one.memory.values())


@pytest.mark.medium
def test_devices_share_memory_and_not_work(one: Plan, eight: Plan) -> None:
    assert eight.mesh == {"data": 2, "fsdp": 4}
    for part in ("parameters", "optimizer"):  # all but the small ones are divided by four
        assert 1 / 4 < eight.memory[part] / one.memory[part] < 0.3
    for part in ("carried", "batch"):
        assert eight.memory[part] == pytest.approx(one.memory[part] / 8, abs=16)
    assert eight.flops == one.flops
    assert eight.flops["student"] > 2 * eight.flops["teacher"] > 0
    # Every anchor with every row, and with its two supports for the votes.
    assert eight.flops["prototypes"] == 2 * 8 * (64 + 2) * 128


@pytest.mark.medium
def test_one_device_sends_nothing_and_several_gradients(one: Plan, eight: Plan) -> None:
    assert one.collectives == []
    sent = traffic(eight.collectives, eight.flops)
    reduced = sum(
        size or 0
        for (kind, where), (_, size) in sent.items()
        if "reduce" in kind and where == "student"
    )
    assert reduced >= 0.9 * one.memory["parameters"] / 2  # the student's half
    assert not any(where == "memories" for _, where in sent)


@pytest.mark.medium
def test_a_cpu_reports_whether_the_step_fits(one: Plan) -> None:
    """Devices of a CPU share the memory that the machine has left."""
    assert one.limit is not None and 2**28 < one.limit < 2**46
    assert one.fits is True
    assert table(one).splitlines()[-1].startswith("fits: yes, ")


@pytest.mark.medium
def test_a_device_that_does_not_report_its_memory_gets_no_verdict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "fits: unknown" in table(made(limit=None, fits=None))
    monkeypatch.setattr(plan_lib, "bytes_limit", lambda devices: None)
    with pytest.raises(UserError, match="do not report how much memory"):
        largest_batch(make_config(), jax.devices()[:1])


@pytest.mark.medium
def test_bound_is_that_of_the_smaller_memory(one: Plan) -> None:
    assert one.bound == (32, "sop.patch.memory")
    assert "sop.patch.memory limits the batch to 32 images." in table(one)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 12}, "batch_size 12 cannot be split over 8 devices"),
        ({"batch_size": 64}, "does not fit sop.patch.memory 32"),
        ({"mesh.fsdp": 3}, "mesh.fsdp 3 does not divide the 8 available devices"),
        ({"model.size": "xl"}, "model.size is 'xl'; expected one of"),
    ],
)
def test_what_cannot_run_is_reported_before_it_compiles(
    changes: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_lib.flops, "by_scope", lambda *_: pytest.fail("too late"))
    config = make_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words):
        plan(config, jax.devices())


def test_table_and_record_have_the_same_numbers() -> None:
    sent = [
        Collective("all-reduce", 2**20, 12, "jit(f)/transpose(jvp(student))/while/body/dot"),
        Collective("all-reduce", 2**21, 1, "jit(f)/jvp(student)/add"),
        Collective("all-gather", 2**10, None, "jit(f)/while/body/prototypes/gather"),
        Collective("all-reduce", 8, 1, "jit(f)/health/cond/branch_1_fun/reduce_sum"),
    ]
    found = made(collectives=sent)
    words = " ".join(table(found).split())
    for text in (
        "batch 64 on 8 TPU v5 lite (data 4 x fsdp 2): 8 images per chip",
        "parameters, student and teacher 2048.0",
        "activations and the like 3072.0",
        "student 3.000",
        "total of matrix products 4.000",
        "a step would take 500 ms",
        "all-reduce student 13 14.000",
        "all-gather prototypes ? ?",
        "(only in logged steps)",
        "fits: yes, 5.00 GiB per chip of 16.00 GiB",
    ):
        assert text in words
    numbers = json.loads(json.dumps(record(found)))
    assert numbers["fits"] is True
    assert numbers["memory"]["parameters"] == 2 * GIB
    assert {"kind": "all-reduce", "where": "student", "times": 13, "bytes": 14 * 2**20} in numbers[
        "collectives"
    ]


def test_the_estimate_of_a_step_is_called_one() -> None:
    def operation(scope: str, kind: str, seconds: float, **values: Any) -> Operation:
        name = f"jit(step)/transpose(jvp({scope}))/while/body/dot"
        return Operation("fusion.1", name, f"models/{scope}.py:7", kind, 2, seconds, **values)

    operations = [
        operation("student", "fusions", 0.004, bytes=1e9),
        operation("teacher", "matrix products, bfloat16", 0.0005, flops=1e12),
        operation("student", "collectives", 0.0005, hidden=0.002),
    ]
    found = made(estimate=operations, model_flops=4e12, rate=1e15)
    words = " ".join(table(found).split())
    for text in (
        "ESTIMATE of the step, not a measurement ms share step 10.00",
        "by scope student 9.00 90.0% teacher 1.00 10.0%",
        "by kind fusions 8.00 80.0%",
        "models/student.py:7 8.00 80.0% 2 x fusions",
        "6400 images/s, 5.0% of the peak of 1000 TFLOP/s per chip (4.000 TFLOP of the model)",
        "Collectives take 1.00 ms while nothing else runs, and 4.00 ms beside kernels.",
        "does not see caches",
    ):
        assert text in words
    numbers = json.loads(json.dumps(record(found)))["estimate"]
    assert numbers["ms"] == pytest.approx(10) and numbers["gb_moved"] == pytest.approx(2)
    assert numbers["most_costly"][0]["source"] == "models/student.py:7"
    assert "estimate" not in record(made()) and "ESTIMATE" not in table(made())


def linear(images: int) -> int:
    """Returns bytes of memory, of which one plan does not show how they grow."""
    return 5 * GIB + images * GIB // 2 + 1


def flat(images: int) -> int:
    """Returns bytes as of a compiler that computes arrays anew near the limit, here from 43 GiB."""
    return max(min(linear(images), 48 * GIB), linear(round(0.7 * images)))


def fixed(largest: int) -> Callable[[int], int]:
    """Returns a function of the bytes of which `largest` images need less than 51.5 GiB."""
    return lambda images: (51 if images <= largest else 52) * GIB


@pytest.mark.parametrize(
    ("wanted", "first", "most", "largest", "trials"),
    [
        (linear, 8, 500, 92, 5),
        (linear, 200, 500, 92, 4),
        (fixed(29), 8, 500, 29, 10),
        (fixed(42), 64, 500, 42, 10),
        (linear, 8, 40, 40, 2),
        (linear, 40, 40, 40, 1),
        (flat, 8, 500, 132, 8),
        (flat, 90, 500, 132, 8),
        (flat, 500, 500, 132, 6),
        (flat, 8, 100, 100, 4),
    ],
)
def test_the_largest_batch_for_gpus_is_found_with_few_trials(
    wanted: Callable[[int], int], first: int, most: int, largest: int, trials: int
) -> None:
    limit, tried = 51.5 * GIB, []

    def pretend(images: int) -> Plan:
        tried.append(images)
        size = wanted(images)
        memory = {"parameters": 4 * GIB, "activations": size - 4 * GIB}
        return made(batch_size=images, memory=memory, wanted=size, limit=limit, fits=size <= limit)

    assert wanted(largest) <= limit and (largest == most or wanted(largest + 1) > limit)
    found = plan_lib.by_interpolation(pretend, first, most)
    assert found and found.fits and 0.98 * largest <= found.batch_size <= largest
    assert len(tried) == len(set(tried)) <= trials


@pytest.mark.parametrize("first", [1, 4, 200])
@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_the_largest_batch_for_gpus_is_exact_where_few_images_fit(most: int, first: int) -> None:
    def pretend(images: int) -> Plan:
        wanted = (2 + images) * GIB
        memory = {"activations": images * GIB}
        fits = images <= most
        return made(
            batch_size=images, wanted=wanted, limit=(2.5 + most) * GIB, memory=memory, fits=fits
        )

    found = plan_lib.by_interpolation(pretend, first, 500)
    assert found and found.batch_size == most


def test_a_gpu_that_is_too_small_for_one_image_has_no_largest_batch() -> None:
    def pretend(images: int) -> Plan:
        memory = {"activations": images * GIB}
        return made(wanted=(9 + images) * GIB, limit=8.0 * GIB, memory=memory, fits=False)

    assert plan_lib.by_interpolation(pretend, 4, 10) is None
    assert plan_lib.by_interpolation(pretend, 1, 0) is None


def test_a_batch_for_gpus_that_is_far_too_large_does_not_hide_smaller_ones() -> None:
    """Its images take more memory than is left beside the state."""

    def pretend(images: int) -> Plan:
        memory = {"parameters": 55 * GIB, "batch": images * GIB, "activations": images * GIB}
        wanted = sum(memory.values())
        return made(
            batch_size=images, memory=memory, wanted=wanted, limit=59.0 * GIB, fits=images <= 2
        )

    found = plan_lib.by_interpolation(pretend, 64, 100)
    assert found and found.batch_size == 2


def test_the_largest_batch_is_told_in_words() -> None:
    large = made(fits=False, accumulate=2)
    told = plan_lib.largest_text(made(batch_size=48), large)
    assert told == "The largest batch that fits is 48, to within 2%."
    nothing = plan_lib.largest_text(None, large)
    assert nothing.startswith("No batch fits, not even one image per chip and microbatch. --config")


def test_a_step_that_does_not_compile_is_reported_as_too_large() -> None:
    words = table(made(wanted=40 * GIB, fits=False, memory={"parameters": 2 * GIB}))
    assert words.endswith("fits: no, 40.00 GiB per chip of 16.00 GiB")
    assert "activations" not in words


@pytest.mark.medium
@pytest.mark.parametrize(
    ("most", "accumulate", "expected"), [(5, 1, 5), (1, 1, 1), (0, 1, None), (99, 1, 32), (3, 2, 3)]
)
def test_largest_batch_is_found_up_to_what_the_memories_take(
    most: int, accumulate: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here `most` images per microbatch fit one device, and the memories limit the batch to 32."""

    def pretend(config: ml_collections.ConfigDict, devices: list) -> Plan:
        assert config.batch_size <= 32
        fits = config.batch_size <= most * config.accumulate
        return made(batch_size=config.batch_size, fits=fits, mesh={"data": 1})

    monkeypatch.setattr(plan_lib, "plan", pretend)
    monkeypatch.setattr(plan_lib, "bytes_limit", lambda device: GIB)
    config = make_config()
    config.accumulate = accumulate
    found = largest_batch(config, jax.devices()[:1])
    assert (found and found.batch_size // accumulate) == expected
    assert config.batch_size == 16


def test_a_method_without_a_limit_bounds_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search then starts from all images of ImageNet."""
    tried = []

    def pretend(config: ml_collections.ConfigDict, devices: list) -> Plan:
        tried.append(config.batch_size)
        return made(batch_size=config.batch_size, fits=config.batch_size <= 3, mesh={"data": 1})

    monkeypatch.setitem(METHODS, "sop", METHODS["sop"]._replace(batch_limit=lambda config: None))
    monkeypatch.setattr(plan_lib, "plan", pretend)
    monkeypatch.setattr(plan_lib, "bytes_limit", lambda device: GIB)
    found = largest_batch(make_config(), jax.devices()[:1])
    assert found and found.batch_size == 3
    assert tried[0] == plan_lib.IMAGES
    unbound = made(bound=None)
    assert "limits the batch" not in table(unbound)
    assert record(unbound)["bound"] is None


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("h10:8", "names a chip that is not known here; did you mean h100?; choose one of v4, v5e"),
        ("h100:16", "does not exist: a host has at most 8"),
        ("foo", "names a chip that is not known here; choose one of v4, v5e, v5p, v6e, a100_40"),
    ],
)
def test_a_chip_or_size_that_does_not_exist_is_refused(topology: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        plan_lib.described_devices(topology)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs the compiler of GPUs, in an environment of its own: pip install -e '.[cuda]'",
)
def test_a_small_step_compiles_for_two_hosts_of_gpus() -> None:
    ended = run(
        *("--config=configs/digits.py", "--topology=h100:2x2", "--config.model.dtype=bfloat16"),
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["kind"] == "NVIDIA H100 80GB HBM3"
    assert found["limit"] == 0.75 * GPUS["h100"].memory and found["fits"]
    assert 0 < found["estimate"]["mfu"] < 0.5
    assert found["estimate"]["exposed_ms"] > 0


def test_without_libtpu_the_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs libtpu.*pip install -e '\.\[tpu\]'"):
        plan_lib.described_devices("v5e:2x2")


def run(*arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process without the settings of the tests."""
    settings = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in settings}
    return subprocess.run(
        [sys.executable, "-m", "sop_jax.plan", *arguments],
        env=environment | {"TPU_SKIP_MDS_QUERY": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.medium
@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("v5e:3x5", "libtpu does not support --topology=v5e:3x5"),
        ("v3:2x2", "memory is not known here: TPU v3; choose one of v4, v5e, v5p and v6e"),
        ("v5e:4x6", "batch_size 512 cannot be split over 24 devices"),
    ],
)
def test_an_invalid_topology_is_reported_in_one_line(topology: str, words: str) -> None:
    ended = run("--config=configs/imagenet_vitb16.py", f"--topology={topology}", timeout=60)
    assert ended.returncode == 1
    assert words in ended.stderr
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert not ended.stdout


@pytest.mark.medium
@needs_libtpu
def test_a_mesh_that_no_torus_has_is_refused_in_a_line() -> None:
    ended = run(
        "--config=configs/imagenet_vitb16.py",
        "--topology=v5p:4x4x4",
        "--config.mesh.fsdp=2",
        timeout=60,
    )
    assert ended.returncode == 1
    assert "asks for 64 devices, which do not fit the axes of the 4 x 4 x 4 torus" in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.slow
@needs_libtpu
def test_a_batch_that_is_too_large_is_a_no() -> None:
    ended = run(
        "--config=configs/imagenet_vits16.py",
        "--topology=v5e:2x2",
        "--config.batch_size=4096",
        timeout=120,
    )
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    *words, numbers = ended.stdout.splitlines()
    assert words[-1].startswith("fits: no, ")
    found = json.loads(numbers)
    assert found["fits"] is False
    assert found["wanted"] > 5 * found["limit"]


@pytest.mark.slow
@needs_libtpu
def test_vit_b_with_the_papers_recipe_fits_256_chips_of_v5e() -> None:
    ended = run("--config=configs/imagenet_vitb16.py", "--topology=v5e:16x16", timeout=600)
    assert ended.returncode == 0, ended.stderr
    *words, numbers = ended.stdout.splitlines()
    assert words[-1].startswith("fits: yes, ")
    found = json.loads(numbers)
    assert (found["kind"], found["mesh"]) == ("TPU v5 lite", {"data": 256, "fsdp": 1})
    assert found["batch_size"] == 512
    # Student and teacher have 86 M parameters and a head each, in float32.
    assert 2 * 86e6 * 4 < found["memory"]["parameters"] < 2 * 95e6 * 4
    assert 1e9 < found["wanted"] < found["limit"] < 16 * GIB
    # Each of two global views costs the teacher 35 GFLOP.
    assert found["flops"]["teacher"] == pytest.approx(512 * 2 * 36e9, rel=0.1)
    search = 2 * 2 * 4096 * 65536 * 256
    assert found["flops"]["prototypes"] == pytest.approx(search, rel=0.01)
    sent = {(c["kind"], c["where"]): c for c in found["collectives"]}
    assert all(c["times"] is not None for c in found["collectives"])
    assert sent["all-reduce", "student"]["bytes"] > 86e6 * 2  # gradients, in bfloat16 at least
    assert sent["all-to-all", "prototypes"]["times"] == 2  # the winners of both tasks
