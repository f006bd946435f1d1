"""Which run may write to a workdir: one at a time, named by an owner file in the workdir.

The file is created by an operation that fails if the file exists, and is changed every BEAT
seconds as a heartbeat. A run that finds the file of another one waits, is refused, or takes over
if the owner is dead. A process of the same machine is known to be dead at once; any other counts
as dead after DEAD seconds without a heartbeat, measured with the clock of the waiting process
only. An owner that was wrongly taken for dead finds out before its next save.
"""

import contextlib
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

import tensorstore
from etils import epath

from sop_jax.errors import UserError
from sop_jax.parallel import hosts

# All in seconds.
BEAT = 10  # between two heartbeats
DEAD = 60  # without a heartbeat, an owner on another machine counts as dead
POLL = 0.5  # between two checks of the file
SURE = 1  # for which a check of the ownership remains valid
ROUND = 2  # between two exchanges of the processes that wait


class Claim(NamedTuple):
    """An owner file.

    Attributes:
        key: its identity: the number of the file on a disk, its generation in a bucket.
        text: its content.
        sign: a value that changes with each heartbeat.
    """

    key: Any
    text: str
    sign: Any


class Disk:
    """Owner files on a local or network disk.

    A run takes over from number n by creating number n + 1, so that only the exclusive creation of
    a file needs to be atomic, which it is on NFS too.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.made: list[pathlib.Path] = []  # the folders that were created
        self.times: tuple[int, int] = (0, 0)  # the folder's change time before and after the file

    def look(self) -> Claim | None:
        """Returns the valid owner file, that of the highest number, or None if there is none."""
        while (numbers := self._numbers()) and (number := max(numbers)):
            with contextlib.suppress(FileNotFoundError), self._path(number).open() as file:
                # The time of the open file, since NFS may have cached old attributes of the path.
                return Claim(number, file.read(), (number, os.fstat(file.fileno()).st_mtime_ns))
        return None

    def take(self, found: Claim | None, text: str) -> Claim | None:
        """Replaces the file `found` with a new one; returns None if another process was first."""
        self.made += [p for p in (*reversed(self.folder.parents), self.folder) if not p.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        before = self.folder.stat().st_mtime_ns
        number = found.key + 1 if found else 1
        path = self._path(number)
        try:
            with path.open("x") as file:
                file.write(text)
        except FileExistsError:
            return None
        except OSError:
            path.unlink(missing_ok=True)
            raise
        others = {other: self._text(other) for other in self._numbers() if other != number}
        if any(found is None or (found.key, found.text) != other for other in others.items()):
            path.unlink()  # another process, which is not known to be dead, has a file too
            return None
        for other in others:
            self._path(other).unlink(missing_ok=True)
        self.times = before, self.folder.stat().st_mtime_ns
        return Claim(number, text, None)

    def beat(self, claim: Claim) -> Claim | None:
        """Touches the file, which needs no disk space; returns None if it is no longer valid."""
        if self._text(claim.key) != claim.text or max(self._numbers()) != claim.key:
            return None
        os.utime(self._path(claim.key))
        return claim

    def drop(self, claim: Claim) -> None:
        """Removes the file and empty folders made for it; restores the folder's time if unused."""
        if self._text(claim.key) == claim.text:
            before, after = self.times
            untouched = self.folder.stat().st_mtime_ns == after
            self._path(claim.key).unlink()
            if untouched:
                os.utime(self.folder, ns=(self.folder.stat().st_atime_ns, before))
        for folder in reversed(self.made):
            with contextlib.suppress(OSError):  # the folder is not empty
                folder.rmdir()

    def _path(self, number: int) -> pathlib.Path:
        return self.folder / f"owner-{number}.json"

    def _numbers(self) -> list[int]:
        names = [path.stem.removeprefix("owner-") for path in self.folder.glob("owner-*.json")]
        return [int(name) for name in names if name.isdecimal()]

    def _text(self, number: int) -> str | None:
        with contextlib.suppress(FileNotFoundError):
            return self._path(number).read_text()
        return None


