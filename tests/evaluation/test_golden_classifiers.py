"""The official numbers of frozen features and of the classifiers on them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_network import golden_network
from golden_numbers import Found, differences, exact, load, unnoticed

from sop_jax import models
from sop_jax.evaluation import accuracy, knn, linear, logistic
from sop_jax.evaluation.features import pooled
from sop_jax.evaluation.task import Features, View
from sop_jax.parallel.mesh import make_mesh
from sop_jax.parallel.search import nearest

MESH = make_mesh(1)


def section(name: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a section by the rest of their names."""
    golden = load("evaluate.npz")
    return {key.removeprefix(f"{name}/"): golden[key] for key in golden if key.startswith(name)}


def as_features(vectors: np.ndarray, labels: np.ndarray) -> Features:
    index = np.arange(len(labels), dtype=np.int32)
    return Features(vectors.astype(np.float32), None, index, labels.astype(np.int32), [])


def knn_numbers() -> dict[str, Found]:
    golden = section("knn")
    ks, temperature = golden["k"].tolist(), float(golden["temperature"])
    train = as_features(golden["train_features"], golden["train_labels"])
    test = as_features(golden["test_features"], golden["test_labels"])
    found = knn.accuracies(train, test, ks, temperature, mesh=MESH)
    rows = jnp.asarray(train.vectors)
    cosines, indices = nearest(jnp.asarray(test.vectors), rows, max(ks), MESH)
    classes, weights = jnp.asarray(train.labels)[indices], jnp.exp(cosines / temperature)
    votes = []
    for k in ks:
        own, first = knn.vote(classes[:, :k], weights[:, :k])
        table = np.zeros(golden["scores"].shape[1:])
        rows_of = np.broadcast_to(np.arange(len(table))[:, None], first.shape)[first]
        table[rows_of, np.asarray(classes[:, :k])[first]] = np.asarray(own)[first]
        votes.append(table)
    slack = 100 / len(test.labels)  # one image
    return {
        "knn/scores": Found(np.stack(votes)),
        "knn/top1": Found([100 * found[k].top1 for k in ks], slack, absolute=True),
        "knn/top5_voted": Found([100 * found[k].top5 for k in ks], slack, absolute=True),
    }


def linear_numbers() -> dict[str, Found]:
    golden = section("linear")
    batch, classes = int(golden["batch"]), len(golden["init_weight"])
    epochs, count = golden["order"].shape
    epoch = -(-count // batch)
    rates = jnp.asarray(golden["base_lrs"] * batch / 256, jnp.float32)
    params = linear.init_heads(jax.random.key(0), len(rates), classes, golden["features"].shape[1])
    params["weights"] = jnp.broadcast_to(
        jnp.asarray(golden["init_weight"], jnp.float32), params["weights"].shape
    )
    tx = linear.optimizer(rates, epoch, epochs)
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, part: Any) -> Any:
        def loss(params: Any) -> Any:
            losses = linear.head_losses(params, *part)
            return losses.sum(), losses

        gradients, losses = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, losses

    features, labels = golden["features"], golden["labels"].astype(np.int32)
    val, val_labels = golden["val_features"], golden["val_labels"].astype(np.int32)
    found: dict[str, list[Any]] = {
        name: [] for name in ("weights", "biases", "train_loss", "val_loss", "val_acc1", "val_acc5")
    }

    def padded(vectors: np.ndarray, labels: np.ndarray) -> Any:
        padding = batch - len(labels)
        return (
            jnp.asarray(np.pad(vectors, ((0, padding), (0, 0)))),
            jnp.asarray(np.pad(labels, (0, padding), constant_values=-1)),
            jnp.arange(batch) < len(labels),
        )

    for order in golden["order"]:
        losses = []
        for start in range(0, count, batch):
            part = order[start : start + batch]
            params, state, own = step(params, state, padded(features[part], labels[part]))
            losses.append(own)
        found["train_loss"].append(np.mean(losses, axis=0))
        found["weights"].append(params["weights"])
        found["biases"].append(params["bias"])
        parts = [slice(start, start + batch) for start in range(0, len(val), batch)]
        val_losses = [linear.head_losses(params, *padded(val[p], val_labels[p])) for p in parts]
        found["val_loss"].append(np.mean(val_losses, axis=0))
        logits = linear.scores(params, jnp.asarray(val))
        truth = jnp.broadcast_to(jnp.asarray(val_labels)[:, None], logits.shape[:2])
        ranks = np.asarray(accuracy.rank_of(logits, truth))
        for top in (1, 5):
            found[f"val_acc{top}"].append(100 * (ranks < top).mean(axis=0))
    schedule = linear.cosine(epoch, epochs)
    steps = epoch * jnp.arange(epochs)
    numbers = {f"linear/{name}": Found(np.stack(rows), 1e-5) for name, rows in found.items()}
    lr = jax.vmap(schedule)(steps)[:, None] * rates
    return numbers | {"linear/lr_used": Found(lr, 1e-5)}


