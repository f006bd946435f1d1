"""Pretrains a vision transformer on unlabelled images.

    python -m sop_jax.train --config=configs/digits.py --workdir=runs/digits

Any setting can be changed on the command line: --config.batch_size=128. The same command again
resumes an interrupted run, exactly; a finished one it leaves as it is.
"""

import contextlib
import importlib.util
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple, NoReturn

import jax
import ml_collections
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh

from sop_jax import cli, pretrained
from sop_jax import config as config_lib
from sop_jax.check import check_config, check_trace, check_used
from sop_jax.config import PATHS, flatten
from sop_jax.data import sources
from sop_jax.data.decode import decoding
from sop_jax.data.pipeline import Batches, check_shared_memory, train_batches
from sop_jax.data.sources import Source, open_source
from sop_jax.errors import Interrupted, UserError
from sop_jax.evaluate import knn_evaluation
from sop_jax.evaluation.features import make_extractor
from sop_jax.models import Params
from sop_jax.monitor.corrupt import CorruptImages, lines_of
from sop_jax.monitor.journal import Journal
from sop_jax.monitor.metrics import Progress, Writer, read_metrics
from sop_jax.monitor.pace import PaceKeeper
from sop_jax.monitor.profiling import Trace
from sop_jax.parallel import hosts
from sop_jax.parallel.interruption import Interruption
from sop_jax.parallel.mesh import host_rows, make_mesh, put, replicated, to_devices
from sop_jax.paths import check_writable, expand, write_whole
from sop_jax.training import checkpoint, optim, resume
from sop_jax.training.assemble import Run, assemble, compiled_step
from sop_jax.training.owner import Owner, owned
from sop_jax.training.state import TrainState

IN_FLIGHT = 2  # steps that the host may be ahead of the devices
UNSEEN = 100  # steps at most whose metrics nobody has looked at


