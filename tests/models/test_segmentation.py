"""Heads for segmentation: their training mode, their checks, and mmsegmentation's names."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import small_config

from sop_jax.errors import UserError
from sop_jax.models import segmentation
from sop_jax.models.segmentation import Design, Segmenter, build
from sop_jax.training.checkpoint import named_leaves
from sop_jax.weights import mapping
from sop_jax.weights.tables import MMSEG

UPERNET = Design("upernet", (0, 0, 1, 1), 5, True, 6, 4)
LINEAR = Design("linear", (0, 1), 5)


def config(patch: int = 8, **changes: Any) -> Any:
    made = small_config()
    made.model.update(dict(patch=patch, drop_path=0.0) | changes)
    return made


@functools.cache
def small(head: str, patch: int = 8) -> tuple[Segmenter, Any]:
    return compiled(build(config(patch), UPERNET if head == "upernet" else LINEAR, 4 * patch))


def compiled(made: Segmenter) -> tuple[Segmenter, Any]:
    """Returns a segmenter with compiled functions, and its parameters."""
    apply = jax.jit(made.apply, static_argnames="training")
    return made._replace(apply=apply), jax.jit(made.init)(jax.random.key(0))


def images(batch: int, side: int) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (batch, side, side, 3), 0, 256).astype(jnp.uint8)


def arrays_of(params: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in named_leaves(params).items()}


def test_adaptive_cells_overlap_like_pytorchs():
    expected = [[1 / 2, 1 / 2, 0, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3, 0], [0, 0, 0, 1 / 2, 1 / 2]]
    np.testing.assert_allclose(segmentation.average_matrix(5, 3), expected)
    more = segmentation.average_matrix(2, 4)
    np.testing.assert_array_equal(more, [[1, 0], [1, 0], [0, 1], [0, 1]])


@pytest.mark.medium
@pytest.mark.parametrize("patch, sizes", [(16, (16, 8, 4, 2)), (8, (8, 4, 2, 1))])
def test_levels_halve_from_one_to_the_next(patch, sizes):
    made, params = small("upernet", patch)
    outputs = made.apply(params, images(1, 4 * patch))
    assert outputs.logits.shape == (1, sizes[0], sizes[0], 5)
    assert outputs.auxiliary.shape == (1, sizes[2], sizes[2], 5)


def test_rows_beyond_the_last_patch_are_left_out():
    made, params = small("linear")
    x = images(1, 32)
    whole = made.apply(params, x[:, :24, :16]).logits
    np.testing.assert_array_equal(made.apply(params, x[:, :29, :23]).logits, whole)


def test_linear_head_is_random_in_nothing_and_leaves_the_backbone():
    made, params = small("linear")
    x, keys = images(2, 32), jax.random.split(jax.random.key(2), 2)
    np.testing.assert_array_equal(
        made.apply(params, x, keys, training=True).logits, made.apply(params, x).logits
    )
    total = jax.jit(jax.grad(lambda params: made.apply(params, x, training=True).logits.sum()))
    gradients = total(params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients["backbone"]))
    assert np.any(gradients["decode_head"]["conv_seg"]["kernel"])


@pytest.mark.medium
def test_training_reaches_all_parameters_and_moves_the_statistics():
    made, params = small("upernet", 16)
    x, keys = images(2, 64), jax.random.split(jax.random.key(2), 2)

    def loss(params: Any) -> Any:
        outputs = made.apply(params, x, keys, training=True)
        total = jnp.square(outputs.logits).sum() + jnp.square(outputs.auxiliary).sum()
        return total, outputs.statistics

    gradients, statistics = jax.jit(jax.grad(loss, has_aux=True))(params)
    unused = {"backbone/mask_token"}
    for path, leaf in named_leaves(gradients).items():
        trained = path not in unused and not path.endswith(("/mean", "/var"))
        assert np.any(leaf) or not trained, path
    before, after = named_leaves(params), named_leaves(statistics)
    assert set(after) == {path for path in before if path.endswith(("/mean", "/var"))}
    assert all(not np.array_equal(before[path], leaf) for path, leaf in after.items())


@pytest.mark.medium
def test_dropout_and_drop_path_are_on_with_keys_only():
    made, params = compiled(build(config(drop_path=0.5), UPERNET, 32))
    x = images(2, 32)
    plain, again = (made.apply(params, x).logits for _ in range(2))
    np.testing.assert_array_equal(plain, again)
    first, second = (
        made.apply(params, x, jax.random.split(jax.random.key(i), 2)).logits for i in range(2)
    )
    assert not np.allclose(first, second) and not np.allclose(first, plain)


def test_dropped_channels_keep_the_mean():
    x = jnp.ones((64, 2, 2, 50))
    dropped = segmentation.drop_channels(x, 0.25, jax.random.split(jax.random.key(0), 64))
    assert set(np.unique(dropped).round(4)) == {0.0, np.float32(1.3333)}
    assert np.ptp(dropped, axis=(1, 2)).max() == 0  # whole channels
    assert abs(float(dropped.mean()) - 1) < 4 * (0.25 / 0.75 / 3200) ** 0.5


@pytest.mark.parametrize("head, patch", [("linear", 8), ("upernet", 8), ("upernet", 16)])
def test_weights_by_mmsegmentations_names_keep_every_bit(head, patch):
    _, params = small(head, patch)
    leaves = arrays_of(params)
    written = mapping.write_arrays(MMSEG, leaves)
    assert written.not_exported == []
    assert written.arrays["decode_head.conv_seg.weight"].ndim == 4
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    read = mapping.load_leaves(MMSEG, written.arrays, shapes, lambda table, rows: table)
    assert not read.ignored and not read.missing
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(read.leaves[path], leaf, err_msg=path)


def test_weights_of_another_head_are_refused():
    _, params = small("upernet")
    arrays = mapping.write_arrays(MMSEG, arrays_of(params)).arrays
    shapes = {path: leaf.shape for path, leaf in named_leaves(small("linear")[1]).items()}
    with pytest.raises(UserError, match=r"unexpected: backbone.fpn1.0.weight"):
        mapping.load_leaves(MMSEG, arrays, shapes, lambda table, rows: table)


@pytest.mark.parametrize(
    "changes, head, layers, message",
    [
        (dict(family="resnet"), "linear", [0], r"which a resnet does not have"),
        ({}, "linear", [0, 2], r"layers \[0, 2\] .* has 2 layers. Expected indices from 0 to 1"),
        ({}, "linear", [], r"layers \[\]"),
        ({}, "upernet", [0, 1], r"2 layers .* combines 4"),
        (dict(patch=4), "upernet", [0, 0, 1, 1], r"adaptors only for patches of 16 and 8"),
    ],
)
def test_network_that_cannot_have_the_head_is_refused(changes, head, layers, message):
    with pytest.raises(UserError, match=message):
        segmentation.check(config(**changes).model, head, layers)
