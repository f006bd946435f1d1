"""Mixup and CutMix of a batch on the devices, and the targets and losses of mixed labels.

As in timm 0.4.12's mode "batch": one of the two is drawn for a batch, with one share for all of its
images, and the partner of an image is that at the mirrored position of the batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, Shaped


class Mixing(NamedTuple):
    """How a batch is mixed.

    Attributes:
        mixup: the share of an image in a mixup is drawn from Beta(mixup, mixup); 0 for no mixup.
        cutmix: the same for CutMix, where 1 minus the share is the area of the box before it is
            clipped.
        probability: the probability that a batch is mixed at all.
        switch: the probability of CutMix where both are possible.
        smoothing: the share of a target that is spread evenly over all classes.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    probability: float = 1.0
    switch: float = 0.5
    smoothing: float = 0.1


def mix(
    images: Shaped[Array, "B H W 3"],
    labels: Int[Array, " B"],
    valid: Bool[Array, " B"],
    classes: int,
    mixing: Mixing,
    key: Key[Array, ""],
) -> tuple[Float[Array, "B H W 3"], Float[Array, "B C"]]:
    """Mixes a batch; an image whose partner is not valid stays as it is.

    Args:
        images: pixels.
        labels: the classes; those of invalid images are not used.
        valid: False for rows without an image, which the loss leaves out.
        classes: C, the number of classes.
        mixing: how the batch is mixed.
        key: of all draws.

    Returns:
        The images in float32, and the distributions over classes, which are smoothed before they
        are mixed.
    """
    images, targets = images.astype(jnp.float32), smooth(labels, classes, mixing.smoothing)
    if not mixing.mixup and not mixing.cutmix:
        return images, targets
    mixed_key, kind_key, share_key, cut_key = jax.random.split(key, 4)
    chance = {(True, True): mixing.switch, (False, True): 1.0}.get(
        (mixing.mixup > 0, mixing.cutmix > 0), 0.0
    )
    cut = jax.random.bernoulli(kind_key, chance)
    mixed = jax.random.bernoulli(mixed_key, mixing.probability) & valid[::-1]
    # Beta(a, a) of the kind that was drawn; an `a` of 0 is never drawn.
    alpha = jnp.where(cut, mixing.cutmix or 1.0, mixing.mixup or 1.0)
    drawn = jax.random.beta(share_key, alpha, alpha)
    height, width = images.shape[1:3]
    centre = jax.random.randint(cut_key, (2,), 0, jnp.array([height, width]))
    box = cut_box(drawn, centre, height, width)
    share = jnp.where(cut, kept_share(box, height, width), drawn)
    together = jnp.where(cut, cutmix(images, box), mixup(images, drawn))
    images = jnp.where(mixed[:, None, None, None], together, images)
    return images, jnp.where(mixed[:, None], mix_targets(targets, share), targets)


def mixup(
    images: Float[Array, "B H W 3"], share: Float[Array, ""] | float
) -> Float[Array, "B H W 3"]:
    """Returns `share` of each image plus the rest of its partner."""
    return share * images + (1 - share) * images[::-1]


def cutmix(images: Shaped[Array, "B H W 3"], box: Int[Array, "4"]) -> Shaped[Array, "B H W 3"]:
    """Returns each image with a box (top, bottom, left, right) from its partner."""
    top, bottom, left, right = box
    rows, columns = jnp.arange(images.shape[1]), jnp.arange(images.shape[2])
    inside = ((rows >= top) & (rows < bottom))[:, None] & (columns >= left) & (columns < right)
    return jnp.where(inside[None, :, :, None], images[::-1], images)


def cut_box(
    share: Float[Array, ""], centre: Int[Array, "2"], height: int, width: int
) -> Int[Array, "4"]:
    """Returns the box of a CutMix around a centre, clipped to the image.

    Args:
        share: 1 minus the box's share of the area before it is clipped.
        centre: (y, x) in pixels.
        height: the height of the image in pixels.
        width: the width of the image in pixels.

    Returns:
        (top, bottom, left, right) in pixels, the second and fourth exclusive.
    """
    sides = jnp.array([height, width])
    half = (sides.astype(jnp.float32) * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
    first, last = jnp.maximum(centre - half, 0), jnp.minimum(centre + half, sides)
    return jnp.stack([first[0], last[0], first[1], last[1]])


def kept_share(box: Int[Array, "4"], height: int, width: int) -> Float[Array, ""]:
    """Returns the share of an image outside of a clipped box (top, bottom, left, right)."""
    top, bottom, left, right = box
    return 1 - (bottom - top) * (right - left) / (height * width)


def smooth(labels: Int[Array, " B"], classes: int, smoothing: float) -> Float[Array, "B C"]:
    """Returns targets: 1 - smoothing for the class, and smoothing spread over all C classes."""
    return optax.smooth_labels(jax.nn.one_hot(labels, classes), smoothing)


def mix_targets(
    targets: Float[Array, "B C"], share: Float[Array, ""] | float
) -> Float[Array, "B C"]:
    """Returns `share` of each target plus the rest of its partner's."""
    return share * targets + (1 - share) * targets[::-1]


def mean_loss(
    logits: Float[Array, "B C"], targets: Float[Array, "B C"], valid: Bool[Array, " B"]
) -> Float[Array, ""]:
    """Returns the mean cross-entropy with target distributions over the valid rows; 0 if none."""
    losses = optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)
    return jnp.sum(losses, where=valid) / jnp.maximum(valid.sum(dtype=jnp.float32), 1)
