"""Assignments of data to prototypes, and shares by redundancy."""

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from sop_jax.diagnosis import distribution
from sop_jax.diagnosis.distribution import by_redundancy, distribute, entropy_of
from sop_jax.diagnosis.uniqueness import covers
from sop_jax.errors import UserError

TEMPERATURE = 0.1


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(37, 6)).astype(np.float32), rng.normal(size=(20, 6))


def test_distributions_are_those_of_the_definitions_in_parts_of_any_size(data, monkeypatch):
    features, prototypes = data
    subsets = [np.arange(20), np.array([3]), np.array([0, 4, 5, 19]), np.arange(20)]
    cosines = unit(features) @ unit(prototypes).T
    for scores in (20, 200, 10**6):
        monkeypatch.setattr(distribution, "SCORES", scores)
        found = distribute(features, prototypes, subsets, TEMPERATURE)
        for subset, one in zip(subsets, found, strict=True):
            p = softmax(cosines[:, subset] / TEMPERATURE, axis=1)
            np.testing.assert_array_equal(
                one.images, np.bincount(cosines[:, subset].argmax(1), minlength=len(subset))
            )
            np.testing.assert_allclose(one.marginal, p.mean(0), rtol=1e-5)
            assert one.sample_entropy == pytest.approx(entropy(p, axis=1).mean(), abs=1e-5)


def test_marginals_of_many_images_are_exact(data):
    features, prototypes = data
    many = np.tile(features, (20_000, 1))
    (one,) = distribute(many, prototypes[:4], [np.arange(4)], TEMPERATURE)
    p = softmax(unit(features) @ unit(prototypes[:4]).T / TEMPERATURE, axis=1)
    np.testing.assert_allclose(one.marginal, p.mean(0), rtol=1e-5)
    assert one.marginal.sum() == pytest.approx(1, abs=1e-6)


def test_only_directions_count(data):
    features, prototypes = data
    lengths = np.random.default_rng(1).uniform(0.1, 10, 37)[:, None].astype(np.float32)
    (one,) = distribute(features, prototypes, [np.arange(20)], TEMPERATURE)
    (other,) = distribute(lengths * features, 3 * prototypes, [np.arange(20)], TEMPERATURE)
    np.testing.assert_array_equal(one.images, other.images)
    np.testing.assert_allclose(one.marginal, other.marginal, rtol=1e-5)


def test_a_small_temperature_is_as_the_nearest_prototype(data):
    features, prototypes = data
    (found,) = distribute(features, prototypes, [np.arange(20)], 1e-5)
    np.testing.assert_allclose(found.marginal, found.images / 37, atol=1e-6)
    assert 0 <= found.sample_entropy < 1e-3


def test_images_belong_to_the_first_of_equal_prototypes():
    features = np.eye(2, dtype=np.float32)
    (found,) = distribute(features, features[[1, 0, 0]], [np.arange(3)], TEMPERATURE)
    assert found.images.tolist() == [1, 1, 0]


def test_features_are_not_read_as_a_whole(data, tmp_path, monkeypatch):
    features, prototypes = data
    monkeypatch.setattr(distribution, "SCORES", 60)
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    (expected,) = distribute(features, prototypes, [np.arange(20)], TEMPERATURE)
    (found,) = distribute(mapped, prototypes, [np.arange(20)], TEMPERATURE)
    np.testing.assert_array_equal(found.images, expected.images)


def test_shares_are_summed_by_redundancy():
    rows = np.eye(4, dtype=np.float32)[[0, 0, 1, 2, 2, 3, 2]]  # redundancy 2, 1, 3, 1
    (cover,) = covers(rows, [0.1])
    found = by_redundancy(cover, np.array([0.4, 0.1, 0.3, 0.2]))
    np.testing.assert_allclose(found, [0.3, 0.4, 0.3])


def test_entropy_is_in_nats_and_allows_zeros():
    assert entropy_of(np.array([0.5, 0.0, 0.5])) == pytest.approx(np.log(2))


def test_features_that_do_not_fit(data):
    features, prototypes = data
    with pytest.raises(UserError, match="features have 5 dimensions and the prototypes 6"):
        distribute(features[:, :5], prototypes, [np.arange(20)], TEMPERATURE)
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="the temperature is .* Expected a positive number"):
            distribute(features, prototypes, [np.arange(20)], temperature)
    with pytest.raises(UserError, match="there are no features"):
        distribute(features[:0], prototypes, [np.arange(20)], TEMPERATURE)
    broken = features.copy()
    broken[30, 2] = np.nan
    with pytest.raises(UserError, match="1 of 37 features have values that are not finite"):
        distribute(broken, prototypes, [np.arange(20)], TEMPERATURE)
