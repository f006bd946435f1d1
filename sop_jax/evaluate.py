"""Measures the quality of the features of a network.

    python -m sop_jax.evaluate --workdir=DIR --task=knn [--step=N] [--data.path=PATH]
    python -m sop_jax.evaluate --weights=FILE --task=knn --data.path=PATH
    python -m sop_jax.evaluate --workdir=DIR --task=TASK --help
    python -m sop_jax.evaluate --workdir=DIR --task=all --root=ROOT

Prints a table, then one line of JSON, which it also writes to DIR/evaluations/. --task=TASK --help
lists the settings of a task, which --eval.KEY=VALUE changes, and the data that it needs.
--task=all does all tasks whose data is below ROOT, and lists the others.

By default the data is that of the run. --data.path names other data: a folder of images, a packed
.npz file, a TFDS data set, or what the task expects. If the path does not determine which data to
use, --data.source, --data.name, --data.train_split and --data.test_split do.

Features are computed once and kept in DIR/evaluations/features, where an interrupted command
continues. A measurement that is finished is not repeated: the same command prints it again.

For example, after the quick start:

    python -m sop_jax.evaluate --workdir=runs/digits --task=knn
"""

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import flags
from etils import epath

from sop_jax import cli, paths
from sop_jax.check import check_rules
from sop_jax.data.named import LOOKED_AT
from sop_jax.data.sources import identity, stamp
from sop_jax.errors import UserError, nearest
from sop_jax.evaluation.fit import UNFINISHED
from sop_jax.evaluation.tables import text_of
from sop_jax.evaluation.task import Subject, Task
from sop_jax.evaluation.tasks import TASKS
from sop_jax.evaluation.tools import Toolbox
from sop_jax.evaluation.views import VIEW_RULES
from sop_jax.models import build
from sop_jax.models.positions import RULES as POSITIONS
from sop_jax.parallel import hosts
from sop_jax.parallel.interruption import Interruption
from sop_jax.parallel.mesh import make_mesh, put, replicated
from sop_jax.paths import write_whole
from sop_jax.pretrained import (
    fingerprint,
    load_network,
    network_of_file,
    origin,
    settings_of,
)
from sop_jax.settings import flatten
from sop_jax.training import resume
from sop_jax.training.owner import owned

ALL = "all"


class Asked(NamedTuple):
    """What a command asks for.

    Attributes:
        workdir: the folder of a run or of a conversion; None for a file of weights.
        weights: a file of weights; None for a folder.
        step: the step of the checkpoint of a run; the newest by default.
        network: which of several networks: "teacher" or "student"; the teacher by default.
        heads: the number of heads of a ViT in a file whose size has no name.
        positions: how positions are resized, if not as the file's project does.
        out: the folder of the results; by default the workdir, or the folder of the file.
        cache: the folder of the cache of features; "off" for none, None for the default.
        again: whether to measure what has been measured before.
        batch_size: the number of images that are computed at a time, which bounds the memory;
            `eval.batch_size` of the run by default.
    """

    workdir: epath.PathLike | None = None
    weights: epath.PathLike | None = None
    step: int | None = None
    network: str | None = None
    heads: int | None = None
    positions: str | None = None
    out: epath.PathLike | None = None
    cache: str | None = None
    again: bool = False
    batch_size: int | None = None

    @property
    def folder(self) -> epath.Path:
        """The folder in which `evaluations/` is."""
        if self.out is not None:
            return epath.Path(self.out)
        return epath.Path(self.workdir) if self.workdir else epath.Path(self.weights or "").parent


