"""Reports whether a run fits its chips and what a step costs, before the chips are needed.

    python -m sop_jax.plan --config=NAME --topology=v5e:16x16
    python -m sop_jax.plan --config=NAME --topology=h100:2x8
    python -m sop_jax.plan --config=NAME [--largest_batch]

Compiles the train step of the run, for TPUs or GPUs that need not exist (`pip install -e '.[tpu]'`
or, in an environment of its own, `'.[cuda]'`), or for the devices of this machine. Prints a table
and one JSON line. Exits with 1 if the step does not fit the memory of a chip or, on a CPU, the
memory that is available now. No data is needed: the number of images, which affects only the
schedules, is taken to be that of ImageNet. --largest_batch finds the largest batch that fits; for
GPUs that are only described, it finds one within 2 % of it.

For GPUs the table also has an estimate of the step from the compiled program, see
`sop_jax.compiled.roofline`. It is not a measurement: it ranks programs, and a run is likely to be
slower.

For example, for the devices of this machine:

    python -m sop_jax.plan --config=digits
"""

import importlib.util
import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Container
from typing import Any, NamedTuple

import jax
import ml_collections
import scipy.optimize
from absl import flags

from sop_jax import cli
from sop_jax.check import check_config, check_used
from sop_jax.compiled import flops
from sop_jax.compiled.collectives import Collective, collectives
from sop_jax.compiled.device_memory import (
    CHIPS,
    GIB,
    bytes_limit,
    compile_and_compare,
    is_described_gpu,
)
from sop_jax.compiled.gpus import GPUS, Gpu, described_gpus
from sop_jax.compiled.roofline import Operation, estimate
from sop_jax.errors import UserError, nearest
from sop_jax.objectives.methods import method_of
from sop_jax.parallel.mesh import make_mesh
from sop_jax.training.assemble import Run, assemble, model_flops, traced_step

IMAGES = 1_281_167  # in the train split of ImageNet
MIB = 2**20
TPUS = ("v4", "v5e", "v5p", "v6e")
SCOPES = ("teacher", "targets", "student", "losses", "update", "health")  # of every train step


class Plan(NamedTuple):
    """The cost of a train step, known before it runs. Bytes are those of one chip.

    Attributes:
        mesh: the number of chips on each axis.
        kind: the kind of the chips.
        batch_size: the images per step, over all chips.
        accumulate: the microbatches per step.
        bound: the largest batch that the objective supports, and the setting that limits it; None
            if there is no limit.
        memory: the bytes of each part; without temporary arrays if the step did not compile.
        wanted: the bytes of all parts; the compiler's message if the step did not compile, and the
            message names no number.
        limit: the bytes that a program can use; None if the device does not report them.
        fits: whether the step fits; None if that is unknown.
        flops: the operations of matrix products per step, over all chips, by scope of the step.
        rate: the peak operations per second of a chip; None if its kind is not known.
        collectives: the collectives of the compiled step; empty if it did not compile.
        compile_s: the seconds that compiling took.
        estimate: the operations of the compiled step with the time that each may take, for GPUs
            that are only described; empty for other devices.
        model_flops: the operations of `flops` without those that a backward pass repeats; None
            where nothing is estimated.
    """

    mesh: dict[str, int]
    kind: str
    batch_size: int
    accumulate: int
    bound: tuple[int, str] | None
    memory: dict[str, int]
    wanted: int | str
    limit: float | None
    fits: bool | None
    flops: dict[str, float]
    rate: float | None
    collectives: list[Collective]
    compile_s: float
    estimate: list[Operation]
    model_flops: float | None

    @property
    def chips(self) -> int:
        """The number of chips in the mesh."""
        return math.prod(self.mesh.values())


def described_devices(topology: str) -> list[Any]:
    """Returns the chips of a topology such as v5e:16x16 or h100:2x8; none need exist.

    Raises:
        UserError: there is no such topology, or its compiler is not installed.
    """
    kind = topology.partition(":")[0]
    if kind in GPUS:
        return described_gpus(topology)
    if kind.startswith(("v", "tpu")):
        return described_tpus(topology)
    names = [*TPUS, *GPUS]
    raise UserError(
        f"--topology={topology} names a chip that is not known here{nearest(kind, names)}; choose "
        f"one of {', '.join(names)}, with a size, such as v5e:16x16, h100:8 or h200:2x8"
    )