class Bucket:
    """The owner file in a Cloud Storage bucket; each write requires the generation it replaces."""

    KEY = "owner.json"

    def __init__(self, address: str) -> None:
        bucket, _, path = address.removeprefix("gs://").partition("/")
        spec = {"driver": "gcs", "bucket": bucket, "path": f"{path.strip('/')}/"}
        self.store: Any = tensorstore.KvStore.open(spec).result()
        self.absent = b""  # the generation of an object that does not exist

    def look(self) -> Claim | None:
        """Returns the owner file, or None if there is none."""
        read = self.store.read(self.KEY).result()
        if read.state != "value":
            self.absent = read.stamp.generation
            return None
        return Claim(read.stamp.generation, read.value.decode(), read.stamp.generation)

    def take(self, found: Claim | None, text: str) -> Claim | None:
        """Replaces the file `found` with a new one; returns None if another process was first."""
        return self._write(found.key if found else self.absent, text)

    def beat(self, claim: Claim) -> Claim | None:
        """Writes the same text as a new generation; returns None if another process wrote it."""
        if written := self._write(claim.key, claim.text):
            return written
        found = self.look()  # the write may have succeeded although its response was lost
        return found if found and found.text == claim.text else None

    def drop(self, claim: Claim) -> None:
        """Removes the file."""
        self.store.write(self.KEY, None, if_equal=claim.key).result()

    def _write(self, generation: bytes, text: str) -> Claim | None:
        written = self.store.write(self.KEY, text.encode(), if_equal=generation).result()
        return Claim(written.generation, text, None) if written.generation else None


Store = Disk | Bucket


class Owner:
    """The right of a run to write to a workdir, which is held by its first process."""

    def __init__(self, workdir: epath.Path, store: Store, claim: Claim | None) -> None:
        self.workdir, self.store, self.claim = workdir, store, claim
        self.lost = False  # whether another process is known to have taken over
        self.proved = 0.0  # when it was last certain that none has; 0 if it is uncertain
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        if claim:
            self._thread.start()

    def check(self) -> None:
        """Raises UserError if another process has taken over the workdir.

        The process that writes calls this before every write that must not happen twice; in all
        others it does nothing.
        """
        if self.claim is None or (self.proved and time.monotonic() - self.proved < SURE):
            return
        self._beat()
        if self.lost:
            found = self.store.look()
            what = f"{_who(found.text)} has taken over" if found else "its owner file is gone from"
            raise UserError(
                f"this run has stopped, because {what} {self.workdir}. Expected a heartbeat from "
                f"this process at least every {DEAD} s. If it was paused, start the same command "
                "again after the other run has ended"
            )

    def release(self) -> None:
        """Releases the ownership of the workdir."""
        if self.claim is None:
            return
        self._end.set()
        self._thread.join(BEAT)  # a network failure may block the thread for longer
        with contextlib.suppress(Exception):  # if this fails, the next run finds the owner dead
            if not self.lost:
                self.store.drop(self.claim)

    def _beat(self) -> None:
        with self._lock:
            assert self.claim is not None
            claim = None if self.lost else self.store.beat(self.claim)
            self.lost = claim is None
            self.claim, self.proved = claim or self.claim, time.monotonic() if claim else 0.0

    def _live(self) -> None:
        while not self._end.wait(BEAT) and not self.lost:
            with contextlib.suppress(Exception):  # such as a full disk or a network failure
                self._beat()


ADVICE = "Wait until it ends (--wait=SECONDS does so), stop it, or choose another --workdir"


@contextlib.contextmanager
def owned(workdir: epath.Path, wait: float, advice: str = ADVICE) -> Iterator[Owner]:
    """A context in which only this run writes to a workdir; all its processes enter it.

    Args:
        workdir: the folder, which need not exist; if nothing is written, it is left as it was.
        wait: the seconds to wait for another run that owns the workdir. The wait is somewhat
            longer if it is not known whether that run is alive.
        advice: what to do if another run owns the workdir.

    Raises:
        UserError: on every process: another run owns the workdir, or it cannot be written to.
    """
    store = open_store(workdir)
    owner = Owner(workdir, store, None)
    search = Search(workdir, store, wait, advice) if hosts.is_first() else None
    try:
        while True:
            found, trouble = search.advance() if search else (None, "")
            if found:
                owner = Owner(workdir, store, found)
            answer = json.loads(hosts.broadcast(json.dumps([bool(found), trouble])))
            if answer[1]:
                raise UserError(answer[1])
            if answer[0]:
                break
        yield owner
    finally:
        owner.release()


