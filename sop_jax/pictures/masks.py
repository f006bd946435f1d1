"""Masked images, and what the loss of masked patches compares in them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from sop_jax.data.masks import view_mask
from sop_jax.models import token_side
from sop_jax.pictures.subject import Trained, without_patches
from sop_jax.training.state import OWN


class Masked(NamedTuple):
    """Masked images, and how well the student infers what the teacher sees.

    Attributes:
        masks: the hidden patches.
        cosines: of the student's embedding of each patch, where hidden patches are masked, to the
            teacher's, which sees the whole image.
        choices: the prototype nearest to each patch for the teacher, then for the student; None
            if the method compares no prototypes with patches.
    """

    masks: Bool[np.ndarray, "n h w"]
    cosines: Float[np.ndarray, "n h w"]
    choices: Int[np.ndarray, "2 n h w"] | None


def without_masks(trained: Trained) -> str | None:
    """Returns why there is no loss of masked patches to show; None if there is one."""
    if why := without_patches(trained.config):
        return why
    if trained.objective is None:
        return "the network was converted, without its student"
    if not trained.objective.masks or "mim" not in trained.objective.terms:
        return f"this run of method={trained.config.method} has no loss of masked patches"
    if max(trained.config.mask.ratio) == 0:
        return "mask.ratio is 0, so that no patches are masked"
    return None


def masked(trained: Trained, images: UInt8[np.ndarray, "n H W 3"], seed: int = 0) -> Masked:
    """Returns masks as in training, and the embeddings of both networks compared.

    Args:
        trained: a checkpoint for which `without_masks` is None.
        images: images whose sides are multiples of those of a token.
        seed: draws the masks and anchors.
    """
    config, model, objective = trained.config, trained.model, trained.objective
    assert trained.student is not None and objective is not None
    side, rng = token_side(config.model), np.random.default_rng(seed)
    grid = (images.shape[1] // side, images.shape[2] // side)
    settings = config.mask.copy_and_resolve_references()
    settings.none = 0.0  # a view without a mask would show nothing
    masks = np.stack([view_mask(grid, rng, settings) for _ in images])

    def embed(params: dict, images: Array, mask: Array | None) -> Array:
        rows = model.embed(params, images, mask, None)[1]
        return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)

    teacher = np.asarray(jax.jit(lambda p, x: embed(p, x, None))(trained.teacher, images))
    student = np.asarray(jax.jit(embed)(trained.student, images, masks))
    shape = (len(images), *grid)
    choices = None
    if objective.banks is not None:
        banks = [
            objective.banks(
                trained.student.get(OWN, {}),
                trained.teacher.get(OWN, {}),
                trained.carried,
                jax.random.key(seed),
                taught,
            )
            for taught in (True, False)
        ]
        names = [name for name, bank in banks[0].items() if bank.compared == "patches"]
        names = names or [name for name, bank in banks[0].items() if bank.compared == "cls"]
        if names and names[0] in banks[1]:
            choices = np.stack(
                [
                    _nearest(rows, np.asarray(bank[names[0]].rows)).reshape(shape)
                    for rows, bank in zip((teacher, student), banks, strict=True)
                ]
            )
    return Masked(masks, (teacher * student).sum(-1).reshape(shape), choices)


def _nearest(
    rows: Float[np.ndarray, "n L d"], prototypes: Float[np.ndarray, "K d"]
) -> Int[np.ndarray, "n L"]:
    lengths = np.maximum(np.linalg.norm(prototypes, axis=1, keepdims=True), 1e-12)
    return (rows @ (prototypes / lengths).T).argmax(-1)
