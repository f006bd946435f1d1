"""Uniformity, effective ranks and mean direction, against their definitions."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import pdist
from scipy.stats import entropy

from sop_jax.diagnosis import spread
from sop_jax.diagnosis.spread import spread_of
from sop_jax.objectives.health import effective_rank


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 12)) * np.geomspace(1, 0.01, 12) + 0.3
    return (x * rng.uniform(0.1, 10, (300, 1))).astype(np.float32)


def rank(values: np.ndarray) -> float:
    return float(np.exp(entropy(values)))


def test_numbers_are_those_of_the_definitions_in_tiles_of_any_size(rows, monkeypatch):
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1)[:, None]
    centred = unit - unit.mean(0)
    uniformity = np.log(np.exp(-2 * pdist(unit) ** 2).mean())
    for tile, columns in ((7, 64), (100, 30), (1024, 4096)):
        monkeypatch.setattr(spread, "TILE", tile)
        monkeypatch.setattr(spread, "COLUMNS", columns)
        found = spread_of(rows, "rows")
        assert found.uniformity == pytest.approx(uniformity, rel=1e-5)
        assert found.uniformity_rows == 300
        singular = np.linalg.svd(unit, compute_uv=False)
        assert found.effective_rank == pytest.approx(rank(singular), rel=1e-5)
        singular = np.linalg.svd(centred, compute_uv=False)
        assert found.effective_rank_centred == pytest.approx(rank(singular), rel=1e-5)
        assert found.effective_rank_covariance == pytest.approx(rank(singular**2), rel=1e-5)
        assert found.mean_direction_norm == pytest.approx(np.linalg.norm(unit.mean(0)), rel=1e-5)
    assert found.effective_rank_centred == pytest.approx(
        float(effective_rank(jnp.asarray(unit, jnp.float32))), rel=1e-3
    )  # the sign of health of a train step


def test_more_dimensions_than_rows(rows):
    found = spread_of(np.ascontiguousarray(rows[:12].T)[:5], "rows")
    assert 1 < found.effective_rank_centred < 4 < 5 + 1e-6 > found.effective_rank > 1


def test_a_single_direction():
    found = spread_of(np.full((50, 7), 0.3, np.float32), "rows")
    assert found.uniformity == pytest.approx(0, abs=1e-6)
    assert found.effective_rank == pytest.approx(1, abs=1e-6)
    assert found.effective_rank_centred is None and found.effective_rank_covariance is None
    assert found.mean_direction_norm == pytest.approx(1)
    single = spread_of(np.ones((1, 7), np.float32), "rows")
    assert single.uniformity is None and single.effective_rank == pytest.approx(1)


def test_many_rows_of_a_single_direction_have_no_rank_after_their_mean_is_subtracted():
    rng = np.random.default_rng(1)
    one = rng.normal(size=(1, 64)).astype(np.float32)
    lengths = rng.uniform(0.1, 10, (16384, 1)).astype(np.float32)
    for rows in (np.repeat(one, 16384, axis=0), one * lengths):
        found = spread_of(rows, "rows")
        assert found.effective_rank_centred is None and found.effective_rank_covariance is None
    nearly = one + 1e-3 * rng.normal(size=(16384, 64))
    assert spread_of(nearly, "rows").effective_rank_centred == pytest.approx(63, abs=0.5)


def test_uniformity_of_many_rows_is_that_of_rows_at_equal_steps(rows, monkeypatch):
    monkeypatch.setattr(spread, "MOST", 100)
    found = spread_of(rows, "rows")
    assert found.uniformity_rows == 100
    chosen = np.linspace(0, 299, 100).round().astype(int)
    assert found.uniformity == spread_of(rows[chosen], "rows").uniformity
    monkeypatch.setattr(spread, "MOST", 300)
    assert spread_of(rows, "rows")._replace(uniformity=None, uniformity_rows=0) == found._replace(
        uniformity=None, uniformity_rows=0
    )