def open_store(workdir: epath.Path) -> Store:
    """Returns the store of the owner files of a workdir."""
    text = str(workdir)
    return Bucket(text) if text.startswith("gs://") else Disk(pathlib.Path(text))


class Search:
    """The attempts of the first process of a run to become the owner of the workdir."""

    def __init__(self, workdir: epath.Path, store: Store, wait: float, advice: str) -> None:
        self.workdir, self.store, self.wait, self.advice = workdir, store, wait, advice
        self.began = time.monotonic()
        self.text = json.dumps(_record())
        self.seen: Claim | None = None  # the owner that is being watched
        self.since = 0.0  # when its last heartbeat was seen
        self.alive = False  # whether it is known to be alive
        self.waited_for = ""  # the owner for which a wait was reported

    def advance(self) -> tuple[Claim | None, str]:
        """Tries for ROUND seconds; returns the claim if it succeeds, and an error if it cannot."""
        until = time.monotonic() + ROUND
        try:
            while True:
                found = self.store.look()
                if found and found.text == self.text:
                    return found, ""  # a write succeeded, although its response was lost
                if found is None or self._is_dead(found):
                    if claim := self.store.take(found, self.text):
                        return claim, ""
                elif self.alive and time.monotonic() - self.began >= self.wait:
                    return None, self._refusal(found)
                if time.monotonic() >= until:
                    return None, ""
                time.sleep(POLL)
        except Exception as error:  # each kind of storage raises its own errors
            return None, f"cannot write to {self.workdir}: {error}; choose another --workdir"

    def _is_dead(self, found: Claim) -> bool:
        now, record = time.monotonic(), _read(found.text)
        here = record.get("place") == _place()
        if self.seen is None or self.seen.text != found.text:
            self.seen, self.since, self.alive = found, now, False
            if not here:
                self._tell(found, f"checking for up to {DEAD} s whether that process is alive")
        elif self.seen.sign != found.sign:
            self.seen, self.since, self.alive = found, now, True
        if here:
            self.alive = _started(int(record["pid"])) == record["started"]
        if self.alive and self.wait and self.waited_for != found.text:
            self.waited_for = found.text
            self._tell(found, f"waiting for up to {self.wait:g} s until it ends")
        return not self.alive if here else now - self.since > DEAD

    def _tell(self, found: Claim, what: str) -> None:
        print(f"{_who(found.text)} owns {self.workdir}: {what}", file=sys.stderr, flush=True)

    def _refusal(self, found: Claim) -> str:
        return (
            f"{_who(found.text)} owns {self.workdir}, and only one run at a time can write there. "
            f"{self.advice}"
        )


def _record() -> dict[str, Any]:
    """Returns the content of an owner file of this process."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "started": _started(os.getpid()),
        "place": _place(),
        "token": uuid.uuid4().hex,
    }


def _read(text: str) -> dict[str, Any]:
    """Returns the content of an owner file; {} while it is being written."""
    with contextlib.suppress(ValueError):
        record = json.loads(text)
        if isinstance(record, dict) and {"host", "pid", "since", "started", "place"} <= set(record):
            return record
    return {}


def _who(text: str) -> str:
    record = _read(text)
    if not record:
        return "another process"
    return f"process {record['pid']} on {record['host']} (since {record['since']})"


def _place() -> str:
    """Returns what identifies the scope of a process number: this boot, in this container."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """Returns when a process was started, in its system's ticks; None if it is absent or a zombie.

    Returns "unknown" for a process that exists on a system other than Linux.
    """
    try:
        state, *rest = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else rest[18]
    except (FileNotFoundError, ProcessLookupError):
        if pathlib.Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"
