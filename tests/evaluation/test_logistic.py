"""Logistic regression: the optimum, the choice of the strength, and few images per class."""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from runs import APART, make_run
from sklearn.linear_model import LogisticRegression

from sop_jax import evaluate
from sop_jax.errors import UserError
from sop_jax.evaluation import logistic
from sop_jax.parallel.mesh import make_mesh, put, split


def points(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count).astype(np.int32)
    centres = np.random.default_rng(9).normal(size=(4, 6))
    # Features of very different size, with means far from 0.
    vectors = (centres[labels] + rng.normal(size=(count, 6))) * [100, 10, 1, 1, 0.1, 0.01] + 5
    return vectors.astype(np.float32), labels


@pytest.mark.medium
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_is_the_optimum_that_scikit_learn_finds(devices: int, strength: float) -> None:
    vectors, labels = points(120)
    mesh = make_mesh(devices)
    chosen = np.arange(120) < 100
    problem = logistic.Problem(put(vectors, split(mesh)), jnp.asarray(labels), True, 4)
    found = logistic.minimize(problem, chosen, strength, mesh=mesh, iterations=5000)
    assert found.converged
    model = LogisticRegression(C=1 / (100 * strength), tol=1e-10, max_iter=100_000)
    # Standardized for scikit-learn's solver, with the penalty on the weights of the raw features.
    exact = model.fit(vectors[chosen].astype(np.float64), labels[chosen])
    logits = vectors @ found.weights.T + found.bias
    expected = exact.decision_function(vectors.astype(np.float64))
    np.testing.assert_allclose(
        logits - logits.mean(1, keepdims=True),
        expected - expected.mean(1, keepdims=True),
        atol=2e-3 * np.abs(expected).max(),
    )


def test_too_few_iterations_are_not_called_converged() -> None:
    vectors, labels = points(120)
    mesh = make_mesh(1)
    problem = logistic.Problem(jnp.asarray(vectors), jnp.asarray(labels), True, 4)
    found = logistic.minimize(problem, np.ones(120, bool), 1e-6, mesh=mesh, iterations=2)
    assert not found.converged and found.iterations == 2


def measure(workdir: pathlib.Path, task: str, **changes: Any) -> dict[str, Any]:
    return evaluate.evaluate(evaluate.Asked(workdir), task, changes)["results"]


@pytest.mark.medium
def test_logistic_regression_of_digits(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, **APART)
    found = measure(tmp_path, "logistic", strengths=(1e-3, 1.0, 1e5))
    assert found["top1"] > 0.7 and found["converged"]
    assert found["strength"] in (1e-3, 1.0)
    assert [x for x, _, _ in found["by_strength"]] == [1e-3, 1.0, 1e5]
    unit = measure(tmp_path, "logistic", protocol="ibot")
    assert unit["top1"] > 0.5 and unit["validation_top1"] is None
    # Both use the features that were computed first.
    assert capsys.readouterr().err.count("took the features of") == 2
    # Better than one image per class.
    few = measure(tmp_path, "fewshot", shots=(1, 5), draws=2)
    assert 0.1 < few["top1_1"] < few["top1_5"] < found["top1"]
    assert few["top1_1_std"] > 0 and few["converged"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": 0.9999}, "no image is fitted; choose a share such as 0.2"),
        ({"validation": 0.0}, "no image chooses the strength; choose a share such as 0.2"),
        ({"validation": 0.1, "protocol": "ibot"}, "eval.validation would have no effect"),
    ],
)
def test_a_useless_share_of_validation_images_is_an_error(
    tmp_path: pathlib.Path, changes: dict[str, Any], message: str
) -> None:
    make_run(tmp_path, steps=())
    with pytest.raises(UserError, match=message):
        measure(tmp_path, "logistic", **changes)


def test_more_images_per_class_than_there_are_is_an_error(tmp_path: pathlib.Path) -> None:
    make_run(tmp_path, steps=())
    with pytest.raises(UserError, match="eval.shots has 2000 images per class, but a class has"):
        measure(tmp_path, "fewshot", shots=(1, 2000))


def test_a_transfer_set_without_a_path_is_an_error(tmp_path: pathlib.Path) -> None:
    make_run(tmp_path, steps=())
    with pytest.raises(UserError, match="eval.set=flowers needs the data: give --data.path"):
        measure(tmp_path, "logistic", set="flowers")