def feature_numbers() -> dict[str, Found]:
    network, golden = golden_network(), load("backbone.npz")
    model, params = network.model, network.params
    # The images are normalized: this inverts the normalization of the package.
    images = golden["vit/image"].transpose(0, 2, 3, 1) * np.array(models.STD)
    images = jnp.asarray(255 * (images + np.array(models.MEAN)), jnp.float32)
    found = {}
    for pool, number in (("cls", 0), ("patches", 1), ("cls_patches", 2)):
        for layers in (1,) if pool == "patches" else (1, 2):
            view = View(layers=layers, pool=pool)
            vectors, _ = pooled(model, params, images, view)
            found[f"features/avgpool{number}_n{layers}"] = Found(vectors)
    return found


def logistic_numbers() -> dict[str, Found]:
    golden = section("logistic")
    found: dict[str, Found] = {}
    train = as_features(golden["features"], golden["labels"])
    classes = int(golden["labels"].max()) + 1
    val = {
        kind: logistic.prepare(jnp.asarray(golden["val_features"]), kind)
        for kind in ("raw", "unit", "centred")
    }
    labels = jnp.asarray(golden["val_labels"], jnp.int32)
    count = len(train.labels)
    wd = golden["transfer/wd"]
    for name, kind, strengths in (
        ("ibot", "unit", golden["ibot/lambda"]),
        ("msn", "centred", golden["msn/lambda"]),
        ("transfer", "raw", wd / count),
    ):
        rows = logistic.prepare(jnp.asarray(train.vectors), kind)
        problem = logistic.Problem(rows, jnp.asarray(train.labels), name == "transfer", classes)
        solutions = [
            logistic.minimize(
                problem, np.ones(count, bool), float(strength), mesh=MESH, iterations=5000
            )
            for strength in strengths
        ]
        assert all(solution.converged for solution in solutions)
        logits = [np.asarray(val[kind]) @ s.weights.T + s.bias for s in solutions]
        chosen = range(len(strengths)) if name != "transfer" else golden["transfer/chosen"]
        weights = np.stack([solutions[i].weights for i in chosen])
        probabilities = np.stack([jax.nn.softmax(logits[i]) for i in chosen])
        found[f"logistic/{name}/weights"] = Found(weights)
        found[f"logistic/{name}/val_probabilities"] = Found(probabilities, absolute=True)
        top1 = [
            accuracy.summary(
                np.asarray(
                    accuracy.count_right(jnp.asarray(one), labels, jnp.ones(len(labels), bool))
                )
            )["top1"]
            for one in logits
        ]
        if name == "transfer":
            biases = np.stack([solutions[i].bias for i in chosen])
            found["logistic/transfer/biases"] = Found(biases)
            found["logistic/transfer/val_accuracy_exact"] = exact(top1)._replace(tolerance=1e-9)
        else:
            found[f"logistic/{name}/val_accuracy"] = exact(top1)._replace(tolerance=1e-9)
    return found


NUMBERS = {
    "logistic": logistic_numbers,
    "knn": knn_numbers,
    "linear": linear_numbers,
    "features": feature_numbers,
}


@functools.cache
def numbers(name: str) -> dict[str, Found]:
    return NUMBERS[name]()


@pytest.mark.medium
@pytest.mark.parametrize("name", NUMBERS)
def test_official_numbers(name: str) -> None:
    golden = load("evaluate.npz")
    assert differences(golden, numbers(name)) == []
    assert unnoticed(golden, numbers(name)) == []


INPUTS = (
    *("knn/train_features", "knn/train_labels", "knn/test_features", "knn/test_labels", "knn/k"),
    *("knn/temperature", "linear/features", "linear/labels", "linear/val_features"),
    *("linear/val_labels", "linear/order", "linear/batch", "linear/base_lrs"),
    *("linear/init_weight", "logistic/features", "logistic/labels", "logistic/val_features"),
    *("logistic/val_labels", "logistic/ibot/lambda", "logistic/msn/lambda"),
    *("logistic/transfer/wd", "logistic/transfer/chosen"),
)
# What the official code gave by luck, how safe an input is, and a protocol's unfinished runs.
INFORMATION = (
    *("knn/top5_official", "knn/min_gap_at_k"),
    *("logistic/transfer/val_accuracy_as_run", "logistic/transfer/converged_as_run"),
)
# The sections that other modules compare, each of them completely.
ELSEWHERE = (
    *("video", "retrieval", "backgrounds", "clustering"),
    *("finetune", "transforms", "seg"),
)


@pytest.mark.medium
def test_no_expected_array_is_left_out() -> None:
    compared = {key for name in NUMBERS for key in numbers(name)}
    expected = {key for key in load("evaluate.npz") if key.split("/")[0] not in ELSEWHERE}
    assert compared | {*INPUTS, *INFORMATION} == expected
    assert not compared & {*INPUTS, *INFORMATION}
