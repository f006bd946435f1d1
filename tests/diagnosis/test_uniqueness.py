"""The greedy sets of redundant prototypes, against the definition as a plain loop."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sop_jax.diagnosis import uniqueness
from sop_jax.diagnosis.uniqueness import EPS, PAPER, covers
from sop_jax.errors import UserError

SIXTEENTHS = [n / 16 for n in range(1, 32)]


def plain(prototypes: np.ndarray, eps: float) -> list[int]:
    """Returns the representative of each prototype by a loop over all pairs."""
    rows = prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)
    of = [-1] * len(rows)
    for i, row in enumerate(rows):
        if of[i] < 0:
            for j in range(i, len(rows)):
                if of[j] < 0 and (j == i or 1 - row @ rows[j] < eps):
                    of[j] = i
    return of


def assert_same(prototypes: np.ndarray, eps: list[float]) -> None:
    found = covers(prototypes, eps)
    assert [cover.eps for cover in found] == eps
    for cover in found:
        expected = plain(prototypes, cover.eps)
        assert cover.of.tolist() == expected, cover.eps
        assert cover.representatives.tolist() == sorted(set(expected))
        assert cover.redundancy.tolist() == [expected.count(i) for i in cover.representatives]


@st.composite
def lattices(draw: st.DrawFn) -> np.ndarray:
    """Returns vectors whose cosines are exact multiples of 1/16, many of them equal."""
    known = []
    for _ in range(draw(st.integers(1, 12))):
        entries = draw(st.sampled_from((1, 4, 16)))
        places = draw(st.permutations(range(16)))[:entries]
        signs = draw(st.lists(st.sampled_from((-1, 1)), min_size=entries, max_size=entries))
        row = np.zeros(16, np.float32)
        row[places] = signs
        known.append(row * draw(st.sampled_from((0.25, 1, 8))))
    order = draw(st.lists(st.integers(0, len(known) - 1), min_size=1, max_size=40))
    return np.stack([known[number] for number in order])


@settings(max_examples=100, deadline=None)
@given(
    lattices(),
    st.lists(st.sampled_from(SIXTEENTHS), min_size=1, max_size=4, unique=True),
    st.integers(1, 7),
    st.integers(1, 7),
)
def test_ties_and_duplicates_are_as_in_the_plain_loop(prototypes, eps, tile, columns):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uniqueness, "TILE", tile)
        patch.setattr(uniqueness, "COLUMNS", columns)
        assert_same(prototypes, eps)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 9), st.integers(1, 9))
def test_clusters_are_as_in_the_plain_loop(seed, count, tile, columns):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(5, 6))
    prototypes = centers[rng.integers(0, 5, count)] + rng.uniform(0, 1) * rng.normal(
        size=(count, 6)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uniqueness, "TILE", tile)
        patch.setattr(uniqueness, "COLUMNS", columns)
        assert_same(prototypes, [1.5, *EPS])


def test_tiles_of_the_usual_size_are_as_in_the_plain_loop():
    rng = np.random.default_rng(0)
    count = 2 * uniqueness.TILE + 100
    centers = rng.normal(size=(300, 16))
    noise = rng.choice([0.02, 0.2, 0.6], (count, 1)) * rng.normal(size=(count, 16))
    prototypes = centers[rng.integers(0, 300, count)] + noise
    rows = prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)
    distances = 1 - rows @ rows.T
    for cover in covers(prototypes, EPS):
        of = np.full(count, -1)
        for i in range(count):
            if of[i] < 0:
                of[(of < 0) & (distances[i] < cover.eps)] = i
        assert 10 < len(cover.representatives) < count
        np.testing.assert_array_equal(cover.of, of)


def test_the_distance_is_strict():
    rows = np.array([[1, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]], np.float32)  # a cosine of one half
    at, above = covers(rows, [0.5, float(np.nextafter(np.float32(0.5), np.float32(1)))])
    assert at.redundancy.tolist() == [1, 1] and above.redundancy.tolist() == [2]


def test_sets_for_a_larger_distance_need_not_contain_the_smaller_ones():
    angles = np.radians([0, 20, 35, 50])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    near, far = covers(rows, [1 - np.cos(np.radians(16)), 1 - np.cos(np.radians(21))])
    assert near.of.tolist() == [0, 1, 1, 3]  # the third is with the second,
    assert far.of.tolist() == [0, 0, 2, 2]  # and here it represents itself


def test_planted_duplicates_are_found_whatever_their_length():
    rng = np.random.default_rng(0)
    originals = rng.normal(size=(700, 64))
    copies = rng.integers(0, 700, 1500)
    rows = np.concatenate([originals, originals[copies] * rng.uniform(0.1, 10, (1500, 1))])
    rows = rows.astype(np.float32)
    for scale in (1, 1e-30, 1e30):
        for cover in covers(rows * np.float32(scale), [uniqueness.LEAST, PAPER]):
            assert cover.representatives.tolist() == list(range(700))
            np.testing.assert_array_equal(cover.redundancy, 1 + np.bincount(copies, minlength=700))


def test_a_single_prototype_is_unique():
    (cover,) = covers(np.ones((1, 3), np.float32), [1.0])
    assert cover.of.tolist() == [0] and cover.redundancy.tolist() == [1]


def test_not_all_cosines_are_in_memory():
    rows = np.random.default_rng(0).normal(size=(10_000, 8)).astype(np.float32)
    tracemalloc.start()
    covers(rows, [0.001, 0.01])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64e6  # all cosines are 400 MB


@pytest.mark.parametrize(
    "eps, message",
    [
        ([], "there is no eps"),
        ([0.1, 0.0], r"eps is 0, outside of \(0, 2\)\. Expected distances 1 - cos"),
        ([-0.5], r"eps is -0.5, outside of \(0, 2\)"),
        ([2.0], r"eps is 2, outside of \(0, 2\)"),
        ([float("nan")], "eps is nan, outside"),
        ([1e-7], "eps is 1e-07, which cosines in float32 do not resolve"),
        ([0.1, 0.2, 0.1], "eps are 0.1, 0.2, 0.1, some of them twice"),
    ],
)
def test_distances_that_make_no_sense(eps, message):
    with pytest.raises(UserError, match=message):
        covers(np.eye(3, dtype=np.float32), eps)


def test_prototypes_without_a_direction():
    rows = np.ones((5000, 3), np.float32)
    for value, message in (
        (np.nan, "1 of 5000 prototypes have values that are not finite; the first is row 4321"),
        (np.inf, "not finite.*Use weights from before training diverged"),
    ):
        broken = rows.copy()
        broken[4321, 1] = value
        with pytest.raises(UserError, match=message):
            covers(broken, [0.1])
    broken = rows.copy()
    broken[[7, 4000]] = 0
    with pytest.raises(UserError, match="2 of 5000 prototypes have length 0.*the first is row 7"):
        covers(broken, [0.1])
    for shape in ((0, 3), (3, 0)):
        with pytest.raises(UserError, match="there are no prototypes: their array is"):
            covers(np.empty(shape, np.float32), [0.1])
