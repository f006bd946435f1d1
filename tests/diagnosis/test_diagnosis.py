"""The whole diagnosis: what it says of prototypes whose collapse is known."""

import json

import numpy as np
import pytest

from sop_jax.diagnosis.diagnosis import diagnose
from sop_jax.diagnosis.uniqueness import EPS
from sop_jax.errors import UserError


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """Returns 12 prototypes: 4 directions, which occur 5, 4, 2 and 1 times."""
    directions = np.eye(6, dtype=np.float32)[:4]
    return directions[[0, 1, 0, 2, 0, 1, 1, 0, 3, 2, 1, 0]] * np.float32(3)


def features(counts: tuple[int, ...]) -> np.ndarray:
    """Returns so many images near each of the directions."""
    return np.repeat(np.eye(6, dtype=np.float32), [*counts, *[0] * (6 - len(counts))], axis=0) + 0.1


def test_a_planted_collapse(rows):
    result = diagnose(rows, features((10, 4, 0, 2)), [0.025, 1.5], temperature=0.1)
    assert result == json.loads(json.dumps(result, allow_nan=False))
    assert (result["prototypes"], result["dimensions"], result["images"]) == (12, 6, 16)
    assert result["temperature"] == 0.1
    assert result["images_per_class"] == [10, 4, 2]  # each in the first of equal prototypes
    assert result["dead"] == 9
    assert sum(result["marginal"]) == pytest.approx(1)
    assert result["marginal_perplexity"] == pytest.approx(np.exp(result["marginal_entropy"]))
    assert result["marginal_kl_uniform"] == pytest.approx(np.log(12) - result["marginal_entropy"])
    assert 0 < result["sample_entropy"] < np.log(12)
    assert 1 < result["effective_rank"] <= 4 and result["uniformity_rows"] == 12
    assert result["features"]["uniformity_rows"] == 16
    near, far = result["eps"]
    assert near["eps"] == 0.025 and near["unique"] == 4 and near["share"] == pytest.approx(1 / 3)
    assert near["factors"] == [1, 2, 4, 5] and near["representatives"] == [1, 1, 1, 1]
    assert near["share_total"] == near["share_mean"] == [2 / 16, 0, 4 / 16, 10 / 16]
    assert sum(near["share_total_soft"]) == pytest.approx(1)
    assert near["images_per_class"] == [10, 4, 2] and near["dead"] == 1
    assert near["same_image"] is None
    assert far["unique"] == 1 and far["factors"] == [12] and far["share_total"] == [1]


def test_averages_are_over_representatives_of_equal_redundancy():
    result = diagnose(np.eye(6, dtype=np.float32), features((1, 2, 3)), [0.1])
    (entry,) = result["eps"]
    assert entry["share_total"] == [1] and entry["representatives"] == [6]
    assert entry["share_mean"] == [pytest.approx(1 / 6)] and entry["dead"] == 3
    assert entry["share_mean_soft"] == [pytest.approx(1 / 6)]


def test_without_features(rows):
    result = diagnose(rows)
    assert result == json.loads(json.dumps(result, allow_nan=False))
    assert [entry["eps"] for entry in result["eps"]] == list(EPS)
    with_features = diagnose(rows, features((3, 2, 1, 1)))
    assert result.keys() == with_features.keys()
    for name, value in result.items():
        if name == "eps":
            continue
        assert value in (None, with_features[name])
    nothing = {name for name, value in result.items() if value is None}
    assert nothing == {
        *("images", "temperature", "features", "marginal", "marginal_entropy"),
        *("marginal_kl_uniform", "marginal_perplexity", "sample_entropy", "images_per_class"),
        "dead",
    }
    assert result["eps"][3]["unique"] == 4 and result["eps"][3]["share_mean"] is None
    assert not {name for name, value in with_features.items() if value is None}


def test_redundancy_within_an_image_is_counted_apart(rows):
    # Prototypes of the first direction: 0, 2, 4, 7, 11; of the second: 1, 5, 6, 10; third: 3, 9.
    shows = np.array([50, 1, 50, 3, 50, 1, 7, 8, 9, 3, 11, 12])
    (entry,) = diagnose(rows, eps=[0.025], images=shows)["eps"]
    assert entry["unique"] == 4
    assert entry["same_image"] == 2 + 1 + 1  # 2 and 4; 5; 9


def test_bad_input_is_reported(rows):
    wrong = [
        (dict(eps=[3.0]), r"outside of \(0, 2\)"),
        (dict(features=np.ones((3, 5), np.float32)), "features have 5 dimensions"),
        (dict(features=np.full((3, 6), np.nan, np.float32)), "3 of 3 features have values"),
        (dict(features=features((1,)), temperature=0.0), "temperature is 0"),
        (dict(images=np.arange(5)), "there are 12 rows, but the images of 5"),
    ]
    for arguments, message in wrong:
        with pytest.raises(UserError, match=message):
            diagnose(rows, **arguments)
    with pytest.raises(UserError, match="12 of 12 prototypes have length 0"):
        diagnose(0 * rows)
