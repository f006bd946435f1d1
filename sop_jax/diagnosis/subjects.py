"""What is diagnosed: the prototypes of a run or of a file of weights, and the memories of a run."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int, Key

from sop_jax.diagnosis.uniqueness import lengths_of
from sop_jax.errors import UserError, nearest
from sop_jax.objectives.methods import objective_of
from sop_jax.objectives.objective import Objective
from sop_jax.parallel.mesh import make_mesh, replicated
from sop_jax.pretrained import origin, settings_of
from sop_jax.training import checkpoint
from sop_jax.training.state import OWN
from sop_jax.weights import files, prototype_layers

NETWORKS = ("teacher", "student")


class Subject(NamedTuple):
    """Prototypes, or a memory that stands for them.

    Attributes:
        layer: their name in the run or in the file.
        rows: the vectors, of any lengths.
        images: for rows of a memory, the image that each is from; rows that are from none have
            different negative numbers. None for prototypes.
        compared: what is compared with them, see `objectives.objective.Bank`.
    """

    layer: str
    rows: Float32[np.ndarray, "K d"]
    images: Int[np.ndarray, " K"] | None
    compared: str


class Read(NamedTuple):
    """The prototypes of one checkpoint or file.

    Attributes:
        subjects: the prototypes, the most important first.
        step: the step of the checkpoint; None for a file.
        words: lines for the user.
    """

    subjects: list[Subject]
    step: int | None
    words: list[str]


class Item(NamedTuple):
    """One set of prototypes to diagnose.

    Attributes:
        run: the folder or file that it is from.
        step: the step; None for a file.
        subject: the prototypes.
        knn: the k-NN accuracy in [0, 1] that the run recorded at this step, if it did.
    """

    run: str
    step: int | None
    subject: Subject
    knn: float | None


def titles_of(items: Sequence[Item]) -> list[str]:
    """Returns names that tell the items apart: what differs of run, step and layer."""
    bases = short_names([item.run for item in items])
    parts = [
        (bases[item.run], "" if item.step is None else f"step {item.step}", item.subject.layer)
        for item in items
    ]
    differ = [len(set(column)) > 1 for column in zip(*parts, strict=True)]
    if not any(differ):
        differ = [False, False, True]
    return [
        ", ".join(part for part, is_shown in zip(own, differ, strict=True) if is_shown and part)
        for own in parts
    ]


def short_names(runs: Sequence[str]) -> dict[str, str]:
    """Returns the names of folders and files without their paths, if these tell them apart."""
    names = {run: epath.Path(run).name for run in runs}
    return names if len(set(names.values())) == len(names) else {run: run for run in runs}


def steps_of(workdir: epath.PathLike, asked: str | None) -> list[int]:
    """Returns the steps of the checkpoints to diagnose, ascending.

    Args:
        workdir: the folder of a run.
        asked: steps separated by commas, or `all`; the newest by default.

    Raises:
        UserError: these are not steps, or the run has no such checkpoints.
    """
    settings_of(workdir)  # raises if this is not the folder of a run
    check_run(workdir)
    known = checkpoint.steps(workdir)
    if not known:
        raise UserError(
            f"there is no checkpoint in {workdir}: check --workdir, or start or resume "
            "its training with python -m sop_jax.train"
        )
    if asked is None:
        return known[-1:]
    if asked == "all":
        return known
    texts = [text.strip() for text in asked.split(",")]
    if not all(text.isascii() and text.isdigit() for text in texts):
        raise UserError(
            f"--step={asked} is not a step; expected whole numbers separated by commas, or all; "
            f"{workdir} has checkpoints of {known}"
        )
    absent = [text for text in texts if int(text) not in known]
    if absent:
        raise UserError(
            f"there is no checkpoint of step {absent[0]} in {workdir}, only of {known}: choose "
            "some of these, or --step=all"
        )
    return sorted({int(text) for text in texts})


def names_of(config: ml_collections.ConfigDict, objective: Objective, taught: bool) -> list[str]:
    """Returns the names of the prototypes and memories of a run, without computing them.

    Raises:
        UserError: its method has none.
    """
    if objective.banks is None:
        raise UserError(
            f"method={config.method} has neither prototypes nor a memory; expected a run of a "
            "method that has. Choose another --workdir"
        )
    names: list[str] = []

    def give(key: Key[Array, ""]) -> None:
        assert objective.banks is not None
        params, carried = objective.init(key)
        names.extend(objective.banks(params, params, carried, key, taught))

    jax.eval_shape(give, jax.random.key(0))
    return names


def of_run(
    workdir: epath.PathLike,
    step: int | None = None,
    network: str = "teacher",
    layer: str | None = None,
    seed: int = 0,
) -> Read:
    """Reads the prototypes of a checkpoint of a run, and the memories that stand for them.

    Args:
        workdir: the folder of the run.
        step: the step of the checkpoint; the newest by default.
        network: `teacher` for the prototypes of the targets, `student` for those to which the
            student is assigned. Some methods have only one kind.
        layer: the name of the only one to take; all by default.
        seed: draws the anchors of SOP.

    Raises:
        UserError: there is no such checkpoint or layer, or rows are not finite or have no
            direction.
    """
    config, mesh = settings_of(workdir), make_mesh()
    _, objective = objective_of(config, mesh)
    names = names_of(config, objective, network == "teacher")
    if layer is not None and layer not in names:
        raise UserError(
            f"{workdir} has no layer {layer!r}{nearest(layer, names)}; expected one of "
            f"{', '.join(names)}; choose it with --layer"
        )
    everywhere = replicated(mesh)
    params, carried = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        jax.eval_shape(objective.init, jax.random.key(0)),
    )
    step = checkpoint.latest_step(workdir) if step is None else step
    own: dict[str, Any] = {}
    for part in NETWORKS:
        own[part] = {}
        if params:
            own[part] = checkpoint.restore_part(workdir, {OWN: params}, part, step)[OWN]
    if jax.tree.leaves(carried):
        carried = checkpoint.restore_part(workdir, carried, "carried", step)
    read = make_reader(
        objective, mesh, seed, network == "teacher", names if layer is None else [layer]
    )
    subjects = read(own["student"], own["teacher"], carried)
    for subject in subjects:
        lengths_of(subject.rows, f"{workdir}, step {step}: rows of {subject.layer}")
    return Read(subjects, step, [])


def check_run(workdir: epath.PathLike) -> None:
    """Raises UserError for a converted folder, which has no prototypes."""
    if converted := origin(workdir):
        raise UserError(
            f"{workdir} was converted from {converted.source}: it has a backbone and a head, but "
            "no prototypes. Give the file itself with --weights, or the folder of a run"
        )


def make_reader(
    objective: Objective,
    mesh: Mesh,
    seed: int,
    taught: bool,
    names: Sequence[str],
) -> Callable[[Any, Any, Any], list[Subject]]:
    """Returns a function that reads prototypes and memories from a state, compiled once.

    It maps the objective's parameters in the student, those in the teacher, and what the objective
    carries from step to step, to what is read. All processes call it, and receive the same.

    Args:
        objective: the objective, which has some.
        mesh: the devices, over which the state is split.
        seed: draws what each step draws anew.
        taught: see `objectives.objective.Banks`.
        names: what to read.
    """
    compared: dict[str, str] = {}

    def arrays(student: Any, teacher: Any, carried: Any) -> dict[str, tuple[Array, Array | None]]:
        assert objective.banks is not None
        found = objective.banks(student, teacher, carried, jax.random.key(seed), taught)
        compared.update({name: bank.compared for name, bank in found.items()})
        return {name: (found[name].rows, found[name].images) for name in names}

    compiled = jax.jit(arrays, out_shardings=replicated(mesh))

    def read(student: Any, teacher: Any, carried: Any) -> list[Subject]:
        found = compiled(student, teacher, carried)  # by name, in another order
        return [subject_of(name, *found[name], compared=compared[name]) for name in names]

    return read


def subject_of(name: str, rows: Array, images: Array | None, *, compared: str) -> Subject:
    """Returns arrays that are on every device as arrays of the host."""
    vectors = np.asarray(rows.addressable_data(0), np.float32)
    if images is None:
        return Subject(name, vectors, None, compared)
    own = np.asarray(images.addressable_data(0), np.int64)
    own = np.where(own < 0, -1 - np.arange(len(own)), own)
    return Subject(name, vectors, own, compared)


def once_per_image(subject: Subject) -> Subject | None:
    """Returns the newest row of each image of a memory; None if no image has several rows.

    Two rows of one image are near each other without any collapse. Rows that are from no image all
    count. The order of rows stays the same.
    """
    if subject.images is None:
        return None
    _, first = np.unique(subject.images, return_index=True)
    if len(first) == len(subject.rows):
        return None
    kept = np.sort(first)
    return subject._replace(
        layer=f"{subject.layer}, one row per image",
        rows=subject.rows[kept],
        images=subject.images[kept],
    )


def of_file(path: epath.PathLike, network: str | None = None, layer: str | None = None) -> Read:
    """Reads the prototypes of a file of weights, see `weights.prototype_layers.read`.

    Raises:
        UserError: the file cannot be read, or has no such prototypes.
    """
    with files.opened(path) as arrays:
        try:
            layers, words = prototype_layers.read(arrays, network, layer)
            for found in layers:
                lengths_of(found.rows, f"rows of {found.name}")
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    return Read(
        [Subject(found.name, found.rows, None, _compared(found.name)) for found in layers],
        None,
        words,
    )


def _compared(name: str) -> str:
    """Returns what is compared with a layer of a file: iBOT's `last_layer2` is for patches."""
    if name.endswith("last_layer2") or "ibot_head" in name:
        return "patches"
    return "patch_features" if name.endswith("head.layer") else "cls"
