"""The golden numbers of video object segmentation, and the reference of davis2017-evaluation."""

import functools
import json
import pathlib
from collections.abc import Callable

import golden_numbers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from golden_network import golden_network
from golden_numbers import Found, exact

from sop_jax import models
from sop_jax.data import davis
from sop_jax.evaluation import overlap, propagation, video

Golden = dict[str, np.ndarray]
RED_STD = video.settings().red_std


@functools.cache
def golden() -> Golden:
    return golden_numbers.load("evaluate.npz")


def cases(golden: Golden) -> list[tuple[str, int]]:
    """Returns each clip with each radius of the neighbourhood."""
    radii = [int(radius) for radius in golden["video/neighbourhoods"]]
    return [(str(clip), radius) for clip in golden["video/clips"] for radius in radii]


@functools.cache
def tokens(clip: str) -> list[jax.Array]:
    """Returns the tokens of the frames of a clip in the stored size."""
    look = video.make_look(golden_network(), RED_STD)
    return [look(frame) for frame in golden()[f"video/{clip}/resized"]]


def inputs(golden: Golden) -> dict[str, Found]:
    """Computes what the network sees of each clip, its features, and the first masks."""
    numbers = {}
    short_side, patch = int(golden["video/short_side"]), golden_network().model.patch
    for clip in golden["video/clips"]:
        section = f"video/{clip}"
        frames = [video.resized(frame, short_side) for frame in golden[f"{section}/frames"]]
        numbers[f"{section}/resized"] = Found(np.stack(frames), 1.0, absolute=True)
        seen = jnp.stack(
            [video.recoloured(jnp.asarray(x), RED_STD) for x in golden[f"{section}/resized"]]
        )
        pixels = np.asarray(models.normalize(seen, jnp.dtype("float32")), np.float64)
        moments = np.stack([pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))], -1)
        numbers[f"{section}/input_mean_std"] = Found(moments)
        small = video.on_grid(golden[f"{section}/masks"][0], short_side, patch)
        first = propagation.one_hot(small).transpose(2, 0, 1)[None]
        numbers[f"{section}/first_soft"] = exact(first)
        count = len(golden[f"{section}/features"])
        features = np.stack([np.asarray(x).reshape(-1, x.shape[-1]) for x in tokens(clip)[:count]])
        numbers[f"{section}/features"] = Found(features)
    return numbers


def propagated(clip: str, radius: int, stored: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the masks of all frames but the first, soft [T-1, C, h, w] and decided [T-1, H, W].

    Args:
        clip: the name of the clip.
        radius: the radius of the neighbourhood.
        stored: whether the masks of earlier frames are the stored ones, which tests each step by
            itself.
    """
    section = f"video/{clip}"
    first = golden()[f"{section}/first_soft"][0].transpose(1, 2, 0)
    contexts = propagation.start(
        tokens(clip)[0], jnp.asarray(first), int(golden()["video/n_last_frames"])
    )
    top_k, temperature = int(golden()["video/topk"]), float(golden()["video/temperature"])
    height, width = golden()[f"{section}/masks"].shape[1:]
    soft, decided = [], []
    for number, features in enumerate(tokens(clip)[1:]):
        masks = propagation.propagate(contexts, features, radius, top_k, temperature)
        soft.append(np.asarray(masks.transpose(2, 0, 1)))
        decision = np.asarray(propagation.decide(masks, golden_network().model.patch))
        decided.append(davis.scaled(decision, (height, width)))
        if stored:
            masks = jnp.asarray(golden()[f"{section}/hood{radius}/soft"][number].transpose(1, 2, 0))
        contexts = propagation.remember(contexts, features, masks)
    return np.stack(soft), np.stack(decided)


def scores(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Returns J and F [2, objects, T] of the objects of the first mask."""
    objects = int(truth[0].max())
    pairs = zip(found, truth, strict=True)
    return np.stack([overlap.measure(*pair, objects) for pair in pairs], -1)


def masks(golden: Golden) -> dict[str, Found]:
    numbers = {}
    for clip, radius in cases(golden):
        section, truth = f"video/{clip}/hood{radius}", golden[f"video/{clip}/masks"]
        soft, decided = propagated(clip, radius, stored=False)
        numbers[f"{section}/soft"] = Found(soft)
        found = np.concatenate([truth[:1], decided])
        numbers[f"{section}/masks"] = Found(found, 0.0, absolute=True, share=1e-3)
        for measure, values in zip("JF", scores(found, truth), strict=True):
            numbers[f"{section}/{measure}"] = Found(values, 1e-3, absolute=True)
    return numbers


def single_steps(golden: Golden) -> dict[str, Found]:
    """Computes each frame from the stored masks of the frames before it."""
    return {
        f"video/{clip}/hood{radius}/soft": Found(propagated(clip, radius, stored=True)[0])
        for clip, radius in cases(golden)
    }


def stored_masks(golden: Golden) -> dict[str, Found]:
    """Scores the stored masks, of which all scores are exact."""
    numbers = {}
    for clip, radius in cases(golden):
        section = f"video/{clip}/hood{radius}"
        both = scores(golden[f"{section}/masks"], golden[f"video/{clip}/masks"])
        for measure, values in zip("JF", both, strict=True):
            numbers[f"{section}/{measure}"] = Found(values, 1e-9)
        if f"{section}/JF_statistics" in golden:
            rows = [[overlap.statistics(row) for row in values] for values in both]
            numbers[f"{section}/JF_statistics"] = Found(np.array(rows), 1e-9)
    return numbers


CHECKS: dict[str, Callable[[Golden], dict[str, Found]]] = {
    "inputs": inputs,
    "masks": masks,
    "single_steps": single_steps,
    "stored_masks": stored_masks,
}
INPUTS = (
    *("short_side", "n_last_frames", "topk", "temperature", "neighbourhoods", "clips"),
    *("frames", "masks", "margin"),  # `margin` is informational; `hood*/masks` are expected
)


@functools.cache
def numbers(part: str) -> dict[str, Found]:
    return CHECKS[part](golden())


@pytest.mark.medium
@pytest.mark.parametrize("part", CHECKS)
def test_every_number(part: str) -> None:
    assert golden_numbers.differences(golden(), numbers(part)) == []


@pytest.mark.medium
@pytest.mark.parametrize("part", CHECKS)
def test_any_moved_number_fails(part: str) -> None:
    assert golden_numbers.unnoticed(golden(), numbers(part)) == []


@pytest.mark.medium
def test_no_expected_array_is_left_out() -> None:
    computed = {key for part in CHECKS for key in numbers(part)}
    expected = {
        key
        for key in golden()
        if key.startswith("video/") and ("/hood" in key or key.split("/")[-1] not in INPUTS)
    }
    assert {key for key in expected - computed if not key.endswith("/margin")} == set()


def test_scores_of_osvos_are_those_of_the_official_evaluation(shared: pathlib.Path) -> None:
    folder = shared / "data" / "fixtures" / "davis"
    reference = json.loads((folder / "reference_osvos_JF.json").read_text())["sequences"]
    clips = davis.open_davis(str(folder / "DAVIS"))
    for clip in clips:
        found = [
            davis.read_mask(epath.Path(folder) / "osvos_results" / clip.name / mask.name)
            for mask in clip.masks
        ]
        values = scores(np.stack(found), np.stack([davis.read_mask(m) for m in clip.masks]))
        (row,) = video.statistics(values)
        expected = {name: reference[clip.name][name] for name in row}
        assert row == pytest.approx(expected, abs=1e-6)
    assert {clip.name for clip in clips} <= set(reference)
