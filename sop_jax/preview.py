"""What a run would do, without training: its parameters, batches, schedules, plan and views."""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from PIL import Image

from sop_jax.check import check_config
from sop_jax.compiled import flops
from sop_jax.data.decode import decoding, load_image
from sop_jax.data.pipeline import train_batches
from sop_jax.data.sources import Source, open_source
from sop_jax.evaluation.contact_sheet import Tile, contact_sheet
from sop_jax.models import MEAN
from sop_jax.own_images import choices
from sop_jax.own_images.estimate import estimate, words
from sop_jax.parallel import hosts
from sop_jax.parallel.mesh import make_mesh
from sop_jax.paths import check_writable
from sop_jax.schedules import duration
from sop_jax.training import checkpoint, resume
from sop_jax.training.assemble import Run, assemble, traced_step

PICTURE = "views.png"
SHOWN = 6  # images in the picture
MIB = 2**20


def show(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    seen: choices.Seen | None = None,
    full: bool = False,
    tell: Callable[[str], Any] = choices.say,
) -> None:
    """Says what a run would do, and draws its first views to `workdir/views.png`.

    The workdir does not count as begun.

    Args:
        config: the settings.
        workdir: the folder of the run, which need not exist.
        seen: what is known of images and devices; None to look at them.
        full: whether all images are decoded and near-duplicates are looked for, unless `seen`.
        tell: shows a line.

    Raises:
        UserError: the run could not start.
    """
    check_config(config)
    resume.check_place(config, workdir)
    status = resume.check_workdir(config, workdir)
    config = status.config
    check_writable(workdir, "--workdir")
    train = open_source(config.data, "train")
    assert train is not None  # only the test split may be missing
    run = assemble(config, make_mesh(config.mesh.data, config.mesh.fsdp), len(train))
    if not hosts.is_first():
        return
    if seen is None:
        seen = choices.look(config, full, tell)
    sections = {
        "Parameters of the student; the teacher has the same": parameters(run),
        "A batch": batch(run),
        "Schedules": milestones(config, run),
        "Evaluations and checkpoints": plan(config, run, seen),
        "Estimates": cost(config, run, seen),
    }
    for title, lines in sections.items():
        tell(f"\n{title}:")
        for line in lines:
            tell(f"  {line}")
    workdir.mkdir(parents=True, exist_ok=True)
    if resume.is_among_images(config, workdir):
        tell(f"\nNo views are drawn: in {workdir}, the picture would become one of the images.")
    else:
        draw_views(config, train, run.model.patch, workdir / PICTURE)
        tell(f"\nThe first views of {SHOWN} images are drawn in {workdir / PICTURE}.")
    tell(_standing(workdir, run.steps))


def _standing(workdir: epath.Path, steps: int) -> str:
    """Returns what the same command without --dry_run would do."""
    saved = checkpoint.latest_step(workdir)
    if saved is None:
        return "Nothing was trained. The same command without --dry_run begins the run."
    if saved >= steps:
        return f"Nothing was trained. The run in {workdir} is finished, after {steps:,} steps."
    return (
        f"Nothing was trained. The same command without --dry_run resumes the run in {workdir} "
        f"after step {saved:,} of {steps:,}."
    )


