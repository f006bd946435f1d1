"""The tools with which tasks measure one network."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import tqdm
from etils import epath
from jax.sharding import Mesh

from sop_jax.data.decode import decoding
from sop_jax.data.sources import Source, identity, stamp
from sop_jax.errors import Interrupted
from sop_jax.evaluation import store as store_lib
from sop_jax.evaluation.features import Extract, make_extractor, whole
from sop_jax.evaluation.scales import make_scale_extractor
from sop_jax.evaluation.store import Disk, Memory, Store, key_of, size_on_disk
from sop_jax.evaluation.task import Bar, Features, Subject, View
from sop_jax.monitor.corrupt import print_corrupt
from sop_jax.parallel import hosts
from sop_jax.parallel.interruption import Interruption
from sop_jax.training.owner import owned

WAIT = 24 * 3600.0  # seconds, for another command that computes the same features
ADVICE = "Wait until it ends, stop it, or keep the features elsewhere with --cache=DIR"
LINES_SECONDS = 30.0  # between two lines of progress where there is no terminal


@dataclasses.dataclass
class Toolbox:
    """The tools of a command; see `task.Tools`.

    Attributes:
        subject: the network.
        mesh: the devices.
        folder: where the task leaves files; None if nothing can be written.
        seed: the seed of all random draws.
        cache: the folder of the cache of features; None to keep none.
        interruption: reports signals to stop; None if they end the process.
        extractors: the compiled extractors by view; they can be shared with other toolboxes of the
            same network.
        kept: the features of this process by source and view, which are not computed again; None
            to keep none in memory.
        corrupt: called with a source and its records that cannot be read.
        shown: whether progress is shown.
    """

    subject: Subject
    mesh: Mesh
    folder: epath.Path | None = None
    seed: int = 0
    cache: epath.Path | None = None
    interruption: Interruption | None = None
    extractors: dict[View, Extract] = dataclasses.field(default_factory=dict)
    kept: dict[tuple[str, View], Features] | None = None
    corrupt: Callable[[Source, list[int]], Any] | None = None
    shown: bool = True

    def features(self, source: Source, view: View) -> Features:
        """Returns the features of this process's share of a source, computed once per view."""
        known = (source.digest, view)
        if self.kept is not None and known in self.kept:
            return self.kept[known]
        found = self._compute(source, view)
        if self.kept is not None:
            self.kept[known] = found
        return found

    def _compute(self, source: Source, view: View) -> Features:
        if view not in self.extractors:
            subject = self.subject
            self.extractors[view] = (
                make_scale_extractor(subject.model, subject.config, view)
                if view.longest
                else make_extractor(subject.model, subject.config, self.mesh, view)
            )
        if self.cache is None:
            found = self._extract(source, view, Memory())
        else:
            facts = self._facts(source, view)
            folder = self.cache / key_of(facts)
            with owned(folder, WAIT, ADVICE):
                found = self._extract_to_disk(source, view, folder, facts)
        if found.corrupt:
            self._report(source, found.corrupt)
        return found

    def _extract(self, source: Source, view: View, store: Store) -> Features:
        with contextlib.closing(store), self.progress(len(source), "image") as bar:
            return self.extractors[view](
                self.subject.params, source, bar.update, self.between, store
            )

    def _extract_to_disk(
        self, source: Source, view: View, folder: epath.Path, facts: Mapping[str, Any]
    ) -> Features:
        store = Disk(folder / f"{jax.process_index()}", facts, store_lib.KEEP_SECONDS)
        known = store.filled()
        found = self._extract(source, view, store)
        if store.filled() > known:
            size = size_on_disk(store.folder) / 1e6
            self.note(
                f"kept the features of {len(source)} images in {store.folder} ({size:.1f} MB); "
                "they can be deleted, or not kept with --cache=off"
            )
        else:
            self.note(f"took the features of {len(source)} images from {store.folder}")
        return found

    def _facts(self, source: Source, view: View) -> dict[str, Any]:
        """Returns all that the features depend on."""
        return {
            "weights": self.subject.fingerprint,
            "images": {**identity(source), "stamp": stamp(source)},
            "view": view._asdict(),
            "decoding": decoding(self.subject.config.data, source)._asdict(),
            "versions": hosts.versions(),
            "processes": jax.process_count(),
        }

    def _report(self, source: Source, corrupt: list[int]) -> None:
        if self.corrupt is not None:
            self.corrupt(source, corrupt)
        elif hosts.is_first():
            print_corrupt(source, corrupt, decoding(self.subject.config.data, source))

    def whole(self, features: Features) -> Features:
        """Returns the same features with the rows of all processes."""
        return whole(features)

    def between(self, save: bool = False) -> bool:
        """Raises Interrupted if asked to stop, and returns whether to save; see `task.Tools`."""
        if self.interruption is None:
            return save
        answer = self.interruption.poll(save)
        if answer.stop:
            kept = "; what was computed is kept, and the same command continues"
            raise Interrupted(
                self.interruption.starting or f"interrupted{kept if self.cache else ''}"
            )
        if answer.save:
            self.interruption.saved()
        return answer.save

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A context that raises Interrupted when asked to stop; see `task.Tools`."""
        if self.interruption is None or hosts.several():
            yield
            return
        try:
            with self.interruption.at_once():
                if self.interruption.asked:  # before the context, so that no exception was raised
                    raise KeyboardInterrupt
                yield
        except KeyboardInterrupt:
            kept = "; the features are kept, and the same command computes the rest again"
            raise Interrupted(f"interrupted{kept if self.cache else ''}") from None

    def progress(self, total: int, unit: str) -> AbstractContextManager[Bar]:
        """Returns a context that shows a progress bar, in the first process."""
        shown = self.shown and hosts.is_first()
        return tqdm.tqdm(
            total=total,
            unit=unit,
            dynamic_ncols=True,
            disable=not shown,
            leave=False,
            mininterval=0.1 if sys.stderr.isatty() else LINES_SECONDS,
        )

    def note(self, text: str) -> None:
        """Prints a line for people, in the first process."""
        if self.shown and hosts.is_first():
            tqdm.tqdm.write(text, file=sys.stderr)
