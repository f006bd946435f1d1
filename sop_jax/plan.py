"""Reports whether a run fits its chips and what a step costs, before the chips are needed.

    python -m sop_jax.plan --config=NAME --topology=v5e:16x16
    python -m sop_jax.plan --config=NAME [--largest_batch]

Compiles the train step of the run, either for a TPU topology, on a machine without TPUs
(`pip install -e '.[tpu]'`), or for the devices of this machine. Prints a table and one JSON line.
Exits with 1 if the step does not fit the memory of a chip or, on a CPU, the memory that is
available now. No data is needed: the number of images, which affects only the schedules, is taken
to be that of ImageNet. --largest_batch finds the largest batch that fits.

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
from collections.abc import Container
from typing import Any, NamedTuple

import jax
import ml_collections
from absl import flags

from sop_jax import cli
from sop_jax.check import check_config, check_used
from sop_jax.compiled import flops
from sop_jax.compiled.collectives import Collective, collectives
from sop_jax.compiled.device_memory import CHIPS, GIB, bytes_limit, compile_and_compare
from sop_jax.errors import UserError
from sop_jax.objectives.methods import method_of
from sop_jax.parallel.mesh import make_mesh
from sop_jax.training.assemble import Run, assemble, traced_step

IMAGES = 1_281_167  # in the train split of ImageNet
MIB = 2**20
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
        rate: the peak operations per second of a chip; None for devices other than TPUs.
        collectives: the collectives of the compiled step; empty if it did not compile.
        compile_s: the seconds that compiling took.
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

    @property
    def chips(self) -> int:
        """The number of chips in the mesh."""
        return math.prod(self.mesh.values())


def described_devices(topology: str) -> list[Any]:
    """Returns the chips of a TPU topology such as v5e:16x16, one device each; none need exist.

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
    began = time.monotonic()
    fit = compile_and_compare(traced.lower(), list(mesh.devices.flat))
    if fit.compiled is not None:
        memory |= program_bytes(fit.compiled.memory_analysis(), sum(memory.values()))
        sent = collectives(fit.compiled.as_text())
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
        rate=CHIPS[device.device_kind].rate if device.device_kind in CHIPS else None,
        collectives=sent,
        compile_s=time.monotonic() - began,
    )


def largest_batch(config: ml_collections.ConfigDict, devices: list[Any]) -> Plan | None:
    """Returns the plan with the largest batch that fits, or None if one image per chip is too many.

    The search starts from the largest batch that the objective supports, or else from all images
    of an epoch, and halves it until it fits, because the compiler rejects large programs quickly.
    Then it bisects. The number of microbatches stays the same.

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
    best = None

    def fits(images: int) -> bool:
        nonlocal best
        trial = config.copy_and_resolve_references()
        trial.batch_size = images * unit
        trial.update_from_flattened_dict(dict(method.any_batch))
        found = plan(trial, devices)
        print(f"batch {trial.batch_size}: {fit_text(found)}", file=sys.stderr, flush=True)
        best = found if found.fits else best
        return bool(found.fits)

    most, _ = method.batch_limit(config) or (IMAGES, "")
    too_many = most // unit + 1
    enough = too_many - 1
    while enough and not fits(enough):
        too_many, enough = enough, enough // 2
    while too_many - enough > 1:
        middle = (enough + too_many) // 2
        enough, too_many = (middle, too_many) if fits(middle) else (enough, middle)
    return best


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
    lines.append("")
    if found.bound:
        bound, key = found.bound
        lines.append(f"{key} limits the batch to {bound} images.")
    lines += [
        f"Compiled in {found.compile_s:.0f} s.",
        fit_text(found),
    ]
    return "\n".join(lines)


def fit_text(found: Plan) -> str:
    """Returns the sentence that says whether the step fits."""
    wanted = found.wanted
    size = f"{wanted / GIB:.2f} GiB per chip" if isinstance(wanted, int) else wanted
    if found.limit is None:
        return f"fits: unknown, {size} needed, and {found.kind} does not report its memory"
    return f"fits: {'yes' if found.fits else 'no'}, {size} of {found.limit / GIB:.2f} GiB"


def record(found: Plan) -> dict[str, Any]:
    """Returns the plan as an object for JSON."""
    return {
        **found._asdict(),
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
    if found is None:
        found = plan(args.config, devices)
    print(table(found))
    print(json.dumps(record(found)))
    if found.fits is False:
        sys.exit(1)


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_string(
        "topology",
        "",
        "The TPUs to plan for, such as v5e:16x16; by default the devices of this machine.",
    )
    flags.DEFINE_bool("largest_batch", False, "Find the largest batch that fits.")
    cli.run(main, devices=False)
