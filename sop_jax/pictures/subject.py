"""A run whose pictures are made: its networks, its images, and its objective with its memories."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath
from jaxtyping import Bool, UInt8

from sop_jax.data.augment import eval_image
from sop_jax.data.decode import decoding, load_image
from sop_jax.data.named import name_data
from sop_jax.data.sources import Source, open_source
from sop_jax.errors import UserError
from sop_jax.models import FAMILIES, Model, Params
from sop_jax.objectives.methods import objective_of
from sop_jax.objectives.objective import Objective
from sop_jax.parallel.mesh import make_mesh, replicated
from sop_jax.pretrained import load_network, origin, settings_of
from sop_jax.training import checkpoint


class Images(NamedTuple):
    """The images of a run.

    Attributes:
        train: those it learns from.
        test: those it is evaluated with; None if there are none.
    """

    train: Source
    test: Source | None


class Trained(NamedTuple):
    """A checkpoint of a run.

    Attributes:
        config: the settings of the run; `config.data` is that of its images.
        step: the step of the checkpoint.
        model: the network.
        teacher: the parameters of the teacher.
        student: those of the student; None for a converted network.
        objective: the objective of its method; None for a converted network.
        carried: what the objective carries from step to step, such as memories.
    """

    config: ml_collections.ConfigDict
    step: int
    model: Model
    teacher: Params
    student: Params | None
    objective: Objective | None
    carried: Any


def open_images(
    workdir: epath.PathLike, data: Mapping[str, Any] | None = None
) -> tuple[Images, ml_collections.ConfigDict]:
    """Opens the images of a run, and returns them with the `config.data` that describes them.

    Args:
        workdir: the folder of the run.
        data: flags that name other data, see `data.named.name_data`, such as the new place of
            images that were moved.

    Raises:
        UserError: the folder is not that of a run, or its images are not there.
    """
    config = settings_of(workdir).data
    try:
        name_data(config, data or {})
        train = open_source(config, "train")
        assert train is not None  # only the test split may be missing
        test = open_source(config, "test", train)
    except UserError as error:  # its message names the flags of `sop_jax.train`
        raise UserError(str(error).replace("--config.data.", "--data.")) from error
    return Images(train, test), config


def load(workdir: epath.PathLike, step: int | None = None) -> Trained:
    """Loads a checkpoint of a run, or a converted network. It reads only.

    Args:
        workdir: the folder.
        step: the step of the checkpoint; the newest by default.

    Raises:
        UserError: the folder is not that of a run, or the checkpoint cannot be read.
    """
    config, model, teacher, step = load_network(workdir, step)
    if origin(workdir):
        return Trained(config, step, model, teacher, None, None, None)
    _, _, student, _ = load_network(workdir, step, "student")
    mesh = make_mesh(1)  # one device holds the memories of any number of lanes
    _, objective = objective_of(config, mesh)
    _, carried = jax.eval_shape(objective.init, jax.random.key(0))
    if jax.tree.leaves(carried):
        on_one = replicated(mesh)
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_one), carried
        )
        carried = checkpoint.restore_part(workdir, abstract, "carried", step)
    return Trained(config, step, model, teacher, student, objective, carried)


def centre_crops(
    source: Source, records: Sequence[int], config: ml_collections.ConfigDict
) -> tuple[UInt8[np.ndarray, "n S S 3"], Bool[np.ndarray, " n"]]:
    """Returns the images as networks see them in evaluations, and which could be read.

    Images that cannot be read are black.

    Args:
        source: the images.
        records: the indices of those to return.
        config: the config of the run; `data` and `eval` say how images are decoded and cropped.

    Raises:
        UserError: their storage cannot be reached.
    """
    side, how = config.eval.crop, decoding(config.data, source)
    images = np.zeros((len(records), side, side, 3), np.uint8)
    readable = np.zeros(len(records), bool)
    for place, record in enumerate(records):
        try:
            pixels = load_image(source, int(record), how)
        except ValueError:
            continue
        images[place] = eval_image(pixels, config.eval.resize, side)
        readable[place] = True
    return images, readable


def without_patches(config: ml_collections.ConfigDict) -> str | None:
    """Returns why a network has no tokens of patches to look at; None if it has some."""
    if FAMILIES[config.model.family].patches:
        return None
    return f"a {config.model.family} has no tokens of patches"
