"""Whether a run may resume in its workdir: compares its settings, length and data, then and now."""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import ml_collections
from etils import epath

from sop_jax import config as config_lib
from sop_jax import schedules
from sop_jax.data.sources import Identity, identity, open_source
from sop_jax.errors import UserError
from sop_jax.models import has_batch_norm
from sop_jax.objectives.methods import METHODS, method_of
from sop_jax.paths import write_whole
from sop_jax.settings import flatten
from sop_jax.training import checkpoint

SPLITS = ("train", "test")

_DATA = "data.json"

Data = dict[str, Identity | None]


class Status(NamedTuple):
    """What a workdir says about the requested run.

    Attributes:
        config: the config with which the run continues: as requested, except for settings that
            are newer than the run.
        notes: messages for people, one line each.
        summary: the summary of the finished run; None if it is not finished.
    """

    config: ml_collections.ConfigDict
    notes: list[str]
    summary: dict[str, Any] | None


def check_place(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Checks that the folder of a run is not a file, and not in the folder of its images.

    A run that an earlier version began in a folder below the images may continue there.

    Raises:
        UserError: it is one of them.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; name a folder, which need not exist yet")
    if config.data.path and os.path.realpath(workdir) == os.path.realpath(config.data.path):
        raise UserError(
            f"--workdir={workdir} is also data.path, so the run would write among the images; name "
            "another folder for the run"
        )
    if is_among_images(config, workdir) and not (workdir / "config.json").exists():
        raise UserError(
            f"--workdir={workdir} is inside the folder of images, so pictures of the run would "
            "become some of them; name another folder for the run"
        )


def is_among_images(config: ml_collections.ConfigDict, workdir: epath.Path) -> bool:
    """Returns whether the folder of a run is below the folder of its images."""
    if config.data.source != "folder" or not config.data.path:
        return False
    parents = pathlib.Path(os.path.realpath(workdir)).parents
    return pathlib.Path(os.path.realpath(config.data.path)) in parents


def check_workdir(config: ml_collections.ConfigDict, workdir: epath.Path) -> Status:
    """Checks that the folder of a run is new, or belongs to a run with this config and its files.

    Args:
        config: the requested config.
        workdir: the folder of the run.

    Raises:
        UserError: the folder belongs to a run with another config, or to something else.
    """
    summary, made = workdir / "summary.json", workdir / "config.json"
    if not made.exists():
        if workdir.exists() and checkpoint.latest_step(workdir) is not None:
            raise UserError(
                f"{workdir} has checkpoints, but no config.json, from which their settings would "
                "be read; restore it, or use another --workdir"
            )
        return Status(config, [], None)
    finished = None
    if summary.exists():
        with contextlib.suppress(ValueError):
            finished = json.loads(summary.read_text())
        if not isinstance(finished, dict):
            finished = None  # the summary is damaged, so the end of the run is repeated
    old = config_lib.read_config(workdir)
    config, notes = follow(config, old, config_lib.version_of(workdir))
    longer, different = changed_durations(old, config, lambda: _images(config, workdir))
    different = sorted([*changes(old, config, _names(durations(old))), *different])
    files, unrecorded = changed_files(config, workdir)
    different += files
    notes += unrecorded
    if different:
        raise UserError(
            f"{workdir} belongs to a run with other settings:\n  "
            + "\n  ".join(different)
            + "\nUse the settings of that run to resume it, or another --workdir. Only "
            f"{', '.join(resumable(config))} may change."
            + (_further(workdir) if finished and longer else "")
        )
    if old.init_from != config.init_from and checkpoint.latest_step(workdir):
        notes.append("init_from has no effect: it is only read at the first step of a run.")
    return Status(config, notes, finished)


def durations(config: ml_collections.ConfigDict) -> list[str]:
    """Returns the settings that are given in steps or epochs, without `steps` or `epochs`.

    The first is the duration of the run, the others end with an underscore.
    """
    return ["", "optim.warmup_", "mask.start_", *(f"{key}_" for key in method_of(config).warmups)]


def follow(
    config: ml_collections.ConfigDict, old: ml_collections.ConfigDict, version: str
) -> tuple[ml_collections.ConfigDict, list[str]]:
    """Returns the config with which to continue a run of an earlier version, and notes about it.

    A setting that the version did not have keeps the value with which the run began, unless a
    value other than the default is requested.

    Args:
        config: the requested config.
        old: the config of the run.
        version: the version that began the run.

    Returns:
        The config, and a note if it differs from `config`.
    """
    asked, began = flatten(config), flatten(old)
    default = flatten(config_lib.paper())
    kept = {
        key: began[key]
        for key in config_lib.later_settings(version)
        if key not in resumable(config) and asked[key] == default[key] != began[key]
    }
    if not kept:
        return config, []
    config = deepcopy(config)
    config.update_from_flattened_dict(
        {key: tuple(value) if isinstance(value, list) else value for key, value in kept.items()}
    )
    settings = ", ".join(f"{key}={value}" for key, value in sorted(kept.items()))
    return config, [f"sop_jax {version} began this run, which continues as before: {settings}."]


def resumable(config: ml_collections.ConfigDict) -> list[str]:
    """What a resumed run of this config may change.

    With batch norm the number of microbatches is fixed, because each is normalized by itself.
    """
    fixed = ("accumulate",) if has_batch_norm(config) else ()
    return [key for key in config_lib.RESUMABLE if key not in fixed]


def changes(
    old: ml_collections.ConfigDict, new: ml_collections.ConfigDict, but: Sequence[str] = ()
) -> list[str]:
    """Returns the settings that differ between two configs although they must not, one per line.

    With another method all else may differ, so that only the method is named. The settings of
    methods that are not chosen are not compared.

    Args:
        old: the config of the run.
        new: the requested config.
        but: the names of settings that are not compared.
    """
    before, after = flatten(old), flatten(new)
    if before.get("method") != after.get("method"):
        before, after = {"method": before.get("method")}, {"method": after.get("method")}
    unused = tuple(f"{name}." for name in METHODS if name != new.get("method"))
    return [
        f"{key}: the run has {before.get(key)!r}, but {after.get(key)!r} was requested"
        for key in sorted(before.keys() | after.keys())
        if key not in (*resumable(new), *but)
        and not key.startswith(unused)
        and before.get(key) != after.get(key)
    ]


def changed_durations(
    old: ml_collections.ConfigDict,
    new: ml_collections.ConfigDict,
    images: Callable[[], int],
) -> tuple[bool, list[str]]:
    """Compares the durations of two configs in steps.

    Args:
        old: the config of the run.
        new: the requested config.
        images: returns the number of train images; it is called only if needed.

    Returns:
        Whether the run has become longer, and the differences, one line each.
    """
    before, after = flatten(old), flatten(new)
    longer, lines = False, []
    for name in durations(old):
        keys = _names([name])
        if all(before[key] == after[key] for key in keys):
            continue
        then, now = (_duration(config, name, images()) for config in (old, new))
        if then != now:
            longer = longer or (name == "" and now > then)
            lines.append(
                f"{name}steps: the run has {_duration_text(before, name, then)}, but "
                f"{_duration_text(after, name, now)} was requested"
            )
    return longer, lines


def changed_files(
    config: ml_collections.ConfigDict, workdir: epath.Path
) -> tuple[list[str], list[str]]:
    """Compares what a run reads from the files that its method's settings name, then and now.

    Args:
        config: the config of the run.
        workdir: the folder of the run.

    Returns:
        The differences, one line each, and a note for each file of which there is no record.
    """
    began = (_read_data(workdir) or {}).get("files", {})
    lines, notes = [], []
    for key, digest in method_of(config).files(config).items():
        path = flatten(config)[key]
        if key not in began:
            notes.append(
                f"{workdir} has no record of what the run read from {key}={path}. The present "
                "content is recorded instead."
            )
        elif began[key] != digest:
            lines.append(f"{key}: {path} has other content than when the run began")
    return lines, notes


def check_data(config: ml_collections.ConfigDict, data: Data, workdir: epath.Path) -> list[str]:
    """Checks that the data of a run is the data that it began with.

    Args:
        config: the config of the run.
        data: the present data, from `data_of`.
        workdir: the folder of the run.

    Returns:
        Messages for people, one line each.

    Raises:
        UserError: the data differs; the message says how, for each split.
    """
    if not (workdir / "config.json").exists():
        return []
    began = recorded(workdir)
    if began is None:
        images = {split: found["images"] for split, found in data.items() if found}
        counts = " and ".join(f"{count} {split} images" for split, count in images.items())
        return [
            f"{workdir} has no record of the data that the run began with. The present data is "
            f"recorded instead: {counts}."
        ]
    if different := differences(began, data):
        path = f" in {config.data.path}" if config.data.path else ""
        raise UserError(
            f"the data{path} is not the data that the run in {workdir} began with:\n  "
            + "\n  ".join(different)
            + "\nA run cannot continue with other images. Restore them, or name their place now "
            "with --config.data.path, or with --images if the run began with that flag; for the "
            "present images use another --workdir."
        )
    return []


def check_finished_data(config: ml_collections.ConfigDict, workdir: epath.Path) -> list[str]:
    """Checks the data of a finished run as `check_data` does; the data may be absent."""
    try:
        train = open_source(config.data, "train")
        data = data_of(train, open_source(config.data, "test", train))
    except UserError as error:
        return [f"Its data was not compared with what the run used: {error}"]
    return check_data(config, data, workdir)


def data_of(train: Any, test: Any) -> Data:
    """Returns the identity of the data of a run by split; None for an absent test split."""
    return {"train": identity(train), "test": None if test is None else identity(test)}


def facts(data: Data) -> dict[str, Any]:
    """Returns the facts that all processes must agree on, for `hosts.check_agreement`."""
    known: dict[str, Any] = {}
    for split, found in data.items():
        known[f"{split} images"] = None if found is None else found["images"]
        known[f"the names of the {split} images"] = None if found is None else found["names"]
    return known


def file_facts(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Returns what all processes must read from the files that the method's settings name."""
    files = method_of(config).files(config)
    return {f"the content of {key}": digest for key, digest in files.items()}


def save(config: ml_collections.ConfigDict, data: Data, workdir: epath.Path) -> None:
    """Writes the identity of a run's data and files, and then its settings, to its workdir."""
    files = method_of(config).files(config)
    record = {**data, **({"files": files} if files else {})}
    write_whole(workdir / _DATA, json.dumps(record, indent=2) + "\n")
    config_lib.save(config, workdir)


def differences(then: Data, now: Data) -> list[str]:
    """Returns the differences between the data of a run then and now, one line per split."""
    return [
        f"{split}: {_difference(then[split], now[split])}"
        for split in SPLITS
        if then[split] != now[split]
    ]


def recorded(workdir: epath.Path) -> Data | None:
    """Returns the data that a run began with; None if its version did not record it.

    Raises:
        UserError: the record is damaged.
    """
    saved = _read_data(workdir)
    return saved and {split: saved[split] for split in SPLITS}


def _read_data(workdir: epath.Path) -> dict[str, Any] | None:
    """Returns the record of the data and files that a run began with; None if there is none."""
    path = workdir / _DATA
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text())
        found: dict[str, Any] = {
            split: saved[split]
            and Identity(images=saved[split]["images"], names=saved[split]["names"])
            for split in SPLITS
        }
        return found | {"files": dict(saved.get("files", {}))}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}, the record of the data of this run, is damaged: expected the number and the "
            "digest of the images of each split. Restore it, or delete it if you are sure that the "
            "data is the same"
        ) from error


