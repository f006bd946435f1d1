"""Times the train step of a run, its parts, and a PyTorch step of the same method for comparison.

    python benchmarks/step.py --arch=vit_tiny --batch=4 --dtype=float32
    python benchmarks/step.py --arch=vit_base --batch=64 --method=paper --config.model.remat=dots
    python benchmarks/step.py --arch=vit_tiny --batch=4 --dtype=float32 --peer=PATH/torch_sop.py

The step is the one that training compiles, with its state donated, on random pixels and masks that
are already on the devices. With `--peer` both steps alternate, `--rounds` times, each time in a new
process, so that each has a peak memory of its own. With `--trace` five further steps are traced,
and their time is summed up by scope, beside the estimate of the compiled program on GPUs whose
rates are known. The last line is JSON.

`utilisation` is the share of the rate of a large matrix product that the operations of the model
take, without those that the backward pass repeats to save memory.

Parts are the functions that the step itself calls, each compiled and timed on its own: the
teacher's forward pass, the targets (the search of prototypes and the push of the memories), the
losses with their backward pass, and the update. The student is the rest of the step. Parts do not
donate their inputs, so that the time of the targets includes a copy of the memories, which the step
does not make.
"""

import argparse
import ast
import functools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ceilings import matrix_rate, seconds  # noqa: E402

from sop_jax import config as config_lib  # noqa: E402
from sop_jax.check import check_config  # noqa: E402
from sop_jax.compiled.cache import keep_compiled  # noqa: E402
from sop_jax.compiled.flops import scope  # noqa: E402
from sop_jax.compiled.gpus import GPUS  # noqa: E402
from sop_jax.compiled.program import parse_program  # noqa: E402
from sop_jax.compiled.roofline import estimate  # noqa: E402
from sop_jax.data.masks import view_mask  # noqa: E402
from sop_jax.errors import UserError  # noqa: E402
from sop_jax.objectives.methods import method_of  # noqa: E402
from sop_jax.objectives.objective import Outputs  # noqa: E402
from sop_jax.parallel.mesh import make_mesh, put, replicated, to_devices  # noqa: E402
from sop_jax.plan import SCOPES  # noqa: E402
from sop_jax.settings import flatten  # noqa: E402
from sop_jax.training import optim  # noqa: E402
from sop_jax.training.assemble import Run, assemble, attention_of, model_flops  # noqa: E402
from sop_jax.training.step import embed_views, update  # noqa: E402

ARCHS = {"vit_tiny": "ti", "vit_small": "s", "vit_base": "b", "vit_large": "l"}

# The yardstick is the paper's pseudo-code with one task per level: all nine rows of an SOP have the
# same votes, and supports come from the whole memory. It has no drop path.
METHODS: dict[str, dict[str, Any]] = {
    "yardstick": {
        "sop.cls.tasks": 1,
        "sop.cls.votes": "smoothed",
        "sop.pool": "all",
        "sop.search_precision": "high",  # as in the peer
        "model.drop_path": 0.0,
    },
    "paper": {},
}

TRACED = 5  # steps

IMAGES = 1_281_167  # of ImageNet's train split, which determine the schedules


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Parses the command line; returns the arguments and the settings --config.KEY=VALUE."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="vit_tiny", choices=ARCHS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--local-crops", type=int, default=10)
    parser.add_argument("--method", default="yardstick", choices=METHODS)
    parser.add_argument("--parts", action="store_true", help="also time the parts of the step")
    parser.add_argument("--trace", action="store_true", help="also trace five steps, by scope")
    parser.add_argument("--cache", help="folder of compiled programs; by default that of training")
    parser.add_argument("--peer", help="path of torch_sop.py, to alternate with this step")
    parser.add_argument("--peer-python", default=sys.executable, help="Python to run the peer with")
    parser.add_argument("--closed-form", action="store_true", help="passed to the peer")
    parser.add_argument("--compile", action="store_true", help="use torch.compile in the peer")
    parser.add_argument("--device", default=None, help="device of the peer: cpu or cuda")
    parser.add_argument("--rounds", type=int, default=2, help="alternations of both steps")
    args, changes = parser.parse_known_args()
    if min(args.steps, args.rounds) < 1 or args.warmup < 0:
        parser.error("--steps and --rounds must be 1 or more, --warmup 0 or more")
    return args, changes