def described_tpus(topology: str) -> list[Any]:
    """Returns the chips of a TPU topology such as v5e:16x16, one device each.

    Raises:
        UserError: libtpu is not installed or does not support the topology, or the memory of these
            chips is unknown.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology} needs libtpu, which has the compiler for TPUs, and it is not "
            "installed; run: pip install -e '.[tpu]'"
        )
    # Otherwise libtpu would look for TPUs, query the metadata of Google's cloud, and allow only one
    # process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    # By default a v4 chip is two devices here, but only one in a run.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        devices: Any = topologies.get_topology_desc(topology, "tpu", **options).devices
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ").rstrip(".")
        raise UserError(
            f"libtpu does not support --topology={topology}: {reason}. Expected a kind of chip and "
            "a size of whole hosts, such as v5e:16x16, v6e:4x4, v5p:4x4x4 or v4:2x2x2; the "
            "smallest are v5e:2x2, v6e:2x2, v5p:2x2x1 and v4:2x2x1. Choose one of these"
        ) from error
    if devices[0].device_kind not in CHIPS:
        raise UserError(
            f"--topology={topology} has chips whose memory is not known here: "
            f"{devices[0].device_kind}; choose one of v4, v5e, v5p and v6e"
        )
    return list(devices)


def plan(config: ml_collections.ConfigDict, devices: list[Any]) -> Plan:
    """Compiles the train step of a config for some devices, and returns what it costs.

    Args:
        config: the settings, see `sop_jax.config`.
        devices: the devices of this machine, or those that `described_devices` returns.

    Raises:
        UserError: the config is invalid, or does not match the devices.
    """
    check_config(config)
    method = method_of(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    run = assemble(config, mesh, IMAGES)
    device: Any = mesh.devices.flat[0]
    traced = traced_step(run)
    memory = state_bytes(run)
    sent: list[Collective] = []
    operations: list[Operation] = []
    gpu, chip = gpu_of(device), CHIPS.get(device.device_kind)
    began = time.monotonic()
    fit = compile_and_compare(traced.lower(), list(mesh.devices.flat))
    if fit.compiled is not None:
        memory |= program_bytes(fit.compiled.memory_analysis(), sum(memory.values()))
        text = fit.compiled.as_text()
        sent = collectives(text)
        if gpu is not None:
            hosts = len({device.process_index for device in mesh.devices.flat})
            operations = estimate(text, gpu, mesh.devices.size, hosts)
    return Plan(
        mesh=dict(mesh.shape),
        kind=device.device_kind,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        bound=method.batch_limit(config),
        memory=memory,
        wanted=fit.wanted,
        limit=fit.limit,
        fits=fit.fits,
        flops=flops.by_scope(traced.jaxpr, (*SCOPES, *method.scopes)),
        rate=gpu.matrix if gpu else chip.rate if chip else None,
        collectives=sent,
        compile_s=time.monotonic() - began,
        estimate=operations,
        model_flops=model_flops(config, run) if operations else None,
    )


def gpu_of(device: Any) -> Gpu | None:
    """Returns the kind of a GPU that is only described, None for other devices."""
    if not is_described_gpu(device):
        return None
    return next(gpu for gpu in GPUS.values() if gpu.description == device.device_kind)


def largest_batch(
    config: ml_collections.ConfigDict, devices: list[Any], known: Plan | None = None
) -> Plan | None:
    """Returns the plan with the largest batch that fits, or None if one image per chip is too many.

    For GPUs that are only described, it is the largest to within `APART`.

    The search ends at the largest batch that the objective supports, or else at all images of an
    epoch. The number of microbatches stays the same.

    Args:
        config: the settings.
        devices: as in `plan`.
        known: the plan of this config, if there is one.

    Raises:
        UserError: as in `plan`, or the devices do not report how much memory they have.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    devices = list(mesh.devices.flat)
    if bytes_limit(devices) is None:
        raise UserError(
            f"{devices[0].device_kind} devices do not report how much memory they have, so the "
            "largest batch is unknown; name a --topology"
        )
    unit, method = mesh.devices.size * config.accumulate, method_of(config)

    def planned(images: int) -> Plan:
        trial = config.copy_and_resolve_references()
        trial.batch_size = images * unit
        trial.update_from_flattened_dict(dict(method.any_batch))
        found = plan(trial, devices)
        print(f"batch {trial.batch_size}: {fit_text(found)}", file=sys.stderr, flush=True)
        return found

    most, _ = method.batch_limit(config) or (IMAGES, "")
    if is_described_gpu(devices[0]):
        first = known.batch_size // unit if known else max(1, min(config.batch_size, most) // unit)
        return by_interpolation(planned, first, most // unit, known)
    return by_bisection(planned, most // unit)


def by_bisection(planned: Callable[[int], Plan], most: int) -> Plan | None:
    """Returns the plan with the most images, up to `most`, that fits; None if there is none.

    The search starts from `most` and halves it until it fits, because compilers of TPUs reject
    large programs quickly. Then it bisects.

    Args:
        planned: maps the images of a chip and microbatch to the plan.
        most: the largest number to try.
    """
    best = None

    def fits(images: int) -> bool:
        nonlocal best
        found = planned(images)
        best = found if found.fits else best
        return bool(found.fits)

    too_many, enough = most + 1, most
    while enough and not fits(enough):
        too_many, enough = enough, enough // 2
    while too_many - enough > 1:
        middle = (enough + too_many) // 2
        enough, too_many = (middle, too_many) if fits(middle) else (enough, middle)
    return best


APART = 0.02  # the share of the images by which `by_interpolation` may miss the most that fit


def by_interpolation(
    planned: Callable[[int], Plan], first: int, most: int, known: Plan | None = None
) -> Plan | None:
    """Returns the plan with the most images that fits, to within `APART`; None if there is none.

    The compiler of GPUs does not reject large programs, so that every trial takes long. Trials are
    therefore chosen by Brent's method, which needs few where memory is linear in the images. It is
    not where the compiler computes arrays anew to stay below the limit; there the method halves the
    interval. Memory is taken to grow with the images.

    Args:
        planned: as in `by_bisection`.
        first: the number to try first.
        most: the largest number to try.
        known: the plan of `first`, if there is one.
    """
    if most < 1:
        return None
    one = known or planned(first)
    assert isinstance(one.wanted, int) and one.limit is not None
    tried, limit = {first: one}, one.limit
    state = one.wanted - one.memory["activations"] - one.memory.get("batch", 0)

    def excess(images: int) -> float:
        """Returns the bytes beyond the limit; without images, those of the state."""
        if images and images not in tried:
            tried[images] = planned(images)
        wanted = tried[images].wanted if images else state
        assert isinstance(wanted, int)
        return wanted - limit

    enough, end = 0, first
    while (beyond := excess(end)) <= 0:
        if end == most:
            return tried[most]
        larger = end * max(1.25, 1.1 * limit / (limit + beyond))
        enough, end = end, min(most, math.ceil(larger))
    if excess(0) > 0:
        return None
    scipy.optimize.brentq(lambda x: excess(math.floor(x)), enough, end, xtol=1e-3, rtol=APART)
    return tried.get(max((n for n in tried if tried[n].fits), default=0))


def state_bytes(run: Run) -> dict[str, int]:
    """Returns the bytes per chip of the arguments of a step, by part."""
    state = run.abstract
    parts = {
        "parameters": (state.student, state.teacher),
        "optimizer": state.opt_state,
        "carried": state.carried,
        "batch": run.batch,
    }
    return {
        name: sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(part)
        )
        for name, part in parts.items()
    }


def program_bytes(analysis: Any, given: int) -> dict[str, int]:
    """Returns the bytes per chip beyond those of the arguments, by part, as the compiler reports.

    Args:
        analysis: the compiler's memory analysis.
        given: the bytes per chip of the arguments, from `state_bytes`.
    """
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return {
        "activations": analysis.temp_size_in_bytes,
        "program": analysis.generated_code_size_in_bytes,
        "padding": analysis.argument_size_in_bytes - given + max(0, outputs),
    }


def traffic(
    sent: list[Collective], scopes: Container[str]
) -> dict[tuple[str, str], tuple[int | None, int | None]]:
    """Returns how often collectives run per step, and their bytes per step, by kind and scope.

    Both are None if a collective is in a loop of unknown length.
    """
    groups = defaultdict(list)
    for collective in sent:
        groups[collective.kind, flops.scope(collective.name, scopes)].append(collective)
    totals: dict[tuple[str, str], tuple[int | None, int | None]] = {}
    for key, group in groups.items():
        times = [collective.times for collective in group if collective.times is not None]
        if len(times) < len(group):
            totals[key] = None, None
        else:
            totals[key] = sum(times), sum(c.bytes * n for c, n in zip(group, times, strict=True))
    return totals


WORDS = {
    "parameters": "parameters, student and teacher",
    "optimizer": "optimizer",
    "carried": "carried by the objective",
    "batch": "batch",
    "activations": "activations and the like",
    "program": "program",
    "padding": "padding and the rest",
}


def table(found: Plan) -> str:
    """Returns the plan as a table for people."""
    axes = " x ".join(f"{name} {size}" for name, size in found.mesh.items())
    images = found.batch_size // found.chips
    lines = [
        f"batch {found.batch_size} on {found.chips} {found.kind} ({axes}): {images} images per chip"
        + f", in {found.accumulate} microbatches" * (found.accumulate > 1),
        "",
        f"{'memory per chip':<36}{'MiB':>10}",
    ]
    lines += [f"  {WORDS[name]:<34}{size / MIB:>10.1f}" for name, size in found.memory.items()]
    lines += ["", f"{'operations per step':<36}{'TFLOP':>10}"]
    lines += [
        f"  {name or 'elsewhere':<34}{count / 1e12:>10.3f}"
        for name, count in found.flops.items()
        if count
    ]
    total = sum(found.flops.values())
    lines += [f"  {'total of matrix products':<34}{total / 1e12:>10.3f}"]
    if found.rate:
        least = total / found.chips / found.rate
        lines += [
            f"  At the peak of {found.rate / 1e12:.0f} TFLOP/s per chip, a step would take "
            f"{1000 * least:.3g} ms:",
            "  a lower bound, not a prediction.",
        ]
    if found.collectives:
        heads = f"{'collectives':<20}{'where':<16}{'per step':>10}{'MiB':>12}"
        lines += ["", heads]
        for (kind, where), (times, size) in sorted(traffic(found.collectives, found.flops).items()):
            note = "   (only in logged steps)" if where == "health" else ""
            count = "?" if times is None else str(times)
            amount = "?" if size is None else f"{size / MIB:.3f}"
            lines.append(f"  {kind:<18}{where or 'elsewhere':<16}{count:>10}{amount:>12}{note}")
    if found.estimate:
        lines += ["", *estimate_table(found)]
    lines.append("")
    if found.bound:
        bound, key = found.bound
        lines.append(f"{key} limits the batch to {bound} images.")
    lines += [
        f"Compiled in {found.compile_s:.0f} s.",
        fit_text(found),
    ]
    return "\n".join(lines)


COSTLY = 10  # the number of operations that the table of an estimate names


def estimate_table(found: Plan) -> list[str]:
    """Returns the lines of the table with the estimate of the step."""
    total, numbers = sum(o.total for o in found.estimate), estimated(found)
    lines = [
        f"{'ESTIMATE of the step, not a measurement':<44}{'ms':>8}{'share':>8}",
        f"  {'step':<42}{1000 * total:>8.2f}",
    ]
    for heading, parts in (("scope", numbers["by_scope"]), ("kind", numbers["by_kind"])):
        lines.append(f"by {heading}")
        lines += [
            f"  {name or 'elsewhere':<42}{ms:>8.2f}{ms / 1000 / total:>8.1%}"
            for name, ms in parts.items()
        ]
    lines.append(f"the {COSTLY} most costly operations, with how often each runs")
    lines += [
        f"  {row['source'] or row['instruction']:<42.42}{row['ms']:>8.2f}{row['share']:>8.1%}"
        f"  {row['times']:>4} x {row['kind']}"
        for row in numbers["most_costly"]
    ]
    lines += [
        f"  {numbers['images_per_s']:.0f} images/s, {numbers['mfu']:.1%} of the peak of "
        f"{(found.rate or 0) / 1e12:.0f} TFLOP/s per chip ({numbers['model_tflop']:.3f} TFLOP of "
        "the model), "
        f"{numbers['gb_moved']:.0f} GB moved, {numbers['launches']} kernels.",
        f"  Collectives take {numbers['exposed_ms']:.2f} ms while nothing else runs, and "
        f"{numbers['hidden_ms']:.2f} ms beside kernels.",
        "  It assumes the rates that large kernels reach, and does not see caches, tiles,",
        "  autotuning, the host, the input or clocks under load. It ranks programs; a run is",
        "  likely to be slower.",
    ]
    return lines


def estimated(found: Plan) -> dict[str, Any]:
    """Returns the estimate of the step as numbers, for one chip unless they say otherwise."""
    operations = found.estimate
    total = sum(o.total for o in operations)
    scopes: dict[str, float] = defaultdict(float)
    kinds: dict[str, float] = defaultdict(float)
    for operation in operations:
        scopes[flops.scope(operation.name, found.flops)] += 1000 * operation.total
        kinds[operation.kind] += 1000 * operation.total

    def ranked(parts: dict[str, float]) -> dict[str, float]:
        return dict(sorted(parts.items(), key=lambda item: -item[1]))

    sent = [o for o in operations if o.kind == "collectives"]
    return {
        "ms": 1000 * total,
        "images_per_s": found.batch_size / total,
        "mfu": (found.model_flops or 0) / found.chips / (found.rate or math.inf) / total,
        "model_tflop": (found.model_flops or 0) / 1e12,
        "gb_moved": sum(o.times * o.bytes for o in operations if o.kind != "collectives") / 1e9,
        "launches": sum(o.times for o in operations if o.kind != "collectives"),
        "by_scope": ranked(scopes),
        "by_kind": ranked(kinds),
        "exposed_ms": 1000 * sum(o.total for o in sent),
        "hidden_ms": 1000 * sum(o.times * o.hidden for o in sent),
        "most_costly": [
            {
                "source": o.source,
                "instruction": o.instruction,
                "kind": o.kind,
                "times": o.times,
                "ms": 1000 * o.total,
                "share": o.total / total,
            }
            for o in sorted(operations, key=lambda o: -o.total)[:COSTLY]
        ],
    }


def fit_text(found: Plan) -> str:
    """Returns the sentence that says whether the step fits."""
    wanted = found.wanted
    size = f"{wanted / GIB:.2f} GiB per chip" if isinstance(wanted, int) else wanted
    if found.limit is None:
        return f"fits: unknown, {size} needed, and {found.kind} does not report its memory"
    return f"fits: {'yes' if found.fits else 'no'}, {size} of {found.limit / GIB:.2f} GiB"


def largest_text(best: Plan | None, found: Plan) -> str:
    """Returns the sentence that says which batch fits, None if not even one image per chip does.

    Args:
        best: the plan with the largest batch that fits.
        found: a plan of the same settings that does not fit.
    """
    if best is not None:
        return f"The largest batch that fits is {best.batch_size}, to within {APART:.0%}."
    least = "one image per chip" + " and microbatch" * (found.accumulate > 1)
    return (
        f"No batch fits, not even {least}. --config.model.remat=full, a smaller model, smaller "
        "images, or more chips with --config.mesh.fsdp need less memory per chip."
    )


def record(found: Plan) -> dict[str, Any]:
    """Returns the plan as an object for JSON."""
    numbers = found._asdict()
    if not found.estimate:
        del numbers["estimate"], numbers["model_flops"]
    return {
        **numbers,
        **({"estimate": estimated(found)} if found.estimate else {}),
        "bound": found.bound[0] if found.bound else None,
        "collectives": [
            {"kind": kind, "where": where, "times": times, "bytes": size}
            for (kind, where), (times, size) in sorted(
                traffic(found.collectives, found.flops).items()
            )
        ],
        "jax": jax.__version__,
    }


def main() -> None:
    """Plans the run that the flags describe."""
    args = flags.FLAGS
    check_used(args.config, given := cli.given())
    if args.largest_batch and "batch_size" in given:
        raise UserError(
            "--config.batch_size would have no effect: --largest_batch tries batches of all sizes"
        )
    if args.topology:
        jax.config.update("jax_platforms", "cpu")  # nothing is computed, so no chip is claimed
        devices = described_devices(args.topology)
    else:
        devices = jax.devices()
    found = largest_batch(args.config, devices) if args.largest_batch else None
    nothing_fits = args.largest_batch and found is None
    if found is None:
        found = plan(args.config, devices)
    print(table(found))
    if nothing_fits:
        print(largest_text(None, found))
    elif found.fits is False and is_described_gpu(devices[0]):
        print(largest_text(largest_batch(args.config, devices, found), found))
    print(json.dumps(record(found)))
    if found.fits is False:
        sys.exit(1)


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_string(
        "topology",
        "",
        "The TPUs or GPUs to plan for, such as v5e:16x16, h100:8 or h200:2x8 (hosts x GPUs); by "
        "default the devices of this machine.",
    )
    flags.DEFINE_bool("largest_batch", False, "Find the largest batch that fits.")
    cli.run(main, devices=False)
