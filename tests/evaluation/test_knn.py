"""The k-NN classifier compared with a plain loop, also for sizes that are easy to get wrong."""

from typing import Any

import numpy as np
import pytest

from sop_jax.errors import UserError
from sop_jax.evaluation import knn
from sop_jax.evaluation.task import Features
from sop_jax.parallel.mesh import make_mesh


def features(vectors: np.ndarray, labels: np.ndarray) -> Features:
    index = np.arange(len(labels), dtype=np.int32)
    return Features(vectors, None, index, labels.astype(np.int32), [])


def accuracies(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *more: Any,
    **options: Any,
) -> dict[int, knn.Accuracy]:
    """Classifies on eight devices, which divide neither split of most tests."""
    known, asked = features(train, train_labels), features(test, test_labels)
    return knn.accuracies(known, asked, *more, **options, mesh=make_mesh())


def knn_top1(*arguments: Any, **options: Any) -> dict[int, float]:
    return {k: found.top1 for k, found in accuracies(*arguments, **options).items()}


def clusters(
    seed: int, count: int, classes: int = 5, dim: int = 8, noise: float = 1.5
) -> tuple[np.ndarray, np.ndarray]:
    """Returns noisy points around one centre per class; centres are the same for every seed."""
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count).astype(np.int32)
    points = centres[labels] + noise * rng.normal(size=(count, dim))
    return points.astype(np.float32), labels


def reference(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    k: int,
    temperature: float,
) -> float:
    """Classifies one test image after the other, in float64."""
    train = train.astype(float) / np.linalg.norm(train, axis=1, keepdims=True)
    right = 0
    for query, truth in zip(test.astype(float), test_labels, strict=True):
        cosine = train @ (query / np.linalg.norm(query))
        votes: dict[int, float] = {}
        for i in np.argsort(-cosine, kind="stable")[:k]:
            label = int(train_labels[i])
            votes[label] = votes.get(label, 0.0) + np.exp(cosine[i] / temperature)
        right += max(votes, key=lambda label: votes[label]) == truth
    return right / len(test)


@pytest.mark.parametrize("tests", [1, 2, 7, 16, 33])
def test_agrees_with_a_loop_for_any_number_of_test_images(
    tests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn, "CHUNK", 8)  # 16 images fill whole chunks; of 33 one is left
    train, test = clusters(0, 200), clusters(1, tests)
    found = knn_top1(*train, *test, ks=(1, 10, 20, 100), temperature=0.07)
    for k, share in found.items():
        assert share == pytest.approx(reference(*train, *test, k, 0.07), abs=1e-12), k


@pytest.mark.parametrize("temperature", [0.001, 0.07, 10.0])
def test_agrees_with_a_loop_at_any_temperature(temperature: float) -> None:
    train, test = clusters(0, 300, noise=2.5), clusters(1, 150, noise=2.5)
    if temperature == 0.001:  # only the nearest one counts; exp(1000) overflows float32
        expected = knn_top1(*train, *test, ks=(1,), temperature=1.0)[1]
    else:
        expected = reference(*train, *test, 20, temperature)
    assert knn_top1(*train, *test, ks=(20,), temperature=temperature)[20] == expected


def test_is_as_good_as_scikit_learns() -> None:
    from sklearn.datasets import load_digits
    from sklearn.neighbors import KNeighborsClassifier

    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels - pixels[:1400].mean(axis=0)).astype(np.float32)
    model = KNeighborsClassifier(
        n_neighbors=10, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(pixels[:1400], labels[:1400])
    expected = model.score(pixels[1400:], labels[1400:])
    found = knn_top1(pixels[:1400], labels[:1400], pixels[1400:], labels[1400:], (10,), 0.07)
    assert found[10] == pytest.approx(expected, abs=1e-12)
    assert found[10] > 0.9


def test_one_program_serves_all_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "CHUNK", 16)
    before = knn.count_right._cache_size()
    knn_top1(*clusters(0, 61, dim=9), *clusters(1, 16 * 3 + 5, dim=9), ks=(3,))
    assert knn.count_right._cache_size() == before + 1