def _difference(then: Identity | None, now: Identity | None) -> str:
    if then is None or now is None:
        return " ".join(
            [
                f"{then['images']} images then" if then else "no such split then",
                f"and {now['images']} images now" if now else "and none now",
            ]
        )
    if then["images"] != now["images"]:
        return f"{then['images']} images then, {now['images']} now"
    return f"the same number of images, {now['images']}, but other names"


def _images(config: ml_collections.ConfigDict, workdir: epath.Path) -> int:
    """Returns the number of train images that a run began with, or the present one if unknown."""
    began = recorded(workdir)
    if began is not None and began["train"] is not None:
        return began["train"]["images"]
    source = open_source(config.data, "train")
    assert source is not None  # only the test split may be missing
    return len(source)


def _names(durations: Any) -> list[str]:
    return [f"{name}{unit}" for name in durations for unit in ("steps", "epochs")]


def _duration(config: ml_collections.ConfigDict, name: str, images: int) -> int:
    steps, epoch = schedules.run_length(config, images)
    section, _, rest = name.rpartition(".")
    return schedules.duration(config[section], rest, epoch) if section else steps


def _duration_text(flat: dict[str, Any], name: str, steps: int) -> str:
    given = flat[f"{name}steps"]
    return str(steps) if given is not None else f"{steps} ({name}epochs={flat[f'{name}epochs']:g})"


def _further(workdir: epath.Path) -> str:
    return (
        "\nThis run is finished, and its schedules have reached their end. To train its network "
        f"for longer, start a new run from it: --config.init_from={workdir} --workdir=NEW"
    )