def train(
    config: ml_collections.ConfigDict, workdir: epath.PathLike, wait: float = 0.0
) -> dict[str, Any]:
    """Runs a config to its end, from wherever `workdir` stands.

    Args:
        config: see `sop_jax.config`.
        workdir: gets config.json, data.json, metrics.jsonl, tensorboard/, checkpoints/ and
            summary.json, and while the run goes on the owner file of `sop_jax.training.owner`.
        wait: seconds to wait for another run that has the workdir.

    Returns:
        The summary.

    Raises:
        UserError: something that the person who started the run can mend.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    check_config(config)
    config, workdir = expand_paths(config), epath.Path(expand(str(workdir)))
    if workdir.exists() and not workdir.is_dir():
        raise UserError(
            f"--workdir={workdir} is a file; name a folder, which need not be there yet"
        )
    if config.data.path and os.path.realpath(workdir) == os.path.realpath(config.data.path):
        raise UserError(
            f"--workdir={workdir} is also data.path; a run would write among the images. Name "
            "another folder for the run"
        )
    with Interruption(ahead=IN_FLIGHT) as interruption:
        interruption.starting = before_training(workdir)
        hosts.check_shared(workdir)
        standing = resume.check_workdir(config, workdir)
        if standing.summary is not None:
            return tell_finished(standing, workdir)
        if not hosts.several():  # for whom `check_shared` did it
            check_writable(workdir, "--workdir")
        with owned(workdir, wait) as owner, contextlib.ExitStack() as opened:
            interruption.starting = before_training(workdir)  # after a wait for another run
            return train_until(interruption, owner, opened, config, workdir)


def train_until(
    interruption: Interruption,
    owner: Owner,
    opened: contextlib.ExitStack,
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
) -> dict[str, Any]:
    """As `train`; a wish to stop is granted at once during the start, later after a step."""
    standing = resume.check_workdir(config, workdir)  # again, after a wait for another run
    if standing.summary is not None:
        return tell_finished(standing, workdir)
    parts = prepare(standing, workdir)
    resumed = take_up(parts, workdir)
    progress = Progress(resumed.step, parts.run.steps, shown=hosts.is_first())
    opened.callback(progress.close)
    for note in (*parts.about(resumed.step), *parts.notes, *resumed.notes):
        progress.note(note)
    clock = time.monotonic()
    train_step = compiled_step(parts.config, parts.run, progress.note)
    compile_s = time.monotonic() - clock
    progress.note(f"The step is compiled, in {compile_s:.1f} s.")

    # Nothing was written so far, so that an error above leaves no trace.
    owner.check()
    if hosts.is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        resume.save(parts.config, parts.data, workdir)
    tools = open_tools(opened, parts, resumed, progress, owner, interruption, workdir)
    try:
        take_steps(train_step, parts, resumed, tools)
    finally:
        opened.close()
    return finish(tools.journal.rows, parts.run.steps, compile_s, owner, workdir)


class Parts(NamedTuple):
    """What a run is made of, before there is a state.

    Attributes:
        config: its settings.
        run: what follows from them and from the devices.
        train: the images to train on.
        test: the images to evaluate with, if there are any.
        data: what identifies the images.
        batch_rows: of the global batch that this process makes.
        notes: what a person should know.
    """

    config: ml_collections.ConfigDict
    run: Run
    train: Source
    test: Source | None
    data: resume.Data
    batch_rows: list[int]
    notes: list[str]

    def about(self, start: int) -> list[str]:
        """What is about to run from step `start` on, and what is doubtful about it."""
        return [
            describe(self.config, self.run, self.train, self.test, start),
            *doubts(self.config, len(self.train), start),
            *optim.beyond_end(self.config, self.run.steps, self.run.epoch),
        ]


def prepare(standing: resume.Standing, workdir: epath.Path) -> Parts:
    """Opens the images and assembles the run; every error of settings and data is raised here."""
    config = standing.config
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    train = open_source(config.data, "train")
    assert train is not None  # only the test split may be missing
    test = open_source(config.data, "test", train)
    data = resume.data_of(train, test)
    devices = f"{jax.local_device_count()} {jax.local_devices()[0].device_kind}"
    hosts.check_agreement({**resume.facts(data), "devices": devices})
    notes = [*standing.notes, *sources.notes(train, test)]
    notes += resume.check_data(config, data, workdir)
    run = assemble(config, mesh, len(train))
    check_trace(config.profile_steps, run.steps)
    batch_rows = host_rows(mesh, config.batch_size)  # of a batch that `assemble` has checked
    check_shared_memory(config, len(batch_rows))
    # One more than are kept, for the new one is there before the oldest goes.
    to_come = max(1, config.checkpoint.keep_last + 1 - len(checkpoint.steps(workdir)))
    checkpoint.check_space(workdir, to_come * checkpoint_bytes(run.abstract))
    return Parts(config, run, train, test, data, batch_rows, notes)


class Resumed(NamedTuple):
    """Where a run stands.

    Attributes:
        state: of the newest checkpoint, or a new one.
        step: steps done.
        rows: of metrics up to there.
        owed: whether the evaluation of this step was interrupted and is made first of all.
        unfinished: what there is of its row.
        notes: what a person should know.
    """

    state: TrainState
    step: int
    rows: list[dict[str, Any]]
    owed: bool
    unfinished: dict[str, Any]
    notes: list[str]


def take_up(parts: Parts, workdir: epath.Path) -> Resumed:
    """Restores the newest checkpoint and its rows, or starts anew."""
    config, run = parts.config, parts.run
    step = hosts.agree(max(checkpoint.steps(workdir), default=0))
    notes: list[str] = []
    if step:
        state = checkpoint.restore(workdir, run.abstract, step)
    else:
        state, notes = start_from(config, run, run.init(jax.random.key(config.seed)))
    rows = [row for row in read_metrics(workdir) if row["step"] <= step > 0]
    judged_now = step > 0 and judged(config, step, run.steps)
    owed = bool(hosts.agree(int(judged_now and is_unjudged(rows, step))))
    unfinished = rows.pop() if owed and rows and rows[-1]["step"] == step else {}
    return Resumed(state, step, rows, owed, unfinished, notes)


class Saver:
    """Saves states, each after the rows up to it and only while the workdir is this run's.

    Args:
        checkpoints: what writes them.
        journal: the rows.
        owner: the right to write.
        saved: the newest step that is saved; 0 for none.
        steps: of the run.
        minutes: a save is overdue when this many have passed since the last one began; 0 for never.
        clock: gives seconds.
    """

    def __init__(
        self,
        checkpoints: checkpoint.Checkpoints,
        journal: Journal,
        owner: Owner,
        saved: int,
        steps: int,
        minutes: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.checkpoints, self.journal, self.owner = checkpoints, journal, owner
        self.saved, self.steps, self.minutes, self.clock = saved, steps, minutes, clock
        self.began = clock()

    def overdue(self) -> bool:
        """Whether this is the process that decides when to save, and it is time to."""
        waited = self.clock() - self.began
        return hosts.is_first() and 0 < 60 * self.minutes <= waited

    def save(self, step: int, state: TrainState) -> None:
        """Starts to save the state after `step`, unless it is saved already."""
        if step > self.saved:
            self.owner.check()
            self.began = self.clock()
            self.journal.flush()  # a checkpoint's rows are there before it is
            self.checkpoints.save(step, state)
            self.saved = step

    def stop(self, step: int, state: TrainState) -> NoReturn:
        """Ends the run, which `step` was the last one of, with its state saved."""
        self.save(step, state)
        self.wait()
        raise Interrupted(
            f"interrupted; step {step} of {self.steps} is saved, and the same command goes on "
            "from there"
        )

    def wait(self) -> None:
        """Waits until the newest state is saved."""
        self.checkpoints.wait()


class Tools(NamedTuple):
    """What the loop works with, all of it open.

    Attributes:
        batches: of images, from the first step to take.
        journal: rows and words.
        saver: of states.
        pace: whether devices wait.
        trace: of some steps.
        corrupt: images that could not be read.
        evaluate: (parameters) -> the row of an evaluation.
        interruption: a wish to stop.
    """

    batches: Batches
    journal: Journal
    saver: Saver
    pace: PaceKeeper
    trace: Trace
    corrupt: CorruptImages
    evaluate: Callable[[Params], dict[str, Any]]
    interruption: Interruption


def open_tools(
    opened: contextlib.ExitStack,
    parts: Parts,
    resumed: Resumed,
    progress: Progress,
    owner: Owner,
    interruption: Interruption,
    workdir: epath.Path,
) -> Tools:
    """Opens what the loop works with; `opened` closes it, the last one first."""
    config, run, keep = parts.config, parts.run, parts.config.checkpoint
    checkpoints = checkpoint.Checkpoints(workdir, keep.keep_last, keep.keep_every)
    opened.callback(checkpoints.close)
    writer = Writer(workdir, resumed.step - resumed.owed) if hosts.is_first() else None
    if writer is not None:
        opened.callback(lambda: writer.close(write=not owner.lost))
    journal = Journal(resumed.rows, writer, progress, run.objective.verdict, config.batch_size)
    batches = train_batches(parts.train, config, run.model.patch, resumed.step, parts.batch_rows)
    opened.callback(batches.close)
    pace, trace = PaceKeeper(), Trace(config.profile_steps, workdir / "tensorboard")
    opened.callback(pace.close)
    opened.callback(trace.close)

    def tell_left_out(source: Source, found: list[int]) -> None:
        """Names, once each, images that an evaluation does without."""
        lines = lines_of(source, found, decoding(config.data, source)) if hosts.is_first() else []
        for line in lines:
            journal.note_once(f"cannot be read, left out of the evaluation: {line}")

    extract = make_extractor(run.model, config, run.mesh)

    def evaluate(params: Params) -> dict[str, Any]:
        return knn_evaluation(
            extract,
            params,
            parts.train,
            parts.test,
            config.eval,
            run.mesh,
            between=interruption.check,
            unreadable=tell_left_out,
        )

    how = decoding(config.data, parts.train)
    return Tools(
        batches=batches,
        journal=journal,
        saver=Saver(checkpoints, journal, owner, resumed.step, run.steps, keep.minutes),
        pace=pace,
        trace=trace,
        corrupt=CorruptImages(parts.train, config.data.max_corrupt_share, how),
        evaluate=evaluate,
        interruption=interruption,
    )


def take_steps(
    train_step: Callable[..., Any], parts: Parts, resumed: Resumed, tools: Tools
) -> None:
    """Trains to the end of the run.

    Raises:
        Interrupted: a signal came; the state of the last step is saved.
    """
    config, run = parts.config, parts.run
    journal, saver, pace = tools.journal, tools.saver, tools.pace
    state, steps = resumed.state, run.steps
    measure = {flag: put(np.array(flag), replicated(run.mesh)) for flag in (False, True)}
    if resumed.owed or (resumed.step == 0 and config.eval_every):
        journal.record(resumed.step, resumed.unfinished | tools.evaluate(state.teacher))

    pending: list[tuple[int, dict[str, jax.Array]]] = []
    clock, timed = time.monotonic(), resumed.step
    for step in range(resumed.step + 1, steps + 1):
        last = step == steps
        log = last or due(step, config.log_every)
        batch = next_batch(tools, run.mesh)
        if batch is None:
            fetch(pending, run.objective.terms, saver.saved, tools.corrupt)  # which must be finite
            saver.stop(step - 1, state)
        if tools.trace.before(step):
            pace.pause()
        arrived = time.monotonic()
        with (
            jax.transfer_guard("disallow"),  # nothing waits for the devices unseen
            jax.profiler.StepTraceAnnotation("train", step_num=step),
        ):
            state, metrics = train_step(state, batch, measure[log])
            pace.step(arrived, metrics["loss"])
            pending.append((step, metrics))
            asked = tools.interruption.poll(save=saver.overdue())
            stop = asked.stop and not last
        wait_for(pending, first=step <= resumed.step + 2)
        journal.progress.advance()
        if words := tools.trace.after(step, metrics["loss"]):
            journal.note(words)
            pace.pause()

        save = last or stop or asked.save or due(step, config.checkpoint_every)
        judge = judged(config, step, steps)
        if not (log or save or judge or len(pending) == UNSEEN):
            continue
        saver.owner.check()
        fetched, unreadable = fetch(pending, run.objective.terms, saver.saved, tools.corrupt)
        pending.clear()
        for line in unreadable:
            journal.note(f"cannot be read, replaced by another image: {line}")
        row, recent = {}, None
        if log:
            recent, elapsed = pace.look(), time.monotonic() - clock
            row = fetched | {"images_per_s": (step - timed) * config.batch_size / elapsed}
            row["idle_share"] = recent.idle_share
        pace.pause()
        if judge and not stop:
            found = evaluate_unless_stopped(tools, state.teacher)
            if found is None:
                stop = save = True
            else:
                row |= found
        if row:
            journal.record(step, row, recent)
        if save:
            saver.save(step, state)
            tools.interruption.saved()
        if stop:
            saver.stop(step, state)
        clock, timed = time.monotonic(), step
        pace.resume()
    saver.wait()


def next_batch(tools: Tools, mesh: Mesh) -> dict[str, jax.Array] | None:
    """The images of the next step; None where a signal ended the wait for them."""
    try:
        with tools.interruption.at_once():
            made = next(tools.batches)
    except KeyboardInterrupt:
        if tools.interruption.starting or hosts.several():
            raise
        return None
    batch = to_devices(mesh, made)
    tools.interruption.starting = None  # from the first step on there is something to save
    return batch


def wait_for(pending: list[tuple[int, dict[str, jax.Array]]], first: bool) -> None:
    """Keeps the host at most IN_FLIGHT steps ahead of the devices, and with them at `first`."""
    ahead = 0 if first else IN_FLIGHT  # so that the time of a step is soon known
    if len(pending) > ahead:
        jax.block_until_ready(pending[-1 - ahead][1]["loss"])


def evaluate_unless_stopped(tools: Tools, params: Params) -> dict[str, Any] | None:
    """The row of an evaluation; None where a signal ended it."""
    try:
        with tools.interruption.at_once():
            return tools.evaluate(params)
    except Interrupted:
        return None
    except KeyboardInterrupt:
        if hosts.several():
            raise
        return None


def finish(
    rows: list[dict[str, Any]], steps: int, compile_s: float, owner: Owner, workdir: epath.Path
) -> dict[str, Any]:
    """Writes and prints the summary."""
    summary = summarise(rows, steps, compile_s)
    if hosts.is_first():
        owner.check()
        write_whole(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
        print(summary_text(summary, workdir), file=sys.stderr)
        print(json.dumps(summary))
    return summary


def expand_paths(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config with its paths in the form that the commands give them, and absolute.

    The commands that read the workdir later may be started in another folder.
    """
    config, flat = deepcopy(config), flatten(config)
    for key in PATHS:
        if flat[key]:
            path = expand(flat[key])
            path = path if "://" in path else os.path.abspath(path)
            config.update_from_flattened_dict({key: path})
    return config