def settings(args: argparse.Namespace, changes: list[str]) -> ml_collections.ConfigDict:
    """Returns the config of the arguments and settings.

    Raises:
        SystemExit: a setting is unknown or invalid.
    """
    config = config_lib.paper()
    config.batch_size = args.batch
    config.model.size, config.model.dtype = ARCHS[args.arch], args.dtype
    config.augment.local_crops = args.local_crops
    given = dict(parsed(change) for change in changes)
    for key in given.keys() - flatten(config).keys():
        raise SystemExit(f"error: unknown argument --config.{key}")
    try:
        config.update_from_flattened_dict(METHODS[args.method] | given)
        check_config(config)
    except (UserError, KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    return config


def parsed(change: str) -> tuple[str, Any]:
    """Returns the key and the value of --config.KEY=VALUE, a Python literal or else a string."""
    if not (match := re.fullmatch(r"--config\.([^=]+)=(.*)", change)):
        raise SystemExit(f"error: unknown argument {change}")
    try:
        return match[1], ast.literal_eval(match[2])
    except (ValueError, SyntaxError):
        return match[1], match[2]


def random_batch(config: ml_collections.ConfigDict, run: Run) -> dict[str, np.ndarray]:
    """Returns a global batch of random pixels, with masks drawn as in training."""
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.integers(256, size=leaf.shape, dtype=np.uint8)
        for name, leaf in run.batch.items()
        if leaf.dtype == jnp.uint8
    }
    mask = run.batch["mask"].shape
    drawn = [view_mask(mask[2:], rng, config.mask) for _ in range(mask[0] * mask[1])]
    arrays["mask"] = np.stack(drawn).reshape(mask)
    arrays["index"] = np.arange(config.batch_size, dtype=np.int32)
    arrays["corrupt"] = np.full(config.batch_size, -1, np.int32)
    return arrays


