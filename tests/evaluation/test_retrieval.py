"""Image retrieval from files to scores, and the neighbours of the images of a folder."""

import csv
import os
import pathlib
import pickle
import signal
from typing import Any

import jax
import numpy as np
import pytest
from datasets import picture, write_small_set
from etils import epath
from PIL import Image
from subjects import toolbox, untrained
from test_evaluate import make_run

from sop_jax.data.revisited import read_truth
from sop_jax.errors import Interrupted, UserError
from sop_jax.evaluate import Asked, evaluate
from sop_jax.evaluation import ranking, retrieval, scales, store
from sop_jax.evaluation.scales import at_scales
from sop_jax.evaluation.tables import text_of
from sop_jax.evaluation.task import View
from sop_jax.evaluation.tools import Toolbox
from sop_jax.parallel.mesh import make_mesh

PATCH, LONGEST = 4, 32


def measure(
    data: dict[str, str], box: Toolbox | None = None, **changes: Any
) -> tuple[dict[str, Any], str]:
    """Returns the result and the table of the task with a few settings changed."""
    settings = retrieval.settings()
    settings.update(longest=LONGEST, **changes)
    inputs = retrieval.open_inputs(untrained().config, settings, data)
    result = retrieval.run(untrained(), inputs, settings, box or toolbox())
    return result, text_of(retrieval.table(result, settings))


def view(**changes: Any) -> View:
    return retrieval.view(untrained().config, retrieval.settings())._replace(
        longest=LONGEST, **changes
    )


def write_oxford(root: pathlib.Path, shared: pathlib.Path) -> pathlib.Path:
    """Writes Oxford's ground truth, with images that look like the queries they are right for."""
    name = "roxford5k"
    folder = root / name
    (folder / "jpg").mkdir(parents=True)
    content = (shared / "data" / "fixtures" / "revisitop" / name / f"gnd_{name}.pkl").read_bytes()
    (folder / f"gnd_{name}.pkl").write_bytes(content)
    images, queries, truth = read_truth(folder / f"gnd_{name}.pkl")
    shows = np.full(len(images), len(queries))
    for query, known in enumerate(truth):
        shows[np.concatenate([known.easy, known.hard])] = query
    pictures = [np.asarray(picture(number, 12, 16)) for number in range(len(queries) + 1)]
    rng = np.random.default_rng(0)
    for image, number in zip([*images, *queries], [*shows, *range(len(queries))], strict=True):
        noise = rng.integers(-40, 41, pictures[number].shape)
        pixels = (pictures[number] + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "jpg" / f"{image}.jpg")
    return folder


@pytest.mark.medium
def test_oxford_from_files_to_scores(tmp_path, shared):
    """Compares with features that are computed in the order of the files and looked up by name."""
    folder = write_oxford(tmp_path, shared)
    one_scale = dict(sets=("roxford5k",), scales=(1.0,))
    result, text = measure(dict(path=str(tmp_path)), **one_scale)
    source = retrieval.folder_source(str(folder / "jpg"))
    what = view(scales=(1.0,))
    vectors = retrieval.unit(toolbox().features(source, what).vectors).astype(float)
    by_name = dict(zip(source.files, vectors, strict=True))
    images, queries, truth = read_truth(folder / "gnd_roxford5k.pkl")
    known, asked = (np.stack([by_name[f"{x}.jpg"] for x in names]) for names in (images, queries))
    ranks = np.argsort(-known @ asked.T, axis=0)
    for protocol in "EMH":
        expected = ranking.evaluate(ranks, truth, protocol)
        found = result["roxford5k"][protocol]
        assert found["map"] == pytest.approx(expected.mean_ap, abs=1e-9)
        assert list(found.values())[1:] == pytest.approx(expected.mean_precision, abs=1e-9)
    easy = result["roxford5k"]["E"]["map"]
    chance = np.stack([np.random.default_rng(q).permutation(len(images)) for q in range(70)], 1)
    assert easy > 5 * ranking.evaluate(chance, truth, "E").mean_ap
    assert text.splitlines()[1].split()[:3] == ["roxford5k", "E", f"{100 * easy:.2f}"]
    assert "42.70" in text  # the paper's


def test_both_sets_are_ranked(tmp_path):
    for name in ("roxford5k", "rparis6k"):
        write_small_set(tmp_path, name)
    result, text = measure(dict(path=str(tmp_path)))
    assert list(result) == ["roxford5k", "rparis6k"]
    assert result["rparis6k"]["M"] == {"map": 1.0, "mp_at_1": 1.0, "mp_at_5": 1.0, "mp_at_10": 1.0}
    assert "rparis6k" in text and "SOP" in text


