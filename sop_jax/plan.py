"""Says whether a run fits its chips and what a step costs, before any chip is paid for.

    python -m sop_jax.plan --config=configs/imagenet_vitb16.py --topology=v5e:16x16
    python -m sop_jax.plan --config=configs/digits.py

Compiles the run's own train step, for a TPU topology on a machine that has no TPU
(`pip install -e .[tpu]`) or for the devices of this machine. Prints a table and one line of JSON;
exits with 1 where the step does not fit, on a CPU in the memory that is available now. Needs no
data: ImageNet's size stands in for it, which decides schedules alone. --largest_batch finds the
largest batch a chip that fits.
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

IMAGES = 1_281_167  # of ImageNet's train split
MIB = 2**20
SCOPES = ("teacher", "targets", "student", "losses", "update", "health")  # of every train step


class Plan(NamedTuple):
    """What is known of a train step before it runs. Bytes are those of one chip.

    Attributes:
        mesh: chips by axis.
        kind: of the chips.
        batch_size: images a step, over all chips.
        accumulate: microbatches of a step.
        bound: the largest batch that the objective can take, and the setting that says so; None
            where it takes any.
        memory: bytes by part; without temporaries where the compiler gave up.
        wanted: bytes in all; the compiler's own words for it where it gave up.
        limit: bytes that a program may use; None when the device does not say.
        fits: None when that is not known.
        flops: operations of matrix products a step, all chips together, by scope of the step.
        rate: operations a second that a chip does at best; None for other devices than TPUs.
        collectives: of the compiled step; empty where the compiler gave up.
        compile_s: seconds that compiling took.
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
        """Of the whole mesh."""
        return math.prod(self.mesh.values())


