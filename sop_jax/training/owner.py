"""Who may write to a workdir: one run at a time, which an owner file in it names.

The file is created by an operation that fails if it exists, and shows a sign of life every BEAT
seconds. A start that finds it waits, is refused, or takes over from an owner that is dead: at once
if that was a process of this machine, else after DEAD seconds without a sign of life, for which
no two clocks are compared. An owner that was taken for dead finds out before its next save.
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
BEAT = 10  # between two signs of life
DEAD = 60  # without one, until the owner is taken for dead by another machine
POLL = 0.5  # between two looks at the file
SURE = 1  # that an owner needs no new proof that it still is one
ROUND = 2  # after which the processes of a run tell each other how their wait stands


class Claim(NamedTuple):
    """An owner file.

    Attributes:
        key: which one: its number on a disk, its generation in a bucket.
        text: what it says.
        sign: another one after each sign of life.
    """

    key: Any
    text: str
    sign: Any


class Disk:
    """Owner files on a local or network disk.

    To take over from number n is to create number n + 1, so that nothing but the exclusive creation
    of a file needs to be atomic; it is on NFS, too.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.made: list[pathlib.Path] = []  # folders
        self.times: tuple[int, int] = (0, 0)  # of the last change of the folder, before and after

    def look(self) -> Claim | None:
        """The owner file that counts, that of the highest number; None if there is none."""
        while (numbers := self._numbers()) and (number := max(numbers)):
            with contextlib.suppress(FileNotFoundError), self._path(number).open() as file:
                # Of the open file: what NFS remembers of its attributes may be old.
                return Claim(number, file.read(), (number, os.fstat(file.fileno()).st_mtime_ns))
        return None

    def take(self, found: Claim | None, text: str) -> Claim | None:
        """Puts a new file in place of `found`; None if somebody else was faster."""
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
            path.unlink()  # one that was not judged dead
            return None
        for other in others:
            self._path(other).unlink(missing_ok=True)
        self.times = before, self.folder.stat().st_mtime_ns
        return Claim(number, text, None)

    def beat(self, claim: Claim) -> Claim | None:
        """Touches the file, which needs no space; None if it is no longer the one that counts."""
        if self._text(claim.key) != claim.text or max(self._numbers()) != claim.key:
            return None
        os.utime(self._path(claim.key))
        return claim

    def drop(self, claim: Claim) -> None:
        """Removes the file and what was made for it; an unchanged folder keeps its time."""
        if self._text(claim.key) == claim.text:
            before, after = self.times
            untouched = self.folder.stat().st_mtime_ns == after
            self._path(claim.key).unlink()
            if untouched:
                os.utime(self.folder, ns=(self.folder.stat().st_atime_ns, before))
        for folder in reversed(self.made):
            with contextlib.suppress(OSError):  # there is something in it
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
    """The owner file in a Cloud Storage bucket, which only changes on top of a known generation."""

    KEY = "owner.json"

    def __init__(self, address: str) -> None:
        bucket, _, path = address.removeprefix("gs://").partition("/")
        spec = {"driver": "gcs", "bucket": bucket, "path": f"{path.strip('/')}/"}
        self.store: Any = tensorstore.KvStore.open(spec).result()
        self.absent = b""  # the generation of an object that does not exist

    def look(self) -> Claim | None:
        """The owner file; None if there is none."""
        read = self.store.read(self.KEY).result()
        if read.state != "value":
            self.absent = read.stamp.generation
            return None
        return Claim(read.stamp.generation, read.value.decode(), read.stamp.generation)

    def take(self, found: Claim | None, text: str) -> Claim | None:
        """Puts a new file in place of `found`; None if somebody else was faster."""
        return self._write(found.key if found else self.absent, text)

    def beat(self, claim: Claim) -> Claim | None:
        """Writes the same text again, as a new generation; None if the file has changed."""
        if written := self._write(claim.key, claim.text):
            return written
        found = self.look()  # a write may have succeeded although its answer was lost
        return found if found and found.text == claim.text else None

    def drop(self, claim: Claim) -> None:
        """Removes the file."""
        self.store.write(self.KEY, None, if_equal=claim.key).result()

    def _write(self, generation: bytes, text: str) -> Claim | None:
        written = self.store.write(self.KEY, text.encode(), if_equal=generation).result()
        return Claim(written.generation, text, None) if written.generation else None


Store = Disk | Bucket