def test_a_truth_that_was_changed_is_measured_again(tmp_path):
    make_run(tmp_path / "run", (3,))
    folder = write_small_set(tmp_path)
    changes, data = dict(sets=("roxford5k",), longest=LONGEST), dict(path=str(tmp_path))
    asked = Asked(workdir=tmp_path / "run")
    first = evaluate(asked, "retrieval", changes, data)
    assert first["data"]["path"] == str(tmp_path)
    assert first["data"]["roxford5k"]["images"] == 6
    path = folder / "gnd_roxford5k.pkl"
    truth = pickle.loads(path.read_bytes())
    for entry in truth["gnd"]:
        entry.update(easy=entry["hard"], hard=entry["easy"])
    truth["gnd"][0].update(easy=[5])
    path.write_bytes(pickle.dumps(truth))
    second = evaluate(asked, "retrieval", changes, data)
    assert second["results"] != first["results"]


@pytest.mark.medium
def test_neighbours_that_were_deleted_are_found_again(tmp_path):
    make_run(tmp_path / "run", (3,))
    write_folder(tmp_path / "images")
    changes = dict(images=str(tmp_path / "images"), neighbours=3, longest=LONGEST)
    asked = Asked(workdir=tmp_path / "run")
    first = evaluate(asked, "retrieval", changes)
    assert first["data"]["path"] == changes["images"] and first["data"]["source"] == "folder"
    (sheet,) = (tmp_path / "run" / "evaluations").glob("*/neighbours.png")
    sheet.unlink()
    assert evaluate(asked, "retrieval", changes)["results"] == first["results"]
    assert sheet.exists()


def test_unreadable_images_are_ranked_last_and_such_queries_are_left_out(tmp_path):
    folder = write_small_set(tmp_path)
    (folder / "jpg" / "i0.jpg").write_bytes(b"broken")
    (folder / "jpg" / "q1.jpg").write_bytes(b"broken")
    result, text = measure(dict(path=str(tmp_path)), sets=("roxford5k",))
    found = result["roxford5k"]
    assert found["unreadable"] == 2 and "roxford5k: 2 images could not be read" in text
    # Query 0 finds its easy image behind the other four, as its hard one is ignored; query 2 first.
    assert found["E"]["mp_at_1"] == 0.5
    assert found["E"]["map"] == pytest.approx((1 / 2 * (0 + 1 / 5) + 1) / 2)


def test_missing_data_is_described_before_anything_is_computed(tmp_path):
    with pytest.raises(UserError, match="--data.path is missing. Expected the revisited Oxford"):
        measure({})
    with pytest.raises(UserError, match=r"--data\.source=tfds would have no effect"):
        measure(dict(path=str(tmp_path), source="tfds"))
    write_small_set(tmp_path)
    with pytest.raises(UserError, match=r"there is no .*rparis6k/gnd_rparis6k\.pkl"):
        measure(dict(path=str(tmp_path)))


# Scales


@pytest.mark.parametrize("shape", [(60, 80), (500, 3), (2, 2), (4, 400)])
def test_every_image_has_patches_whatever_its_shape(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    found = at_scales(image, LONGEST, scales.SCALES, PATCH)
    assert found and all(side and side % PATCH == 0 for x in found for side in x.shape[:2])
    assert at_scales(image, LONGEST, (0.1,), PATCH)  # less than a patch: the image at scale 1


def write_folder(root: pathlib.Path, count: int = 7) -> list[str]:
    """Writes pairs of similar images of different sizes, and returns their names."""
    names = [f"{'ab'[i % 2]}/{i}.png" for i in range(count)]
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i // 2, 24 + 8 * (i % 3), 32).save(root / name)
    return names


def features(root: pathlib.Path, devices: int, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:devices])
    extract = scales.make_scale_extractor(untrained().model, untrained().config, view())
    return extract(untrained().params, retrieval.folder_source(str(root))).vectors


@pytest.mark.medium
def test_the_number_of_devices_changes_nothing(tmp_path, monkeypatch):
    write_folder(tmp_path)
    found = [features(tmp_path, devices, monkeypatch) for devices in (1, 3, 8)]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.medium
def test_an_interrupted_extraction_computes_nothing_twice(tmp_path):
    write_folder(tmp_path / "images", 2 * scales.GROUP * 8 + 3)
    source = retrieval.folder_source(str(tmp_path / "images"))
    whole = toolbox().features(source, view())

    class Stopped(Exception):
        pass

    def stop() -> None:
        raise Stopped

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(store, "KEEP_SECONDS", 0.0)
        box = toolbox(cache=epath.Path(tmp_path / "cache"))
        monkeypatch.setattr(box, "between", stop)
        with pytest.raises(Stopped):
            box.features(source, view())
        read: list[int] = []
        load = scales.load_image

        def counted(share: Any, record: int, *rest: Any) -> np.ndarray:
            read.append(record)
            return load(share, record, *rest)

        monkeypatch.setattr(scales, "load_image", counted)
        again = toolbox(cache=epath.Path(tmp_path / "cache")).features(source, view())
        assert sorted(read) == list(range(scales.GROUP * 8, len(source)))
        read.clear()
        cached = toolbox(cache=epath.Path(tmp_path / "cache")).features(source, view())
        assert not read
    for found in (again, cached):
        np.testing.assert_array_equal(found.vectors, whole.vectors)


