"""Reads the collectives of a compiled program, what its devices send each other, from its HLO."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from sop_jax.compiled.program import (
    Computation,
    Instruction,
    called_computations,
    parse_program,
    shape_bytes,
    trip_count,
    tuple_elements,
)

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
        kind: one of KINDS.
        bytes: the size of the array on one device where it is whole: the gathered, reduced,
            scattered or exchanged one; the sum if the collective has several arrays.
        times: the number of times that one call of the program runs it: the product of the lengths
            of the loops around it. Every branch counts as taken. None if the length of a loop is
            not known.
        name: the operation that it comes from, with its scopes of `jax.named_scope`; "" if
            unknown.
    """

    kind: str
    bytes: int
    times: int | None
    name: str


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of a compiled program, one entry for each place that calls them.

    An asynchronous collective is one entry, even if it is scheduled in several pieces. Collectives
    within groups of a single device send nothing and are left out.

    Args:
        text: the HLO of the program, from `compiled.as_text()`.

    Raises:
        ValueError: the text is not the HLO of a compiled program.
    """
    computations, entry = parse_program(text)
    found, chains = [], set()
    for collective, attributes in _walk(computations, entry, 1, ""):
        # On TPUs a collective may be spread over several fusions, each of which contains it on the
        # same channel.
        channel = re.search(r"channel_id=(\d+)", attributes)
        if channel and "chain_id=" in attributes:
            if channel[1] in chains:
                continue
            chains.add(channel[1])
        if group_size(attributes, devices=2) > 1:
            found.append(collective)
    return found


def group_size(attributes: str, devices: int) -> int:
    """Returns the number of devices in each group of a collective.

    Args:
        attributes: those of its instruction.
        devices: the number of all devices, which are one group if none is written.
    """
    # Groups are written in three ways: {{0},{1}}, [2,1]<=[2], mesh['a'=4,'b'=1] {'b'}.
    if named := re.search(r"replica_groups=mesh\[([^]]*)\][^{]*\{('[^}:]*)\}", attributes):
        sizes = dict(re.findall(r"('\w+')=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in named[2].split(","))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return listed[1].count(",") + 1
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes)
    return int(counted[1]) if counted else devices


def _walk(
    computations: dict[str, Computation], place: str, times: int | None, around: str
) -> Iterator[tuple[Collective, str]]:
    """Yields the collectives of a computation and those that it calls, and their attributes.

    Args:
        computations: all computations of the program.
        place: the name of the computation.
        times: the number of times that it runs; None if unknown.
        around: the operation name of the instruction that calls it, for its instructions without
            a name of their own.
    """
    for instruction in computations[place].values():
        attributes = instruction.attributes
        named = re.search(r'op_name="([^"]*)"', attributes)
        name = named[1] if named else around
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            if kind == "all-reduce" and place.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # TPUs write it as an all-reduce in such a computation
            size = collective_bytes(instruction, computations[place])
            yield Collective(kind, size, times, name), attributes
        elif instruction.opcode == "while":
            trips = trip_count(computations, computations[place], instruction)
            inside = None if times is None or trips is None else times * trips
            for called in called_computations(instruction, "condition|body"):
                yield from _walk(computations, called, inside, name)
        # The end of an asynchronous call may name the computation that its start called.
        elif instruction.opcode not in ("async-update", "async-done"):
            for called in called_computations(instruction):
                yield from _walk(computations, called, times, name)


def collective_bytes(instruction: Instruction, computation: Computation) -> int:
    """Returns the bytes of the operands or of the results of a collective, whichever are more."""
    given = sum(shape_bytes(computation[name].shape) for name in instruction.operands)
    parts = tuple_elements(instruction.shape)
    if instruction.opcode.endswith("-start") and len(parts) > 1:
        return max(
            given, shape_bytes(parts[1])
        )  # the parts are operands, results, perhaps contexts
    return max(given, shape_bytes(instruction.shape))
