"""What is exported: a trained network and where it comes from."""

from typing import NamedTuple

import ml_collections
from etils import epath

from sop_jax.evaluation.views import view_of
from sop_jax.models import FAMILIES
from sop_jax.pretrained import resizer
from sop_jax.weights.tables import Arrays

POSITIONS = "backbone/pos_embed"


class Trained(NamedTuple):
    """A network to export.

    Attributes:
        config: the settings of its run.
        leaves: its parameters by path.
        source: the folder or the file that it was loaded from.
        step: the step of its checkpoint; None for a file.
        absent: the paths of parameters that the source did not have, so that they are random.
        network: which network of the folder it is, "teacher" or "student"; None for a file.
        heads_known: whether the number of attention heads is known, which weights do not show.
    """

    config: ml_collections.ConfigDict
    leaves: Arrays
    source: epath.Path
    step: int | None
    absent: list[str]
    network: str | None = None
    heads_known: bool = True


def at_crop(trained: Trained) -> tuple[Trained, list[str]]:
    """Returns the network with positions for the images that the run evaluates, and what changed.

    Other projects resize positions by their own rules, or not at all. With positions of the grid of
    `eval.crop` pixels they need not.

    Raises:
        UserError: the crop is not a multiple of the patches.
    """
    size = view_of(trained.config).crop
    config = trained.config.copy_and_resolve_references().unlock()
    before, config.augment.global_size = config.augment.global_size, size
    leaves = dict(trained.leaves)
    words = []
    if POSITIONS in leaves and before != size:
        rows = 1 + (size // config.model.patch) ** 2
        leaves[POSITIONS] = resizer(config.model.positions)(leaves[POSITIONS], rows)
        words.append(f"positions resized from images of {before} to {size} pixels, eval.crop")
    return trained._replace(config=config, leaves=leaves), words


def has_patches(trained: Trained) -> bool:
    """Whether the network has tokens of patches."""
    return FAMILIES[trained.config.model.family].patches