def described_devices(topology: str) -> list[Any]:
    """The chips of a TPU topology such as v5e:16x16, one device each, none of which need exist.

    Raises:
        UserError: libtpu is not installed, or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology} needs libtpu, whose compiler knows TPUs, and it is not "
            "installed; run: pip install -e .[tpu]"
        )
    # libtpu would look for TPUs and ask Google's cloud about itself, and let one process in.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    # A v4 chip is two devices unless told otherwise, and runs are started with one.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        devices: Any = topologies.get_topology_desc(topology, "tpu", **options).devices
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ").rstrip(".")
        raise UserError(
            f"libtpu does not know --topology={topology}: {reason}. Expected "
            "a kind of chip and a size of whole hosts, such as v5e:16x16, v6e:4x4, v5p:4x4x4 or "
            "v4:2x2x2; the smallest are v5e:2x2, v6e:2x2, v5p:2x2x1 and v4:2x2x1"
        ) from error
    if devices[0].device_kind not in CHIPS:
        raise UserError(
            f"--topology={topology} has chips of a kind whose memory is not known here: "
            f"{devices[0].device_kind}; expected one of v4, v5e, v5p and v6e"
        )
    return list(devices)


def plan(config: ml_collections.ConfigDict, devices: list[Any]) -> Plan:
    """Compiles the train step of a config for devices.

    Args:
        config: see `sop_jax.config`.
        devices: of this machine, or from `described_devices`.

    Raises:
        UserError: the config is wrong, or does not match the devices.
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
    """The plan with the largest batch that fits; None when not even one image a chip does.

    Halves from what the objective can take, or all images of an epoch, because the compiler is
    quick to say no, then bisects.
    The microbatches of a step stay as many as they are.

    Raises:
        UserError: as `plan`, or the devices do not say how much memory they have.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    devices = list(mesh.devices.flat)
    if bytes_limit(devices) is None:
        raise UserError(
            f"{devices[0].device_kind} devices do not say how much memory they have, so no batch "
            "is too large; name a --topology"
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
    no = most // unit + 1
    yes = no - 1
    while yes and not fits(yes):
        no, yes = yes, yes // 2
    while no - yes > 1:
        middle = (yes + no) // 2
        yes, no = (middle, no) if fits(middle) else (yes, middle)
    return best


def state_bytes(run: Run) -> dict[str, int]:
    """Bytes a chip of what a step is given, by part."""
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
    """Bytes a chip beyond the `given` arrays, by part, as the compiler counts them."""
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return {
        "activations": analysis.temp_size_in_bytes,
        "program": analysis.generated_code_size_in_bytes,
        "padding": analysis.argument_size_in_bytes - given + max(0, outputs),
    }


def traffic(
    sent: list[Collective], scopes: Container[str]
) -> dict[tuple[str, str], tuple[int | None, int | None]]:
    """How often collectives run in a step, and bytes a step, by their kind and scope.

    None where the length of a loop is not known.
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
    """The plan for a person."""
    axes = " x ".join(f"{name} {size}" for name, size in found.mesh.items())
    images = found.batch_size // found.chips
    lines = [
        f"batch {found.batch_size} on {found.chips} {found.kind} ({axes}): {images} images a chip"
        + f", in {found.accumulate} microbatches" * (found.accumulate > 1),
        "",
        f"{'memory a chip':<36}{'MiB':>10}",
    ]
    lines += [f"  {WORDS[name]:<34}{size / MIB:>10.1f}" for name, size in found.memory.items()]
    lines += ["", f"{'operations a step':<36}{'TFLOP':>10}"]
    lines += [
        f"  {name or 'elsewhere':<34}{count / 1e12:>10.3f}"
        for name, count in found.flops.items()
        if count
    ]
    total = sum(found.flops.values())
    lines += [f"  {'in all, of matrix products':<34}{total / 1e12:>10.3f}"]
    if found.rate:
        least = total / found.chips / found.rate
        lines += [
            f"  at the {found.rate / 1e12:.0f} TFLOP/s that a chip does at best, a step takes at "
            f"least {1000 * least:.3g} ms:",
            "  a bound, not a prediction",
        ]
    if found.collectives:
        heads = f"{'collectives':<20}{'where':<16}{'a step':>10}{'MiB':>12}"
        lines += ["", heads]
        for (kind, where), (times, size) in sorted(traffic(found.collectives, found.flops).items()):
            note = "   (steps that measure)" if where == "health" else ""
            count = "?" if times is None else str(times)
            amount = "?" if size is None else f"{size / MIB:.3f}"
            lines.append(f"  {kind:<18}{where or 'elsewhere':<16}{count:>10}{amount:>12}{note}")
    lines.append("")
    if found.bound:
        bound, key = found.bound
        lines.append(f"{key} bounds the batch to {bound} images.")
    lines += [
        f"Compiled in {found.compile_s:.0f} s.",
        fit_text(found),
    ]
    return "\n".join(lines)


def fit_text(found: Plan) -> str:
    """Whether it fits, in words."""
    wanted = found.wanted
    size = f"{wanted / GIB:.2f} GiB a chip" if isinstance(wanted, int) else wanted
    if found.limit is None:
        return f"fits: unknown, {size} wanted, and {found.kind} does not say what it has"
    return f"fits: {'yes' if found.fits else 'no'}, {size} of {found.limit / GIB:.2f} GiB"


def record(found: Plan) -> dict[str, Any]:
    """The plan in numbers, for JSON."""
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
    """Plans what the flags name."""
    args = flags.FLAGS
    check_used(args.config, given := cli.given())
    if args.largest_batch and "batch_size" in given:
        raise UserError(
            "--config.batch_size would have no effect: --largest_batch tries batches of all sizes"
        )
    if args.topology:
        jax.config.update("jax_platforms", "cpu")  # nothing is computed, so no chip is taken
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
        "TPUs to plan for, such as v5e:16x16; by default the devices of this machine.",
    )
    flags.DEFINE_bool("largest_batch", False, "Find the largest batch that fits.")
    cli.run(main, devices=False)