def tell_finished(standing: resume.Standing, workdir: epath.Path) -> dict[str, Any]:
    """Prints and returns the summary of a finished run.

    Raises:
        UserError: its data is not what the run used.
    """
    assert standing.summary is not None
    notes = [*standing.notes, *resume.check_finished_data(standing.config, workdir)]
    if hosts.is_first():
        for note in notes:
            print(note, file=sys.stderr)
        print(f"{workdir} is finished; its summary:\n{json.dumps(standing.summary)}")
    return standing.summary


def before_training(workdir: epath.Path) -> str:
    """What to say when the start of a run is interrupted."""
    saved = checkpoint.latest_step(workdir)
    what = f"step {saved} is saved" if saved else "nothing was trained yet"
    return f"interrupted during the start; {what}, and the same command goes on"


def start_from(
    config: ml_collections.ConfigDict, run: Run, state: TrainState
) -> tuple[TrainState, list[str]]:
    """The first state, with student and teacher as `config.init_from` has them, if it says so.

    Returns:
        The state, and what was loaded, what was not and what was resized, for a person.

    Raises:
        UserError: these weights cannot be read or are not of this network.
    """
    if not config.init_from:
        return state, []
    start = pretrained.read_initial_weights(config, run.model)
    networks = [
        pretrained.replace(params, start.leaves) for params in (state.student, state.teacher)
    ]
    state = state._replace(student=networks[0], teacher=networks[1])
    return state, [f"starts from {config.init_from}", *(f"  {line}" for line in start.words)]


