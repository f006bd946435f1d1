"""Files of linear classifiers."""

import numpy as np
import pytest

from sop_jax.errors import UserError
from sop_jax.evaluation.heads import Head, classify, read_head, write_head
from sop_jax.evaluation.task import View


def head(classes: int = 3, width: int = 5) -> Head:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(classes, width)).astype(np.float32)
    return Head(weights, np.arange(classes, dtype=np.float32), View(layers=4, pool="cls_patches"))


def test_a_head_is_read_as_it_was_written(tmp_path):
    write_head(tmp_path / "head.npz", head())
    found = read_head(tmp_path / "head.npz")
    np.testing.assert_array_equal(found.weights, head().weights)
    np.testing.assert_array_equal(found.bias, head().bias)
    assert found.view == head().view and hash(found.view) == hash(head().view)


def test_scores_are_those_of_a_linear_layer():
    features = np.eye(5, dtype=np.float32)[:2]
    np.testing.assert_allclose(
        classify(head(), features), head().weights.T[:2] + head().bias, rtol=1e-6
    )


def test_errors_say_what_is_wrong_with_a_file(tmp_path):
    path = tmp_path / "head.npz"
    with pytest.raises(UserError, match="there is no head .* --task=linear"):
        read_head(path)
    path.write_bytes(b"text")
    with pytest.raises(UserError, match="is not a head"):
        read_head(path)
    np.savez(path, weights=np.zeros((3, 2)), bias=np.zeros(2), view=np.array("{}"))
    with pytest.raises(UserError, match=r"its weights are \(3, 2\) and its bias is \(2,\)"):
        read_head(path)
    np.savez(path, weights=np.full((3, 2), np.nan), bias=np.zeros(3), view=np.array("{}"))
    with pytest.raises(UserError, match="not finite"):
        read_head(path)
    np.savez(path, weights=np.zeros((3, 2)), bias=np.zeros(3), view=np.array('{"zoom": 2}'))
    with pytest.raises(UserError, match="zoom"):
        read_head(path)
