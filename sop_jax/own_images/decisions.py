"""The settings that suit a data set and a machine, each with the reason why.

Every decision is a function of the settings so far, the survey of the images and the machine. A
setting that the user gives is kept, and the decisions after it follow from its value.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_collections

from sop_jax.data.folders import HELD_OUT
from sop_jax.data.pipeline import check_shared_memory
from sop_jax.errors import UserError
from sop_jax.models import size_of
from sop_jax.monitor.metrics import time_text
from sop_jax.own_images.estimate import estimate, fits, least_accumulate
from sop_jax.own_images.machine import Machine
from sop_jax.own_images.survey import Survey
from sop_jax.schedules import run_length

FEWEST = 30  # images
FEW = 5000  # images below which colours change less than in the paper
MANY = 20_000  # images from which the crops and the optimizer are those of the paper
HUGE = 200_000  # images from which the supports, tasks and temperatures are those of the paper
BUDGET = {"cpu": 30 * 60.0}  # seconds that a run should take at most
LONGEST = 24 * 3600.0  # the same for accelerators
FEWEST_EPOCHS, FEWEST_VIEWED = 10.0, 50_000  # epochs, and images seen, that a run has at least
UNREADABLE = 0.5  # the largest share of unreadable images with which a run begins


class Choice(NamedTuple):
    """Settings by their dotted names, and why they are chosen."""

    settings: dict[str, Any]
    reason: str


class Rung(NamedTuple):
    """A network, the views that it is for, and the fewest images that it is worth training on."""

    network: dict[str, Any]
    head: tuple[int, int]  # hidden, dim
    pixels: int
    local_crops: int
    images: int
    name: str


def _custom(width: int, depth: int, heads: int) -> dict[str, Any]:
    return {"size": "custom", "width": width, "depth": depth, "heads": heads}


# From the largest to the smallest.
RUNGS = (
    Rung({"size": "b"}, (2048, 256), 224, 8, 1_000_000, "ViT-B"),
    Rung({"size": "s"}, (2048, 256), 224, 8, MANY, "ViT-S"),
    Rung({"size": "ti"}, (1024, 256), 224, 6, 2000, "ViT-Ti"),
    Rung(_custom(192, 6, 3), (512, 128), 224, 4, 0, "a ViT of 6 layers of width 192"),
    Rung(_custom(192, 6, 3), (512, 128), 112, 4, 0, "a ViT of 6 layers of width 192"),
    Rung(_custom(128, 4, 4), (256, 64), 96, 4, 0, "a ViT of 4 layers of width 128"),
)
# Global views, with their local views and patches, in pixels.
VIEWS = {224: (96, 16), 160: (64, 16), 112: (48, 16), 96: (48, 16), 64: (32, 8), 32: (16, 4)}


NETWORK = {"model.size", "model.width", "model.depth"}


class Facts(NamedTuple):
    """What the decisions follow from."""

    survey: Survey
    machine: Machine
    given: Mapping[str, Any]


def decide(
    config: ml_collections.ConfigDict, survey: Survey, machine: Machine, given: Mapping[str, Any]
) -> tuple[ml_collections.ConfigDict, list[Choice]]:
    """Returns the settings of a run, and those that were chosen, in order.

    Args:
        config: the settings that nothing here decides.
        survey: the images.
        machine: the devices.
        given: the settings that the user gives, by their dotted names.

    Raises:
        UserError: there are too few images, or too many that cannot be read.
    """
    check_images(survey)
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(dict(given))
    facts, made = Facts(survey, machine, given), list[Choice]()
    for decision in DECISIONS:
        for choice in decision(config, facts):
            own = {key: value for key, value in choice.settings.items() if key not in given}
            config.update_from_flattened_dict(own)
            if own:
                made.append(Choice(own, choice.reason))
    return config, made


def check_images(survey: Survey) -> None:
    """Checks that there are enough images to learn from, and that most can be read.

    Raises:
        UserError: otherwise; it says why not.
    """
    broken = [f"\n  {line}" for line in list(survey.unreadable.values())[:5]]
    if survey.share > UNREADABLE:
        looked = max(survey.decoded, len(survey.headers) + len(survey.unreadable))
        raise UserError(
            f"{len(survey.unreadable)} of {looked} images in {survey.name} cannot be read:"
            f"{''.join(broken)}\nRepair them, or give a folder of other images"
        )
    if survey.readable < FEWEST:
        those = "".join(broken) and f", not counting these, which cannot be read:{''.join(broken)}"
        raise UserError(
            f"{survey.name} has {survey.readable} images to train on{those}{chr(10) * bool(those)}"
            f"{'' if those else '. '}Training begins at {FEWEST}: an image is compared with "
            "prototypes that are drawn from the other ones, and a network that has seen only a few "
            "learns these by heart. Add images, or use a trained network: sop_jax.convert reads "
            "those of other projects, and sop_jax.extract gives their features of your images"
        )


def of_data(config: ml_collections.ConfigDict, facts: Facts) -> list[Choice]:
    """Chooses how many images can be unreadable."""
    survey = facts.survey
    if not survey.share:
        return []
    allowed = math.ceil(100 * (1.5 * survey.share + 0.01)) / 100
    return [
        Choice(
            {"data.max_corrupt_share": min(1.0, allowed)},
            f"about {100 * survey.share:.2g} % of the images cannot be read; others replace them",
        )
    ]


def of_type(config: ml_collections.ConfigDict, facts: Facts) -> list[Choice]:
    """Chooses the type of the computation."""
    if facts.machine.platform == "cpu":
        return [Choice({"model.dtype": "float32"}, "CPUs are slow in bfloat16")]
    return [Choice({"model.dtype": "bfloat16"}, f"the fast type on a {facts.machine.platform}")]


def of_length(config: ml_collections.ConfigDict, facts: Facts) -> list[Choice]:
    """Chooses the batch, and how many epochs are worth it if there is time for them."""
    images, devices = facts.survey.images, facts.machine.devices
    sizes = {200: 16, 2000: 32, MANY: 64, 50_000: 128, HUGE: 256, 1_000_000: 512}
    batch = next((size for below, size in sizes.items() if images < below), 1024)
    if facts.machine.platform == "cpu":
        batch = min(batch, 128)
    batch = devices * math.ceil(batch / devices)
    why = f"enough steps per epoch for {images:,} images"
    if devices > 1:
        why += f", and a multiple of {devices} devices"
    choices = [Choice({"batch_size": batch}, why)]
    if config.steps is None:
        why = "fewer images are seen more often"
        choices.append(Choice({"epochs": wanted_epochs(images)}, why))
    return choices


def wanted_epochs(images: int) -> float:
    """Returns the epochs that are worth it if there is time for them."""
    return float(round(min(400.0, max(100.0, 100 * math.sqrt(10_000 / images)))))


def of_network(config: ml_collections.ConfigDict, facts: Facts) -> list[Choice]:
    """Chooses the network and the size of its views: the largest that trains in time."""
    survey, machine, given = facts.survey, facts.machine, facts.given
    if config.model.family != "vit":
        return _of_other_family(config, survey)
    budget = BUDGET.get(machine.platform, LONGEST)
    rungs = [rung for rung in RUNGS if survey.images >= rung.images]
    for rung in rungs:
        settings = _of_rung(rung, config, survey, given)
        trial = config.copy_and_resolve_references()
        trial.update_from_flattened_dict(settings | dict(given))
        # A short trial has the network of the whole run.
        given_epochs = run_length(config, survey.images).steps * config.batch_size / survey.images
        trial.steps, trial.epochs = None, max(given_epochs, wanted_epochs(survey.images))
        trial.accumulate = least_accumulate(trial, machine)
        if "data.workers" not in given:  # they are chosen for the network, later
            trial.data.workers = most_workers(machine)
        seconds = estimate(trial, survey, machine).seconds
        if seconds <= budget and fits(trial, machine):
            break
    size = trial.augment.global_size
    network = {key: value for key, value in settings.items() if key.startswith(("model", "head"))}
    views = {key: value for key, value in settings.items() if key not in network}
    largest = "the largest" if rung is rungs[0] else "the largest that trains in time"
    why = f"{rung.name}: {largest} for {survey.images:,} images"
    if rung is rungs[-1] and seconds > budget:
        why = f"{rung.name}: the smallest, because even this is slow on this machine"
    if NETWORK & given.keys():
        why = "what suits the given network"
    limit = f"the images have {survey.short_side} pixels"
    if size >= rung.pixels:
        limit = "for which this network is meant"
    return [
        Choice(network, why),
        Choice(views, f"views of {size} pixels, {limit}, and smaller ones of parts of the image"),
    ]


def _of_rung(
    rung: Rung, config: ml_collections.ConfigDict, survey: Survey, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the settings of a network and its views that are not given."""
    most = given.get("augment.global_size", min(rung.pixels, max(survey.short_side, min(VIEWS))))
    size = max((size for size in VIEWS if size <= most), default=min(VIEWS))
    local, patch = VIEWS[size]
    patch = given.get("model.patch", patch)
    size = max(patch, size // patch * patch)
    network = dict(rung.network)
    if dimensions := [key for key in ("width", "depth", "heads") if f"model.{key}" in given]:
        network = _custom(192, 6, 3) if network["size"] != "custom" else network
        if "width" in dimensions:
            width = given["model.width"]
            network["heads"] = next(n for n in (width // 64, width // 32, 1) if n and not width % n)
    elif given.get("model.size", "custom") != "custom":
        network = {}
    hidden, dim = rung.head
    settings = {
        **{f"model.{key}": value for key, value in network.items()},
        "model.patch": patch,
        "head.hidden": hidden,
        "head.dim": dim,
        "augment.global_size": size,
        "augment.local_size": max(patch, local // patch * patch),
        "augment.local_crops": rung.local_crops,
    }
    return {key: value for key, value in settings.items() if key not in given}


def _of_other_family(config: ml_collections.ConfigDict, survey: Survey) -> list[Choice]:
    size = 224 if survey.short_side >= 224 else 128 if survey.short_side >= 128 else 64
    return [
        Choice(
            {"augment.global_size": size, "augment.local_size": {224: 96, 128: 64, 64: 32}[size]},
            f"the images have {survey.short_side} pixels; model.family={config.model.family} is "
            "given, whose size is not chosen",
        )
    ]


def of_crops(config: ml_collections.ConfigDict, facts: Facts) -> list[Choice]:
    """Chooses how different views are."""
    size, choices = config.augment.global_size, []
    if facts.survey.images < MANY:
        milder = {"augment.global_scale": (0.4, 1.0), "augment.local_scale": (0.1, 0.4)}
        choices.append(Choice(milder, "with few images, views must have more in common"))
    else:
        paper = {"augment.global_scale": (0.25, 1.0), "augment.local_scale": (0.05, 0.25)}
        choices.append(Choice(paper, "as in the paper"))
    if facts.survey.images < FEW:
        strengths = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.1, "hue": 0.05}
        colours = {f"augment.{key}": value for key, value in strengths.items()}
        why = "half of the paper's or less: with few images, colours tell much"
        choices.append(Choice(colours | {"augment.grayscale": 0.1}, why))
    if size <= 32:
        sharp = {"augment.blur": (0.0, 0.0, 0.0), "augment.solarize": 0.0}
        choices.append(Choice(sharp, f"blur would leave little of {size} pixels"))
    elif size < 224:
        sigma = (round(0.1 * size / 224, 3), round(2.0 * size / 224, 2))
        why = f"the paper's blur of 224 pixels, for {size}"
        choices.append(Choice({"augment.blur_sigma": sigma}, why))
    return choices


def of_time(config: ml_collections.ConfigDict, facts: Facts) -> list[Choice]:
    """Chooses microbatches, and fewer epochs if there is no time for all."""
    survey, machine, given = facts.survey, facts.machine, facts.given
    choices = []
    if config.model.family != "vit":
        return []
    config = config.copy_and_resolve_references()
    config.accumulate = least_accumulate(config, machine)
    if config.accumulate > 1:
        why = "so that a step fits the memory of a device"
        choices.append(Choice({"accumulate": config.accumulate}, why))
    budget = BUDGET.get(machine.platform, LONGEST)
    seconds = estimate(config, survey, machine).seconds
    if config.steps is None and "epochs" not in given and seconds > budget:
        least = max(FEWEST_EPOCHS, math.ceil(FEWEST_VIEWED / survey.images))
        epochs = max(float(least), float(math.floor(config.epochs * budget / seconds)))
        if epochs < config.epochs:
            why = f"{config.epochs:g} would take {time_text(seconds)} on this machine"
            choices.append(Choice({"epochs": epochs}, why))
    return choices


def of_prototypes(config: ml_collections.ConfigDict, facts: Facts) -> list[Choice]:
    """Chooses the memories, the anchors that are drawn from them, and their supports."""
    if config.method != "sop":
        return []
    images, batch = facts.survey.images, config.batch_size
    rows = 2 ** round(math.log2(min(images, 64 * batch)))
    rows = max(128, min(65536, rows), 2 ** math.ceil(math.log2(2 * batch)))
    rows = facts.given.get("sop.cls.memory", rows)
    many = images >= HUGE
    anchors = max(2, rows // (16 if many else 8))
    patch_rows = facts.given.get("sop.patch.memory", max(min(rows, 8192), batch))
    choices = [
        Choice(
            {"sop.cls.memory": rows, "sop.cls.anchors": anchors},
            f"a memory of about an epoch, or of 64 batches, and K = one in {rows // anchors} of it",
        ),
        Choice(
            {"sop.cls.supports": 8 if many else 4, "sop.cls.tasks": 2 if many else 1},
            "as in the paper" if many else "a small memory has fewer good supports",
        ),
    ]
    if patch_rows:
        patches = {"sop.patch.memory": patch_rows, "sop.patch.anchors": max(2, patch_rows // 8)}
        choices.append(Choice(patches, "one patch of each image is stored"))
    return choices


def of_temperatures(config: ml_collections.ConfigDict, facts: Facts) -> list[Choice]:
    """Chooses the teacher's temperature: the lower, the less can views agree without collapse."""
    if config.method != "sop":
        return []
    images = facts.survey.images
    if images >= HUGE:
        ends, why = (0.04, 0.07), "as in the paper"
    elif images >= MANY:
        ends, why = (0.04, 0.04), "as in the paper before its warm-up"
    else:
        ends, why = (0.02, 0.02), "low, so that few images do not collapse to one point"
    choices = [Choice({"sop.teacher_temperature": ends}, why)]
    if ends[0] != ends[1]:
        warmup = {"sop.temperature_warmup_epochs": min(30.0, round(config.epochs / 10, 1))}
        choices.append(Choice(warmup, "a tenth of the run, or 30 epochs"))
    return choices


def of_start(config: ml_collections.ConfigDict, facts: Facts) -> list[Choice]:
    """Chooses how the network begins."""
    if config.model.family != "vit":
        return []
    size = size_of(config.model)
    if size.width >= 384 or size.depth > 8:
        return [Choice({"model.drop_path": 0.1}, "as in the paper")]
    return [
        Choice(
            {"model.init_std": 0.1, "model.position_std": 0.5, "model.drop_path": 0.0},
            "a narrow network must tell images and positions apart from the start",
        )
    ]


def of_optimizer(config: ml_collections.ConfigDict, facts: Facts) -> list[Choice]:
    """Chooses the learning rate and the schedules."""
    length = run_length(config, facts.survey.images)
    narrow = config.model.drop_path == 0.0
    lr = round(0.256 / config.batch_size, 5) if narrow else 5e-4
    choices = [
        Choice(
            {"optim.lr": lr},
            f"for 256 images; {lr * config.batch_size / 256:.3g} for {config.batch_size}: "
            + ("as small networks learnt well" if narrow else "as in the paper"),
        )
    ]
    if config.optim.warmup_steps is None:
        warmup = round(min(10.0, length.steps / length.epoch / 10), 2)
        choices.append(Choice({"optim.warmup_epochs": warmup}, "a tenth of the run, or 10 epochs"))
    decay = (0.04, 0.1) if narrow else (0.04, 0.4)
    # At the end of a short run the teacher averages about its last tenth.
    end = round(min(0.9995, max(0.995, 1 - 10 / length.steps)), 4)
    momentum = (0.99, end) if length.steps < 20_000 else (0.994, 1.0)
    choices += [
        Choice({"optim.weight_decay": decay}, "less in a short run" if narrow else "the paper's"),
        Choice(
            {"optim.momentum": momentum},
            f"the teacher must follow within {length.steps:,} steps",
        ),
    ]
    return choices


def of_workers(config: ml_collections.ConfigDict, facts: Facts) -> list[Choice]:
    """Chooses the threads and processes that make batches."""
    machine = facts.machine
    if config.model.family != "vit":
        return []
    found = estimate(config, facts.survey, machine)
    if machine.shares_cores:
        busy = found.input * machine.cores > found.compute
        threads = min(machine.cores, 8) if busy else 1
        why = "images take longer than steps" if busy else "the cores are for the steps"
        return [Choice({"data.workers": 0, "data.threads": threads}, why)]
    trial = config.copy_and_resolve_references()
    trial.data.workers = 1
    input_of_one = estimate(trial, facts.survey, machine).input
    needed = math.ceil(1.5 * input_of_one / max(found.compute, 1e-9))
    workers = min(most_workers(machine), needed)
    local = config.batch_size // machine.devices
    while workers:
        trial.data.workers = workers
        try:
            check_shared_memory(trial, local)
            break
        except UserError:
            workers //= 2
    why = f"each makes {config.batch_size / max(input_of_one, 1e-9):.0f} images per second"
    return [Choice({"data.workers": workers, "data.threads": 4 if workers else 1}, why)]


def most_workers(machine: Machine) -> int:
    """Returns the most processes that make batches."""
    return min(machine.cores, 32)


def of_evaluation(config: ml_collections.ConfigDict, facts: Facts) -> list[Choice]:
    """Chooses how often a run is logged, evaluated and saved, and the size of test images."""
    steps = run_length(config, facts.survey.images).steps
    size = config.augment.global_size
    every = max(1, round(steps / 10))
    return [
        Choice(
            {"eval.crop": size, "eval.resize": round(size * 256 / 224)},
            "as large as the views, in the paper's proportion",
        ),
        Choice(
            {
                "log_every": min(50, max(1, steps // 200)),
                "eval_every": every,
                "checkpoint_every": every,
            },
            f"ten times in {steps:,} steps; a checkpoint also after {config.checkpoint.minutes:g} "
            "minutes",
        ),
    ]


DECISIONS: tuple[Callable[[ml_collections.ConfigDict, Facts], list[Choice]], ...] = (
    of_data,
    of_type,
    of_length,
    of_network,
    of_crops,
    of_time,
    of_prototypes,
    of_temperatures,
    of_start,
    of_optimizer,
    of_workers,
    of_evaluation,
)


def words(choices: list[Choice], given: Mapping[str, Any]) -> list[str]:
    """Returns choices in words for people: each with its reason, and then what was given."""
    lines = []
    for settings, reason in choices:
        lines.append("  " + " ".join(f"{key}={_shown(value)}" for key, value in settings.items()))
        lines.append(f"      {reason}")
    shown = [f"{key}={_shown(value)}" for key, value in given.items()]
    return lines + ([f"  given: {' '.join(shown)}"] if shown else [])


def _shown(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_split(folders: list[str]) -> str:
    """Returns the split of test images among the folders of a tree; `val` if there is none."""
    for name in (*HELD_OUT, "test"):
        if any(folder.casefold() == name for folder in folders):
            return name
    return HELD_OUT[0]
