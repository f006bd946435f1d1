"""A run of two processes that is interrupted again and again, and what that costs it."""

import collections
import contextlib
import dataclasses
import itertools
import os
import pathlib
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import processes
import programs
from PIL import Image
from test_train import CONFIG

from sop_jax.data.sources import DigitsSource
from sop_jax.monitor.metrics import read_metrics
from sop_jax.training import checkpoint

TROUBLE_SECONDS = 5.0  # for which a disk is full, or a folder cannot be written to or is gone
DISK_MB = 64
BRIEFLY = 0.2  # seconds between two looks at the run
STALLED = 900.0  # seconds after which a run without a new step hangs


def write_digits(folder: pathlib.Path) -> None:
    """Writes scikit-learn's digits as a folder of PNGs: SPLIT/CLASS/NUMBER.png."""
    for split in ("train", "val"):
        source = DigitsSource(split)
        for name in source.class_names:
            (folder / split / name).mkdir(parents=True)
        for index, (image, label) in enumerate(zip(source.images, source.labels, strict=True)):
            file = folder / split / source.class_names[label] / f"{index:04}.png"
            Image.fromarray(image).save(file)


@contextlib.contextmanager
def disk(folder: pathlib.Path) -> Iterator[bool]:
    """Mounts a small file system of its own at a new folder; yields whether that was possible."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", folder]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


def unprivileged(command: Sequence[object]) -> list[object]:
    """Returns a command without a superuser's right to write where permissions forbid it.

    The user stays the same, because others may not be allowed to run this Python.
    """
    if os.geteuid() != 0:
        return list(command)
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--", *command]


class Haul:
    """A run of two processes, of which one program at a time exists.

    Args:
        workdir: the folder of the run.
        data: the folder of images.
        settings: the settings that differ from those of the recipe for digits.
    """

    def __init__(
        self, workdir: pathlib.Path, data: pathlib.Path, settings: Mapping[str, Any]
    ) -> None:
        self.workdir, self.data = workdir, data
        self.log = workdir.parent / f"{workdir.name}.log"
        own = {"data.source": "folder", "data.path": data, "data.workers": 1, "mesh.data": 0}
        flags = [f"--config.{name}={value}" for name, value in {**settings, **own}.items()]
        train = [sys.executable, "-m", "sop_jax.train", f"--config={CONFIG}"]
        self.command = [*train, f"--workdir={workdir}", "--wait=600", *flags]
        self.running: list[programs.Program] = []

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        """A context in which both processes run; on leaving it, what is left of them is killed."""
        with contextlib.ExitStack() as stack:
            self.running = [
                stack.enter_context(programs.start(unprivileged([*self.command, *flags]), self.log))
                for flags in processes.among(2)
            ]
            yield

    def codes(self) -> list[int] | None:
        """Returns the exit codes of both processes, or None while one of them runs."""
        codes = [program.popen.poll() for program in self.running]
        return None if None in codes else [code for code in codes if code is not None]

    def workers(self) -> list[int]:
        """Returns the numbers of the input workers."""
        sessions = [program.popen.pid for program in self.running]
        return programs.processes(
            lambda each: each.session in sessions and "spawn_main" in each.command
        )

    def step(self) -> int:
        """Returns the last step that was logged; 0 if there is none."""
        return max((row["step"] for row in read_metrics(self.workdir)), default=0)

    def says(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def undisturbed(self, step: int) -> None:
        """Runs both processes until they have saved this step, which is their first checkpoint."""
        self.command.append(f"--config.checkpoint_every={step}")
        with self.started():

            def saved() -> bool:
                assert self.codes() is None, self.says()
                return checkpoint.latest_step(self.workdir) == step

            programs.wait_for(f"step {step}", saved, self.says, timeout=7200)


class Trouble(Protocol):
    """Interrupts a run, or makes its life hard for some seconds; returns when that is over."""

    def __call__(self, haul: Haul, rng: random.Random) -> None: ...


def asked_to_stop(haul: Haul, rng: random.Random) -> None:
    _signal([rng.choice(haul.running).popen.pid], signal.SIGTERM)


def process_killed(haul: Haul, rng: random.Random) -> None:
    _signal([rng.choice(haul.running).popen.pid], signal.SIGKILL)


def worker_killed(haul: Haul, rng: random.Random) -> None:
    found = haul.workers()
    _signal(rng.sample(found, min(1, len(found))), signal.SIGKILL)


def disk_full(haul: Haul, rng: random.Random) -> None:
    filler = haul.workdir.parent / "filler"
    until = time.monotonic() + TROUBLE_SECONDS
    with filler.open("wb") as file:
        while time.monotonic() < until:
            if free := shutil.disk_usage(filler).free:  # also what the run gives back
                with contextlib.suppress(OSError):
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, free)
            time.sleep(BRIEFLY / 4)
    filler.unlink()


def workdir_read_only(haul: Haul, rng: random.Random) -> None:
    folders = [haul.workdir, haul.workdir / "checkpoints"]
    modes = {folder: stat.S_IMODE(folder.stat().st_mode) for folder in folders if folder.exists()}
    for folder, mode in modes.items():
        folder.chmod(mode & ~0o222)
    time.sleep(TROUBLE_SECONDS)
    for folder, mode in modes.items():
        folder.chmod(mode)


def data_gone(haul: Haul, rng: random.Random) -> None:
    away = haul.data.with_name("away")
    haul.data.rename(away)
    time.sleep(TROUBLE_SECONDS)
    away.rename(haul.data)


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


TROUBLES: tuple[Trouble, ...] = (
    asked_to_stop,
    process_killed,
    worker_killed,
    disk_full,
    workdir_read_only,
    data_gone,
)
# The kinds that always end the run, sooner or later; the next trouble waits for that.
ENDING = {each.__name__ for each in (asked_to_stop, process_killed, worker_killed)}


@dataclasses.dataclass
class Interruption:
    """One trouble and what it did to the run.

    Attributes:
        kind: the name of the trouble.
        step: the last step that was logged before it, or before the run ended.
        began: when it began, by time.monotonic.
        codes: the exit codes of both processes, if they ended.
        lost: the number of steps that were done, and had to be done again.
        recovery: the seconds from its beginning until the run had saved a later step.
    """

    kind: str
    step: int
    began: float
    codes: list[int] | None = None
    lost: int = 0
    recovery: float = 0.0


def interrupt(
    haul: Haul,
    troubles: Sequence[Trouble],
    pauses: tuple[float, float],
    minutes: float,
    seed: int = 0,
) -> list[Interruption]:
    """Runs with one trouble after the other, and starts again whenever the run ends.

    Args:
        haul: the run, which is stopped when it has recovered from the last trouble.
        troubles: what happens to it, in a new order in every round.
        pauses: the shortest and the longest time in seconds from a recovery to the next trouble.
        minutes: the time after which there is no more trouble; 0 ends with the first round.
        seed: of the troubles and their order.
    """
    rng, began = random.Random(seed), time.monotonic()
    rounds = itertools.count() if minutes else range(1)
    order = (trouble for _ in rounds for trouble in rng.sample(troubles, len(troubles)))
    found, due, stopped = list[Interruption](), began, False
    latest, moved = 0, began  # the step at the last look, and when it changed
    following: Trouble | None = next(order)
    while True:
        with haul.started():
            while (codes := haul.codes()) is None:
                now, step = time.monotonic(), haul.step()
                saved = checkpoint.latest_step(haul.workdir) or 0
                latest, moved = (step, now) if step != latest else (latest, moved)
                assert now - moved < STALLED, f"no step for {STALLED} s: {haul.says()}"
                for each in found:
                    over = each.codes is not None or each.kind not in ENDING
                    if not each.recovery and over and saved > each.step:
                        each.recovery = now - each.began
                        due = now + rng.uniform(*pauses)
                if minutes and now - began > 60 * minutes:
                    following = None
                if step and now >= due and not stopped and all(each.recovery for each in found):
                    if stopped := following is None:
                        asked_to_stop(haul, rng)
                    else:
                        found.append(Interruption(following.__name__, step, now))
                        following(haul, rng)
                        following = next(order, None)
                time.sleep(BRIEFLY)
        if stopped:
            assert codes == [130, 130], haul.says()
            return found
        assert found and found[-1].codes is None, f"ended with {codes} for no reason: {haul.says()}"
        last = found[-1]
        last.codes, last.step, last.recovery = codes, haul.step(), 0.0
        last.lost = last.step - (checkpoint.latest_step(haul.workdir) or 0)


def figures(found: Sequence[Interruption]) -> list[str]:
    """Returns a line for each kind of trouble, and one for all of them."""
    lines = []
    for kind in [*dict.fromkeys(each.kind for each in found), "all"]:
        these = [each for each in found if kind in (each.kind, "all")]
        codes = collections.Counter(str(each.codes) for each in these)
        ends = ", ".join(f"{count} x {code}" for code, count in codes.items())
        lost = [each.lost for each in these]
        lines.append(
            f"{kind}: {len(these)}; steps lost {sum(lost)}, at most {max(lost)}; longest recovery "
            f"{max(each.recovery for each in these):.0f} s"
            + f"; ended with {ends}"
            * (kind != "all")
        )
    return lines
