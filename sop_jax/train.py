"""Pretrains a vision transformer on unlabelled images.

    python -m sop_jax.train --config=configs/digits.py --workdir=runs/digits

Any setting can be changed on the command line: --config.batch_size=128. The same command again
resumes an interrupted run, exactly; a finished one it leaves as it is.
"""

import functools
import json
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from etils import epath

from sop_jax import checkpoint, optim
from sop_jax import config as config_lib
from sop_jax.check import check
from sop_jax.data.pipeline import train_batches
from sop_jax.data.sources import Source, open_source
from sop_jax.errors import UserError
from sop_jax.evaluate import knn_evaluation
from sop_jax.features import make_extractor
from sop_jax.mesh import make_mesh, replicated, to_devices
from sop_jax.metrics import Progress, open_writer, read_metrics
from sop_jax.models import build
from sop_jax.sop.objective import sop
from sop_jax.state import TrainState, init_state
from sop_jax.step import make_train_step

IN_FLIGHT = 2  # steps that the host may be ahead of the devices
FEW_IMAGES = 1000  # below this many seen, a share of corrupt images says little


def train(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
    """Runs a config to its end, from wherever `workdir` stands.

    Args:
        config: see `sop_jax.config`.
        workdir: gets config.json, metrics.jsonl, tensorboard/, checkpoints/ and summary.json.

    Returns:
        The summary.

    Raises:
        UserError: something that the person who started the run can mend.
    """
    check(config)
    workdir = epath.Path(workdir)
    if (finished := open_workdir(config, workdir)) is not None:
        print(f"{workdir} is finished; its summary:\n{json.dumps(finished)}")
        return finished

    # What the run is made of.
    mesh = make_mesh(config.mesh.data, config.batch_size)
    train_source, test_source = open_source(config.data, "train"), open_source(config.data, "test")
    assert train_source is not None  # only the test split may be missing
    steps, epoch = optim.run_length(config, len(train_source))
    plan = optim.schedules(config, steps, epoch)
    tx = optim.optimizer(config.optim, plan)
    model = build(config, config.augment.global_size)
    objective = sop(config.sop, model.dim)
    train_step = jax.jit(
        make_train_step(model, objective, tx, plan),
        donate_argnums=0,
        out_shardings=replicated(mesh),
    )
    evaluate = functools.partial(
        knn_evaluation,
        make_extractor(model, config, mesh),
        train=train_source,
        test=test_source,
        eval_config=config.eval,
    )

    # The state: the newest checkpoint's, or a new one.
    init = functools.partial(init_state, model=model, objective=objective, tx=tx)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
        jax.eval_shape(init, jax.random.key(0)),
    )
    checkpoint.check_space(workdir, (config.checkpoint.keep_last + 1) * state_bytes(abstract))
    checkpoints = checkpoint.Checkpoints(
        workdir, config.checkpoint.keep_last, config.checkpoint.keep_every
    )
    start = checkpoint.latest_step(workdir) or 0
    if start:
        state = checkpoint.restore(workdir, abstract, start)
    else:
        state = jax.jit(init, out_shardings=replicated(mesh))(jax.random.key(config.seed))

    writer = open_writer(workdir, start) if jax.process_index() == 0 else None
    rows = read_metrics(workdir)
    untrained = rows[0].get("knn_top1") if rows else None
    wall_before = rows[-1]["wall_s"] if rows else 0.0
    progress = Progress(start, steps, shown=writer is not None)
    progress.note(describe(config, train_source, state, mesh.devices, start, steps, epoch))
    batches = train_batches(
        train_source, config, model.patch, start, jax.process_index(), jax.process_count()
    )
    began = time.monotonic()

    def record(step: int, row: dict[str, Any]) -> None:
        row = row | {"wall_s": wall_before + time.monotonic() - began}
        if writer is not None:
            writer.write(step, row)
        rows.append({"step": step} | row)

    try:
        with Interruption() as interruption:
            if start == 0 and config.eval_every:
                progress.note("k-NN accuracy of the untrained network ...")
                result = evaluate(state.teacher)
                untrained = result["knn_top1"]
                record(0, result)
                progress.show(0, {"knn": untrained})

            pending: list[tuple[int, dict[str, jax.Array]]] = []
            corrupt = Corrupt(train_source, config)
            clock, timed = time.monotonic(), start
            for step in range(start + 1, steps + 1):
                last = step == steps
                log = last or due(step, config.log_every)
                state, metrics = train_step(state, to_devices(mesh, next(batches)), log)
                pending.append((step, metrics))
                if len(pending) > IN_FLIGHT:
                    jax.block_until_ready(pending[-1 - IN_FLIGHT][1]["loss"])
                progress.advance()

                save = last or interruption.asked or due(step, config.checkpoint_every)
                evaluating = config.eval_every and (last or due(step, config.eval_every))
                if not (log or save or evaluating):
                    continue
                row = fetch(pending, checkpoint.latest_step(workdir), corrupt, progress)
                pending.clear()
                if log:
                    speed = (step - timed) * config.batch_size / (time.monotonic() - clock)
                    row["images_per_s"] = speed
                    shown = {"loss": row["loss"], "images/s": speed}
                    if words := objective.verdict(row):
                        progress.note(f"step {step}: {words}")
                    progress.show(step, shown)
                else:
                    row = {}
                if evaluating:
                    result = evaluate(state.teacher)
                    row |= result
                    progress.show(step, {"knn": result["knn_top1"]})
                if row:
                    record(step, row)
                if save:
                    checkpoints.save(step, state)
                if interruption.asked and not last:
                    checkpoints.wait()
                    raise UserError(
                        f"interrupted; step {step} of {steps} is saved, and the same command goes "
                        "on from there"
                    )
                if log or evaluating or save:
                    clock, timed = time.monotonic(), step
            checkpoints.wait()
    finally:
        batches.close()
        progress.close()
        checkpoints.close()
        if writer is not None:
            writer.close()

    summary = summarise(rows, untrained, steps)
    if writer is not None:
        (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(json.dumps(summary))
    return summary


def open_workdir(config: ml_collections.ConfigDict, workdir: epath.Path) -> dict[str, Any] | None:
    """Makes the folder of a run, or checks that an existing one is of this config.

    Returns:
        The summary if the run is finished.

    Raises:
        UserError: another config made the folder, or it holds something else.
    """
    summary, made = workdir / "summary.json", workdir / "config.json"
    if made.exists():
        if different := config_lib.changes(config_lib.load(workdir), config):
            raise UserError(
                f"{workdir} belongs to a run with other settings:\n  "
                + "\n  ".join(different)
                + "\nUse those settings to go on with it, or another --workdir. Only "
                f"{', '.join(config_lib.RESUMABLE)} may change."
            )
        if summary.exists():
            return json.loads(summary.read_text())
    elif workdir.exists() and checkpoint.latest_step(workdir) is not None:
        raise UserError(
            f"{workdir} has checkpoints but no config.json that says of what; use another --workdir"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    config_lib.save(config, workdir)
    return None


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps, 0 for never, happens at this one."""
    return every > 0 and step % every == 0


def fetch(
    pending: list[tuple[int, dict[str, jax.Array]]],
    saved: int | None,
    corrupt: "Corrupt",
    progress: Progress,
) -> dict[str, float]:
    """The newest step's metrics, after a look at those of all steps since the last fetch.

    Args:
        pending: steps and their metrics, still on the devices.
        saved: the newest checkpoint, for the error.
        corrupt: counts images that had to be replaced.
        progress: tells of them.

    Raises:
        UserError: a loss is not finite, or too many images are corrupt.
    """
    for step, metrics in jax.device_get(pending):
        for index in corrupt.add(metrics.pop("corrupt")):
            progress.note(f"corrupt image replaced: {corrupt.source.name(index)}")
        row = {name: float(value) for name, value in metrics.items()}
        bad = [name for name in ("cls", "mim", "loss", "grad_norm") if not finite(row.get(name, 0))]
        if bad:
            values = ", ".join(f"{name} {row[name]:.4g}" for name in ("cls", "mim", "grad_norm") if name in row)
            raise UserError(
                f"step {step}: {bad[0]} is not finite ({values}). "
                + (f"The last good checkpoint is step {saved}. " if saved else "None was saved yet. ")
                + "Try a lower optim.lr, a longer optim.warmup_steps, or model.dtype=float32; "
                "nothing was saved after the failure"
            )
    corrupt.check()
    return row


def finite(value: float) -> bool:
    """Neither NaN nor infinite."""
    return bool(np.isfinite(value))


class Corrupt:
    """Images that could not be read, over all hosts: each step reports those of the global batch."""

    def __init__(self, source: Source, config: ml_collections.ConfigDict):
        """Counts for a run over `source` with the share that `config.data` allows."""
        self.source, self.share = source, config.data.max_corrupt_share
        self.seen, self.found = 0, set[int]()

    def add(self, corrupt: np.ndarray) -> list[int]:
        """Takes a batch's `corrupt` [B] and returns the records not met before."""
        self.seen += len(corrupt)
        new = sorted(set(corrupt[corrupt >= 0].tolist()) - self.found)
        self.found.update(new)
        return new

    def check(self) -> None:
        """Raises UserError when more than the allowed share of the images seen is corrupt."""
        base = min(len(self.source), max(self.seen, FEW_IMAGES))
        if len(self.found) > self.share * base:
            names = [self.source.name(index) for index in sorted(self.found)]
            raise UserError(
                f"{len(names)} of {base} images cannot be read, more than "
                f"data.max_corrupt_share {self.share:.2%}:\n  "
                + "\n  ".join(names[:100])
                + (f"\n  and {len(names) - 100} more" if len(names) > 100 else "")
                + "\nRepair or remove them, or allow more with --config.data.max_corrupt_share"
            )


class Interruption:
    """Turns SIGINT and SIGTERM into a wish that the loop reads; a second one ends the program."""

    def __enter__(self) -> "Interruption":
        self.asked = False
        self.before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _ask(self, number: int, _: Any) -> None:
        self.asked = True
        signal.signal(number, self.before[number])

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def state_bytes(abstract: TrainState) -> int:
    """Size of a state in memory and on disk."""
    leaves = (
        jax.eval_shape(jax.random.key_data, leaf)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
        for leaf in jax.tree.leaves(abstract)
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def describe(
    config: ml_collections.ConfigDict,
    source: Source,
    state: TrainState,
    devices: np.ndarray,
    start: int,
    steps: int,
    epoch: float,
) -> str:
    """What is about to run, for a person."""
    count = sum(leaf.size for leaf in jax.tree.leaves(state.student))
    views = f"2x{config.augment.global_size}"
    if config.augment.local_crops:
        views += f" + {config.augment.local_crops}x{config.augment.local_size}"
    kind = devices.flat[0].device_kind
    return (
        f"{len(source)} images, views {views}; {count / 1e6:.1f} M parameters; batch "
        f"{config.batch_size} on {devices.size} {kind} device{'s' * (devices.size > 1)}; "
        f"steps {start} to {steps} ({steps / epoch:.1f} epochs). The first step compiles."
    )


def summarise(
    rows: list[dict[str, Any]], untrained: float | None, steps: int
) -> dict[str, Any]:
    """The summary of a finished run from its logged rows."""
    final = rows[-1]
    speeds = [row["images_per_s"] for row in rows if "images_per_s" in row]
    return {
        "knn_top1": final.get("knn_top1"),
        "knn_top1_untrained": untrained,
        "knn_k": final.get("knn_k"),
        "loss": final["loss"],
        "steps": steps,
        "images_per_s": float(np.median(speeds)),
        "wall_s": final["wall_s"],
    }


def main(argv: list[str]) -> None:
    """Trains what the flags name."""
    del argv
    train(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
    from ml_collections import config_flags

    from sop_jax import cli

    config_flags.DEFINE_config_file("config", lock_config=True)
    flags.DEFINE_string("workdir", None, "The folder of the run, local or gs://.", required=True)
    flags.mark_flag_as_required("config")
    cli.run(main)
