"""Linear classifiers: the stacked head, the selection, and the task from start to end."""

import os
import pathlib
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import APART, make_run

from sop_jax import evaluate
from sop_jax.errors import Interrupted, UserError
from sop_jax.evaluation import fit, linear
from sop_jax.evaluation.heads import read_head

SMALL = {
    "epochs": 4,
    "batch_size": 128,
    "rates": (0.01, 0.03, 0.1, 0.3),
    "scale": (0.9, 1.0),
    "flip": 0.0,
    "threads": 0,
    "layers": 2,
}


def measure(workdir: pathlib.Path, **changes: Any) -> dict[str, Any]:
    asked = evaluate.Asked(workdir, cache=changes.pop("cache", None))
    return evaluate.evaluate(asked, "linear", SMALL | changes)


@pytest.mark.medium
def test_a_linear_classifier_learns_the_digits(tmp_path: pathlib.Path) -> None:
    make_run(tmp_path, **APART)
    found = measure(tmp_path)["results"]
    assert found["top1"] > 0.5  # chance is 0.1
    assert found["top1_held_out"] <= found["top1"] <= found["top5"]
    assert found["rate"] in SMALL["rates"] and found["epoch"] in (1, 2, 3, 4)
    assert found["classes"] == 10 and found["unreadable"] == 0
    # The file of the best classifier gives the accuracy that was reported.
    (file,) = (tmp_path / "evaluations").glob("linear_*/head.npz")
    head = read_head(file)
    assert head.view.layers == 2 and head.weights.shape == (10, 64)
    assert not (file.parent / fit.UNFINISHED).exists()


@pytest.mark.slow
def test_an_interrupted_fit_continues_exactly(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "whole", **APART)
    make_run(tmp_path / "parts", **APART)
    rows = record_rows(monkeypatch)
    whole = measure(tmp_path / "whole")["results"]
    for stop in (3, 26):
        stop_after(monkeypatch, stop)
        with pytest.raises(Interrupted, match=r"step \d+ of 44 is saved, and the same command"):
            measure(tmp_path / "parts")
        monkeypatch.undo()
    parts = record_rows(monkeypatch)
    assert measure(tmp_path / "parts")["results"] == whole
    assert parts == rows and None not in [row["loss"] for row in rows[0]]
    heads = [
        read_head(next((tmp_path / name / "evaluations").glob("linear_*/head.npz")))
        for name in ("whole", "parts")
    ]
    np.testing.assert_array_equal(heads[0].weights, heads[1].weights)


def record_rows(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, Any]]]:
    """Returns a list that gets the rows of each finished fit of the task."""
    found: list[list[dict[str, Any]]] = []

    def recording(*args: Any) -> fit.Fitted:
        fitted = fit.fit(*args)
        found.append(fitted.rows)
        return fitted

    monkeypatch.setattr(linear, "fit", recording)
    return found


@pytest.mark.medium
def test_the_loss_that_is_shown_is_the_mean_over_the_heads(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path, **APART)
    rows = record_rows(monkeypatch)
    for rates in ((0.01,), (0.01,) * 7):
        measure(tmp_path, rates=rates, epochs=1)
    one, several = (row["loss"] for (row,) in rows)
    assert several == pytest.approx(one, rel=1e-5)


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Sends SIGTERM to this process after a number of batches of a fit."""
    to_devices, seen = fit.to_devices, []

    def counted(*args: Any) -> Any:
        seen.append(1)
        if len(seen) == batches:
            os.kill(os.getpid(), signal.SIGTERM)
        return to_devices(*args)

    monkeypatch.setattr(fit, "to_devices", counted)


@pytest.mark.medium
def test_heads_learn_as_if_each_was_alone() -> None:
    rng = np.random.default_rng(0)
    vectors = jnp.asarray(rng.normal(size=(16, 5)), jnp.float32)
    labels, valid = jnp.asarray(rng.integers(0, 3, 16), jnp.int32), jnp.arange(16) < 13
    rates = jnp.array([0.1, 2.0, 30.0])

    def trained(rates: Any) -> Any:
        params = linear.init_heads(jax.random.key(0), len(rates), 3, 5)
        tx = linear.optimizer(rates, 2, 3)
        state = tx.init(params)
        for _ in range(6):
            gradients = jax.grad(lambda p: linear.head_losses(p, vectors, labels, valid).sum())(
                params
            )
            updates, state = tx.update(gradients, state, params)
            params = jax.tree.map(jnp.add, params, updates)
        return params

    together = trained(rates)
    for i in range(len(rates)):
        single = trained(rates[i : i + 1])
        for name in together:
            np.testing.assert_allclose(together[name][i], single[name][0], rtol=1e-5, atol=1e-6)


def test_all_images_held_out_is_an_error(tmp_path: pathlib.Path) -> None:
    make_run(tmp_path, steps=())
    with pytest.raises(UserError, match="no images are left to train on: eval.held_out=0.9999"):
        measure(tmp_path, held_out=0.9999)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 7}, "eval.layers is 7, but the network has 2 layers"),
        ({"pool": "patches"}, "needs a ViT and eval.layers=1"),
        ({"crop": 18, "resize": 20}, "not a multiple of the 4 pixels of a token"),
        ({"crop": 20, "resize": 16}, "larger than eval.resize 16"),
        ({"rates": ()}, "rates is .*expected one or more values"),
        ({"pool": "max"}, "expected one of cls, patches, cls_patches, auto"),
    ],
)
def test_what_the_network_does_not_have_is_an_error_before_it_is_loaded(
    tmp_path: pathlib.Path, changes: dict[str, Any], message: str
) -> None:
    make_run(tmp_path, steps=())
    with pytest.raises(UserError, match=message):
        measure(tmp_path, **changes)
