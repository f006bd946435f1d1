"""Pretrains a vision transformer on unlabelled images.

    python -m sop_jax.train --images=FOLDER --workdir=DIR
    python -m sop_jax.train --config=NAME --workdir=DIR [--config.KEY=VALUE ...]

--images looks at a folder of your own images and chooses the settings; --config names a recipe. Any
setting can be changed on the command line: --config.batch_size=128. --dry_run says what a run would
do. Running the same command again resumes an interrupted run exactly, and leaves a finished run as
it is.

For example, on scikit-learn's digits, which need no download:

    python -m sop_jax.train --config=digits --workdir=runs/digits
"""

import contextlib
import functools
import json
import math
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
from ml_collections.config_flags import config_path

from sop_jax import cli, pretrained, preview
from sop_jax import config as config_lib
from sop_jax.check import check_config, check_trace, check_used
from sop_jax.data import sources
from sop_jax.data.decode import decoding
from sop_jax.data.pipeline import Batches, check_shared_memory, train_batches
from sop_jax.data.sources import Source, open_source
from sop_jax.diagnosis import in_training
from sop_jax.errors import Interrupted, UserError
from sop_jax.evaluation.splits import Splits
from sop_jax.evaluation.task import Subject
from sop_jax.evaluation.tasks import PROTOTYPES, measure
from sop_jax.evaluation.tools import Toolbox
from sop_jax.monitor.corrupt import CorruptImages, lines_of
from sop_jax.monitor.journal import Journal
from sop_jax.monitor.metrics import Progress, Writer, read_metrics
from sop_jax.monitor.pace import PaceKeeper
from sop_jax.monitor.profiling import Trace
from sop_jax.monitor.sentences import (
    curves_text,
    run_text,
    summarise,
    summary_text,
    warnings_of,
)
from sop_jax.monitor.trackers import TRACKERS, check_tracker
from sop_jax.own_images import choices
from sop_jax.parallel import hosts
from sop_jax.parallel.interruption import Interruption
from sop_jax.parallel.mesh import host_rows, make_mesh, put, replicated, to_devices
from sop_jax.paths import absolute, check_writable, expand, write_whole
from sop_jax.report import FILE as REPORT
from sop_jax.report import reporter
from sop_jax.schedules import Length
from sop_jax.settings import PATHS, flatten
from sop_jax.training import checkpoint, optim, resume
from sop_jax.training.assemble import Run, assemble, compiled_step
from sop_jax.training.owner import Owner, owned
from sop_jax.training.state import TrainState

IN_FLIGHT = 2  # the most steps that the host may be ahead of the devices
MAX_PENDING = 100  # the most steps whose metrics are kept on the devices before they are fetched


