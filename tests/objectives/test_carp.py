"""CARP's terms have their smallest values where views agree and prototypes are used equally."""

import jax.numpy as jnp
import numpy as np
import pytest
from small import small_config

from sop_jax.check import check_config
from sop_jax.errors import UserError
from sop_jax.objectives.carp import consistency, inequality


def test_consistency_is_least_for_the_same_one_hot_distribution() -> None:
    one_hot = jnp.log(jnp.array([[1 - 3e-7, 1e-7, 1e-7, 1e-7]]))
    uniform = jnp.full((1, 4), -jnp.log(4.0))
    assert consistency(one_hot, one_hot) == pytest.approx(0, abs=1e-6)
    assert consistency(uniform, uniform) == pytest.approx(np.log(4), rel=1e-5)
    assert consistency(one_hot, jnp.roll(one_hot, 1)) > 10


def test_inequality_is_zero_only_for_equal_use() -> None:
    assert inequality(jnp.full((3, 4), 0.25)) == pytest.approx(0, abs=1e-6)
    assert inequality(jnp.eye(4)[:2]) == pytest.approx(np.log(4), rel=1e-5)
    assert inequality(jnp.full((3, 4), 0.25), "prior_to_mean") == pytest.approx(0, abs=1e-6)
    assert inequality(jnp.eye(4)[:2], "prior_to_mean") > 10


@pytest.mark.parametrize("method", ["carp", "decoupled"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(block=25), r"block is 25, but .*prototypes is 24; expected a block of 2 to 24"),
        (dict(prior="power"), r"prior is power; expected one of none, uniform"),
        (dict(accumulate=2), r"accumulate is 2, but .*prior is uniform, which compares all images"),
    ],
    ids=str,
)
def test_bad_settings_are_named(method: str, changes: dict[str, int], message: str) -> None:
    accumulate = dict(accumulate=changes.get("accumulate", 1))
    own = {key: value for key, value in changes.items() if key != "accumulate"}
    section = {method: dict(prototypes=24, block=6) | own}
    with pytest.raises(UserError, match=message):
        check_config(small_config(method=method, batch_size=8, **accumulate, **section))