def parameters(run: Run) -> list[str]:
    """Returns a table of the parameters: name, shape and number, and their total."""
    rows = [
        ("/".join(str(key.key) for key in path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(run.abstract.student)
    ]
    total = sum(leaf.size for _, leaf in rows)
    table = [(name, " x ".join(map(str, leaf.shape)), f"{leaf.size:,}") for name, leaf in rows]
    return _aligned([*table, ("total", "", f"{total:,}")])


def batch(run: Run) -> list[str]:
    """Returns a table of the arrays of a batch."""
    leaves = run.batch.items()
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for _, leaf in leaves)
    table = [(name, " x ".join(map(str, leaf.shape)), str(leaf.dtype)) for name, leaf in leaves]
    return [*_aligned(table), f"{size / MIB:.1f} MiB"]


def milestones(config: ml_collections.ConfigDict, run: Run) -> list[str]:
    """Returns a table of the values of all schedules at the steps where something changes."""
    warmup = min(duration(config.optim, "warmup_", run.epoch), run.steps)
    steps = sorted({0, warmup, run.steps // 2, run.steps})
    scheduled = {**run.schedules, **run.objective.schedules}
    head = ("step", *(f"{step:,}" for step in steps))
    epochs = ("epoch", *(f"{step / run.epoch:.4g}" for step in steps))
    rows = [
        (name, *(f"{float(schedule(step)):.4g}" for step in steps))
        for name, schedule in scheduled.items()
    ]
    return _aligned([head, epochs, *rows])


def plan(config: ml_collections.ConfigDict, run: Run, seen: choices.Seen) -> list[str]:
    """Returns when a run is logged, evaluated and saved."""

    def times(every: int) -> str:
        if not every:
            return "never"
        return f"every {every:,} steps, {run.steps // every:,} times"

    tasks = ", ".join(config.eval.tasks)
    survey = seen.survey
    if "knn" in config.eval.tasks and survey.test is None:
        tasks += f"; no k-NN accuracy, because there is no split {config.data.test_split!r}"
    elif "knn" in config.eval.tasks and survey.classes is None:
        tasks += "; no k-NN accuracy, because the images have no labels"
    size = sum(_bytes(leaf) for leaf in jax.tree.leaves(run.abstract))
    keep = config.checkpoint
    kept = f"the last {keep.keep_last} are kept"
    if keep.keep_every:
        kept += f", and one every {keep.keep_every:,} steps"
    return [
        f"{run.steps:,} steps, {run.steps / run.epoch:.1f} epochs of {run.epoch:.4g} steps",
        f"logged {times(config.log_every)}",
        f"evaluated {times(config.eval_every)}, and before the first and after the last: {tasks}",
        f"saved {times(config.checkpoint_every)}, and after {keep.minutes:g} minutes; {kept}, of "
        f"{size / MIB:.0f} MiB each",
    ]


def _bytes(leaf: Any) -> int:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def cost(config: ml_collections.ConfigDict, run: Run, seen: choices.Seen) -> list[str]:
    """Returns the expected time and memory; the operations are those of the traced step."""
    operations = flops.count(traced_step(run).jaxpr)
    return words(estimate(config, seen.survey, seen.machine, operations), seen.machine)


def draw_views(
    config: ml_collections.ConfigDict, train: Source, patch: int, path: epath.Path
) -> None:
    """Draws images and their views in the first step; masked patches are grey in global ones."""
    trial = config.copy_and_resolve_references()
    trial.batch_size = min(SHOWN, config.batch_size)
    trial.data.workers, trial.data.threads = 0, 1
    batches = train_batches(train, trial, patch, 0)
    try:
        made = next(batches)
    finally:
        batches.close()
    how = decoding(config.data, train)
    rows = []
    for row, index in enumerate(made["index"].tolist()):
        views = [(view, "global view") for view in made["global_views"][row]]
        masked = [
            (hide(view, mask, patch), f"masked {mask.mean():.0%}")
            for view, mask in zip(made["global_views"][row], made["mask"][row], strict=True)
            if mask.any()
        ]
        views += masked + [(view, "local view") for view in made["local_views"][row]]
        name = os.path.basename(train.name(index))
        tiles = [Tile(load_image(train, index, how), name, "image")]
        rows.append([*tiles, *(Tile(view, "", note) for view, note in views)])
    picture: Image.Image = contact_sheet(rows)
    with path.open("wb") as file:
        picture.save(file, "PNG")


def hide(view: np.ndarray, mask: np.ndarray, patch: int) -> np.ndarray:
    """Returns a view whose masked patches are grey.

    Args:
        view: uint8 [S, S, 3].
        mask: bool [S / patch, S / patch].
        patch: the pixels on each side of a patch.
    """
    pixels = np.kron(mask, np.ones((patch, patch), bool))[..., None]
    return np.where(pixels, np.array(MEAN) * 255, view).astype(np.uint8)


def _aligned(table: Sequence[tuple[str, ...]]) -> list[str]:
    """Returns rows as lines: the first column on the left, the others aligned on the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in table
    ]