@pytest.mark.slow
def test_a_command_that_is_interrupted_and_resumed_finds_the_same(tmp_path, monkeypatch):
    make_run(tmp_path / "run", (3,))
    write_folder(tmp_path / "images", 2 * scales.GROUP * 8 + 3)
    changes = dict(images=str(tmp_path / "images"), neighbours=3, longest=LONGEST)

    def neighbours(out: str) -> str:
        asked = Asked(workdir=tmp_path / "run", out=tmp_path / out)
        evaluate(asked, "retrieval", changes)
        (path,) = (tmp_path / out / "evaluations").glob("*/neighbours.csv")
        return path.read_text()

    whole = neighbours("whole")
    read: list[int] = []
    load = scales.load_image

    def counted(share: Any, record: int, *rest: Any) -> np.ndarray:
        read.append(record)
        if len(read) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return load(share, record, *rest)

    monkeypatch.setattr(scales, "load_image", counted)
    monkeypatch.setattr(store, "KEEP_SECONDS", 0.0)
    with pytest.raises(Interrupted):
        neighbours("resumed")
    assert not list((tmp_path / "resumed" / "evaluations").glob("*.json"))
    read[:] = [-1] * 5  # so that there is no second signal
    assert neighbours("resumed") == whole
    assert sorted(read[5:]) == list(range(scales.GROUP * 8, 2 * scales.GROUP * 8 + 3))


# Neighbours in a folder


def by_hand(vectors: np.ndarray, k: int) -> np.ndarray:
    cosines = vectors.astype(float) @ vectors.astype(float).T
    np.fill_diagonal(cosines, -2)
    return np.argsort(-cosines, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("count, k", [(2, 1), (9, 3), (40, 12)])
def test_neighbours_are_those_of_all_pairs(count, k, monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK", 16)
    vectors = retrieval.unit(np.random.default_rng(0).normal(size=(count, 5)).astype(np.float32))
    for mesh in (make_mesh(1), make_mesh()):
        found = retrieval.find_neighbours(vectors, k, mesh)
        np.testing.assert_array_equal(found.rows, by_hand(vectors, k))
        own = np.take_along_axis(vectors @ vectors.T, found.rows, axis=1)
        np.testing.assert_allclose(found.cosines, own, atol=1e-5)


def test_neighbours_of_a_folder_as_csv_and_contact_sheet(tmp_path):
    names = sorted(write_folder(tmp_path / "images"))
    (tmp_path / "images" / "a" / "broken.png").write_bytes(b"")
    box = toolbox(tmp_path / "out")
    result, text = measure({}, box, images=str(tmp_path / "images"), neighbours=3, rows=4)
    files = ["neighbours.csv", "neighbours.png"]
    assert result == {"images": 7, "neighbours": 3, "unreadable": 1, "files": files}
    assert "3 nearest neighbours of each of 7 images are in neighbours.csv, neigh" in text
    assert "1 images could not be" in text
    with open(tmp_path / "out" / "neighbours.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["query"] for row in rows[::3]] == names
    for start in range(0, len(rows), 3):
        mine = rows[start : start + 3]
        assert [row["rank"] for row in mine] == ["1", "2", "3"]
        cosines = [float(row["cosine"]) for row in mine]
        assert cosines == sorted(cosines, reverse=True) and cosines[0] <= 1 + 1e-5
        others = [row["neighbour"] for row in mine]
        assert len(set(others)) == 3 and mine[0]["query"] not in others
    with Image.open(tmp_path / "out" / "neighbours.png") as sheet:
        assert sheet.width > 4 * 128 and sheet.height > 4 * 128


def test_fewer_images_than_neighbours(tmp_path):
    write_folder(tmp_path, 3)
    result, text = measure({}, images=str(tmp_path), neighbours=50)
    assert result["neighbours"] == 2
    assert result["files"] == [] and "were not saved" in text  # there is no folder


def test_folders_that_cannot_be_searched(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        measure({}, images=str(tmp_path / "nowhere"))
    write_folder(tmp_path, 1)
    with pytest.raises(UserError, match="contains one image only"):
        measure({}, images=str(tmp_path))
    for flag in ("path", "source", "test_split"):
        with pytest.raises(UserError, match=f"--data.{flag}=x would have no effect with --eval.im"):
            measure({flag: "x"}, images=str(tmp_path))
    with pytest.raises(UserError, match="--eval.sets=.* would have no effect: --eval.images is"):
        measure({}, images=str(tmp_path), sets=("roxford5k",))
    with pytest.raises(UserError, match="--eval.rows=3 would have no effect: it is for --eval.im"):
        measure(dict(path=str(tmp_path)), rows=3)
    with pytest.raises(UserError, match=r"--eval\.images= *: it is empty|Expected the revisited"):
        measure({}, images="")
