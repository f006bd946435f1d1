"""The revisited Oxford and Paris sets: what is read, without running it, and what is refused."""

import os
import pathlib
import pickle
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sop_jax.data.decode import decode, decoding
from sop_jax.data.revisited import open_revisited, read_truth
from sop_jax.errors import UserError

NAME = "roxford5k"


def content(**changes: Any) -> dict[str, Any]:
    """Returns a ground truth of two queries among three images."""
    entries = [dict(bbx=[0, 0, 9, 9], easy=[0], hard=[1, 2], junk=[]) for _ in range(2)]
    return dict(imlist=["a", "b", "c"], qimlist=["q", "r"], gnd=entries) | changes


def write_set(root: pathlib.Path, truth: Any, images: str = "abcqr") -> pathlib.Path:
    folder = root / NAME
    (folder / "jpg").mkdir(parents=True)
    (folder / f"gnd_{NAME}.pkl").write_bytes(pickle.dumps(truth))
    for number, name in enumerate(images):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(folder / "jpg" / f"{name}.jpg")
    return folder


def test_images_and_queries_are_in_the_order_of_the_lists(tmp_path):
    write_set(tmp_path, content(imlist=["c", "a", "b"]))
    found = open_revisited(tmp_path, NAME)
    assert found.images.files == ["c.jpg", "a.jpg", "b.jpg"]
    assert found.queries.files == ["q.jpg", "r.jpg"]
    assert found.images.name(0) == f"{tmp_path}/{NAME}/jpg/c.jpg"
    assert decode(found.images[1]).shape == (6, 8, 3)
    assert [known.hard.tolist() for known in found.truth] == [[1, 2], [1, 2]]
    assert found.truth[0].junk.dtype == np.int64 and not len(found.truth[0].junk)
    again = pickle.loads(pickle.dumps(found.images))
    assert again.digest == found.images.digest != found.queries.digest


def test_images_are_not_rotated_by_exif_as_in_the_official_code(tmp_path):
    from types import SimpleNamespace

    write_set(tmp_path, content())
    source = open_revisited(tmp_path, NAME).images
    settings = dict(white=0.0, max_pixels=10**6, retry_seconds=0.0)
    assert not decoding(SimpleNamespace(orientation="auto", **settings), source).upright
    assert decoding(SimpleNamespace(orientation="exif", **settings), source).upright


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_indices_can_be_arrays_and_numbers_of_numpy(tmp_path, protocol):
    arrays = dict(easy=np.array([2, 0], ">i4"), hard=[np.int64(1)], junk=np.zeros(0))
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps(content(gnd=[arrays, arrays]), protocol))
    _, _, truth = read_truth(path)
    assert truth[1].easy.tolist() == [2, 0] and truth[1].hard.tolist() == [1]
    assert not len(truth[1].junk)


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["HARM"],)


def test_nothing_in_the_file_is_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps(content(imlist=Harmful())))
    with pytest.raises(UserError, match=r"gnd\.pkl: it contains posix\.mkdir, .* nothing of the"):
        read_truth(path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(gnd=[]), "it has 2 queries, but the truth of 0"),
        (dict(imlist=[1, 2]), "imlist is not a list of names"),
        (dict(gnd=[dict(easy=[0], hard=[3], junk=[])] * 2), "hard has an index outside of 0 to 2"),
        (dict(gnd=[dict(easy=[0.5], hard=[], junk=[])] * 2), "easy is not a list of whole"),
        (dict(gnd=[dict(easy=[0], hard=[])] * 2), "it has no 'junk'"),
    ],
)
def test_a_damaged_ground_truth_is_described(tmp_path, changes, message):
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps(content(**changes)))
    with pytest.raises(UserError, match=message):
        read_truth(path)


def test_files_that_are_no_ground_truth(tmp_path):
    path = tmp_path / "gnd.pkl"
    for text in (b"", b"<html>", pickle.dumps([1, 2]), pickle.dumps(content())[:40]):
        path.write_bytes(text)
        with pytest.raises(UserError, match=r"is not a ground truth .* Download it again"):
            read_truth(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no .*gnd_roxford5k\.pkl\. Expected .*revisitop"):
        open_revisited(tmp_path, NAME)
    folder = write_set(tmp_path, content(), images="abr")
    with pytest.raises(UserError, match=r"does not contain c\.jpg, q\.jpg, which gnd_roxford5k"):
        open_revisited(tmp_path, NAME)
    for file in (folder / "jpg").iterdir():
        file.unlink()
    (folder / "jpg").rmdir()
    with pytest.raises(UserError, match="3 images and 2 queries, but no folder called jpg"):
        open_revisited(tmp_path, NAME)


def test_queries_are_identified_by_the_truth_too(tmp_path):
    folder = write_set(tmp_path, content())
    found = open_revisited(tmp_path, NAME)
    images, queries = found.images.stamp, found.queries.stamp
    assert (images, queries) == (found.images.stamp, found.queries.stamp)
    (folder / f"gnd_{NAME}.pkl").write_bytes(pickle.dumps(content(), protocol=2))
    found = open_revisited(tmp_path, NAME)
    assert found.images.stamp == images and found.queries.stamp != queries
    (folder / "jpg" / "a.jpg").write_bytes(b"another image")
    assert found.images.stamp != images
