"""Batches: their content, which is a function of the seed and the step only."""

import contextlib
import io
import itertools
import multiprocessing
import os
import pathlib
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sop_jax.config import paper
from sop_jax.data import pipeline
from sop_jax.data.sources import Source, open_source
from sop_jax.errors import UserError


def small_config(**changes: Any) -> Any:
    """Returns settings for digits at 16 and 8 pixels in batches of 8."""
    config = paper()
    config.batch_size = 8
    config.data.update(source="digits", workers=0, threads=0)
    config.augment.update(global_size=16, local_size=8, local_crops=2)
    config.update_from_flattened_dict(changes)
    return config


def digits(split: str = "train") -> Source:
    source = open_source(small_config().data, split)
    assert source is not None
    return source


def folder(root: pathlib.Path, count: int, broken: dict[int, bytes] | None = None) -> Source:
    """Makes `count` images, 0000.png and so on; those in `broken` have other contents."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 12, 12, 3), np.uint8)
    for i, picture in enumerate(pixels):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        (root / f"{i:04}.png").write_bytes((broken or {}).get(i, buffer.getvalue()))
    source = open_source(
        small_config(**{"data.source": "folder", "data.path": str(root)}).data, "train"
    )
    assert source is not None
    return source


def take(source: Source, config: Any, count: int, **where: Any) -> list[dict[str, np.ndarray]]:
    batches = pipeline.train_batches(source, config, 4, **where)
    with contextlib.closing(batches):
        return [dict(batch) for batch in itertools.islice(batches, count)]


def assert_same(first: list[dict[str, np.ndarray]], second: list[dict[str, np.ndarray]]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_what_a_batch_holds():
    (batch,) = take(digits(), small_config(), 1)
    shapes = {key: (value.shape, str(value.dtype)) for key, value in batch.items()}
    assert shapes == {
        "global_views": ((8, 2, 16, 16, 3), "uint8"),
        "local_views": ((8, 2, 8, 8, 3), "uint8"),
        "mask": ((8, 2, 4, 4), "bool"),
        "index": ((8,), "int32"),
        "corrupt": ((8,), "int32"),
    }
    assert (batch["corrupt"] == -1).all() and batch["mask"].any()


def test_three_global_crops():
    (batch,) = take(digits(), small_config(**{"augment.global_crops": 3}), 1)
    assert batch["global_views"].shape == (8, 3, 16, 16, 3)
    assert batch["mask"].shape == (8, 3, 4, 4) and batch["mask"][:, 2].any()
    assert len({view.tobytes() for view in batch["global_views"][0]}) == 3


def test_no_local_crops():
    (batch,) = take(digits(), small_config(**{"augment.local_crops": 0}), 1)
    assert batch["local_views"].shape == (8, 0, 8, 8, 3)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [4, 5, 6, 7], [6, 7], [1, 3, 5, 7]])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.medium)])
def test_a_host_makes_its_rows_of_the_same_global_batches(rows, workers):
    whole = take(digits(), small_config(), 3, start_step=3)
    config = small_config(**{"data.workers": workers})
    part = take(digits(), config, 3, start_step=3, rows=rows)
    assert_same(part, [{key: value[rows] for key, value in batch.items()} for batch in whole])


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads):
    expected = take(digits(), small_config(), 6)
    assert_same(take(digits(), small_config(**{"data.threads": threads}), 6), expected)


@pytest.mark.medium
def test_processes_change_nothing(tmp_path):
    source = folder(tmp_path, 30, {7: b"broken"})
    expected = take(source, small_config(), 8, start_step=2)  # the whole second epoch
    config = small_config(**{"data.workers": 2, "data.threads": 1})
    assert_same(take(source, config, 8, start_step=2), expected)
    assert 7 in np.concatenate([batch["corrupt"] for batch in expected])


def test_a_batch_in_pieces_is_the_same_batch(monkeypatch):
    expected = take(digits(), small_config(), 3)
    monkeypatch.setattr(pipeline, "PIECE_BYTES", 6000)  # pieces of two images
    assert_same(take(digits(), small_config(), 3), expected)


def test_resume_is_a_step_number():
    stream = take(digits(), small_config(), 8)
    for step in (1, 5):
        assert_same(take(digits(), small_config(), 3, start_step=step), stream[step : step + 3])


def test_resume_in_a_late_epoch(tmp_path):
    source = folder(tmp_path, 11)
    stream = take(source, small_config(), 12)
    assert_same(take(source, small_config(), 2, start_step=10), stream[10:])


def test_each_epoch_is_another_permutation(tmp_path):
    source = folder(tmp_path, 20)
    batches = take(source, small_config(batch_size=10), 6)
    epochs = np.concatenate([batch["index"] for batch in batches]).reshape(3, 20)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(20), (3, 1)))
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()


def test_views_are_new_every_epoch_and_differ_within_a_batch(tmp_path):
    source = folder(tmp_path, 1)  # a data set that is smaller than the batch is repeated
    first, second = take(source, small_config(), 2)
    views = np.concatenate([first["global_views"], second["global_views"]]).reshape(32, -1)
    assert len(np.unique(views, axis=0)) == 32
    masks = np.concatenate([first["mask"], second["mask"]]).reshape(32, -1)
    assert len(np.unique(masks, axis=0)) > 10


def test_the_seed_decides():
    first, second = (take(digits(), small_config(seed=seed), 1) for seed in (0, 1))
    assert (first[0]["index"] != second[0]["index"]).any()
    assert_same(take(digits(), small_config(seed=1), 1), second)


def test_settings_reach_the_views():
    still = {"augment.global_scale": (1.0, 1.0), "augment.flip": 0.0, "augment.jitter": 0.0}
    still |= {"augment.grayscale": 0.0, "augment.blur": (0.0, 0.0, 0.0), "augment.solarize": 0.0}
    still |= {"augment.global_size": 32, "mask.kind": "random", "mask.ratio": (0.5, 0.5)}
    source = digits()
    (batch,) = take(source, small_config(**still), 1)
    whole = np.stack([source[int(index)] for index in batch["index"]])
    # at scale 1 nearly every draw falls back to the whole image
    assert (batch["global_views"][:, 0] == whole).all((1, 2, 3)).mean() > 0.5
    assert (batch["mask"].sum((2, 3)) == 32).all()
    (batch,) = take(source, small_config(**{"mask.none": 1.0}), 1)
    assert not batch["mask"].any()


@pytest.mark.medium
@pytest.mark.parametrize("start", [{"mask.start_steps": 3}, {"mask.start_epochs": 1.5}], ids=str)
def test_masks_start_at_a_step_and_nothing_else_changes(tmp_path, start):
    source = folder(tmp_path, 16)  # two steps per epoch
    always = take(source, small_config(), 5)
    expected = [dict(batch) for batch in always]
    for batch in expected[:3]:
        assert batch["mask"].any()
        batch["mask"] = np.zeros_like(batch["mask"])
    config = small_config(**start)
    assert_same(take(source, config, 5), expected)
    assert_same(take(source, config, 4, start_step=1), expected[1:])
    assert_same(take(source, config, 2, start_step=3), always[3:])


def test_broken_records_are_replaced_and_flagged(tmp_path):
    good = io.BytesIO()
    Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(good, "JPEG")
    broken = {2: b"", 5: good.getvalue()[:-200], 6: b"no image", 9: b"\x89PNG\r\n\x1a\n"}
    source = folder(tmp_path, 12, broken)
    batches = take(source, small_config(batch_size=12), 3)
    for batch in batches:
        assert set(batch["corrupt"]) == {-1, *broken}
        intact = batch["corrupt"] == -1
        assert not set(batch["index"]) & set(broken)
        expected = set(range(12)) - set(broken)
        assert set(batch["index"][intact]) == expected and intact.sum() == len(expected)
    used = [dict(zip(batch["corrupt"], batch["index"], strict=True)) for batch in batches]
    assert all(row[index] == used[0][index] for row in used for index in broken)
    assert [source.name(index)[-8:] for index in broken] == [f"{i:04}.png" for i in broken]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_of_rubbish_is_one_clear_error(tmp_path, workers):
    source = folder(tmp_path, 3, dict.fromkeys(range(3), b"rubbish"))
    with pytest.raises(UserError, match=r"\.png.*data\.path"):
        take(source, small_config(**{"data.workers": workers, "data.threads": workers}), 1)


@pytest.mark.medium
@pytest.mark.parametrize("workers", [0, 2])
def test_close_ends_threads_and_processes(monkeypatch, workers):
    monkeypatch.setattr(pipeline, "PIECE_BYTES", 6000)  # several pieces, as for large images
    config = small_config(**{"data.workers": workers, "data.threads": 2})
    batches = pipeline.train_batches(digits(), config, 4)
    next(batches)
    assert len(multiprocessing.active_children()) == workers
    assert workers or grain_threads()
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() or grain_threads():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def grain_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("grain")]


SCRIPT = """
from sop_jax.config import paper
from sop_jax.data import pipeline, sources
if __name__ == "__main__":
    config = paper()
    config.batch_size = 16
    config.data.update(source="digits", workers=2, threads=1)
    batches = pipeline.train_batches(sources.open_source(config.data, "train"), config, 16)
    for _ in range(3):
        batch = next(batches)
    batches.close()