class Owner:
    """The right of this process to write to a workdir, or that of the first one of its run."""

    def __init__(self, workdir: epath.Path, store: Store, claim: Claim | None) -> None:
        self.workdir, self.store, self.claim = workdir, store, claim
        self.lost = False  # whether another process is known to have taken over
        self.proved = 0.0  # when it was last certain that none has
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        if claim:
            self._thread.start()

    def check(self) -> None:
        """Raises UserError if another process has taken over the workdir; does nothing elsewhere.

        To be called in the process that writes, before what must not be written twice.
        """
        if self.claim is None or (self.proved and time.monotonic() - self.proved < SURE):
            return
        self._beat()
        if self.lost:
            found = self.store.look()
            what = f"{_who(found.text)} has taken over" if found else "its owner file has gone from"
            raise UserError(
                f"this run has stopped, because {what} {self.workdir}. A process that gives no "
                f"sign of life for {DEAD} s is taken for dead; was this one paused?"
            )

    def release(self) -> None:
        """Gives the workdir back."""
        if self.claim is None:
            return
        self._end.set()
        self._thread.join(BEAT)  # which a network that is away may hold up
        with contextlib.suppress(Exception):  # the next owner finds a dead process
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
            with contextlib.suppress(Exception):  # a full disk, a network that is away for a while
                self._beat()


@contextlib.contextmanager
def owned(workdir: epath.Path, wait: float) -> Iterator[Owner]:
    """A context in which this run, and no other one, writes to a workdir; all processes enter it.

    Args:
        workdir: the folder, which need not exist; if nothing is written, it is left as it was.
        wait: seconds to wait for another run that has it. Somewhat longer if it is not known
            whether that one is alive.

    Raises:
        UserError: on every process: another run has the workdir, or it cannot be written to.
    """
    store = open_store(workdir)
    owner = Owner(workdir, store, None)
    search = Search(workdir, store, wait) if hosts.is_first() else None
    try:
        while True:
            found, trouble = search.go_on() if search else (None, "")
            if found:
                owner = Owner(workdir, store, found)
            told = json.loads(hosts.tell(json.dumps([bool(found), trouble])))
            if told[1]:
                raise UserError(told[1])
            if told[0]:
                break
        yield owner
    finally:
        owner.release()


def open_store(workdir: epath.Path) -> Store:
    """The store of the owner files of a workdir."""
    text = str(workdir)
    return Bucket(text) if text.startswith("gs://") else Disk(pathlib.Path(text))


class Search:
    """What the first process of a run does until it owns the workdir."""

    def __init__(self, workdir: epath.Path, store: Store, wait: float) -> None:
        self.workdir, self.store, self.wait = workdir, store, wait
        self.began = time.monotonic()
        self.text = json.dumps(_record())
        self.seen: Claim | None = None  # the owner that is watched
        self.since = 0.0  # when its last sign of life was seen
        self.alive = False  # whether it is known to be alive
        self.waited_for = ""  # the owner that a person was told of

    def go_on(self) -> tuple[Claim | None, str]:
        """Tries for ROUND seconds; returns the claim that was made, and what speaks against it."""
        until = time.monotonic() + ROUND
        try:
            while True:
                found = self.store.look()
                if found is None or self._is_dead(found):
                    if claim := self.store.take(found, self.text):
                        return claim, ""
                elif self.alive and time.monotonic() - self.began >= self.wait:
                    return None, self._refusal(found)
                if time.monotonic() >= until:
                    return None, ""
                time.sleep(POLL)
        except Exception as error:  # each kind of storage has its own
            return None, f"cannot write to {self.workdir}: {error}; choose another --workdir"

    def _is_dead(self, found: Claim) -> bool:
        now, record = time.monotonic(), _read(found.text)
        here = record.get("place") == _place()
        if self.seen is None or self.seen.text != found.text:
            self.seen, self.since, self.alive = found, now, False
            if not here:
                self._tell(found, f"watching for {DEAD} s at most whether it is alive")
        elif self.seen.sign != found.sign:
            self.seen, self.since, self.alive = found, now, True
        if here:
            self.alive = _started(int(record["pid"])) == record["started"]
        if self.alive and self.wait and self.waited_for != found.text:
            self.waited_for = found.text
            self._tell(found, f"waiting for {self.wait:g} s at most until it ends")
        return not self.alive if here else now - self.since > DEAD

    def _tell(self, found: Claim, what: str) -> None:
        print(f"{_who(found.text)} has {self.workdir}: {what}", file=sys.stderr, flush=True)

    def _refusal(self, found: Claim) -> str:
        return (
            f"{_who(found.text)} has {self.workdir}, and one run at a time can write there. Wait "
            "until it ends (--wait=SECONDS does), stop it, or choose another --workdir"
        )


def _record() -> dict[str, Any]:
    """What an owner file says of this process."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "started": _started(os.getpid()),
        "place": _place(),
        "token": uuid.uuid4().hex,
    }


def _read(text: str) -> dict[str, Any]:
    """What an owner file says; nothing while it is being written."""
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
    """Where a process number means this process: this start of this machine, this container."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """When a process was started, as its system counts; None if there is none, or only a zombie."""
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