def test_can_be_given_up_between_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "CHUNK", 8)
    calls = []

    def between() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        knn_top1(*clusters(0, 50), *clusters(1, 40), ks=(3,), between=between)
    assert len(calls) == 2


def test_lengths_of_features_do_not_matter() -> None:
    (train, train_labels), (test, test_labels) = clusters(0, 100), clusters(1, 40)
    scales = np.random.default_rng(0).uniform(0.01, 100, (100, 1)).astype(np.float32)
    expected = knn_top1(train, train_labels, test, test_labels, ks=(5,))
    assert knn_top1(train * scales, train_labels, test * 1e4, test_labels, ks=(5,)) == expected


def test_k_above_the_train_set_is_left_out_and_one_k_remains() -> None:
    train, test = clusters(0, 15), clusters(1, 9)
    assert list(knn_top1(*train, *test, ks=(10, 20, 15))) == [10, 15]
    assert list(knn_top1(*train, *test, ks=(20, 100))) == [15]


def test_any_integers_are_labels() -> None:
    (train, train_labels), (test, test_labels) = clusters(0, 80), clusters(1, 30)
    expected = knn_top1(train, train_labels, test, test_labels, ks=(10,))
    ids = np.array([-7, 10**9, 3, 12345, 0])
    assert knn_top1(train, ids[train_labels], test, ids[test_labels], ks=(10,)) == expected


def test_a_class_without_train_images_is_an_error() -> None:
    train, (test, _) = clusters(0, 40), clusters(1, 10)
    assert knn_top1(*train, test, np.full(10, 77), ks=(5,)) == {5: 0.0}


def test_a_tie_goes_to_the_class_of_the_nearer_neighbour() -> None:
    angles = np.radians([40, 20, -20, -40])  # two classes with equal votes
    train = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    labels = np.array([1, 2, 1, 2])
    test = np.array([[np.cos(0.01), np.sin(0.01)], [np.cos(0.01), -np.sin(0.01)]], np.float32)
    truth = np.array([2, 1])
    flat = knn_top1(train, labels, test, truth, ks=(4,), temperature=1e9)
    assert flat == {4: 1.0}


def test_equal_train_rows_go_by_their_order() -> None:
    train = np.ones((4, 3), np.float32)
    labels = np.array([3, 1, 2, 0])
    assert knn_top1(train, labels, train[:1], labels[:1], ks=(1, 4)) == {1: 1.0, 4: 1.0}


def test_a_feature_of_zeros_is_classified_like_any_other() -> None:
    train, labels = clusters(0, 30)
    found = knn_top1(train, labels, np.zeros((1, 8), np.float32), labels[:1], ks=(1,))
    assert found == {1: 1.0}  # all cosines are zero, and the first row comes first


def test_the_top_five_are_the_classes_with_the_most_votes() -> None:
    """Of 7 classes at the same place, those with more images have more votes."""
    counts = [1, 2, 3, 4, 5, 6, 7]
    labels = np.repeat(np.arange(7), counts)
    train = np.ones((len(labels), 4), np.float32)
    for label, count in enumerate(counts):
        found = accuracies(train, labels, train[:1], np.array([label]), ks=(28,))[28]
        assert found == (float(count == 7), float(count >= 3))


def test_a_class_without_a_vote_is_not_among_the_top_five() -> None:
    train, labels = clusters(0, 40)
    found = accuracies(train, labels, train[:1], np.array([labels[0] + 1]), ks=(1,))
    assert found == {1: (0.0, 0.0)}


@pytest.mark.parametrize(("train", "test"), [(0, 5), (5, 0)])
def test_no_images_is_an_error_that_says_so(train: int, test: int) -> None:
    with pytest.raises(UserError, match=f"but {train} and {test} could be read"):
        knn_top1(*clusters(0, train), *clusters(1, test), ks=(10,))
