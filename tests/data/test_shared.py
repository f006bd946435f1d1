"""Worker processes share one copy of a large data set, which is deleted after the last of them."""

import gc
import multiprocessing
import os
import pathlib
import pickle
import threading
from typing import Any

import numpy as np
import pytest

from sop_jax.data.folders import FolderSource
from sop_jax.data.sources import Source

N = 200_000


def large() -> FolderSource:
    files = [f"n{i % 1000:08}/ILSVRC2012_train_{i:08}.JPEG" for i in range(N - 1)]
    files.append("n00000999/caf\udce9.JPEG")
    names = [f"n{i:08}" for i in range(1000)]
    return FolderSource("/data", files, (np.arange(N) % 1000).astype(np.int32), names)


def look(source: Source, answer: Any) -> None:
    places = (0, 7, N - 1, -1)
    answer.send(([source.files[i] for i in places], [source.label(i) for i in places]))  # type: ignore[attr-defined]


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="anonymous files are Linux's")
def test_a_worker_gets_less_than_a_tenth_of_a_megabyte_of_a_large_folder() -> None:
    source = large()
    assert len(pickle.dumps(source)) < 100_000
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=look, args=(source, there))
    child.start()
    files, labels = here.recv()
    child.join()
    assert files == [source.files[i] for i in (0, 7, N - 1, -1)]
    assert labels == [0, 7, 999, 999]
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(source))))
    assert list(again.files[5:9]) == source.files[5:9] and len(again) == N
    with pytest.raises(IndexError):
        again.files[N]


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="anonymous files are Linux's")
def test_threads_that_start_workers_share_one_copy_which_goes_with_its_source() -> None:
    def copies() -> int:
        files = [str(link) for link in pathlib.Path("/proc/self/fd").glob("*") if link.is_symlink()]
        return len({os.stat(file).st_ino for file in files if "sop_jax" in os.readlink(file)})

    gc.collect()  # what earlier tests left
    before, source = copies(), large()
    pickles: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: pickles.append(pickle.dumps(source))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(pickles)) == 1
    assert copies() == before + 3  # the names, their ends, and the labels
    del source, threads, thread
    gc.collect()
    assert copies() == before