def parts_of(
    run: Run, config: ml_collections.ConfigDict, state: Any, batch: dict, args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Returns the median seconds and the compiled temporary bytes of each part of the step."""
    objective, key = run.objective, jax.random.key(1)
    tx = optim.optimizer(config.optim, run.schedules, objective.optimizers)
    now = {name: jnp.float32(schedule(0)) for name, schedule in objective.schedules.items()}
    selection = jax.jit(objective.select)(batch["mask"], jax.random.split(key, args.batch))

    parts = {}

    def part(name: str, function: Callable, *inputs: Any) -> Any:
        compiled = jax.jit(function).lower(*inputs).compile()
        taken = seconds(lambda: compiled(*inputs), args.warmup, args.steps)
        parts[name] = {"s": statistics.median(taken), "temp_bytes": temporary_bytes(compiled)}
        return compiled(*inputs)

    def teacher(params: Any, batch: dict) -> Outputs:
        return embed_views(run.model, params, objective.teacher_views, batch, selection.teacher)[0]

    def losses(shared: Any, targets: Any, student: Outputs) -> Any:
        def loss(student: Outputs) -> jax.Array:
            return objective.loss(
                params={},
                shared=shared,
                targets=targets,
                student=student,
                masked=selection.masked,
                now=now,
            )[0]

        return jax.value_and_grad(loss)(student)

    def teach(carried: Any, outputs: Outputs) -> Any:
        return objective.teach({}, {}, carried, outputs, selection.masked, batch["index"], now, key)

    outputs = part("teacher", teacher, state.teacher, batch)
    shared, targets, _ = part("targets", teach, state.carried, outputs)
    views = len(objective.student_views)
    several = jnp.tile(outputs.cls, (1, views // 2 + 1, 1))[:, :views]
    masked = selection.student.patches.shape[-1]
    student = outputs._replace(cls=several, patches=outputs.patches[:, :, :masked])
    part("losses", losses, shared, targets, student)
    part("update", functools.partial(update, tx, momentum=0.99), state.student, state)
    return parts


def traced(once: Callable[[], Any], compiled: jax.stages.Compiled, scopes: list[str]) -> dict:
    """Returns the seconds of a step by scope, the mean of a trace of five."""
    computations, _ = parse_program(compiled.as_text() or "")
    names = {
        instruction.name: named[1]
        for computation in computations.values()
        for instruction in computation.values()
        if instruction.opcode not in ("while", "conditional", "call")  # which contain others
        and (named := re.search(r'op_name="([^"]*)"', instruction.attributes))
    }
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(TRACED):
                jax.block_until_ready(once())
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
        devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
        found: dict[str, float] = dict.fromkeys(["", *scopes], 0.0)
        for plane in devices or planes:
            for line in plane.lines:
                for event in line.events:
                    operation = dict(event.stats).get("hlo_op")
                    if operation in names:
                        found[scope(names[operation], scopes)] += event.duration_ns / 1e9 / TRACED
    return {name or "elsewhere": round(value, 6) for name, value in found.items() if value}


def estimated(compiled: jax.stages.Compiled, scopes: list[str]) -> dict | None:
    """Returns the estimate that `traced` is compared with; None for devices that are not known."""
    kind = jax.devices()[0].device_kind
    gpu = next((gpu for gpu in GPUS.values() if gpu.description == kind), None)
    if gpu is None:
        return None
    found: dict[str, float] = {}
    for operation in estimate(compiled.as_text() or "", gpu, jax.device_count()):
        name = scope(operation.name, scopes) or "elsewhere"
        found[name] = found.get(name, 0.0) + operation.total
    return {name: round(value, 6) for name, value in found.items()}


def temporary_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Returns the bytes of a program's temporary arrays, None where the compiler does not say."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def peak_bytes() -> int:
    """Returns the peak bytes of the first device, or of this process if the device has no count."""
    stats = jax.devices()[0].memory_stats() or {}
    return (
        stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )


def measure(args: argparse.Namespace, config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Runs the step, and returns its speed, memory and operations."""
    folder = keep_compiled(args.cache)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    run = assemble(config, mesh, IMAGES)
    state = jax.block_until_ready(run.init(jax.random.key(0)))
    batch = to_devices(mesh, random_batch(config, run))
    off = put(np.array(False), replicated(mesh))
    began = time.perf_counter()
    step = run.train_step.lower(state, batch, off).compile()
    compile_s = time.perf_counter() - began

    def once() -> Any:
        nonlocal state
        state, metrics = step(state, batch, off)
        return metrics["loss"]

    taken = seconds(once, args.warmup, args.steps)
    peak = peak_bytes()  # before the parts are timed, which need more memory
    step_s = statistics.median(taken)
    device = jax.devices()[0]
    operations = model_flops(config, run)
    ceiling = matrix_rate(args.dtype) * mesh.devices.size
    result = {
        "arch": args.arch,
        "method": args.method,
        "batch": args.batch,
        "dtype": args.dtype,
        "device": f"{mesh.devices.size} x {device.device_kind}",
        "jax": jax.__version__,
        "attention": attention_of(config, device),
        "flags": os.environ.get("XLA_FLAGS", ""),
        "step_s": round(step_s, 5),
        "step_s_range": [round(min(taken), 5), round(max(taken), 5)],
        "images_per_s": round(args.batch / step_s, 3),
        "peak_bytes": int(peak),
        "compiled_temp_bytes": temporary_bytes(step),
        "compile_s": round(compile_s, 2),
        "cache": folder,
        "flops": operations,
        "matrix_flops_per_s": ceiling,
        "utilisation": round(operations / step_s / ceiling, 4),
        "loss": float(once()),
    }
    if args.trace:
        scopes = [*SCOPES, *method_of(config).scopes]
        result["trace_s"] = traced(once, step, scopes)
        result["estimate_s"] = estimated(step, scopes)
    if args.parts:
        parts = parts_of(run, config, state, batch, args)
        parts_s = {name: part["s"] for name, part in parts.items()}
        parts_s["student"] = step_s - sum(parts_s.values())
        result["parts_s"] = {name: round(value, 5) for name, value in parts_s.items()}
        result["shares"] = {name: round(value / step_s, 4) for name, value in parts_s.items()}
        result["parts_temp_bytes"] = {name: part["temp_bytes"] for name, part in parts.items()}
    return result


def commands(args: argparse.Namespace, changes: list[str]) -> dict[str, list[str]]:
    """Returns the commands that run this step once, and the peer's."""
    shared = [f"--arch={args.arch}", f"--batch={args.batch}", f"--dtype={args.dtype}"]
    shared += [f"--steps={args.steps}", f"--warmup={args.warmup}"]
    shared += [f"--local-crops={args.local_crops}"]
    ours = [sys.executable, __file__, *shared, f"--method={args.method}", *changes]
    ours += ["--parts"] * args.parts + ["--trace"] * args.trace
    ours += [f"--cache={args.cache}"] * bool(args.cache)
    peer = [args.peer_python, args.peer, *shared]
    peer += ["--closed-form"] * args.closed_form + ["--compile"] * args.compile
    peer += [f"--device={args.device}"] * bool(args.device)
    return {"ours": ours, "peer": peer}


def alternate(args: argparse.Namespace, changes: list[str]) -> dict[str, Any]:
    """Alternates both steps in new processes; returns medians and the ratios of neighbours."""
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for _ in range(args.rounds):
        for name, command in commands(args, changes).items():
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"error: {' '.join(command)} failed:\n{done.stderr[-3000:]}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name}: {json.dumps(found[name][-1])}", flush=True)
    step_s = {name: [row["step_s"] for row in rows] for name, rows in found.items()}
    peaks = {name: [row["peak_bytes"] for row in rows] for name, rows in found.items()}
    speed = [b / a for a, b in zip(step_s["ours"], step_s["peer"], strict=True)]
    memory = [a / b for a, b in zip(peaks["ours"], peaks["peer"], strict=True)]
    return found["ours"][-1] | {
        "step_s": statistics.median(step_s["ours"]),
        "images_per_s": round(args.batch / statistics.median(step_s["ours"]), 3),
        "peak_bytes": statistics.median(peaks["ours"]),
        "peer": found["peer"][-1]
        | {
            "step_s": statistics.median(step_s["peer"]),
            "peak_bytes": statistics.median(peaks["peer"]),
        },
        "speed_ratio": round(statistics.median(speed), 3),
        "speed_ratio_range": [round(min(speed), 3), round(max(speed), 3)],
        "memory_ratio": round(statistics.median(memory), 3),
        "memory_ratio_range": [round(min(memory), 3), round(max(memory), 3)],
    }


def main() -> None:
    """Prints the results, with a JSON line last."""
    args, changes = parse()
    config = settings(args, changes)
    result = alternate(args, changes) if args.peer else measure(args, config)
    result["changes"] = changes
    print(json.dumps(result))


if __name__ == "__main__":
    main()
