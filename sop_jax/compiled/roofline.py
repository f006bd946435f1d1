"""Estimates how long a compiled GPU program takes, by a roofline of each of its kernels.

A kernel takes as long as its matrix products, its other operations or its bytes, whichever takes
longest at rates that large kernels reach, and the time to launch it. The estimate does not see
caches, tiles that do not divide a product, the choices of autotuning, the pace of the host, and
clocks that fall under load. So it ranks programs; a run is likely to be slower.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

from sop_jax.compiled.collectives import KINDS, collective_bytes, group_size
from sop_jax.compiled.gpus import NETWORK, Gpu
from sop_jax.compiled.program import (
    Computation,
    Instruction,
    called_computations,
    parse_program,
    shape_bytes,
    sources,
    trip_count,
    tuple_elements,
)

# The shares of the peak rates that large kernels reach. Those of products and of memory are from
# what is published for H100s (a product of 8192^3 in bfloat16 runs at 740 to 800 of 989 TFLOP/s);
# that of cuDNN's attention counts its tiles of 128 tokens as full.
REACHED = {"bf16": 0.75, "f16": 0.75, "tf32": 0.7, "f32": 0.9, "attention": 0.45, "backward": 0.35}
REACHED_BYTES, REACHED_SCALAR, REACHED_LINK = 0.9, 0.85, 0.82

LAUNCH = 3e-6  # seconds between the starts of two kernels, unless the first takes longer
LATENCY = 1e-5  # seconds that a collective takes however few bytes it sends
TILE = 128  # tokens that cuDNN's attention computes together

# The scalar operations that an element costs; all others cost one. Hardware computes one special
# function where it computes eight products.
COSTS = {
    "exponential": 9,
    "exponential-minus-one": 14,
    "log": 10,
    "log-plus-one": 14,
    "logistic": 18,
    "tanh": 12,
    "power": 22,
    "sqrt": 9,
    "rsqrt": 9,
    "divide": 9,
    "erf": 25,
    "cosine": 20,
    "sine": 20,
    "atan2": 25,
}

# Instructions that are no kernels, and those that only move numbers within one.
NO_KERNEL = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("partition-id", "replica-id", "opt-barrier", "domain", "add-dependency"),
}
MOVES = {
    *("broadcast", "transpose", "reshape", "slice", "dynamic-slice", "dynamic-update-slice"),
    *("pad", "concatenate", "copy", "gather", "reverse", "convert"),
}


class Operation(NamedTuple):
    """A kernel or a collective of a program.

    Attributes:
        instruction: the name of its instruction.
        name: the operation that it comes from, with its scopes of `jax.named_scope`.
        source: the line of code that it comes from, as `file:line`; "" if unknown.
        kind: what it does, in words.
        times: how often one call of the program runs it.
        seconds: the time of one, with its launch; of a collective, only what no kernel hides.
        hidden: the seconds of one collective during which kernels run; 0 for a kernel.
        bytes: the bytes that it reads and writes; those that a collective sends.
        flops: the operations of its matrix products.
    """

    instruction: str
    name: str
    source: str
    kind: str
    times: int
    seconds: float
    hidden: float = 0.0
    bytes: float = 0.0
    flops: float = 0.0

    @property
    def total(self) -> float:
        """The seconds that it takes in one call of the program."""
        return self.times * self.seconds


class Work(NamedTuple):
    """What a kernel has to do.

    Attributes:
        kind: what it does, in words.
        bytes: the bytes that it reads and writes.
        products: the operations of its matrix products by type, a key of REACHED.
        scalar: its other operations.
        launches: the number of kernels that it takes.
    """

    kind: str
    bytes: float
    products: dict[str, float] = {}
    scalar: float = 0.0
    launches: int = 1


def estimate(text: str, gpu: Gpu, devices: int = 1, hosts: int = 1) -> list[Operation]:
    """Returns the operations of one call of a program, with the time that each may take.

    Of the branches of a condition the fastest counts, and a loop of unknown length counts once.

    Args:
        text: the HLO of the program, from `compiled.as_text()`.
        gpu: the kind of GPU that it was compiled for.
        devices: the number of GPUs.
        hosts: the number of hosts that have them.

    Raises:
        ValueError: the text is not the HLO of a compiled program.
    """
    computations, entry = parse_program(text)
    return _Schedule(computations, sources(text), gpu, devices, hosts).run(entry, 1, "")


class _Schedule:
    """The order in which a GPU runs a program: kernels one by one, collectives beside them."""

    def __init__(
        self,
        computations: dict[str, Computation],
        lines: dict[int, str],
        gpu: Gpu,
        devices: int,
        hosts: int,
    ):
        self.computations, self.lines, self.gpu = computations, lines, gpu
        self.devices, self.hosts = devices, hosts
        self.clock = self.link_free = 0.0
        self.open: dict[str, tuple[float, float]] = {}  # the time and the end of each collective

    def run(self, place: str, times: int, around: str) -> list[Operation]:
        """Returns the operations of a computation that runs so often, and advances the clock."""
        found: list[Operation] = []
        computation = self.computations[place]
        for instruction in computation.values():
            named = re.search(r'op_name="([^"]*)"', instruction.attributes)
            name = named[1] if named else around
            found += self.one(computation, instruction, times, name)
        return found

    def one(
        self, computation: Computation, instruction: Instruction, times: int, name: str
    ) -> list[Operation]:
        """Returns the operations of an instruction."""
        opcode = instruction.opcode
        kind = opcode.removesuffix("-start").removesuffix("-done")
        if opcode in NO_KERNEL or opcode == "async-update":
            return []
        if opcode == "while":
            began = self.clock
            trips = trip_count(self.computations, computation, instruction) or 1
            body = called_computations(instruction, "body")[0]
            found = self.run(body, times * trips, name)
            self.clock = began + trips * (self.clock - began)
            return found
        if opcode == "conditional":
            began = self.clock
            branches = [self.run(b, times, name) for b in called_computations(instruction)]
            fastest = min(branches, key=lambda ops: sum(o.total for o in ops))
            self.clock = began + sum(o.total for o in fastest) / max(times, 1)
            return fastest
        if opcode.endswith("-done"):
            return self.wait(instruction, times, name)
        inner = self.collective_in(computation, instruction, kind)
        if inner is not None:
            return self.send(instruction, inner, opcode.endswith("-start"), times, name)
        if opcode in ("call", "async-start") or self.wraps(instruction):
            called = called_computations(instruction)
            return [found for c in called for found in self.run(c, times, name)]
        work = kernel(self.computations, computation, instruction)
        seconds = self.seconds(work)
        self.clock += seconds
        flops = sum(work.products.values())
        line = self.line(instruction)
        return [
            Operation(
                *(instruction.name, name, line, work.kind, times, seconds),
                bytes=work.bytes,
                flops=flops,
            )
        ]

    def seconds(self, work: Work) -> float:
        """Returns the time of a kernel."""
        gpu = self.gpu
        rates = dict.fromkeys(REACHED, gpu.matrix) | {"tf32": gpu.matrix / 2, "f32": gpu.scalar}
        products = sum(f / rates[kind] / REACHED[kind] for kind, f in work.products.items())
        scalar = work.scalar / (gpu.scalar / 2 * REACHED_SCALAR)
        moved = work.bytes / (gpu.bandwidth * REACHED_BYTES)
        return max(products, scalar, moved) + work.launches * LAUNCH

    def wraps(self, instruction: Instruction) -> bool:
        """Whether a fusion calls a library, whose inputs or outputs are slices."""
        return instruction.opcode == "fusion" and any(
            inner.opcode == "custom-call"
            for called in called_computations(instruction, "calls")
            for inner in self.computations[called].values()
        )

    # Collectives --------------------------------------------------------------------------------

    def collective_in(
        self, computation: Computation, instruction: Instruction, kind: str
    ) -> tuple[str, int, int] | None:
        """Returns the kind, bytes and group of the collective that an instruction is or starts."""
        if kind in KINDS:
            size = group_size(instruction.attributes, self.devices)
            return kind, collective_bytes(instruction, computation), size
        if instruction.opcode == "async-start":
            for called in called_computations(instruction):
                for inner in self.computations[called].values():
                    if inner.opcode in KINDS:
                        return self.collective_in(self.computations[called], inner, inner.opcode)
        return None

    def send(
        self,
        instruction: Instruction,
        collective: tuple[str, int, int],
        starts: bool,
        times: int,
        name: str,
    ) -> list[Operation]:
        """Starts a collective, and waits for it unless it `starts` only."""
        kind, size, group = collective
        if group == 1:
            return []
        sent = size * (group - 1) / group * (2 if kind == "all-reduce" else 1)
        within = self.hosts == 1 or group <= self.devices // self.hosts
        rate = REACHED_LINK * (self.gpu.link if within else NETWORK)
        seconds = sent / rate + LATENCY
        end = max(self.clock, self.link_free) + seconds
        self.link_free = end
        line = self.line(instruction)
        if starts:
            self.open[instruction.name] = seconds, end
            return [Operation(instruction.name, name, line, "collectives", times, 0.0, bytes=sent)]
        exposed, self.clock = end - self.clock, end
        return [Operation(instruction.name, name, line, "collectives", times, exposed, bytes=sent)]

    def wait(self, instruction: Instruction, times: int, name: str) -> list[Operation]:
        """Waits for the end of a collective that was started; other ends take no time."""
        if instruction.operands[0] not in self.open:
            return []
        seconds, end = self.open.pop(instruction.operands[0])
        exposed = max(0.0, end - self.clock)
        self.clock = max(self.clock, end)
        hidden = max(0.0, seconds - exposed)
        line = self.line(instruction)
        return [Operation(instruction.name, name, line, "collectives", times, exposed, hidden)]

    def line(self, instruction: Instruction) -> str:
        """Returns the line of code that an instruction comes from."""
        frame = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        return self.lines.get(int(frame[1]), "") if frame else ""


# Kernels ----------------------------------------------------------------------------------------


def kernel(
    computations: dict[str, Computation], computation: Computation, instruction: Instruction
) -> Work:
    """Returns what an instruction has to do that is a single kernel, or a few by a library."""
    opcode = instruction.opcode
    read = sum(shape_bytes(computation[name].shape) for name in instruction.operands)
    written = shape_bytes(instruction.shape)
    if opcode == "fusion":
        (called,) = called_computations(instruction, "calls")
        return _fusion(computations[called])
    if opcode == "custom-call":
        return _library(computation, instruction, read + written)
    if opcode == "sort":
        return _sort(computation, instruction)
    if opcode == "dot":
        return Work("matrix products", read + written, _dot(computation, instruction))
    if opcode in ("copy", "copy-start", "transpose"):
        size = shape_bytes(tuple_elements(instruction.shape)[0])
        return Work("copies", 2 * size)
    if opcode in ("slice", "dynamic-slice"):
        return Work("copies", 2 * written)
    if opcode == "dynamic-update-slice":
        return Work("copies", 2 * shape_bytes(computation[instruction.operands[1]].shape))
    return Work("other kernels", read + written, scalar=float(_count(instruction.shape)))


def _fusion(body: Computation) -> Work:
    """Returns the work of a fusion, which computes and reads only the elements that it needs."""
    needed, scalar = _needed(body), 0.0
    products: dict[str, float] = defaultdict(float)
    moved = float(_written(body, next(reversed(body))))
    for instruction in body.values():
        opcode, count = instruction.opcode, needed[instruction.name]
        if opcode == "parameter":
            moved += shape_bytes(instruction.shape) * count / max(_count(instruction.shape), 1)
        elif opcode == "dot":
            for kind, operations in _dot(body, instruction).items():
                products[kind] += operations
        elif opcode == "reduce":
            scalar += needed[instruction.operands[0]]
        elif opcode not in NO_KERNEL | MOVES:
            scalar += COSTS.get(opcode, 1) * count
    return Work("matrix products" if products else "fusions", moved, dict(products), scalar)


def _needed(body: Computation) -> dict[str, int]:
    """Returns how many elements of each instruction of a fusion its results depend on."""
    needed = dict.fromkeys(body, 0)
    root = next(reversed(body))
    for name in body[root].operands if body[root].opcode == "tuple" else [root]:
        needed[name] = _count(body[name].shape)
    for instruction in reversed(body.values()):
        opcode, wanted = instruction.opcode, needed[instruction.name]
        for position, operand in enumerate(instruction.operands):
            size = _count(body[operand].shape)
            share = wanted
            if opcode in ("dynamic-update-slice", "scatter"):
                share = size if position else 0  # the slice replaces a part of the operand
            elif opcode in ("reduce", "dot"):
                share = size if wanted else 0
            needed[operand] = min(size, needed[operand] + share)
    return needed


def _written(body: Computation, name: str) -> int:
    """Returns the bytes of a result of a fusion that are written, which may be a slice of it."""
    instruction = body[name]
    if instruction.opcode == "tuple":
        return sum(_written(body, operand) for operand in instruction.operands)
    if instruction.opcode == "bitcast":
        return _written(body, instruction.operands[0])
    if instruction.opcode == "dynamic-update-slice":
        return shape_bytes(body[instruction.operands[1]].shape)
    if instruction.opcode == "scatter":
        return 2 * shape_bytes(body[instruction.operands[-1]].shape)
    return shape_bytes(instruction.shape)


def _library(computation: Computation, instruction: Instruction, moved: int) -> Work:
    target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    name = target[1] if target else ""
    if "cublas" in name:
        return _cublas(computation, instruction)
    if "fmha" in name:
        return _attention(computation, instruction, name)
    if "conv" in name:
        return _convolution(computation, instruction, name, moved)
    if "TopK" in name:
        scores = computation[instruction.operands[0]].shape
        return Work("sorts and top-k", moved + shape_bytes(scores), scalar=24.0 * _count(scores))
    if "cub" in name:  # a radix sort of eight bits at a time
        return Work("sorts and top-k", 5 * moved, launches=6)
    return Work("other kernels", moved)


def _cublas(computation: Computation, instruction: Instruction) -> Work:
    config = _compact(instruction)
    left, right = (computation[name].shape for name in instruction.operands[:2])

    def sizes(shape: str, axes: str) -> int:
        named = re.search(rf'"{axes}":\[([^\]]*)\]', config)
        numbers = re.findall(r"\d+", named[1]) if named else []
        return math.prod(_dims(shape)[int(axis)] for axis in numbers)

    summed, batch = sizes(left, "lhs_contracting_dimensions"), sizes(left, "lhs_batch_dimensions")
    count = 2.0 * _count(left) * _count(right) / summed / batch
    kind = _dtype(left)
    if kind == "f32" and '"operand_precision":["HIGHEST"' not in config:
        kind = "tf32"
    read = sum(shape_bytes(computation[name].shape) for name in instruction.operands)
    written = shape_bytes(tuple_elements(instruction.shape)[0])
    return Work(PRODUCTS.get(kind, "matrix products"), read + written, {kind: count})


PRODUCTS = {
    "bf16": "matrix products, bfloat16",
    "tf32": "matrix products, TF32",
    "f32": "matrix products, float32",
}


def _attention(computation: Computation, instruction: Instruction, name: str) -> Work:
    head = _dims(computation[instruction.operands[0]].shape)[-1]
    scores = re.search(
        r'"intermediate_tensor_shape":\{.*?"dimensions":\[([^\]]*)\]', _compact(instruction)
    )
    sizes = re.findall(r"\d+", scores[1]) if scores else ["0"] * 4
    batch, heads, queries, keys = map(int, sizes)
    back = "Backward" in name
    tiles = math.ceil(queries / TILE) * math.ceil(keys / TILE) * TILE**2
    count = 2.0 * (5 if back else 2) * batch * heads * tiles * head
    moved = sum(shape_bytes(computation[operand].shape) for operand in instruction.operands)
    moved += sum(
        shape_bytes(part)
        for part in tuple_elements(instruction.shape)
        if not part.startswith("u8")  # its workspace
    )
    return Work("attention by cuDNN", moved, {"backward" if back else "attention": count})


def _compact(instruction: Instruction) -> str:
    """Returns attributes with JSON that has no space after colons and commas; some has."""
    return re.sub(r"([:,]) ", r"\1", instruction.attributes)


def _convolution(computation: Computation, instruction: Instruction, name: str, moved: int) -> Work:
    first, second = (computation[operand].shape for operand in instruction.operands[:2])
    result = tuple_elements(instruction.shape)[0]
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
    kernel, output = second, result
    if "BackwardInput" in name:
        kernel, output = second, first
    elif "BackwardFilter" in name:
        kernel, output = result, second
    channels = _dims(kernel)[labels[1].index("o")] if labels else 1
    kind = _dtype(first) if _dtype(first) != "f32" else "tf32"
    count = 2.0 * _count(output) * _count(kernel) / channels
    return Work("convolutions", moved, {kind: count})


def _sort(computation: Computation, instruction: Instruction) -> Work:
    """A bitonic sort: 2^11 numbers at a time on a core, and passes over the memory beyond that."""
    shape = computation[instruction.operands[0]].shape
    axis = re.search(r"dimensions=\{(\d+)\}", instruction.attributes)
    levels = math.ceil(math.log2(max(2, _dims(shape)[int(axis[1])]))) if axis else 1
    passes = 1 + sum(level - 10 for level in range(12, levels + 1))
    moved = 2.0 * sum(shape_bytes(computation[name].shape) for name in instruction.operands)
    compared = 6.0 * _count(shape) * levels * (levels + 1) / 2
    return Work("sorts and top-k", passes * moved, scalar=compared, launches=passes)


def _dot(computation: Computation, instruction: Instruction) -> dict[str, float]:
    left = computation[instruction.operands[0]].shape
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    summed = math.prod(_dims(left)[int(a)] for a in re.findall(r"\d+", axes[1])) if axes else 1
    kind = _dtype(left)
    if kind == "f32" and "highest" not in instruction.attributes:
        kind = "tf32"
    return {kind if kind in REACHED else "f32": 2.0 * _count(instruction.shape) * summed}


def _dtype(shape: str) -> str:
    return shape.lstrip("(").split("[")[0]


def _dims(shape: str) -> list[int]:
    sizes = re.search(r"\[([\d,]*)\]", shape)
    return [int(size) for size in re.findall(r"\d+", sizes[1])] if sizes else []


def _count(shape: str) -> int:
    return math.prod(_dims(tuple_elements(shape)[0]))
