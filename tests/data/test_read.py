"""Records whose storage fails: they are read again, and never counted as corrupt."""

import errno
import os
import pathlib
import threading
import time

import numpy as np
import pytest
from test_decode import config_of, encoded, photo

from sop_jax.data import pipeline, read
from sop_jax.data.decode import decoding
from sop_jax.data.sources import Source, open_source
from sop_jax.errors import Interrupted, Unreachable, UserError


class Shaky:
    """A source of one record, whose first reads fail with an error of the file system."""

    class_names, has_labels, digest = None, False, "shaky"

    def __init__(self, number: int, times: float) -> None:
        self.number, self.times = number, times

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> bytes:
        if self.times > 0:
            self.times -= 1
            raise OSError(self.number, os.strerror(self.number))
        return b"record"

    def name(self, index: int) -> str:
        return "/data/image.png"

    def label(self, index: int) -> int:
        raise ValueError("there are no labels")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "FIRST_WAIT", 0.001)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOENT, errno.ENOTCONN])
def test_storage_that_fails_for_a_while_is_waited_for(number):
    assert read.read(Shaky(number, 3), 0, 60.0) == b"record"


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_storage_that_does_not_come_back_stops_the_run(seconds):
    with pytest.raises(Unreachable, match=r"cannot be reached: /data/image\.png.*Input/output"):
        read.read(Shaky(errno.EIO, np.inf), 0, seconds)


def test_a_file_that_may_not_be_read_stops_the_run_at_once():
    with pytest.raises(UserError, match=r"/data/image\.png cannot be read: Permission denied"):
        read.read(Shaky(errno.EACCES, np.inf), 0, 60.0)


def test_the_wait_can_be_ended():
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(Interrupted, match="could not be reached"):
        read.read(Shaky(errno.EIO, np.inf), 0, 600.0, stop)


def test_a_link_to_nothing_is_corrupt_and_says_so(tmp_path):
    os.symlink(tmp_path / "gone.jpg", tmp_path / "a.png")
    source = folder(tmp_path, 1)
    with pytest.raises(ValueError, match=r"a link to .*gone\.jpg, which does not exist"):
        read.read(source, 1, 60.0)


def folder(root: pathlib.Path, count: int) -> Source:
    for i in range(count):
        (root / f"{i}.png").write_bytes(encoded(photo(), "PNG"))
    source = open_source(config_of(root).data, "train")
    assert source is not None
    return source


@pytest.mark.parametrize("workers", [0, 1])
def test_a_listed_file_that_is_gone_is_not_replaced_in_training(tmp_path, workers):
    source = folder(tmp_path, 8)
    os.remove(tmp_path / "3.png")
    changes = {"data.workers": workers, "data.threads": workers}
    config = config_of(tmp_path, **changes)
    config.data.retry_seconds = 0.0
    batches = pipeline.train_batches(source, config, 4)
    with pytest.raises(UserError, match=r"cannot be reached: .*3\.png.*No such file"):
        next(batches)
    batches.close()


def test_a_listed_file_that_is_gone_is_not_left_out_of_an_evaluation(tmp_path):
    source = folder(tmp_path, 8)
    config = config_of(tmp_path)
    config.data.retry_seconds = 0.0
    os.remove(tmp_path / "3.png")
    with pytest.raises(UserError, match=r"cannot be reached: .*3\.png.*No such file"):
        list(pipeline.eval_batches(source, 12, 12, 4, decoding(config.data, source)))


def test_an_evaluation_that_is_ended_does_not_wait_for_storage(tmp_path):
    source = folder(tmp_path, 8)
    batches = pipeline.eval_batches(source, 12, 12, 2)
    next(batches)
    for i in range(8):
        os.remove(tmp_path / f"{i}.png")
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 50  # it would wait for 60


def test_a_disk_that_comes_back_gives_the_same_batches(tmp_path):
    source = folder(tmp_path, 8)
    config = config_of(tmp_path)
    expected = next(pipeline.train_batches(source, config, 4))
    os.rename(tmp_path / "3.png", tmp_path / "away")
    threading.Timer(0.5, os.rename, (tmp_path / "away", tmp_path / "3.png")).start()
    again = next(pipeline.train_batches(source, config, 4))
    for key in expected:
        np.testing.assert_array_equal(again[key], expected[key])
