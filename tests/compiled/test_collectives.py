"""Collectives read from programs that XLA compiles here, and from the text of TPU programs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import layouts
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from sop_jax.compiled.collectives import Collective, collectives

SHIFT = [(i, (i + 1) % 8) for i in range(8)]


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return jax.make_mesh((8, 1), ("data", "one"), axis_types=(AxisType.Auto,) * 2)


def compiled(mesh: Mesh, function: Callable, *args: Any) -> list[Collective]:
    """Returns the collectives of a function of the shards on 8 devices."""
    spread = jax.shard_map(
        function, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    with layouts.usual_passes():
        return collectives(jax.jit(spread).lower(*args).compile().as_text())


X = jnp.ones((64, 32))  # each device has 8 x 32 float32 numbers, 1 KiB


@pytest.mark.parametrize(
    ("function", "kind", "size"),
    [
        (lambda x: jax.lax.psum(x, "data"), "all-reduce", 1024),
        (lambda x: jax.lax.all_gather(x, "data", tiled=True)[:8], "all-gather", 8 * 1024),
        (lambda x: jax.lax.psum_scatter(x, "data", tiled=True), "reduce-scatter", 1024),
        (lambda x: jax.lax.all_to_all(x, "data", 0, 1, tiled=True), "all-to-all", 1024),
        (lambda x: jax.lax.ppermute(x, "data", SHIFT), "collective-permute", 1024),
        (lambda x: jax.lax.psum(x.astype(jnp.int8), "data"), "all-reduce", 256),
    ],
    ids=["psum", "all_gather", "psum_scatter", "all_to_all", "ppermute", "int8"],
)
def test_kind_and_bytes_of_the_whole_array(
    mesh: Mesh, function: Callable, kind: str, size: int
) -> None:
    (found,) = compiled(mesh, jax.named_scope("search")(function), X)
    assert found[:3] == (kind, size, 1)
    assert "search" in found.name


def test_loops_multiply_and_branches_count_as_taken(mesh: Mesh) -> None:
    def function(x: jax.Array) -> jax.Array:
        def inner(c: jax.Array, _: None) -> tuple[jax.Array, None]:
            return c + jax.lax.psum(jnp.tanh(c), "data"), None

        def outer(c: jax.Array, _: None) -> tuple[jax.Array, None]:
            c, _ = jax.lax.scan(inner, c, None, length=3)
            return c + jax.lax.all_gather(c, "data").sum(0), None

        x, _ = jax.lax.scan(outer, x, None, length=5)
        return jax.lax.cond(x[0, 0] > 0, lambda: jax.lax.ppermute(x, "data", SHIFT), lambda: x)

    found = {c.kind: (c.bytes, c.times) for c in compiled(mesh, function, X)}
    assert found == {
        "all-reduce": (1024, 15),
        "all-gather": (8 * 1024, 5),
        "collective-permute": (1024, 1),
    }


def test_a_loop_of_unknown_length_says_so(mesh: Mesh) -> None:
    def function(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda c: c.sum() < 1e9, lambda c: jax.lax.psum(c, "data") + 1, x)

    assert {(c.kind, c.times) for c in compiled(mesh, function, X)} == {("all-reduce", None)}


def test_nothing_is_sent_within_one_device(mesh: Mesh) -> None:
    assert compiled(mesh, lambda x: jnp.tanh(x), X) == []
    assert compiled(mesh, lambda x: jax.lax.psum(x, "one"), X) == []


def test_other_text_is_refused() -> None:
    with pytest.raises(ValueError, match="not a compiled program"):
        collectives("all-reduce(everything)")


def program(entry: str, before: str = "") -> list[Collective]:
    return collectives(
        f"HloModule jit_f\n{before}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{entry}\n}}"
    )


# A loop of a TPU program, without a note of how often it runs.
LOOP = """
%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  %b = (s32[]{:T(128)}, f32[8]{0:T(256)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  %step = s32[]{:T(128)} constant(STEP)
  %x = f32[8]{0:T(256)S(1)} get-tuple-element(%b), index=1
  %next = s32[]{:T(128)} add(%i, %step)
  %sum = f32[8]{0:T(256)S(1)} all-reduce(%x), channel_id=1, replica_groups=mesh['a'=4] {'a'}
  ROOT %out = (s32[]{:T(128)}, f32[8]{0:T(256)S(1)}) tuple(%next, %sum)
}
%less (l: s32[], r: s32[]) -> pred[] {
  %l = s32[] parameter(0)
  %r = s32[] parameter(1)
  ROOT %lt = pred[] compare(%l, %r), direction=DIRECTION
}
%condition (c: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(12)
  %c = (s32[]{:T(128)}, f32[8]{0:T(256)S(1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %more = pred[] fusion(%j, %bound), kind=kLoop, calls=%less
}
"""

RUN = """
  %p = f32[8]{0:T(256)} parameter(0)
  %zero = s32[] constant(START)
  %from = s32[]{:T(128)} copy(%zero)
  %start = (s32[]{:T(128)}, f32[8]{0:T(256)S(1)}) tuple(%from, %p)
  %loop = (s32[]{:T(128)}, f32[8]{0:T(256)S(1)}) while(%start), condition=%condition, body=%body
  ROOT %y = f32[8]{0} get-tuple-element(%loop), index=1
"""


@pytest.mark.parametrize(
    ("start", "step", "direction", "times"),
    [(0, 1, "LT", 12), (2, 3, "LT", 4), (14, 1, "LT", 0), (0, 1, "NE", None), (0, 0, "LT", None)],
)
def test_a_loop_that_counts_is_read(
    start: int, step: int, direction: str, times: int | None
) -> None:
    before = LOOP.replace("STEP", str(step)).replace("DIRECTION", direction)
    assert program(RUN.replace("START", str(start)), before) == [
        Collective("all-reduce", 32, times, "")
    ]


def test_what_xla_notes_of_a_loop_is_believed() -> None:
    noted = RUN.replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    ).replace("START", "0")
    (found,) = program(noted, LOOP.replace("STEP", "1").replace("DIRECTION", "NE"))
    assert found.times == 5


def test_pieces_of_one_asynchronous_collective_are_one() -> None:
    gather = (
        "%g{} = f32[4,8]{{1,0:T(8,128)}} all-gather(%q{}), channel_id=7, "
        "replica_groups=mesh['a'=4,'b'=1], device_ids=([4,1]T(1,0)) {{'a'}}, dimensions={{0}}, "
        'frontend_attributes={{chain_id="0"}}, metadata={{op_name="jit(f)/memories/gather"}}'
    )
    fusions = "\n".join(
        f"%piece.{i} (q{i}: f32[1,8]) -> f32[4,8] {{\n  %q{i} = f32[1,8]{{1,0}} parameter(0)\n"
        f"  ROOT {gather.format(i, i)}\n}}"
        for i in range(3)
    )
    calls = "\n".join(
        f"  %f{i} = f32[4,8]{{1,0}} fusion(%p), kind=kCustom, calls=%piece.{i}" for i in range(3)
    )
    found = program(f"  %p = f32[1,8]{{1,0}} parameter(0)\n{calls}", fusions)
    assert found == [Collective("all-gather", 128, 1, "jit(f)/memories/gather")]


def test_a_reduce_scatter_of_tpus_is_recognised() -> None:
    before = """
%all-reduce-scatter.3 (input: bf16[64,8]) -> bf16[8,8] {
  %input = bf16[64,8]{1,0} parameter(0)
  %sum = bf16[64,8]{1,0} all-reduce(%input), channel_id=1, replica_groups={{0,1},{2,3}}
  %zero = u32[] constant(0)
  ROOT %part = bf16[8,8]{1,0} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={8,8}
}
"""
    entry = (
        "  %p = bf16[64,8]{1,0} parameter(0)\n"
        "  ROOT %r = bf16[8,8]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3, "
        'metadata={op_name="jit(f)/student/dot_general"}'
    )
    assert program(entry, before) == [
        Collective("reduce-scatter", 2 * 64 * 8, 1, "jit(f)/student/dot_general")
    ]


@pytest.mark.parametrize(
    ("start", "done", "expected"),
    [
        (
            "(f32[8]{0}, f32[32]{0}) all-gather-start(%p), replica_groups=[1,4]<=[4]",
            "f32[32]{0} all-gather-done(%s)",
            ("all-gather", 128),
        ),
        (
            "((f32[8]{0}, f32[8]{0}), (f32[32]{0}, f32[32]{0})) all-gather-start(%p, %p)",
            "(f32[32]{0}, f32[32]{0}) all-gather-done(%s)",
            ("all-gather", 256),
        ),
        (
            "(f32[8]{0}, f32[8]{0}) all-reduce-start(%p, %p)",
            "(f32[8]{0}, f32[8]{0}) all-reduce-done(%s)",
            ("all-reduce", 64),
        ),
        (
            "(f32[8]{0:T(256)S(1)}, f32[8]{0}, u32[], u32[]) collective-permute-start(%p)",
            "f32[8]{0} collective-permute-done(%s)",
            ("collective-permute", 32),
        ),
        (
            "((f32[8]{0}), f32[2]{0}, s32[]) async-start(%p), calls=%wrapped",
            "f32[2]{0} async-done(%s), calls=%wrapped",
            ("reduce-scatter", 32),
        ),
    ],
    ids=["gather", "two gathered", "reduce", "permute", "wrapped"],
)
def test_start_and_end_are_one_collective(start: str, done: str, expected: tuple[str, int]) -> None:
    wrapped = """
%wrapped (w: f32[8]) -> f32[2] {
  %w = f32[8]{0} parameter(0)
  ROOT %part = f32[2]{0} reduce-scatter(%w), replica_groups=[1,4]<=[4], dimensions={0}
}
"""
    entry = f"  %p = f32[8]{{0}} parameter(0)\n  %s = {start}\n  ROOT %d = {done}"
    assert [(c.kind, c.bytes) for c in program(entry, wrapped)] == [expected]


@pytest.mark.parametrize(
    ("groups", "travels"),
    [
        ("{{0},{1},{2},{3}}", False),
        ("{{0,1},{2,3}}", True),
        ("[4,1]<=[4]", False),
        ("[2,2]<=[4]", True),
        ("mesh['a'=4,'b'=1] {'b'}", False),
        ("mesh['a'=4,'b'=1] {'a','b'}", True),
        ("mesh['a'=4,'b'=1], device_ids=([1,4]T(1,0)) {'a'}", True),
        ("{}", True),
    ],
)
def test_groups_of_one_device_do_not_count(groups: str, travels: bool) -> None:
    found = program(
        "  %p = f32[8]{0} parameter(0)\n"
        f"  ROOT %s = f32[8]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%add\n",
        "%add (a: f32[]) -> f32[] {\n  ROOT %a = f32[] parameter(0)\n}",
    )
    assert len(found) == travels