"""


@pytest.mark.medium
def test_a_process_that_closed_its_batches_ends_silently(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py")]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_eval_batches_cover_the_source_in_order(tmp_path):
    source = digits("test")
    batches = list(pipeline.eval_batches(source, 10, 8, 100))
    assert [batch["image"].shape for batch in batches] == [(100, 8, 8, 3)] * 4
    assert batches[0]["image"].dtype == np.uint8 and batches[0]["index"].dtype == np.int32
    index = np.concatenate([batch["index"] for batch in batches])
    valid = np.concatenate([batch["valid"] for batch in batches])
    np.testing.assert_array_equal(index[valid], np.arange(360))
    np.testing.assert_array_equal(valid, np.arange(400) < 360)
    last = batches[-1]
    assert (last["index"][60:] == 359).all() and (last["image"][60:] == last["image"][59]).all()
    assert all((batch["corrupt"] == -1).all() for batch in batches)
    (whole,) = pipeline.eval_batches(source, 32, 32, 360)
    np.testing.assert_array_equal(whole["image"], np.stack([source[i] for i in range(360)]))


def test_eval_batches_flag_broken_records(tmp_path):
    source = folder(tmp_path, 5, {1: b"broken", 4: b""})
    first, second = pipeline.eval_batches(source, 8, 8, 3)
    np.testing.assert_array_equal(first["corrupt"], [-1, 1, -1])
    np.testing.assert_array_equal(first["valid"], [True, False, True])
    np.testing.assert_array_equal(second["corrupt"], [-1, 4, -1])
    np.testing.assert_array_equal(second["valid"], [True, False, False])
    assert not first["image"][1].any() and first["image"][0].any()


def test_eval_batches_can_be_left_early_and_refuse_large_crops():
    threads = threading.active_count()
    batches = pipeline.eval_batches(digits(), 8, 8, 16)
    next(batches)
    batches.close()
    assert threading.active_count() == threads
    with pytest.raises(UserError, match="crop of 16 pixels"):
        pipeline.eval_batches(digits(), 8, 16, 4)
