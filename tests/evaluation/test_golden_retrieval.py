"""The golden numbers of retrieval, ImageNet-9 and clusterings, and the reference of revisitop."""

import functools
import json
import pathlib
from collections.abc import Callable

import golden_numbers
import jax.numpy as jnp
import numpy as np
import pytest
from golden_network import golden_network
from golden_numbers import Found, exact

from sop_jax import models
from sop_jax.data.revisited import Truth, read_truth
from sop_jax.data.thumbnails import scaled, thumbnail
from sop_jax.evaluation import ranking
from sop_jax.evaluation.agreement import agreement
from sop_jax.evaluation.backgrounds import predict
from sop_jax.evaluation.retrieval import unit
from sop_jax.evaluation.scales import SCALES, make_scale_extractor
from sop_jax.evaluation.task import View

Golden = dict[str, np.ndarray]


@functools.cache
def golden() -> Golden:
    return golden_numbers.load("evaluate.npz")


class Pictures:
    """A source of arrays."""

    has_labels, class_names, digest = False, None, "pictures"

    def __init__(self, images: list[np.ndarray]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[index]

    def name(self, index: int) -> str:
        return f"picture {index}"

    def label(self, index: int) -> int:
        return -1


def extractor() -> Callable[..., np.ndarray]:
    """Returns the features of images at scales, by the network of backbone.npz."""
    network = golden_network()

    def features(images: list[np.ndarray], longest: int, *scales: float) -> np.ndarray:
        view = View(longest=longest, scales=scales)
        return make_scale_extractor(network.model, network.config, view)(
            network.params, Pictures(images)
        ).vectors

    return features


def descriptors(golden: Golden) -> dict[str, Found]:
    section, numbers = "retrieval", {}
    count = sum(key.startswith(f"{section}/image_") for key in golden)
    longest, features = int(golden[f"{section}/imsize"]), extractor()
    images = [golden[f"{section}/image_{i}"] for i in range(count)]
    by_scale = [features(images, longest, scale) for scale in SCALES]
    for i, image in enumerate(images):
        small = thumbnail(image, longest)
        numbers[f"{section}/thumbnail_{i}"] = exact(small)
        # The array of the file is normalized; normalization and interpolation commute.
        pixels = (scaled(small, SCALES[1]) / 255 - models.MEAN) / models.STD
        numbers[f"{section}/scaled_{i}"] = Found(pixels.transpose(2, 0, 1), 1e-5)
        each = np.stack([vectors[i] for vectors in by_scale])
        numbers[f"{section}/scales_{i}"] = Found(each, 1e-5)
    several = unit(features(images, longest, *SCALES))
    numbers[f"{section}/descriptors"] = Found(several, 1e-5)
    numbers[f"{section}/descriptors_single_scale"] = Found(unit(by_scale[0]), 1e-5)
    return numbers


def rankings(golden: Golden) -> dict[str, Found]:
    section, numbers = "retrieval", {}
    lists = zip(*(golden[f"{section}/gnd_{kind}"] for kind in Truth._fields), strict=True)
    truth = [Truth(*(row[row >= 0] for row in rows)) for rows in lists]
    ranks = ranking.rank(golden[f"{section}/similarity"])
    cutoffs = golden[f"{section}/kappas"].tolist()
    for protocol in ranking.PROTOCOLS:
        scores = ranking.evaluate(ranks, truth, protocol, cutoffs)
        found = dict(map=scores.mean_ap, ap=scores.ap)
        found |= dict(mp_at_k=scores.mean_precision, p_at_k=scores.precision)
        for name, array in found.items():
            absent = np.nan_to_num(np.asarray(array), nan=-1)  # as the file marks it
            numbers[f"{section}/{name}_{protocol}"] = Found(absent, 1e-9)
    return numbers


def backgrounds(golden: Golden) -> dict[str, Found]:
    section = "backgrounds"
    logits, labels = (golden[f"{section}/{name}"] for name in ("logits", "labels"))
    predicted = predict(logits, golden[f"{section}/in_to_in9"])
    nine_way = predict(logits[:, :9], None)
    pixels = golden[f"{section}/normalise_in"].clip(0, 1).transpose(0, 2, 3, 1)
    normalized = models.normalize(jnp.asarray(255 * pixels, jnp.float32), jnp.dtype("float32"))
    return {
        f"{section}/predictions": exact(predicted),
        f"{section}/accuracy": Found((predicted == labels).mean(), 1e-9),
        f"{section}/accuracy_nine_way": Found((nine_way == labels).mean(), 1e-9),
        f"{section}/normalise_out": Found(np.asarray(normalized).transpose(0, 3, 1, 2), 1e-5),
    }


def clustering(golden: Golden) -> dict[str, Found]:
    numbers = {}
    for section in ("clustering", "clustering/over"):
        scores = agreement(golden["clustering/labels"], golden[f"{section}/assignments"])
        if section == "clustering/over":  # both definitions, by the names of the file
            scores["accuracy_rectangular"] = scores.pop("accuracy")
        else:
            del scores["accuracy_majority"]
        for name, score in scores.items():
            numbers[f"{section}/{name}"] = Found(score, 1e-9)
    return numbers


CHECKS = (descriptors, rankings, backgrounds, clustering)
INPUTS = {
    "retrieval": ("imsize", "image_", "similarity", "kappas", "gnd_"),
    "backgrounds": ("logits", "labels", "in_to_in9", "normalise_in"),
    "clustering": ("labels", "assignments", "over/assignments"),
}


@functools.cache
def computed(check: Callable[[Golden], dict[str, Found]]) -> dict[str, Found]:
    return {key: found for key, found in check(golden()).items() if key in golden()}


@pytest.mark.medium
@pytest.mark.parametrize("check", CHECKS)
def test_every_number(check: Callable[[Golden], dict[str, Found]]) -> None:
    assert golden_numbers.differences(golden(), computed(check)) == []
    assert golden_numbers.unnoticed(golden(), computed(check)) == []


@pytest.mark.medium
def test_no_number_is_left_out() -> None:
    compared = {key for check in CHECKS for key in computed(check)}
    for section, inputs in INPUTS.items():
        for key in golden():
            first, _, name = key.partition("/")
            if first == section and not name.startswith(inputs):
                assert key in compared, key


def similarity(truth: list[Truth], images: int) -> np.ndarray:
    """Returns the similarities that reference_map.json defines by a formula."""
    i, q = np.arange(images)[:, None], np.arange(len(truth))
    found = ((i * 7919 + q * 104729 + i * q * 31) % 1000003) / 1000003
    for query, known in enumerate(truth):
        for kind, more in (("easy", 0.5), ("hard", 0.3), ("junk", 0.6)):
            found[getattr(known, kind), query] += more
    return found


@pytest.mark.parametrize("name", ["roxford5k", "rparis6k"])
def test_the_reference_of_revisitop(name: str, shared: pathlib.Path) -> None:
    folder = shared / "data" / "fixtures" / "revisitop"
    reference = json.loads((folder / "reference_map.json").read_text())[name]
    images, queries, truth = read_truth(folder / name / f"gnd_{name}.pkl")
    assert (len(images), len(queries)) == (reference["n_db"], reference["n_queries"])
    for kind, count in reference["counts"].items():
        assert sum(len(getattr(known, kind)) for known in truth) == count
    ranks = ranking.rank(similarity(truth, len(images)))
    for protocol in ranking.PROTOCOLS:
        scores, expected = ranking.evaluate(ranks, truth, protocol), reference[protocol]
        assert scores.mean_ap == pytest.approx(expected["mAP"], abs=1e-9)
        assert scores.mean_precision == pytest.approx(expected["mP@1,5,10"], abs=1e-9)
        assert scores.ap[:5] == pytest.approx(expected["ap_first5"], abs=1e-9)
        assert np.isnan(scores.ap).sum() == expected["queries_without_positives"]