def evaluate(
    asked: Asked,
    name: str = "knn",
    changes: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures a network by one task, prints the table and writes the JSON file.

    Args:
        asked: the network, and where results go.
        name: the name of the task.
        changes: settings of the task that differ from its defaults, by their dotted names.
        data: data other than the run's, see `data.named.name_data`.

    Returns:
        The record: `task`, `step`, `results`, `settings`, `weights`, `data`, `versions` and
        `seconds`.

    Raises:
        UserError: something is wrong that the user can fix; everything that can be is checked
            before the network is loaded.
        Interrupted: SIGINT or SIGTERM was received.
    """
    task = TASKS[name]
    began, data = time.monotonic(), data or {}
    settings = task.settings()
    settings.update_from_flattened_dict(dict(changes or {}))
    check_rules(flatten(settings), task.rules, flatten(task.settings()), "--eval.")
    for path in task.paths:
        if settings[path]:
            settings[path] = paths.expand(settings[path])
    with Interruption() as interruption, contextlib.ExitStack() as opened:
        interruption.starting = "interrupted before anything was measured"
        loaded = None if asked.workdir else _of_file(asked)  # its settings follow from the weights
        config = loaded.config if loaded else settings_of(asked.workdir or "")
        config.eval.batch_size = asked.batch_size or config.eval.batch_size
        inputs = task.open(config, settings, data)
        _compare_data(asked, task, inputs, data)
        writable = bool(hosts.agree(int(_is_writable(asked))))
        if writable:
            hosts.check_shared(asked.folder)
        subject = loaded._replace(config=config) if loaded else _of_run(asked, config)
        facts: dict[str, Any] = {
            "task": name,
            "step": subject.step,
            "settings": _settings_of(task, config, settings),
            "weights": {"of": subject.name, "fingerprint": subject.fingerprint},
            "data": _data_of(task, config, inputs, data),
        }
        hosts.check_agreement(facts)
        facts["data"]["contents"] = hosts.broadcast(_contents(task, settings, inputs))
        place = _place(asked, subject, facts)
        if (before := _finished(place, facts)) and not asked.again:
            _show(task, before, settings, f"measured before; {place}.json has the result:")
            return before
        interruption.starting = None
        owner = opened.enter_context(owned(place, 0.0, ADVICE)) if writable else None
        tools = Toolbox(
            subject,
            make_mesh(),
            folder=place if writable else None,
            seed=config.seed,
            cache=_cache(asked) if writable else None,
            interruption=interruption,
        )
        results = task.run(subject, inputs, settings, tools)
        record = facts | {
            "results": results,
            "versions": hosts.versions(),
            "seconds": round(time.monotonic() - began, 1),
        }
        record = {key: record[key] for key in RECORD}
        _show(task, record, settings, f"{name} of {subject.name}:")
        if owner is not None:
            owner.check()
            if hosts.is_first():
                _save(epath.Path(f"{place}.json"), record)
    return record


ADVICE = "Wait until it ends, stop it, or choose another --out"
RECORD = ("task", "step", "results", "settings", "weights", "data", "versions", "seconds")


def evaluate_all(asked: Asked, root: epath.PathLike) -> dict[str, Any]:
    """Does all tasks whose data is below a folder; prints what was done, and what was not and why.

    Returns:
        The results by task; None for those that were not done.

    Raises:
        Interrupted: SIGINT or SIGTERM was received; finished tasks are not done again.
    """
    if not epath.Path(root).is_dir():
        raise UserError(
            f"--root={root} is not a folder; give the folder that has the data of the tasks: "
            + ", ".join(sorted({task.place for task in TASKS.values()}))
        )
    results: dict[str, Any] = {}
    lines = []
    for name, task in TASKS.items():
        place = epath.Path(root) / task.place
        results[name] = None
        if not place.exists():
            lines.append(f"{name}: not done, {place} does not exist; it needs {task.expects}")
            continue
        changes = {}
        if name == "backgrounds" and (heads := _heads(asked)):
            changes["head"] = str(heads[-1])
        try:
            record = evaluate(asked, name, changes, {"path": str(place)})
            results[name] = record["results"]
            lines.append(f"{name}: done")
        except UserError as error:
            if type(error) is not UserError:  # an interruption, or a lost process
                raise
            lines.append(f"{name}: not done, {error}")
    if hosts.is_first():
        print("\n".join(lines))
    return results


def _heads(asked: Asked) -> list[epath.Path]:
    """Returns the linear heads that were trained on networks of a folder, the newest last."""
    heads = (asked.folder / "evaluations").glob("linear_*/head.npz")
    return sorted(heads, key=lambda head: head.stat().mtime)


def _of_run(asked: Asked, config: ml_collections.ConfigDict) -> Subject:
    """Loads the network of a folder."""
    network = asked.network or "teacher"
    assert asked.workdir is not None
    _, model, params, step = load_network(asked.workdir, asked.step, network)
    name = f"the {network} of {asked.workdir}, step {step}"
    converted = origin(asked.workdir)
    absent = tuple(converted.absent) if converted else ()
    return Subject(name, config, model, params, fingerprint(config, params), step, absent)


def _of_file(asked: Asked) -> Subject:
    """Loads the network of a file of weights."""
    assert asked.weights is not None
    path = epath.Path(asked.weights)
    if not path.exists():
        raise UserError(f"there is no file {path}; check --weights")
    if path.is_dir():
        raise UserError(f"--weights={path} is a folder; give --workdir={path}, or a file in it")
    if asked.step is not None:
        raise UserError(f"--step={asked.step} is for --workdir, but {path} is a file; leave it out")
    config, params, absent, words = network_of_file(
        path, asked.network, None, asked.heads, asked.positions, False
    )
    if hosts.is_first():
        lines = [f"{path}:", *words, *([f"absent: {', '.join(absent)}"] if absent else [])]
        print("\n  ".join(lines), file=sys.stderr)
    everywhere = replicated(make_mesh())
    params = jax.tree.map(lambda leaf: put(np.asarray(leaf), everywhere), params)
    model = build(config, config.augment.global_size)
    mark = fingerprint(config, params)
    return Subject(str(path), config, model, params, mark, None, tuple(absent))


def _compare_data(asked: Asked, task: Task, inputs: Any, data: Mapping[str, Any]) -> None:
    """Warns if the data is not that with which the run began, though no other data was named."""
    found = task.sources(inputs)
    if asked.workdir is None or data or not {"train", "test"} <= found.keys():
        return
    began = resume.recorded(epath.Path(asked.workdir))
    if began and found["train"] is not None and hosts.is_first():
        now = resume.data_of(found["train"], found["test"])
        for line in resume.differences(began, now):
            print(f"the data is not the data of the run: {line}", file=sys.stderr)


def _data_of(
    task: Task, config: ml_collections.ConfigDict, inputs: Any, data: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns what identifies the data of a task."""
    own = config.data
    names = {name: own[name] for name in ("source", *LOOKED_AT[own.source])}
    found = {split: source for split, source in task.sources(inputs).items() if source is not None}
    return names | dict(data) | {split: identity(source) for split, source in found.items()}


def _settings_of(
    task: Task, config: ml_collections.ConfigDict, settings: ml_collections.ConfigDict
) -> dict[str, Any]:
    """Returns the settings that affect the results, with those of the run where they are unset."""
    own = {name: value for name, value in flatten(settings).items() if name not in task.free}
    if task.view is None:
        return own
    view = task.view(config, settings)
    return own | {name: getattr(view, name) for name in VIEW_RULES}


def _contents(task: Task, settings: ml_collections.ConfigDict, inputs: Any) -> str:
    """Returns a hash that changes if the files of the data or of settings are changed in place."""
    digest = hashlib.sha256()
    for split, source in task.sources(inputs).items():
        if source is not None:
            digest.update(f"{split} {stamp(source)}\0".encode())
    for name in task.paths:
        if settings[name] and epath.Path(settings[name]).is_file():
            digest.update(name.encode() + epath.Path(settings[name]).read_bytes())
    return digest.hexdigest()[:12]


def _is_writable(asked: Asked) -> bool:
    try:
        paths.check_writable(asked.folder / "evaluations", "--out")
    except UserError as error:  # the network can still be measured and the result printed
        if hosts.is_first():
            print(f"the result will only be printed, not saved: {error}", file=sys.stderr)
        return False
    return True


def _place(asked: Asked, subject: Subject, facts: Mapping[str, Any]) -> epath.Path:
    """Returns the path of the result, without its extension; the same for the same measurement."""
    stem = epath.Path(subject.name).stem if subject.step is None else str(subject.step)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return asked.folder / "evaluations" / f"{facts['task']}_{stem}_{digest}"


def _cache(asked: Asked) -> epath.Path | None:
    """Returns the folder of the cache of features; None if there is none."""
    if asked.cache == "off":
        return None
    if asked.cache is not None:
        return epath.Path(paths.expand(asked.cache))
    folder = asked.folder / "evaluations" / "features"
    if "://" in str(folder):
        if hosts.is_first():
            print(
                f"features are not kept, because {folder} is not local; name a local folder with "
                "--cache=DIR to keep them",
                file=sys.stderr,
            )
        return None
    return folder


def _finished(place: epath.Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the record of the same measurement, if there is one; process 0 decides for all.

    It is not finished if files that its results name under `files` are missing in its folder.
    """
    try:
        text = epath.Path(f"{place}.json").read_text()
        record = json.loads(text)
        same = all(record[key] == json.loads(json.dumps(value)) for key, value in facts.items())
        lost = [name for name in record["results"].get("files", ()) if not (place / name).exists()]
        if same and lost and hosts.is_first():
            print(f"measured before, but {place / lost[0]} is missing", file=sys.stderr)
        same = same and not lost
    except (OSError, ValueError, KeyError, TypeError):
        text, same = "", False
    answer = json.loads(hosts.broadcast(json.dumps([same, text])))
    return json.loads(answer[1]) if answer[0] else None


def _show(
    task: Task, record: Mapping[str, Any], settings: ml_collections.ConfigDict, title: str
) -> None:
    if hosts.is_first():
        print(title)
        images = [f"{key}: {x['images']} images" for key, x in record["data"].items() if _is(x)]
        names = [f"data.{key}={x}" for key, x in record["data"].items() if not _is(x)]
        print(", ".join(images + names))
        print(text_of(task.table(record["results"], settings)))


def _is(value: Any) -> bool:
    """Whether a value of a record's data is the identity of a split."""
    return isinstance(value, Mapping)


def _save(path: epath.Path, record: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(record) + "\n")
        unfinished = path.with_suffix("") / UNFINISHED
        if unfinished.exists():
            unfinished.rmtree()
    except OSError as error:
        raise UserError(
            f"the result above was not saved, because {path} cannot be written: {error}; name "
            "another folder with --out, and run the same command again"
        ) from error


def _help_of(name: str) -> str:
    task = TASKS[name]
    return f"\n\nThe task {name}: {task.does}. It needs {task.expects}."


def _task_on(argv: list[str]) -> str:
    """Returns the value of --task on a command line, which decides which settings there are."""
    value = "knn"
    for flag, following in zip(argv, [*argv[1:], ""], strict=True):
        word, equals, text = flag.partition("=")
        if word in ("--task", "-task"):
            value = text if equals else following
    return value


def main() -> None:
    """Evaluates the network that the flags name."""
    args = flags.FLAGS
    if bool(args.workdir) == bool(args.weights):
        raise UserError("give either --workdir=DIR or --weights=FILE, and not both")
    if args.workdir and (args.heads or args.positions):
        raise UserError("--heads and --positions are for --weights; a folder has its own settings")
    asked = Asked(
        args.workdir,
        args.weights,
        args.step,
        args.network,
        args.heads,
        args.positions,
        args.out,
        args.cache,
        args.again,
        args.batch_size,
    )
    if args.task == ALL:
        if not args.root:
            raise UserError("--task=all needs --root=ROOT, the folder with the data of all tasks")
        if given := cli.given_data():
            raise UserError(
                f"--data.{min(given)} would have no effect: it is for a single task, and "
                "--task=all finds the data below --root; leave it out"
            )
        record = evaluate_all(asked, args.root)
    elif args.task in TASKS:
        if args.root:
            raise UserError("--root is for --task=all; name the data with --data.path")
        changes = {key: flatten(args["eval"].value)[key] for key in cli.given("eval")}
        changes = {key: tuple(x) if isinstance(x, list) else x for key, x in changes.items()}
        record = evaluate(asked, args.task, changes, cli.given_data())
    else:
        known = ", ".join([*TASKS, ALL])
        raise UserError(
            f"unknown --task={args.task}{nearest(args.task, [*TASKS, ALL])}; expected one of: "
            f"{known}"
        )
    if hosts.is_first():
        print(json.dumps(record))


if __name__ == "__main__":
    chosen = _task_on(sys.argv)
    if chosen == ALL and any(flag.startswith("--eval.") for flag in sys.argv):
        sys.exit("error: --eval.KEY is for a single task; leave it out, or choose a --task")
    if chosen in TASKS:
        cli.define_settings("eval", TASKS[chosen].settings())
        __doc__ = (__doc__ or "") + _help_of(chosen)
    cli.define_path("workdir", "The folder of a run, or of sop_jax.convert.")
    cli.define_path("weights", "A file of weights that sop_jax.convert can read.")
    flags.DEFINE_string("task", "knn", f"What to measure: {', '.join([*TASKS, ALL])}.")
    cli.define_path("root", "With --task=all, the folder with the data of all tasks.")
    cli.define_data(
        train_split="The split of images whose labels are known.",
        test_split="The split of images to classify.",
    )
    flags.DEFINE_integer("step", None, "The checkpoint to evaluate; the newest by default.")
    flags.DEFINE_enum(
        "network", None, ["teacher", "student"], "Which network; by default the teacher."
    )
    flags.DEFINE_integer(
        "heads", None, "The heads of a ViT in --weights whose size has no name.", lower_bound=1
    )
    flags.DEFINE_enum("positions", None, list(POSITIONS), "How --weights resizes positions.")
    cli.define_path("out", "The folder of the results; by default that of the network.")
    flags.DEFINE_string("cache", None, "The folder in which features are kept; off for none.")
    flags.DEFINE_bool("again", False, "Measure again what has been measured before.")
    flags.DEFINE_integer(
        "batch_size", None, "The images per batch; by default as in the run.", lower_bound=1
    )
    cli.run(main)
