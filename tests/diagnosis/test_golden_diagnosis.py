"""The diagnosis of collapse gives the golden numbers, and exactly as many unique prototypes."""

import golden_numbers
import numpy as np
import pytest
from golden_numbers import Found, differences, exact, unnoticed

from sop_jax.diagnosis.diagnosis import diagnose
from sop_jax.diagnosis.uniqueness import covers

TOLERANCE = 1e-4
INPUTS = {"diagnosis/prototypes", "diagnosis/features", "diagnosis/epsilons"}
SPREAD = (
    *("uniformity", "effective_rank", "effective_rank_centred", "effective_rank_covariance"),
    "mean_direction_norm",
)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return golden_numbers.load("family.npz")


@pytest.fixture(scope="module")
def numbers(golden: dict[str, np.ndarray]) -> dict[str, Found]:
    """Returns what the package computes, by golden name."""
    prototypes, eps = golden["diagnosis/prototypes"], golden["diagnosis/epsilons"].tolist()
    result = diagnose(prototypes, golden["diagnosis/features"], eps, temperature=0.1)
    found = {
        "mlcd": result["marginal"],
        "mlcd_entropy": result["marginal_entropy"],
        "mlcd_kl_uniform": result["marginal_kl_uniform"],
        "mlcd_perplexity": result["marginal_perplexity"],
        "mean_sample_entropy": result["sample_entropy"],
    }
    for name in SPREAD:
        found[f"{name}_prototypes"] = result[name]
        found[f"{name}_features"] = result["features"][name]
    numbers = {f"diagnosis/{name}": Found(value, TOLERANCE) for name, value in found.items()}
    for cover, entry in zip(covers(prototypes, eps), result["eps"], strict=True):
        place = f"diagnosis/{cover.eps:g}"
        numbers[f"{place}/count"] = exact(entry["unique"])
        numbers[f"{place}/representatives"] = exact(cover.representatives)
        numbers[f"{place}/redundancy"] = exact(cover.redundancy)
        numbers[f"{place}/factors"] = exact(entry["factors"])
        for name in ("share_mean", "share_total", "share_mean_soft"):
            numbers[f"{place}/{name}"] = Found(entry[name], TOLERANCE)
    return numbers


def test_every_number(golden: dict[str, np.ndarray], numbers: dict[str, Found]) -> None:
    expected = {name for name in golden if name.startswith("diagnosis/")} - INPUTS
    assert numbers.keys() == expected
    assert differences(golden, numbers) == []
    for name, found in numbers.items():  # also relative to each entry
        np.testing.assert_allclose(found.array, golden[name], rtol=TOLERANCE, err_msg=name)


def test_any_changed_number_fails(golden: dict[str, np.ndarray], numbers: dict[str, Found]) -> None:
    assert unnoticed(golden, numbers) == []


def test_redundancy_of_the_prototypes_of_the_method() -> None:
    golden = golden_numbers.load("method.npz")
    place = "collapse_redundancy_"
    names = [name for name in golden if name.startswith(place)]
    assert names
    eps = [float(name.removeprefix(place)) for name in names]
    for dtype in (np.float32, np.float64):
        found = covers(golden["collapse_prototypes"].astype(dtype), eps)
        numbers = {name: exact(cover.redundancy) for name, cover in zip(names, found, strict=True)}
        assert differences(golden, numbers) == []
        assert unnoticed(golden, numbers) == []
