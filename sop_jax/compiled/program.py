"""Reads compiled programs from their HLO: instructions, sizes, and how often loops run."""

import re
from typing import NamedTuple

_CALLS = "calls|to_apply|called_computations|branch_computations|(?:true|false)_computation"


class Instruction(NamedTuple):
    """One instruction of a program.

    Attributes:
        name: its name, without %.
        shape: the shape of its result, possibly of a tuple.
        opcode: what it does, such as "fusion".
        operands: the names of its operands.
        literal: the text in the parentheses: the operands, or a constant.
        attributes: the text behind the parentheses.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str


Computation = dict[str, Instruction]  # by name; the root is the last one


def called_computations(instruction: Instruction, attribute: str = _CALLS) -> list[str]:
    """Returns the names of the computations in an attribute of an instruction."""
    lists = re.findall(rf"\b(?:{attribute})=(%[\w.\-]+|\{{[^}}]*\}})", instruction.attributes)
    return [name for names in lists for name in names_in(names)]


def names_in(text: str) -> list[str]:
    """Returns the names of instructions or computations in a text."""
    return re.findall(r"%([\w.\-]+)", text)


# The text ---------------------------------------------------------------------------------------


def parse_program(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations of a compiled program by name, and the name of its entry.

    Args:
        text: the HLO of the program, from `compiled.as_text()`.

    Raises:
        ValueError: the text is not the HLO of a compiled program.
    """
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY %")) and line.endswith("{"):
            name = names_in(line)[0]
            current = computations[name] = {}
            entry = name if line.startswith("ENTRY") else entry
        elif match := re.match(r"  (?:ROOT )?%([\w.\-]+) = ", line):
            shape, rest = _split_shape(line[match.end() :])
            opcode, rest = rest.split("(", 1)
            end = _closing(rest)
            literal, attributes = rest[:end], rest[end + 1 :]
            current[match[1]] = Instruction(
                match[1], shape, opcode, tuple(names_in(literal)), literal, attributes
            )
    if entry is None:
        raise ValueError(
            "the text is not a compiled program: expected an ENTRY computation, as in "
            "`compiled.as_text()`"
        )
    return computations, entry


def _split_shape(text: str) -> tuple[str, str]:
    """Splits a text into the shape at its start, possibly of a tuple, and the rest."""
    end = _closing(text[1:]) + 2 if text.startswith("(") else text.index(" ")
    return text[:end], text[end:].lstrip()


def _closing(text: str) -> int:
    """Returns the position of the parenthesis that closes one opened just before the text."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"the text is not a compiled program: a parenthesis is open in {text[:80]}")


def sources(text: str, package: str = "sop_jax/") -> dict[int, str]:
    """Returns the line of a package that each stack frame of a program comes from.

    Args:
        text: the HLO of the program, from `compiled.as_text()`.
        package: the folder of the package, which lines are relative to.

    Returns:
        The innermost line of the package as `file:line`, by the number of the frame; frames
        outside of the package are left out.
    """
    tables: dict[str, dict[int, str]] = {}
    rows: dict[int, str] = {}
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")):
            break
        if re.fullmatch(r"[A-Z]\w+", line):
            rows = tables[line] = {}
        elif row := re.match(r"(\d+) (.*)", line):
            rows[int(row[1])] = row[2].strip('"')
    files, frames = tables.get("FileNames", {}), tables.get("StackFrames", {})
    places = {number: _numbers(row) for number, row in tables.get("FileLocations", {}).items()}
    found: dict[int, str] = {}
    for number, fields in frames.items():  # the parents of a frame come before it
        frame = _numbers(fields)
        place = places[frame["file_location_id"]]
        _, inside, file = files[place["file_name_id"]].rpartition(package)
        if inside:
            found[number] = f"{file}:{place['line']}"
        elif (parent := frame.get("parent_frame_id", 1) - 1) in found:  # 1 is for none
            found[number] = found[parent]
    return found


def _numbers(row: str) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", row)}


# Bytes ------------------------------------------------------------------------------------------


def tuple_elements(shape: str) -> list[str]:
    """Returns the shapes of the elements of a tuple, or the shape itself if it is no tuple."""
    if not shape.startswith("("):
        return [shape]
    parts, depth, start = [], 0, 1
    for match in re.finditer(r"[()\[\]{},]", shape):
        if match[0] == "," and depth == 1:
            parts.append(shape[start : match.start()].strip())
            start = match.end()
        elif match[0] != ",":
            depth += 1 if match[0] in "([{" else -1
    return [*parts, shape[start:-1].strip()]


def shape_bytes(shape: str) -> int:
    """Returns the bytes of an array, or of all arrays of a tuple together."""
    total = 0
    for dtype, sizes in re.findall(r"\b([a-z]\w*)\[([\d,<= ]*)\]", shape):
        bits = re.match(r"[a-z]+(\d+)", dtype)
        count = 1
        for size in re.findall(r"\d+", sizes):
            count *= int(size)
        if dtype not in ("token", "opaque"):
            total += (count * (int(bits[1]) if bits else 8) + 7) // 8  # a pred takes one byte
    return total


# Loops ------------------------------------------------------------------------------------------


class _Carry(NamedTuple):
    """An element of the tuple that a loop carries."""

    element: int


def trip_count(
    computations: dict[str, Computation], outer: Computation, loop: Instruction
) -> int | None:
    """Returns the number of iterations of a loop, as noted by XLA or inferred from its counter.

    XLA for CPUs notes it and libtpu does not: of the loops in the train step of configs/digits.py,
    24 of 24 are noted for 8 CPU devices and none of 7 for a v5e:2x2, where all 7 are inferred.

    Args:
        computations: all computations of the program.
        outer: the computation with the loop.
        loop: the `while` instruction.

    Returns:
        The number; None if it is neither noted nor inferred.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(known[1])
    condition = computations[called_computations(loop, "condition")[0]]
    compared, sides = _operation(computations, condition, _root(condition))
    if compared is None or "direction=LT" not in compared.attributes:
        return None
    carry, bound = sides
    if not (isinstance(carry, _Carry) and isinstance(bound, int)):
        return None
    body = computations[called_computations(loop, "body")[0]]
    added, terms = _operation(computations, body, body[_root(body).operands[carry.element]])
    start = _value(outer, outer[outer[loop.operands[0]].operands[carry.element]])
    steps = [term for term in terms if isinstance(term, int)]
    if added is None or added.opcode != "add" or carry not in terms or not steps:
        return None
    if not isinstance(start, int) or steps[0] <= 0:
        return None
    return max(0, -((start - bound) // steps[0]))


def _root(computation: Computation) -> Instruction:
    return next(reversed(computation.values()))


def _operation(
    computations: dict[str, Computation], computation: Computation, result: Instruction
) -> tuple[Instruction | None, list[int | _Carry | None]]:
    """Returns the binary operation that computes a result, possibly in a fusion, and its inputs."""
    inputs = [_value(computation, computation[name]) for name in result.operands]
    if result.opcode != "fusion":
        return (result, inputs) if len(inputs) == 2 else (None, [])
    fused = computations[called_computations(result, "calls")[0]]
    operation = _root(fused)
    numbers = []
    for name in operation.operands:
        number = _value(fused, fused[name])
        if fused[name].opcode == "parameter":
            number = inputs[int(fused[name].literal)]
        numbers.append(number)
    return (operation, numbers) if len(numbers) == 2 else (None, [])


def _value(computation: Computation, instruction: Instruction) -> int | _Carry | None:
    """Returns a constant, or an element of the carry, or None for anything else."""
    while instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation[instruction.operands[0]]
    if instruction.opcode == "constant":
        return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None
    if instruction.opcode == "get-tuple-element":
        index = re.search(r"index=(\d+)", instruction.attributes)
        source = computation[instruction.operands[0]]
        if index and source.opcode == "parameter":
            return _Carry(int(index[1]))
        if index and source.opcode == "tuple":
            return _value(computation, computation[source.operands[int(index[1])]])
    return None
