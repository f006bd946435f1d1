"""Mixup and CutMix of whole batches; the golden numbers test their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sop_jax.evaluation import mixing
from sop_jax.evaluation.mixing import Mixing
from sop_jax.parallel.mesh import make_mesh, put, split

CLASSES = 5


def batch(size: int = 8) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns images of one value each, 1 to `size`, their labels, and that all are valid."""
    values = np.arange(1, size + 1, dtype=np.uint8)
    images = np.broadcast_to(values[:, None, None, None], (size, 8, 10, 3))
    return jnp.asarray(images), jnp.arange(size) % CLASSES, jnp.ones(size, bool)


def mix(how: Mixing, seed: int = 0, given=None) -> tuple[np.ndarray, np.ndarray]:
    images, labels, valid = given or batch()
    mixed = mixing.mix(images, labels, valid, CLASSES, how, jax.random.key(seed))
    return tuple(map(np.asarray, mixed))


def test_without_mixing_only_labels_are_smoothed():
    images, targets = mix(Mixing(mixup=0.0, cutmix=0.0))
    np.testing.assert_array_equal(images, batch()[0])
    np.testing.assert_allclose(targets, 0.9 * np.eye(CLASSES)[np.arange(8) % 5] + 0.02, rtol=1e-6)
    images, targets = mix(Mixing(probability=0.0))
    np.testing.assert_array_equal(images, batch()[0])
    np.testing.assert_allclose(targets.max(1), 0.92, rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_a_mixup_has_one_share_for_images_and_targets(seed):
    images, targets = mix(Mixing(cutmix=0.0, smoothing=0.0), seed)
    values = np.arange(1, 9)
    share = (images[0, 0, 0, 0] - 8) / (1 - 8)
    expected = share * values + (1 - share) * values[::-1]
    np.testing.assert_allclose(
        images, np.broadcast_to(expected[:, None, None, None], images.shape), rtol=1e-5
    )
    eye = np.eye(CLASSES)[np.arange(8) % 5]
    np.testing.assert_allclose(targets, share * eye + (1 - share) * eye[::-1], atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_a_cutmix_has_the_share_of_its_clipped_box(seed):
    images, targets = mix(Mixing(mixup=0.0, smoothing=0.0), seed)
    values = np.arange(1, 9)[:, None, None, None]
    own = images == values
    assert (own | (images == values[::-1])).all() and (own[0] == own[3]).all()
    share = own[0].mean()
    eye = np.eye(CLASSES)[np.arange(8) % 5]
    np.testing.assert_allclose(targets, share * eye + (1 - share) * eye[::-1], atol=1e-5)


def test_how_often_each_is_drawn_and_with_which_share():
    images, labels, valid = batch(2)
    drawn = jax.jit(
        jax.vmap(lambda key: mixing.mix(images, labels, valid, 2, Mixing(0.8, 1.0), key)[0])
    )(jax.random.split(jax.random.key(0), 4000))
    first = np.asarray(drawn)[:, 0]
    constant = (first == first[:, :1, :1]).all((1, 2, 3))
    whole = np.isin(first[:, 0, 0, 0], (1, 2))  # no box, or nothing but a box
    mixups = constant & ~whole
    assert abs(mixups.mean() - 0.5) < 0.04
    shares = 2 - first[mixups, 0, 0, 0]
    variance = 1 / (4 * (2 * 0.8 + 1))  # of Beta(0.8, 0.8)
    assert abs(shares.mean() - 0.5) < 0.03 and abs(shares.var() - variance) < 0.01


def test_an_invalid_partner_is_not_mixed_in():
    images, labels, valid = batch()
    valid = valid.at[7].set(False)
    mixed, targets = mix(Mixing(cutmix=0.0, smoothing=0.0), 1, (images, labels, valid))
    np.testing.assert_array_equal(mixed[0], images[0])
    assert targets[0].max() == 1.0
    assert (mixed[1] != np.asarray(images[1], np.float32)).all()


def test_the_partner_is_that_of_the_global_batch_on_several_devices():
    whole = mix(Mixing(), 3)
    sharding = split(make_mesh())
    given = tuple(put(np.asarray(array), sharding) for array in batch())
    for one, other in zip(whole, mix(Mixing(), 3, given), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_the_loss_leaves_out_invalid_rows():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, CLASSES)), jnp.float32)
    targets = mixing.smooth(jnp.array([0, 1, 2, -1]), CLASSES, 0.1)
    valid = jnp.array([True, True, True, False])
    expected = mixing.mean_loss(logits[:3], targets[:3], valid[:3])
    np.testing.assert_allclose(mixing.mean_loss(logits, targets, valid), expected, rtol=1e-6)
    assert mixing.mean_loss(logits, targets, jnp.zeros(4, bool)) == 0
