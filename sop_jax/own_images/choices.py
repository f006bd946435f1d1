"""Settings for a folder of images: looks at the folder and the devices, and then decides."""

import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from etils import epath

from sop_jax import config as config_lib
from sop_jax import recipes
from sop_jax.data import folders, sources
from sop_jax.data.decode import decoding
from sop_jax.data.sources import open_source
from sop_jax.errors import UserError
from sop_jax.own_images import decisions, duplicates, estimate, machine, survey
from sop_jax.parallel import hosts
from sop_jax.paths import absolute
from sop_jax.settings import flatten

FIXED = ("data.path", "data.source", "data.name")  # which `images` stands for


class Seen(NamedTuple):
    """What the decisions are based on."""

    survey: survey.Survey
    machine: machine.Machine


def say(line: str) -> None:
    """Shows a line to the user."""
    print(line, file=sys.stderr, flush=True)


def choose(
    images: str,
    workdir: epath.PathLike | None = None,
    given: Mapping[str, Any] | None = None,
    tell: Callable[[str], Any] = say,
) -> ml_collections.ConfigDict:
    """Returns the settings of a run on a folder of images, and says what they are and why.

    The settings of a run that has begun are those in its config.json: nothing is chosen again.

    Args:
        images: the folder, local or gs://, laid out as for `data.source=folder`.
        workdir: the folder of the run, which need not exist; None to choose in any case.
        given: the settings that are not to be chosen, by their dotted names, such as
            `{"batch_size": 64}`. What follows from them is chosen accordingly.
        tell: shows a line; called in the first process only.

    Raises:
        UserError: the folder cannot be used, or a given setting does not exist or has another type.
    """
    config, seen = chosen(images, workdir, given, tell=tell)
    say_cost(config, seen, tell)
    return config


def chosen(
    images: str,
    workdir: epath.PathLike | None = None,
    given: Mapping[str, Any] | None = None,
    *,
    full: bool = False,
    tell: Callable[[str], Any] = say,
) -> tuple[ml_collections.ConfigDict, Seen | None]:
    """Returns what `choose` does, and what was seen; None in other processes and if a run resumes.

    Args:
        images: see `choose`, like all others.
        workdir: the folder of the run.
        given: the settings that are not to be chosen.
        full: whether all images are decoded and near-duplicates are looked for.
        tell: shows a line.
    """
    given = dict(given or {})
    if fixed := [key for key in FIXED if key in given]:
        raise UserError(
            f"{fixed[0]} is given, but so is the folder of images, {images}; leave one of them out"
        )
    config = recipes.folder()
    config.data.path = absolute(images)
    _update(config, given)
    if workdir is not None and (epath.Path(workdir) / "config.json").exists():
        config = config_lib.read_config(workdir)
        config.data.update(source="folder", path=absolute(images))
        _update(config, given)
        if hosts.is_first():
            tell(f"{workdir} has a run, whose settings are kept: nothing is chosen again.")
        return config, None
    seen, text = None, ""
    if hosts.is_first():
        if "data.test_split" not in given:
            config.data.test_split = test_split(config.data.path)
        seen = look(config, full, tell)
        config, made = decisions.decide(config, seen.survey, seen.machine, given)
        tell("Settings, chosen for these images and this machine:")
        for line in decisions.words(made, given):
            tell(line)
        text = json.dumps(config.to_dict())
    if hosts.several():
        text = hosts.gather(text, hosts.END_TIMEOUT)[0]
        _update(config, dict(flatten(json.loads(text))))
    return config, seen


def say_cost(
    config: ml_collections.ConfigDict, seen: Seen | None, tell: Callable[[str], Any] = say
) -> None:
    """Says what time and memory a run is expected to take, if that is known.

    Args:
        config: the settings.
        seen: what `chosen` saw.
        tell: shows a line.
    """
    if seen is not None and config.model.family == "vit":
        found = estimate.estimate(config, seen.survey, seen.machine)
        for line in estimate.words(found, seen.machine):
            tell(f"Expected {line}")


def test_split(root: str) -> str:
    """Returns the folder of test images below a folder: val, valid, validation or test."""
    path, there = epath.Path(root), list[str]()
    with contextlib.suppress(OSError):  # which is reported when the images are listed
        there = [child.name for child in path.iterdir()] if path.is_dir() else []
    return decisions.test_split(there)


def look(
    config: ml_collections.ConfigDict, full: bool = False, tell: Callable[[str], Any] = say
) -> Seen:
    """Looks at the images and the devices of a config, and says what there is.

    Args:
        config: the settings; those of `data` are read.
        full: whether all images are decoded and near-duplicates are looked for.
        tell: shows a line.

    Raises:
        UserError: the images cannot be used.
    """
    train = open_source(config.data, "train")
    assert train is not None  # only the test split may be missing
    test = open_source(config.data, "test", train)
    hashes: dict[int, np.uint64] = {}

    def hash_of(index: int, image: np.ndarray) -> None:
        hashes[index] = duplicates.perceptual_hash(image)

    name = folders.printable(config.data.path or config.data.source)
    notes = sources.notes(train, test)
    found = survey.survey(
        train, test, decoding(config.data, train), name, notes, hash_of if full else None
    )
    for line in survey.words(found):
        tell(line)
    if full:
        for line in duplicates.words(hashes, train):
            tell(line)
    decisions.check_images(found)
    here = machine.measure()
    tell(machine.words(here))
    return Seen(found, here)


def _update(config: ml_collections.ConfigDict, settings: Mapping[str, Any]) -> None:
    """Changes settings by their dotted names; lists become tuples.

    Raises:
        UserError: a setting does not exist, or a value has another type.
    """
    if wrong := config_lib.misnamed(dict(settings)):
        raise UserError("; ".join(wrong))
    for key, value in settings.items():
        try:
            config.update_from_flattened_dict(
                {key: tuple(value) if isinstance(value, list) else value}
            )
        except TypeError as error:
            raise UserError(f"{key} is {value!r}, which has the wrong type: {error}") from error
