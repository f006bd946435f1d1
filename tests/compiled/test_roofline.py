"""Estimates of programs for GPUs, on an excerpt of a train step that was compiled for an H100.

The excerpt has the search of one task, a linear layer, GELU, and attention by cuDNN forward for the
global views and backward for the local ones, of a ViT-B with 64 images.
"""

import pathlib
from collections import defaultdict

import pytest

from sop_jax.compiled.collectives import group_size
from sop_jax.compiled.gpus import GPUS
from sop_jax.compiled.program import sources
from sop_jax.compiled.roofline import LATENCY, LAUNCH, Operation, estimate

H100 = GPUS["h100"]
TEXT = (pathlib.Path(__file__).parent / "step_h100.hlo").read_text()


@pytest.fixture(scope="module")
def step() -> list[Operation]:
    return estimate(TEXT, H100)


def only(step: list[Operation], kind: str, source: str = "") -> list[Operation]:
    return [o for o in step if o.kind == kind and o.source.startswith(source)]


def test_products_have_the_operations_of_their_shapes(step: list[Operation]) -> None:
    (scores,) = only(step, "matrix products, float32")
    assert scores.flops == 2 * 256 * 65536 * 256
    assert scores.times == 16  # 4096 anchors, 256 at a time
    # Full float32 does not use the units for matrix products.
    assert scores.seconds == pytest.approx(scores.flops / (0.9 * H100.scalar) + LAUNCH, rel=0.01)
    (linear,) = only(step, "matrix products, bfloat16")
    assert linear.flops == 2 * 64 * 2 * 198 * 768 * 768
    assert linear.seconds == pytest.approx(linear.flops / (0.75 * 989e12) + LAUNCH, rel=0.01)


def test_attention_has_the_products_of_whole_tiles(step: list[Operation]) -> None:
    forward, backward = sorted(only(step, "attention by cuDNN"), key=lambda o: "bwd" in o.name)
    assert forward.flops == 2 * 2 * 128 * 12 * 256 * 256 * 64
    assert backward.flops == 5 * 2 * 640 * 12 * 128 * 128 * 64
    # Queries, keys, values and results, and the lengths of 128 sequences twice.
    assert forward.bytes == 4 * 128 * 198 * 768 * 2 + 2 * 128 * 4


def test_elementwise_kernels_take_as_long_as_their_bytes(step: list[Operation]) -> None:
    (gelu,) = only(step, "fusions", "models/gelu.py")
    assert gelu.bytes == pytest.approx(2 * 128 * 198 * 3072 * 2, rel=0.01)
    least = gelu.bytes / (0.9 * H100.bandwidth) + LAUNCH
    assert least == pytest.approx(gelu.seconds, rel=0.01)


def test_a_fusion_reads_only_what_it_gathers(step: list[Operation]) -> None:
    (best,) = (o for o in step if o.instruction == "loop_gather_fusion")
    groups = 256 * 8 * 64 * 4  # eight groups of 64 scores for each of 256 anchors
    assert groups < best.bytes < 5 * groups < 256 * 65536 * 4 / 10


def test_lines_are_those_of_this_package(step: list[Operation]) -> None:
    assert {o.source.split(":")[0] for o in step if o.source} == {
        *("models/attention.py", "models/gelu.py", "models/linear.py", "parallel/search.py"),
    }
    assert sources(TEXT, "flax/") != sources(TEXT)


def test_times_add_up_by_kind(step: list[Operation]) -> None:
    by_kind: dict[str, float] = defaultdict(float)
    for operation in step:
        by_kind[operation.kind] += operation.total
    assert max(by_kind, key=lambda kind: by_kind[kind]) == "matrix products, float32"
    assert sum(by_kind.values()) == pytest.approx(3.6e-3, rel=0.05)
    faster = estimate(TEXT, GPUS["b200"])
    assert sum(o.total for o in faster) < sum(by_kind.values())


def program(entry: str, before: str = "") -> list[Operation]:
    text = f"HloModule jit_f\n{before}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{entry}\n}}"
    return estimate(text, H100, devices=8)


SENT = 2**27  # bytes of f32[33554432]
REDUCED = 2 * SENT * 7 / 8 / (0.82 * 450e9) + LATENCY  # by a ring of eight
COPIED = 2 * SENT / (0.9 * H100.bandwidth) + LAUNCH

START = """  %p = f32[33554432]{0} parameter(0)
  %s = f32[33554432]{0} all-reduce-start(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum"""
COPY = "  %c = f32[33554432]{0} copy(%p)"
DONE = "  ROOT %d = f32[33554432]{0} all-reduce-done(%s)"


def test_a_collective_counts_as_far_as_no_kernel_hides_it() -> None:
    waited = program(f"{START}\n{DONE}")
    assert sum(o.total for o in waited) == pytest.approx(REDUCED)
    hidden = program(f"{START}\n{COPY}\n{DONE}")
    assert sum(o.total for o in hidden) == pytest.approx(REDUCED)
    sent = [o for o in hidden if o.kind == "collectives"]
    assert sum(o.total for o in sent) == pytest.approx(REDUCED - COPIED)
    assert sum(o.hidden for o in sent) == pytest.approx(COPIED)


def test_two_collectives_share_the_links() -> None:
    second = START.splitlines()[1].replace("%s ", "%t ")
    ends = f"{DONE.replace('ROOT ', '')}\n{DONE.replace('%d', '%e').replace('%s', '%t')}"
    found = program(f"{START}\n{second}\n{ends}")
    assert sum(o.total for o in found) == pytest.approx(2 * REDUCED)


def test_the_fastest_branch_counts() -> None:
    """Signs of health are measured in few steps."""
    before = f"""%slow (p: f32[33554432]) -> f32[33554432] {{
  %p = f32[33554432]{{0}} parameter(0)
  ROOT {COPY.strip()}
}}
%fast (q: f32[33554432]) -> f32[33554432] {{
  ROOT %q = f32[33554432]{{0}} parameter(0)
}}"""
    found = program(
        "  %p = f32[33554432]{0} parameter(0)\n  %i = pred[] constant(false)\n"
        "  ROOT %c = f32[33554432]{0} conditional(%i, %p, %p), "
        "branch_computations={%slow, %fast}",
        before,
    )
    assert found == []


def test_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="not a compiled program"):
        estimate("module @jit_f {}", H100)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1},{2,3}}", 2),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("replica_groups={}", 16),
        ("channel_id=1", 16),
    ],
)
def test_the_size_of_groups_is_read_however_it_is_written(groups: str, size: int) -> None:
    assert group_size(groups, devices=16) == size