def judged(config: ml_collections.ConfigDict, step: int, steps: int) -> bool:
    """Whether the network is evaluated after this step."""
    return config.eval_every > 0 and (step == steps or due(step, config.eval_every))


def is_unjudged(rows: list[dict[str, Any]], step: int) -> bool:
    """Whether the rows lack the evaluation of this step."""
    return not any(row["step"] == step and "knn_top1" in row for row in rows[-1:])


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps, 0 for never, happens at this one."""
    return every > 0 and step % every == 0


def fetch(
    pending: list[tuple[int, dict[str, jax.Array]]],
    terms: Sequence[str],
    saved: int,
    corrupt: CorruptImages,
) -> tuple[dict[str, Any], list[str]]:
    """The newest step's metrics, after a look at those of all steps since the last fetch.

    Args:
        pending: steps and their metrics, still on the devices.
        terms: the metrics that the loss consists of, which must be finite as it must.
        saved: the newest checkpoint, for the error; 0 for none.
        corrupt: counts images that had to be replaced.

    Returns:
        The metrics, and the images found corrupt, a line each.

    Raises:
        UserError: a loss is not finite, or too many images are corrupt.
    """
    lines = []
    row: dict[str, Any] = {}
    for step, metrics in jax.device_get(pending):
        batch_corrupt = metrics.pop("corrupt")
        lines += corrupt.add(batch_corrupt)
        row = {name: float(value) for name, value in metrics.items()}
        row["corrupt"] = int((batch_corrupt >= 0).sum())
        guarded = {name: row[name] for name in (*terms, "loss", "grad_norm")}
        bad = [name for name, value in guarded.items() if not math.isfinite(value)]
        if bad:
            last = f"The last good checkpoint is step {saved}" if saved else "None was saved yet"
            raise UserError(
                f"step {step}: {bad[0]} is not finite "
                f"({', '.join(f'{name} {value:.4g}' for name, value in guarded.items())}). {last}; "
                "nothing is saved after such a step. Try a lower optim.lr, a longer "
                "optim.warmup_steps or model.dtype=float32 in a new --workdir"
            )
    corrupt.check()
    return row, lines


def checkpoint_bytes(abstract: TrainState) -> int:
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
    run: Run,
    source: Source,
    test: Source | None,
    start: int,
) -> str:
    """What is about to run, for a person."""
    count = sum(leaf.size for leaf in jax.tree.leaves(run.abstract.student))
    devices = run.mesh.devices
    views = f"{config.augment.global_crops}x{config.augment.global_size}"
    if config.augment.local_crops:
        views += f" + {config.augment.local_crops}x{config.augment.local_size}"
    kind = devices.flat[0].device_kind
    where = f"on {devices.size} {kind} device{'s' * (devices.size > 1)}"
    if jax.process_count() > 1:
        where += f" of {jax.process_count()} processes"
    if config.accumulate > 1:
        where += f" in {config.accumulate} microbatches"
    if test is None:
        quality = f"no k-NN accuracy: there is no split {config.data.test_split!r}"
    elif not (source.has_labels and test.has_labels):
        quality = "no k-NN accuracy: the images have no labels"
    else:
        quality = f"k-NN on {len(test)} test images"
        if source.class_names is not None:
            quality += f" of {len(source.class_names)} classes"
    return (
        f"{len(source)} images, views {views}; {count / 1e6:.1f} M parameters; batch "
        f"{config.batch_size} {where}; steps {start} to {run.steps} "
        f"({run.steps / run.epoch:.1f} epochs); {quality}."
    )


def doubts(config: ml_collections.ConfigDict, images: int, start: int) -> list[str]:
    """What is possible, but probably not meant: of the batch and of the trace."""
    words = []
    if images < config.batch_size:
        words.append(
            f"warning: {images} images are fewer than the batch of {config.batch_size}, so that "
            "every batch shows some of them more than once; is this all of the data? If it is, "
            f"set --config.batch_size to {images} or less"
        )
    first, last = config.profile_steps
    if 0 < last <= start:
        words.append(
            f"warning: nothing is traced, because profile_steps={first},{last} is over: the run "
            f"goes on after step {start}"
        )
    return words


def summarise(rows: list[dict[str, Any]], steps: int, compile_s: float) -> dict[str, Any]:
    """The summary of a finished run from its logged rows, and the seconds of the last start."""
    first, final = (rows[0], rows[-1]) if rows else ({}, {})
    speeds = [row["images_per_s"] for row in rows if "images_per_s" in row]
    return {
        "knn_top1": final.get("knn_top1"),
        "knn_top1_untrained": first.get("knn_top1") if first.get("step") == 0 else None,
        "knn_k": final.get("knn_k"),
        "loss": final.get("loss"),
        "steps": steps,
        "images_per_s": float(np.median(speeds)) if speeds else None,
        "wall_s": final.get("wall_s"),
        "compile_s": compile_s,
    }


def summary_text(summary: dict[str, Any], workdir: epath.Path) -> str:
    """The summary as a person would tell it."""
    minutes = f"{summary['steps']} steps in {(summary['wall_s'] or 0) / 60:.1f} minutes"
    curves = f"curves: tensorboard --logdir {shlex.quote(str(workdir))}"
    if importlib.util.find_spec("tensorboard") is None:
        curves += " (after pip install tensorboard)"
    before, after = summary["knn_top1_untrained"], summary["knn_top1"]
    if before is None or after is None:
        return f"{minutes}; {curves}"
    accuracy = f"k-NN accuracy {100 * before:.1f} % untrained, {100 * after:.1f} % now"
    return f"{accuracy}; {minutes}; {curves}"


def main() -> None:
    """Trains what the flags name."""
    config, workdir = flags.FLAGS.config, epath.Path(flags.FLAGS.workdir)
    made = config_lib.read_config(workdir) if (workdir / "config.json").exists() else None
    check_used(config, cli.given(), made)
    train(config, workdir, flags.FLAGS.wait)


if __name__ == "__main__":
    cli.define_config()
    cli.define_path("workdir", "The folder of the run, local or gs://.", required=True)
    wait = "Seconds to wait for another run that has the workdir; launchers wait."
    flags.DEFINE_float("wait", 0.0, wait, lower_bound=0.0)
    cli.run(main)
