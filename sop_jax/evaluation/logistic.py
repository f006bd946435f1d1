"""Logistic regression on frozen features: the optimum, found by L-BFGS.

The objective is the mean cross-entropy over the images plus strength / 2 times the sum of the
squared weights; a bias is not penalized. Two protocols choose what the features and strengths are:

- `transfer` (DINO's and SimCLR's linear transfer): features as they are, with a bias, and 45
  strengths, of which the best on validation images is refitted on train and validation images. The
  papers give the strength wd of the sum over n images, which is wd / n here. Images are scaled to
  the crop, so that nothing of their shorter side is cut off.
- `ibot` (its `eval_logistic_regression.py`): features of unit norm, no bias, and strengths 0.01,
  0.1 and 1, of which the best *on the test images* is reported.

The solver is SciPy's L-BFGS. The loss and its gradient are computed in float64 on the features,
which are split over the devices; in float32, which is faster on accelerators, rounding ends the
search about 1e-3 away from the optimum. A solution has converged when no derivative by a
weight, scaled to second derivatives of at most 1, is larger than TOLERANCE; if it has not, the
result says so. iBOT's solver
stops at a relative gap of 1e-3, and scikit-learn's after 100 iterations, where solutions for weak
regularization are far from the optimum.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import scipy.optimize
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int

from sop_jax.data import transfer
from sop_jax.data.subsets import draw_share, labels_of
from sop_jax.errors import UserError
from sop_jax.evaluation import accuracy
from sop_jax.evaluation.features import in_chunks, on_devices, unit
from sop_jax.evaluation.splits import Splits, open_transfer_set, sources_of
from sop_jax.evaluation.tables import Part, percent
from sop_jax.evaluation.task import Features, Subject, Task, Tools, View
from sop_jax.evaluation.views import VIEW_RULES, view_of, view_settings
from sop_jax.parallel import hosts
from sop_jax.parallel.mesh import replicated
from sop_jax.rules import COUNT, POSITIVE, any_number_of, less_than, one_of

TOLERANCE = {"float64": 1e-7, "float32": 1e-4}  # by the dtype of the objective
VALIDATION = 0.2
MEMORY = 20  # pairs that L-BFGS remembers
CHUNK = 4096  # images that are classified at a time

PROTOCOLS = {
    "transfer": tuple(float(wd) for wd in np.logspace(-6, 5, 45)),
    "ibot": (0.01, 0.1, 1.0),
}


class Solution(NamedTuple):
    """A linear classifier.

    Attributes:
        weights: one row per class.
        bias: one number per class, with a mean of 0; zeros without a bias.
        converged: whether no derivative is larger than TOLERANCE.
        iterations: the number of iterations.
    """

    weights: Float32[np.ndarray, "C D"]
    bias: Float32[np.ndarray, " C"]
    converged: bool
    iterations: int


def settings() -> ml_collections.ConfigDict:
    """Returns the settings of the task `logistic`."""
    return ml_collections.ConfigDict(
        dict(
            protocol="transfer",  # transfer | ibot
            strengths=(),  # of the regularization; by default those of the protocol
            validation=VALIDATION,  # share of the train images that choose the strength (transfer)
            set="",  # the name of a transfer set of the papers, whose splits and metric are used
            iterations=5000,  # per strength at most
            dtype="float64",  # float64 | float32, of the objective
            **view_settings(),
        )
    )


RULES = {
    "protocol": one_of(PROTOCOLS),
    "strengths": any_number_of(POSITIVE),
    "validation": less_than(1),
    "set": one_of(("", *transfer.SETS)),
    "iterations": COUNT,
    "dtype": one_of(TOLERANCE),
    **VIEW_RULES,
}


def open_inputs(
    config: ml_collections.ConfigDict, settings: ml_collections.ConfigDict, data: Mapping[str, Any]
) -> Splits:
    """Opens the images, see `task.Open`."""
    view_of_protocol(config, settings)
    splits = open_set(config, settings.set, data, "logistic regression")
    if settings.protocol == "transfer":
        _check_validation(labels_of(splits.train), settings.validation)
    elif settings.validation != VALIDATION:
        raise UserError(
            "eval.validation would have no effect: eval.protocol=ibot chooses the strength on the "
            "test images; leave it out, or choose eval.protocol=transfer"
        )
    return splits


def _check_validation(labels: Int[np.ndarray, " n"], share: float) -> None:
    """Checks that there are images to validate on and images to fit."""
    fitted = len(labels) - len(draw_share(labels, share, 0)) if share else 0
    if not fitted:
        what = "no image is fitted" if share else "no image chooses the strength"
        raise UserError(
            f"eval.validation is {share:g}, so that {what}; choose a share such as {VALIDATION}"
        )


def view_of_protocol(
    config: ml_collections.ConfigDict, settings: ml_collections.ConfigDict
) -> View:
    """Returns the view; for `transfer`, images are scaled to the crop unless `resize` is set."""
    view = view_of(config, settings)
    margin = settings.protocol == "ibot" or settings.resize is not None
    return view if margin else view._replace(resize=view.crop)


def open_set(
    config: ml_collections.ConfigDict, name: str, data: Mapping[str, Any], task: str
) -> Splits:
    """Opens the splits of a transfer set, or those that flags name if `name` is empty.

    Raises:
        UserError: there is no such data, or no path is given for a transfer set.
    """
    if name and not data.get("path"):
        raise UserError(
            f"eval.set={name} needs the data: give --data.path=PATH of {transfer.expected(name)}"
        )
    return open_transfer_set(config, name, data, task)


def run(
    subject: Subject, inputs: Splits, settings: ml_collections.ConfigDict, tools: Tools
) -> dict[str, Any]:
    """Returns the accuracy of the test images.

    Returns:
        The results of `accuracy.summary`, `strength`, `converged`, `iterations`, `protocol`,
        `validation_top1`, the accuracy that chose the strength, None for the protocol `ibot`;
        `by_strength`, a list of strength, accuracy that chooses and whether it converged;
        `images`, and `unreadable`, the number of images that were left out.
    """
    assert inputs.test is not None
    view = view_of_protocol(subject.config, settings)
    train, test = tools.features(inputs.train, view), tools.features(inputs.test, view)
    chosen_by = "mean_per_class" if mean_per_class(settings.set) else "top1"
    unit = settings.protocol == "ibot"
    rows, labels, index = on_devices(train, tools.mesh)
    classes = count_outputs(train, test)
    problem = Problem(
        prepare(rows, "unit" if unit else "raw"), labels, not unit, classes, settings.dtype
    )
    everything = np.asarray(index) >= 0
    held = np.zeros_like(everything)
    if not unit:
        labelled = np.where(everything, labels, -1)
        held[draw_share(labelled, settings.validation, tools.seed)] = True
    fitted = everything & ~held
    scale = 1 if unit else fitted.sum()
    strengths = settings.strengths or PROTOCOLS[settings.protocol]
    solve = partial(
        minimize, problem, mesh=tools.mesh, iterations=settings.iterations, between=tools.between
    )
    solutions: dict[float, Solution] = {}
    start = None
    for strength in sorted(strengths, reverse=True):  # each starts at the next stronger solution
        start = solutions[strength] = solve(fitted, strength / scale, start=start)
    measured = {}
    for strength in strengths:
        if unit:
            counts = classify(solutions[strength], test, "unit", tools)
        else:
            counts = classify_rows(solutions[strength], problem.rows, labels, held, tools.mesh)
        measured[strength] = accuracy.summary(counts)
    best = max(strengths, key=lambda x: measured[x][chosen_by] or 0.0)  # the first of the best
    solution = solutions[best]
    if not unit:
        solution = solve(everything, best / everything.sum(), start=solution)
    counts = classify(solution, test, "unit" if unit else "raw", tools)
    occurring = np.bincount(np.asarray(labels)[everything], minlength=classes)
    return accuracy.summary(counts, occurring) | {
        "strength": best,
        "converged": solution.converged,
        "iterations": solution.iterations,
        "protocol": settings.protocol,
        "validation_top1": None if unit else measured[best]["top1"],
        "by_strength": [
            [x, measured[x][chosen_by], solutions[x].converged] for x in sorted(strengths)
        ],
        "images": int(counts[0].sum()),
        "unreadable": len(train.corrupt) + len(test.corrupt),
    }


def mean_per_class(name: str) -> bool:
    """Whether the papers report the mean accuracy of the classes of a transfer set."""
    return bool(name) and transfer.SETS[name].metric == "mean_per_class"


def count_outputs(*parts: Features) -> int:
    """Returns the number of outputs of a classifier: one more than the largest label."""
    largest = max((int(part.labels.max()) for part in parts if len(part.labels)), default=0)
    return 1 + max(int(text) for text in hosts.gather(str(largest)))


# The optimum


class Problem(NamedTuple):
    """What is minimized, apart from the strength and the choice of rows.

    Attributes:
        rows: the features, split over the devices.
        labels: the class of each row, on every device.
        bias: whether there is a bias.
        classes: C, the number of classes.
        dtype: the type in which the objective is computed, float64 or float32.
    """

    rows: Float[Array, "N D"]
    labels: Int[Array, " N"]
    bias: bool
    classes: int
    dtype: str = "float64"


@partial(jax.jit, static_argnames="kind")
def prepare(rows: Float[Array, "N D"], kind: str) -> Float[Array, "N D"]:
    """Returns features as a protocol uses them.

    Args:
        rows: the features.
        kind: "raw"; "unit" scales each row to unit norm; "centred" first subtracts from each row
            its own mean (MSN's `logistic_eval.py`).
    """
    if kind == "centred":
        rows = rows - rows.mean(axis=1, keepdims=True)
    return rows if kind == "raw" else unit(rows)


def minimize(
    problem: Problem,
    chosen: Bool[np.ndarray, " N"],
    strength: float,
    *,
    mesh: Mesh,
    iterations: int,
    start: Solution | None = None,
    between: Callable[[], Any] | None = None,
) -> Solution:
    """Minimizes the mean cross-entropy of the chosen rows + strength / 2 * |weights|^2.

    Args:
        problem: the features and labels.
        chosen: the rows to fit; the same on all processes.
        strength: of the regularization.
        mesh: the devices.
        iterations: the most iterations.
        start: where to start; zeros by default.
        between: called before each evaluation of the objective; it may raise.
    """
    mask = jax.device_put(chosen, replicated(mesh))
    shape = (problem.classes, problem.rows.shape[1])
    moments = jax.device_get(_moments(problem.rows, mask, problem.bias))
    shift, spread = (x.astype(np.float64) for x in moments)
    # Of scaled weights, no second derivative of a single one is larger than 1.
    scale = np.sqrt(spread**2 / 4 + strength)

    def split(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the weights and the bias of the features as they are."""
        weights = flat[: shape[0] * shape[1]].reshape(shape) / scale
        bias = flat[shape[0] * shape[1] :] if problem.bias else np.zeros(problem.classes)
        return weights, bias - weights @ shift

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        if between:
            between()
        weights, bias = (x.astype(problem.dtype) for x in split(flat))
        with jax.enable_x64(problem.dtype == "float64"):
            value, (by_weights, by_bias) = jax.device_get(
                _mean_cross_entropy(weights, bias, problem.rows, problem.labels, mask)
            )
        # By the bias of the centred features, which the weights shift.
        exact = np.asarray(flat[: shape[0] * shape[1]].reshape(shape) / scale)
        by_weights = by_weights.astype(np.float64) - np.outer(by_bias, shift) + strength * exact
        value = float(value) + 0.5 * strength * float(np.sum(exact**2))
        gradient = (by_weights / scale).ravel()
        if problem.bias:
            gradient = np.concatenate([gradient, by_bias.astype(np.float64)])
        return value, gradient

    first = np.zeros(shape[0] * shape[1] + problem.bias * shape[0])
    if start is not None:
        weights = start.weights.astype(np.float64)
        bias = (start.bias + weights @ shift) if problem.bias else np.zeros(0)
        first = np.concatenate([(weights * scale).ravel(), bias])
    found = scipy.optimize.minimize(
        objective,
        first,
        jac=True,
        method="L-BFGS-B",
        options={
            "maxiter": iterations,
            "maxfun": 2 * iterations,
            "maxcor": MEMORY,
            # Much less, because the rounding of the objective ends the search before that.
            "gtol": TOLERANCE[problem.dtype] / 1e4,
            "ftol": 0.0,
        },
    )
    weights, bias = split(found.x)
    return Solution(
        weights.astype(np.float32),
        (bias - bias.mean()).astype(np.float32),
        bool(np.abs(found.jac).max() <= TOLERANCE[problem.dtype]),
        int(found.nit),
    )


@partial(jax.jit, static_argnames="centred")
def _moments(
    rows: Float[Array, "N D"], mask: Bool[Array, " N"], centred: bool
) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
    """Returns the mean of each feature, 0 unless `centred`, and the root mean square around it."""
    weight = mask.astype(jnp.float32)[:, None]
    count = jnp.maximum(weight.sum(), 1)
    mean = jnp.sum(rows * weight, axis=0) / count if centred else jnp.zeros(rows.shape[1])
    spread = jnp.sqrt(jnp.sum(jnp.square(rows - mean) * weight, axis=0) / count)
    return mean, jnp.where(spread > 0, spread, 1)


@jax.jit
def _mean_cross_entropy(
    weights: Float[Array | np.ndarray, "C D"],
    bias: Float[Array | np.ndarray, " C"],
    rows: Float[Array, "N D"],
    labels: Int[Array, " N"],
    mask: Bool[Array, " N"],
) -> tuple[Float[Array, ""], tuple[Float[Array, "C D"], Float[Array, " C"]]]:
    """Returns the mean cross-entropy of the rows in `mask`, and its gradient."""
    dtype = weights.dtype

    def mean(weights: Array, bias: Array) -> Array:
        logits = (
            jnp.matmul(rows.astype(dtype), weights.T, precision=jax.lax.Precision.HIGHEST) + bias
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return jnp.sum(jnp.where(mask, losses, 0)) / jnp.sum(mask, dtype=dtype)

    return jax.value_and_grad(mean, argnums=(0, 1))(weights, bias)


# Accuracy


def classify(
    solution: Solution, features: Features, kind: str, tools: Tools
) -> Int[np.ndarray, "3 C"]:
    """Returns the counts of `accuracy.count_right` of all processes' features."""
    total = np.zeros((3, len(solution.bias)), np.int64)
    for chunk in in_chunks(features, tools.mesh, CHUNK):
        rows = prepare(chunk["vectors"], kind)
        mask = chunk["valid"]
        total += _counts(solution, rows, chunk["labels"], mask, replicated(tools.mesh))
    return total


def classify_rows(
    solution: Solution,
    rows: Float[Array, "N D"],
    labels: Int[Array, " N"],
    chosen: Bool[np.ndarray, " N"],
    mesh: Mesh,
) -> Int[np.ndarray, "3 C"]:
    """Returns the counts of `accuracy.count_right` of some of the rows on the devices."""
    return _counts(solution, rows, labels, chosen, replicated(mesh))


def _counts(
    solution: Solution, rows: Any, labels: Any, mask: Any, everywhere: Any
) -> Int[np.ndarray, "3 C"]:
    found = _count(solution.weights, solution.bias, rows, labels, mask, everywhere)
    return np.asarray(found, np.int64)


@partial(jax.jit, static_argnames="everywhere")
def _count(
    weights: Array, bias: Array, rows: Array, labels: Array, mask: Array, everywhere: Any
) -> Int[Array, "3 C"]:
    logits = jnp.matmul(rows, weights.T, precision=jax.lax.Precision.HIGHEST) + bias
    counted = accuracy.count_right(logits, labels, mask)
    return jax.lax.with_sharding_constraint(counted, everywhere)


def table(result: Mapping[str, Any], settings: ml_collections.ConfigDict) -> list[Part]:
    """Returns the accuracies in percent, and how the strength was chosen."""
    rows: list[Sequence[Any]] = [["", "%", "error"]]
    for name, error in (
        ("top1", "top1_error"),
        ("top5", ""),
        ("mean_per_class", "mean_per_class_error"),
        ("head", ""),
        ("middle", ""),
        ("tail", ""),
    ):
        if result[name] is not None:
            rows.append([name, percent(result[name]), percent(result.get(error))])
    by = "the test images" if result["protocol"] == "ibot" else "validation images"
    parts: list[Part] = [
        rows,
        f"strength {result['strength']:g}, best of {len(result['by_strength'])} on {by}",
    ]
    if not result["converged"]:
        parts.append(
            f"NOT converged after {result['iterations']} iterations; allow more with "
            "--eval.iterations"
        )
    if others := [x for x, _, converged in result["by_strength"] if not converged]:
        parts.append(f"not converged for the strengths {', '.join(f'{x:g}' for x in others)}")
    if mean_per_class(settings.set):
        parts.append("the papers report the mean per class for this data set")
    if result["unreadable"]:
        parts.append(f"{result['unreadable']} images could not be read and were left out")
    return parts


TASK = Task(
    does="accuracy of logistic regression on frozen features, at its optimum",
    expects=(
        "labelled images in a train split and a test split: a folder with train/ and val/, each "
        "with one folder per class, a packed .npz file, or a TFDS data set; --eval.set names a "
        f"transfer set of the papers: {', '.join(transfer.SETS)}"
    ),
    settings=settings,
    rules=RULES,
    open=open_inputs,
    run=run,
    table=table,
    place="imagenet",
    sources=sources_of,
    view=view_of_protocol,
)
