"""Linear classifiers on frozen features, as files: .npz files with the view that they need."""

import io
import json
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

from sop_jax.errors import UserError
from sop_jax.evaluation.task import View

EXPECTED = "an .npz file with `weights` [classes, features], `bias` [classes] and `view`"


class Head(NamedTuple):
    """A linear classifier.

    Attributes:
        weights: one row per class.
        bias: one number per class.
        view: what its features are.
        fingerprint: of the network that gives these features; "" if it is not known.
    """

    weights: Float[np.ndarray, "C D"]
    bias: Float[np.ndarray, " C"]
    view: View
    fingerprint: str = ""


def classify(head: Head, features: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n C"]:
    """Returns the scores (logits) of the classes."""
    return features @ head.weights.T + head.bias


def write_head(path: epath.PathLike, head: Head) -> None:
    """Writes a head to a file that `read_head` reads."""
    content = io.BytesIO()
    view = json.dumps(head.view._asdict())
    named: Any = {"weights": head.weights, "bias": head.bias, "view": np.array(view)}
    np.savez(content, **named, fingerprint=np.array(head.fingerprint))
    epath.Path(path).write_bytes(content.getvalue())


def read_head(path: epath.PathLike) -> Head:
    """Reads a head.

    Raises:
        UserError: the file does not exist, or is not a head.
    """
    if not epath.Path(path).is_file():
        raise UserError(
            f"there is no head {path}. Expected {EXPECTED}. Train one with --task=linear, which "
            "writes such a file"
        )
    try:
        with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            weights, bias = (arrays[name].astype(np.float32) for name in ("weights", "bias"))
            fields = json.loads(str(arrays["view"]))
            fingerprint = str(arrays["fingerprint"]) if "fingerprint" in arrays else ""
        view = View(**fields | {"scales": tuple(fields.get("scales", (1.0,)))})
        if weights.ndim != 2 or bias.shape != weights.shape[:1]:
            raise ValueError(f"its weights are {weights.shape} and its bias is {bias.shape}")
        if not (np.isfinite(weights).all() and np.isfinite(bias).all()):
            raise ValueError("it has numbers that are not finite")
    except Exception as error:  # zip, pickle, key and value errors, depending on the bytes
        raise UserError(
            f"{path} is not a head: {error}. Expected {EXPECTED}. Train one with --task=linear"
        ) from error
    return Head(weights, bias, view, fingerprint)