def train(
    config: ml_collections.ConfigDict,
    workdir: epath.PathLike,
    wait: float = 0.0,
    told: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains to the end of a run, from its newest checkpoint if `workdir` has one.

    Args:
        config: the settings, see `sop_jax.config`.
        workdir: the folder to which the run writes config.json, data.json, metrics.jsonl,
            tensorboard/, checkpoints/ and summary.json, and, while it trains, the owner file of
            `sop_jax.training.owner`.
        wait: the seconds to wait if another run is using the workdir.
        told: what the user was already told of the images, see `sources.notes`.

    Returns:
        The summary, as in summary.json.

    Raises:
        UserError: something is wrong that the user can fix.
        Interrupted: SIGINT or SIGTERM was received; the state is saved.
    """
    check_config(config)
    check_tracker(config.tracker)
    config, workdir = expand_paths(config), epath.Path(expand(str(workdir)))
    resume.check_place(config, workdir)
    with Interruption(ahead=IN_FLIGHT) as interruption:
        interruption.starting = interrupted_start_text(workdir)
        hosts.check_shared(workdir)
        status = resume.check_workdir(config, workdir)
        if status.summary is not None:
            return report_finished(status, workdir)
        if not hosts.several():  # with several processes, `check_shared` has checked this
            check_writable(workdir, "--workdir")
        with owned(workdir, wait) as owner, contextlib.ExitStack() as opened:
            # Another run, for which this one waited, may have changed the workdir.
            interruption.starting = interrupted_start_text(workdir)
            return train_owned(interruption, owner, opened, config, workdir, told)


def train_owned(
    interruption: Interruption,
    owner: Owner,
    opened: contextlib.ExitStack,
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    told: Sequence[str],
) -> dict[str, Any]:
    """Does the work of `train` in a workdir that this run owns.

    A signal stops the run at once during the start, and after the current step later.
    """
    status = resume.check_workdir(config, workdir)  # again: see `train`
    if status.summary is not None:
        return report_finished(status, workdir)
    parts = prepare(status, workdir, told)
    resumed = restore_or_initialize(parts, workdir)
    progress = Progress(resumed.step, parts.run.steps, shown=hosts.is_first())
    opened.callback(progress.close)
    for note in (*parts.describe(resumed.step), *parts.notes, *resumed.notes):
        progress.note(note)
    clock = time.monotonic()
    train_step = compiled_step(parts.config, parts.run, progress.note)
    compile_s = time.monotonic() - clock
    progress.note(f"The step was compiled in {compile_s:.1f} s.")
    # On CPUs, the first collective waits only 30 s for processes that are still compiling.
    hosts.gather("", hosts.END_TIMEOUT)

    # Nothing has been written up to here, so that an error above leaves no trace.
    owner.check()
    if hosts.is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        resume.save(parts.config, parts.data, workdir)
    tools = open_tools(opened, parts, resumed, progress, owner, interruption, workdir)
    try:
        take_steps(train_step, parts, resumed, tools)
    finally:
        opened.close()
    curves = curves_text(parts.config.tracker, workdir)
    return finish(tools, parts.run.steps, compile_s, owner, workdir, curves)


class Parts(NamedTuple):
    """The parts of a run that do not depend on its state.

    Attributes:
        config: the settings.
        run: the compiled functions and shardings that follow from the settings and the devices.
        train: the images to train on.
        test: the images to classify in evaluations; None if there are none.
        data: the identity of the images.
        batch_rows: the rows of the global batch that this process makes.
        notes: messages for people, one line each.
    """

    config: ml_collections.ConfigDict
    run: Run
    train: Source
    test: Source | None
    data: resume.Data
    batch_rows: list[int]
    notes: list[str]

    def describe(self, start: int) -> list[str]:
        """Returns a description of the run from step `start` on, and warnings about it."""
        config, run = self.config, self.run
        parameters = sum(leaf.size for leaf in jax.tree.leaves(run.abstract.student))
        length = Length(run.steps, run.epoch)
        return [
            run_text(config, self.train, self.test, parameters, run.mesh.devices, start, length),
            *warnings_of(self.config, len(self.train), start),
            *optim.beyond_end(self.config, self.run.steps, self.run.epoch),
        ]


def prepare(status: resume.Status, workdir: epath.Path, told: Sequence[str]) -> Parts:
    """Opens the images and assembles the run; its notes have nothing that was told before.

    Raises:
        UserError: the settings, the data, the devices or the disk space do not suit the run.
    """
    config = status.config
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    train = open_source(config.data, "train")
    assert train is not None  # only the test split may be missing
    test = open_source(config.data, "test", train)
    data = resume.data_of(train, test)
    devices = f"{jax.local_device_count()} {jax.local_devices()[0].device_kind}"
    hosts.check_agreement({**resume.facts(data), **resume.file_facts(config), "devices": devices})
    found = [note for note in sources.notes(train, test) if note not in told]
    notes = [*status.notes, *found]
    notes += resume.check_data(config, data, workdir)
    run = assemble(config, mesh, len(train))
    check_trace(config.profile_steps, run.steps)
    batch_rows = host_rows(mesh, config.batch_size)  # after `assemble` has checked the batch size
    check_shared_memory(config, len(batch_rows))
    # One more checkpoint than are kept, because a new one is written before the oldest is deleted.
    missing = max(1, config.checkpoint.keep_last + 1 - len(checkpoint.steps(workdir)))
    checkpoint.check_space(workdir, missing * checkpoint_bytes(run.abstract))
    return Parts(config, run, train, test, data, batch_rows, notes)


class Resumed(NamedTuple):
    """The point from which a run continues.

    Attributes:
        state: the state of the newest checkpoint, or a new one.
        step: the number of steps that are done.
        rows: the rows of metrics up to this step.
        evaluation_due: whether the evaluation of this step was interrupted, so that it is done
            before the next step.
        unfinished: the row of this step without that evaluation; {} if there is none.
        notes: messages for people, one line each.
    """

    state: TrainState
    step: int
    rows: list[dict[str, Any]]
    evaluation_due: bool
    unfinished: dict[str, Any]
    notes: list[str]


def restore_or_initialize(parts: Parts, workdir: epath.Path) -> Resumed:
    """Restores the newest checkpoint and its rows, or initializes a new state."""
    config, run = parts.config, parts.run
    step = hosts.agree(max(checkpoint.steps(workdir), default=0))
    notes: list[str] = []
    if step:
        state = checkpoint.restore(workdir, run.abstract, step)
    else:
        state, notes = start_from(config, run, run.init(jax.random.key(config.seed)))
    rows = [row for row in read_metrics(workdir) if row["step"] <= step > 0]
    expected = step > 0 and evaluated_at(config, step, run.steps)
    evaluation_due = bool(
        hosts.agree(int(expected and lacks_evaluation(rows, step, config.eval.tasks)))
    )
    unfinished = rows.pop() if evaluation_due and rows and rows[-1]["step"] == step else {}
    return Resumed(state, step, rows, evaluation_due, unfinished, notes)


class Saver:
    """Saves states, each one after its rows, and only while this run owns the workdir.

    Args:
        checkpoints: writes the states.
        journal: the rows, which are stored before the state of the same step.
        owner: checks that this run still owns the workdir.
        saved: the step of the newest checkpoint; 0 if there is none.
        steps: the number of steps of the run.
        minutes: a save is overdue this many minutes after the last one began; 0 for never.
        clock: returns the time in seconds.
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
        """Returns whether it is time to save; always False in processes other than the first."""
        waited = self.clock() - self.began
        return hosts.is_first() and 0 < 60 * self.minutes <= waited

    def save(self, step: int, state: TrainState) -> None:
        """Begins to save the state after `step`, unless it has been saved before."""
        if step > self.saved:
            self.owner.check()
            self.began = self.clock()
            self.journal.flush()  # so that a checkpoint never exists without its rows
            self.checkpoints.save(step, state)
            self.saved = step

    def stop(self, step: int, state: TrainState) -> NoReturn:
        """Saves the state after `step`, the last one that was done, and ends the run.

        Raises:
            Interrupted: always.
        """
        self.save(step, state)
        self.wait()
        raise Interrupted(
            f"interrupted; step {step} of {self.steps} is saved, and the same command resumes "
            "from there"
        )

    def wait(self) -> None:
        """Waits until the newest state is saved."""
        self.checkpoints.wait()


class Tools(NamedTuple):
    """The open resources that the train loop uses.

    Attributes:
        batches: the batches of images, beginning with that of the next step.
        journal: records rows and shows messages.
        saver: saves states.
        pace: measures whether devices wait for images.
        trace: traces the steps of `profile_steps`.
        corrupt: counts images that could not be read.
        evaluate: maps a state to the row of an evaluation of its teacher.
        report: writes the report of the run, see `report.reporter`.
        interruption: reports signals to stop.
    """

    batches: Batches
    journal: Journal
    saver: Saver
    pace: PaceKeeper
    trace: Trace
    corrupt: CorruptImages
    evaluate: Callable[[TrainState], dict[str, Any]]
    report: Callable[[bool], None]
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
    """Opens the resources of the train loop, which `opened` closes in reverse order."""
    config, run, keep = parts.config, parts.run, parts.config.checkpoint
    checkpoints = checkpoint.Checkpoints(workdir, keep.keep_last, keep.keep_every)
    opened.callback(checkpoints.close)
    writer = None
    if hosts.is_first():
        # If the evaluation of this step is due, its row is written again.
        writer = Writer(
            workdir,
            resumed.step - resumed.evaluation_due,
            TRACKERS[config.tracker](config.to_dict()),
            progress.note,
        )
        opened.callback(lambda: writer.close(write=not owner.lost))
    journal = Journal(resumed.rows, writer, progress, run.objective.verdict, config.batch_size)
    batches = train_batches(parts.train, config, run.model.patch, resumed.step, parts.batch_rows)
    opened.callback(batches.close)
    pace, trace = PaceKeeper(), Trace(config.profile_steps, workdir / "tensorboard")
    opened.callback(pace.close)
    opened.callback(trace.close)

    def report_unreadable(source: Source, found: list[int]) -> None:
        """Reports the images that an evaluation leaves out, each of them only once."""
        lines = lines_of(source, found, decoding(config.data, source)) if hosts.is_first() else []
        for line in lines:
            journal.note_once(f"cannot be read, left out of the evaluation: {line}")

    splits = Splits(parts.train, parts.test)
    toolbox = functools.partial(
        Toolbox,
        mesh=run.mesh,
        seed=config.seed,
        interruption=interruption,
        extractors={},
        corrupt=report_unreadable,
        shown=False,
    )

    counts = PROTOTYPES in config.eval.tasks and config.eval_every
    count = in_training.make_counter(config, run) if counts else None

    def evaluate(state: TrainState) -> dict[str, Any]:
        subject = Subject("teacher", config, run.model, state.teacher, "", None)
        row = measure(subject, splits, toolbox(subject, kept={}))
        if count is not None:
            row |= count(state)
            if words := in_training.sentence(row):
                progress.note(f"step {int(state.step)}: {words}")
        return row

    how = decoding(config.data, parts.train)
    return Tools(
        batches=batches,
        journal=journal,
        saver=Saver(checkpoints, journal, owner, resumed.step, run.steps, keep.minutes),
        pace=pace,
        trace=trace,
        corrupt=CorruptImages(parts.train, config.data.max_corrupt_share, how),
        evaluate=evaluate,
        report=reporter(workdir, run.objective.verdict, journal.note_once),
        interruption=interruption,
    )


def take_steps(
    train_step: Callable[..., Any], parts: Parts, resumed: Resumed, tools: Tools
) -> None:
    """Trains from the resumed step to the end of the run.

    Raises:
        Interrupted: a signal was received; the state of the last step is saved.
    """
    config, run = parts.config, parts.run
    journal, saver, pace = tools.journal, tools.saver, tools.pace
    state, steps = resumed.state, run.steps
    measure = {flag: put(np.array(flag), replicated(run.mesh)) for flag in (False, True)}
    if resumed.evaluation_due or (resumed.step == 0 and config.eval_every):
        journal.record(resumed.step, resumed.unfinished | tools.evaluate(state))

    pending: list[tuple[int, dict[str, jax.Array]]] = []
    clock, timed = time.monotonic(), resumed.step
    for step in range(resumed.step + 1, steps + 1):
        last = step == steps
        log = last or due(step, config.log_every)
        batch = next_batch(tools, run.mesh)
        if batch is None:
            fetch(pending, run.objective.terms, saver.saved, tools.corrupt)  # raises for NaN
            saver.stop(step - 1, state)
        if tools.trace.before(step):
            pace.pause()
        arrived = time.monotonic()
        with (
            jax.transfer_guard("disallow"),  # no implicit transfer makes the host wait
            jax.profiler.StepTraceAnnotation("train", step_num=step),
        ):
            state, metrics = train_step(state, batch, measure[log])
            pace.step(arrived, metrics["loss"])
            pending.append((step, metrics))
            answer = tools.interruption.poll(save=saver.overdue())
            stop = answer.stop and not last
        wait_for(pending, first=step <= resumed.step + 2)
        journal.progress.advance()
        if words := tools.trace.after(step, metrics["loss"]):
            journal.note(words)
            pace.pause()

        save = last or stop or answer.save or due(step, config.checkpoint_every)
        evaluate = evaluated_at(config, step, steps)
        if not (log or save or evaluate or len(pending) == MAX_PENDING):
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
        if evaluate and not stop:
            found = evaluate_unless_stopped(tools, state)
            if found is None:
                stop = save = True
            else:
                row |= found
        if row:
            journal.record(step, row, recent)
        if evaluate and not (stop or last):
            tools.report(False)
        if save:
            saver.save(step, state)
            tools.interruption.saved()
        if stop:
            saver.stop(step, state)
        clock, timed = time.monotonic(), step
        pace.resume()
    saver.wait()


def next_batch(tools: Tools, mesh: Mesh) -> dict[str, jax.Array] | None:
    """Returns the images of the next step, or None if a signal ended the wait for them."""
    if tools.interruption.asked and not hosts.several():
        return None
    try:
        with tools.interruption.at_once():
            made = next(tools.batches)
    except KeyboardInterrupt:
        if tools.interruption.starting or hosts.several():
            raise
        return None
    batch = to_devices(mesh, made)
    tools.interruption.starting = None  # from the first step on, there is a state to save
    return batch


def wait_for(pending: list[tuple[int, dict[str, jax.Array]]], first: bool) -> None:
    """Waits until the devices are at most IN_FLIGHT steps behind the host, or none at `first`."""
    ahead = 0 if first else IN_FLIGHT  # so that the time of a step is soon known
    if len(pending) > ahead:
        jax.block_until_ready(pending[-1 - ahead][1]["loss"])


def evaluate_unless_stopped(tools: Tools, state: TrainState) -> dict[str, Any] | None:
    """Returns the row of an evaluation, or None if a signal ended it."""
    try:
        with tools.interruption.at_once():
            return tools.evaluate(state)
    except Interrupted:
        return None
    except KeyboardInterrupt:
        if hosts.several():
            raise
        return None


def finish(
    tools: Tools, steps: int, compile_s: float, owner: Owner, workdir: epath.Path, curves: str
) -> dict[str, Any]:
    """Writes, prints and returns the summary, and writes the report."""
    summary = summarise(tools.journal.rows, steps, compile_s)
    if hosts.is_first():
        owner.check()
        write_whole(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
        tools.report(True)
        print(summary_text(summary, curves), file=sys.stderr)
        if (page := workdir / REPORT).exists():
            print(f"report: {page}", file=sys.stderr)
        print(json.dumps(summary))
    return summary


def expand_paths(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns the config with its paths expanded and absolute.

    The commands that read the workdir later may be started from another folder.
    """
    config, flat = deepcopy(config), flatten(config)
    for key in PATHS:
        if flat[key]:
            config.update_from_flattened_dict({key: absolute(flat[key])})
    return config


def report_finished(status: resume.Status, workdir: epath.Path) -> dict[str, Any]:
    """Prints and returns the summary of a finished run.

    Raises:
        UserError: the data is not that of the run.
    """
    assert status.summary is not None
    notes = [*status.notes, *resume.check_finished_data(status.config, workdir)]
    if hosts.is_first():
        for note in notes:
            print(note, file=sys.stderr)
        print(f"{workdir} is finished; its summary:\n{json.dumps(status.summary)}")
    return status.summary


def interrupted_start_text(workdir: epath.Path) -> str:
    """Returns the message for a run that is interrupted during its start."""
    saved = checkpoint.latest_step(workdir)
    what = (
        f"step {saved} is saved, and the same command resumes from there"
        if saved
        else "nothing was trained yet, and the same command starts again"
    )
    return f"interrupted during the start; {what}"


def start_from(
    config: ml_collections.ConfigDict, run: Run, state: TrainState
) -> tuple[TrainState, list[str]]:
    """Returns the first state of a run, with the weights of `config.init_from` if it is set.

    Args:
        config: the settings.
        run: the assembled run.
        state: the initialized state.

    Returns:
        The state, in which both student and teacher have these weights, and messages about what
        was loaded, what was not and what was resized.

    Raises:
        UserError: the weights cannot be read, or do not fit this network.
    """
    if not config.init_from:
        return state, []
    start = pretrained.read_initial_weights(config, run.model)
    networks = [
        checkpoint.with_leaves(params, start.leaves) for params in (state.student, state.teacher)
    ]
    state = state._replace(student=networks[0], teacher=networks[1])
    return state, [f"starts from {config.init_from}", *(f"  {line}" for line in start.words)]


def evaluated_at(config: ml_collections.ConfigDict, step: int, steps: int) -> bool:
    """Returns whether the network is evaluated after `step` of a run of `steps`."""
    return config.eval_every > 0 and (step == steps or due(step, config.eval_every))


def lacks_evaluation(rows: list[dict[str, Any]], step: int, tasks: Sequence[str]) -> bool:
    """Returns whether the rows up to `step` lack the evaluation of that step, by some tasks."""
    measured = tuple(f"{task}_" for task in tasks)
    own = [row for row in rows[-1:] if row["step"] == step]
    return not any(name.startswith(measured) for row in own for name in row)


def due(step: int, every: int) -> bool:
    """Returns whether an action that is repeated after `every` steps, or never if 0, is due."""
    return every > 0 and step % every == 0


def fetch(
    pending: list[tuple[int, dict[str, jax.Array]]],
    terms: Sequence[str],
    saved: int,
    corrupt: CorruptImages,
) -> tuple[dict[str, Any], list[str]]:
    """Returns the metrics of the newest step, after checking those of all pending steps.

    Args:
        pending: the steps since the last fetch, with their metrics, which are still on the devices.
        terms: the names of the terms of the loss, which must be finite, as the loss must.
        saved: the step of the newest checkpoint, for the error; 0 if there is none.
        corrupt: counts images that had to be replaced.

    Returns:
        The metrics, and the images that could not be read, one line each.

    Raises:
        UserError: a loss or a gradient norm is not finite, or too many images are corrupt.
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
            last = (
                f"The last good checkpoint is step {saved}" if saved else "There is no checkpoint"
            )
            raise UserError(
                f"step {step}: {bad[0]} is not finite "
                f"({', '.join(f'{name} {value:.4g}' for name, value in guarded.items())}). {last}; "
                "nothing is saved after such a step. Try a lower optim.lr, a longer "
                "optim.warmup_steps or model.dtype=float32 in a new --workdir"
            )
    corrupt.check()
    return row, lines


def checkpoint_bytes(abstract: TrainState) -> int:
    """Returns the size of a state in bytes, in memory and on disk."""
    leaves = (
        jax.eval_shape(jax.random.key_data, leaf)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
        for leaf in jax.tree.leaves(abstract)
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def main() -> None:
    """Trains the run that the flags describe."""
    args = flags.FLAGS
    config, workdir, seen = args.config, epath.Path(args.workdir), None
    full, begun = args.check == "full", (workdir / "config.json").exists()
    if full and not args.dry_run and (begun or not args.images):
        why = f"{workdir} has a run, which resumes" if begun else "no folder of --images is checked"
        raise UserError(f"--check=full would have no effect, because {why}; add --dry_run")
    if args.images and not begun:  # before the images are looked at, which takes a while
        check_writable(workdir, "--workdir")
    if args.images:
        values = {key: config_path.get_value(key, config) for key in cli.given()}
        config, seen = choices.chosen(args.images, workdir, values, full=full)
    made = config_lib.read_config(workdir) if begun else None
    check_used(config, cli.given(), made)
    if args.dry_run:
        preview.show(expand_paths(config), workdir, seen, full)
    else:
        choices.say_cost(config, seen)
        train(config, workdir, args.wait, seen.survey.notes if seen else ())


if __name__ == "__main__":
    cli.define_config(images="folder")
    cli.define_path("images", "A folder of your own images, for which the settings are chosen.")
    cli.define_path("workdir", "The folder of the run, local or gs://.", required=True)
    wait = "The seconds to wait if another run is using the workdir; the launch scripts wait."
    flags.DEFINE_float("wait", 0.0, wait, lower_bound=0.0)
    text = (
        "Says what the run would do, and does nothing but to draw its views to WORKDIR/views.png."
    )
    flags.DEFINE_bool("dry_run", False, text)
    text = (
        "full decodes all images first and looks for near-duplicates; with --images or --dry_run."
    )
    flags.DEFINE_enum("check", "quick", ["quick", "full"], text)
    cli.run(main)
