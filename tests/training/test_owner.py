"""Only one run at a time writes to a workdir, whatever happens to the others."""

import contextlib
import http.server
import json
import os
import pathlib
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from etils import epath

from sop_jax.errors import UserError
from sop_jax.training import owner


class CloudStorage(http.server.BaseHTTPRequestHandler):
    """A stand-in for Cloud Storage with one object, including `ifGenerationMatch`."""

    objects: dict[str, tuple[int, bytes]]
    generations: Iterator[int]
    lock: threading.Lock

    def answer(self) -> None:
        url = urllib.parse.urlparse(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        name = query.get("name") or urllib.parse.unquote(url.path.rpartition("/o/")[2])
        with self.lock:
            generation, content = self.objects.get(name, (0, b""))
            wanted = query.get("ifGenerationMatch")
            if wanted is not None and int(wanted) != generation:
                return self.send(412)
            if self.command == "POST":
                generation = next(self.generations)
                self.objects[name] = generation, body
                answer = {"name": name, "bucket": "runs", "generation": str(generation)}
                return self.send(200, json.dumps(answer).encode())
            if not generation:
                return self.send(404)
            if self.command == "DELETE":
                del self.objects[name]
                return self.send(204)
        self.send(200, content, {"x-goog-generation": str(generation)})

    do_GET = do_POST = do_DELETE = answer

    def send(self, code: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Yields the address of an empty bucket in a stand-in for Cloud Storage."""
    state = {"objects": {}, "generations": iter(range(1, 10**6)), "lock": threading.Lock()}
    handler = type("Handler", (CloudStorage,), state)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
            patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
            yield "gs://runs"
        server.shutdown()
        thread.join()


@pytest.fixture(params=["disk", "bucket"])
def workdir(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> epath.Path:
    if request.param == "disk":
        return epath.Path(tmp_path / "run")
    return epath.Path(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "POLL", 0.02)
    monkeypatch.setattr(owner, "ROUND", 0.1)


def start(workdir: epath.Path, wait: float = 0.0) -> contextlib.AbstractContextManager[owner.Owner]:
    return owner.owned(workdir, wait)


def left_by(workdir: epath.Path, **changes: Any) -> owner.Claim:
    """Writes the owner file of a process that did not end normally."""
    claim = owner.open_store(workdir).take(None, json.dumps(owner._record() | changes))
    assert claim
    return claim


def owners(workdir: epath.Path) -> list[str]:
    """Returns the content of the owner file, or None if there is none."""
    found = owner.open_store(workdir).look()
    return [] if found is None else [found.text]


def test_a_second_start_is_refused_with_the_name_of_the_owner(workdir: epath.Path) -> None:
    with start(workdir) as first:
        with pytest.raises(UserError) as caught, start(workdir):
            pass
        first.check()
    message = str(caught.value)
    assert f"process {os.getpid()} on " in message and "(since " in message
    assert "--wait=SECONDS" in message and "another --workdir" in message
    with start(workdir) as third:
        third.check()
    assert owners(workdir) == []


def test_a_dead_process_of_this_machine_is_followed_at_once(workdir: epath.Path) -> None:
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
        left_by(workdir, pid=ended.pid)
        with start(workdir) as mine:
            mine.check()


def test_a_process_with_the_number_of_a_dead_one_is_not_the_owner(workdir: epath.Path) -> None:
    left_by(workdir, started="1")
    with start(workdir) as mine:
        mine.check()


@pytest.mark.skipif(not pathlib.Path("/proc").is_dir(), reason="needs /proc to tell zombies")
def test_a_process_that_only_waits_to_be_buried_is_dead(tmp_path: pathlib.Path) -> None:
    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as zombie:
        assert zombie.stdout and zombie.stdout.read() == b""  # it has closed its files
        until = time.monotonic() + 10
        while owner._started(zombie.pid) and time.monotonic() < until:
            time.sleep(0.01)
        assert owner._started(zombie.pid) is None


def test_an_owner_elsewhere_is_dead_without_a_sign_of_life(
    workdir: epath.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(owner, "DEAD", 0.5)
    left_by(workdir, place="elsewhere", host="other")
    began = time.monotonic()
    with start(workdir) as mine:
        assert time.monotonic() - began > 0.5
        mine.check()
    assert "on other (since" in capsys.readouterr().err


def test_an_owner_elsewhere_that_gives_a_sign_of_life_is_not_dead(
    workdir: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "DEAD", 60)
    store, claim = owner.open_store(workdir), left_by(workdir, place="elsewhere", host="other")
    timer = threading.Timer(0.3, lambda: store.beat(claim))
    timer.start()
    with pytest.raises(UserError, match="process .* on other .* owns "), start(workdir):
        pass
    timer.join()


def test_a_start_waits_for_an_owner_that_ends(
    workdir: epath.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, claim = owner.open_store(workdir), left_by(workdir)
    timer = threading.Timer(0.5, lambda: store.drop(claim))
    timer.start()
    with start(workdir, wait=60.0) as mine:
        assert not timer.is_alive() or owners(workdir)
        mine.check()
    timer.join()
    assert "waiting for up to 60 s" in capsys.readouterr().err


def test_a_wait_ends_when_it_is_over(workdir: epath.Path) -> None:
    left_by(workdir)
    with pytest.raises(UserError, match="one run at a time"), start(workdir, wait=0.3):
        pass
    assert len(owners(workdir)) == 1


def test_an_owner_that_was_taken_for_dead_stops_and_leaves_its_follower_alone(
    workdir: epath.Path,
) -> None:
    with start(workdir) as paused:
        store = owner.open_store(workdir)
        follower = store.take(store.look(), json.dumps(owner._record() | {"host": "other"}))
        assert follower
        with pytest.raises(UserError, match="this run has stopped, because process .* on other"):
            paused.check()
        assert paused.lost
    assert owners(workdir) == [follower.text]


def test_of_many_that_follow_a_dead_owner_at_once_one_succeeds(workdir: epath.Path) -> None:
    left_by(workdir, started="1")
    stores = [owner.open_store(workdir) for _ in range(8)]
    found = [store.look() for store in stores]
    together = threading.Barrier(len(stores))

    def follow(i: int) -> owner.Claim | None:
        together.wait()
        return stores[i].take(found[i], f"{i}")

    with ThreadPoolExecutor(len(stores)) as pool:
        claims = [claim for claim in pool.map(follow, range(len(stores))) if claim]
    assert [claim.text for claim in claims] == owners(workdir)


def test_of_many_that_start_at_once_one_succeeds(workdir: epath.Path) -> None:
    stores = [owner.open_store(workdir) for _ in range(8)]
    found = [store.look() for store in stores]
    together = threading.Barrier(len(stores))

    def take(i: int) -> owner.Claim | None:
        together.wait()
        return stores[i].take(found[i], f"{i}")

    with ThreadPoolExecutor(len(stores)) as pool:
        claims = [claim for claim in pool.map(take, range(len(stores))) if claim]
    assert [claim.text for claim in claims] == owners(workdir)


def test_a_claim_whose_response_was_lost_counts(
    bucket: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library repeats the write, whose precondition is then not met."""
    take = owner.Bucket.take

    def take_unheard(store: owner.Bucket, found: owner.Claim | None, text: str) -> None:
        take(store, found, text)

    monkeypatch.setattr(owner.Bucket, "take", take_unheard)
    workdir = epath.Path(f"{bucket}/{tmp_path.name}")
    with start(workdir) as running:
        running.check()
        assert len(owners(workdir)) == 1
    assert not owners(workdir)


def test_a_late_follower_finds_the_run_that_came_before_it(tmp_path: pathlib.Path) -> None:
    workdir = epath.Path(tmp_path)
    slow, dead = owner.Disk(tmp_path), left_by(workdir, started="1")
    found = slow.look()
    owner.Disk(tmp_path).drop(dead)  # it was not dead, but only slow
    with start(workdir) as new:
        assert slow.take(found, "late") is None
        new.check()
    assert owners(workdir) == []


def test_the_heart_beats_through_a_full_disk_and_ends_with_the_run(
    workdir: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "BEAT", 0.02)
    threads = threading.active_count()
    with start(workdir) as mine:
        beat, failures = mine.store.beat, iter([OSError(28, "full")] * 3)

        def failing(claim: owner.Claim) -> owner.Claim | None:
            for failure in failures:
                raise failure
            return beat(claim)

        monkeypatch.setattr(mine.store, "beat", failing)
        signs, until = set(), time.monotonic() + 20
        while len(signs) < 3 and time.monotonic() < until:
            found = owner.open_store(workdir).look()
            assert found
            signs.add(found.sign)
        assert len(signs) == 3
        mine.check()
        assert threading.active_count() > threads
    assert not mine._thread.is_alive()


def test_a_folder_is_left_as_it_was_where_nothing_is_written(tmp_path: pathlib.Path) -> None:
    with start(epath.Path(tmp_path / "a" / "b")):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()
    before = tmp_path.stat().st_mtime_ns
    time.sleep(0.02)
    with start(epath.Path(tmp_path)):
        assert tmp_path.stat().st_mtime_ns != before
    assert tmp_path.stat().st_mtime_ns == before
    with start(epath.Path(tmp_path)):
        (tmp_path / "metrics.jsonl").touch()
    assert tmp_path.stat().st_mtime_ns != before


def test_a_folder_that_cannot_be_written_to_is_reported(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="cannot write to .*run.*choose another --workdir"),
        start(epath.Path(tmp_path / "file" / "run")),
    ):
        pass
