"""Random blocks are disjoint and uniform, and each has a softmax of its own."""

import jax
import numpy as np
import pytest

from sop_jax.objectives.blocks import block_log_softmax, random_blocks


@pytest.mark.parametrize(("count", "size"), [(12, 4), (13, 4), (4, 4), (7, 1)])
def test_blocks_are_disjoint(count: int, size: int) -> None:
    blocks = random_blocks(jax.random.key(0), count, size)
    assert blocks.shape == (count // size, size)
    assert len(np.unique(blocks)) == blocks.size
    assert blocks.min() >= 0
    assert blocks.max() < count


def test_each_draw_leaves_other_prototypes_out() -> None:
    draws = [np.asarray(random_blocks(jax.random.key(i), 10, 4)) for i in range(20)]
    assert {i for draw in draws for i in range(10) if i not in draw} == set(range(10))


def test_each_block_has_a_softmax_of_its_own() -> None:
    logits = jax.random.normal(jax.random.key(0), (3, 12))
    found = block_log_softmax(logits, 4)
    for t in range(3):
        block = logits[:, 4 * t : 4 * t + 4]
        np.testing.assert_allclose(found[:, t], jax.nn.log_softmax(block), atol=1e-6)
