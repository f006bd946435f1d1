"""The interface of evaluations: a task, the network that it measures, and the tools it uses."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Float16, Float32, Int32

from sop_jax.data.sources import Source
from sop_jax.errors import UserError
from sop_jax.evaluation.tables import Part
from sop_jax.models import Model, Params
from sop_jax.rules import Rule

POOLS = ("cls", "patches", "cls_patches")  # iBOT's --avgpool_patchtokens 0, 1 and 2


class View(NamedTuple):
    """What the features of an image are: how it is scaled, and which tokens are taken.

    Attributes:
        resize: the shorter side after scaling, in pixels.
        crop: the side of the centre crop, in pixels.
        interpolation: the filter, "bicubic" or "bilinear", both antialiased (Pillow's).
        layers: n, the number of last layers.
        pool: what stands for the image. `cls` is [CLS] of the n layers after the final norm, oldest
            first; `cls_patches` is the same, then the mean of the patches of the last layer after
            the norm; `patches` is the mean of these patches before the norm, for n = 1.
        patches: whether the tokens of patches, after the final norm, are kept as well.
        longest: if not 0, the image is not cropped, but reduced so that its longer side has at most
            this many pixels (Pillow's `thumbnail`).
        scales: the features are averaged over the image at these sizes; only with `longest`.
    """

    resize: int = 256
    crop: int = 224
    interpolation: str = "bicubic"
    layers: int = 1
    pool: str = "cls"
    patches: bool = False
    longest: int = 0
    scales: tuple[float, ...] = (1.0,)


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of the images of a source that could be read, in the source's order.

    With several processes, each has the rows of its own share of the records; see `Tools.whole`.

    Attributes:
        vectors: the features of images.
        patches: the L tokens of patches, row by row; None unless the view has them.
        index: the record that each row belongs to.
        labels: the labels of these records, -1 where there are none.
        corrupt: the records of the whole source that could not be read, which have no row.
    """

    vectors: Float32[np.ndarray, "n D"]
    patches: Float16[np.ndarray, "n L D"] | None
    index: Int32[np.ndarray, " n"]
    labels: Int32[np.ndarray, " n"]
    corrupt: list[int]


class Subject(NamedTuple):
    """The network that is evaluated.

    Attributes:
        name: describes it to people.
        config: the settings of the run that it comes from.
        model: the network.
        params: its parameters, replicated over the devices.
        fingerprint: identifies the network, its settings and its parameters.
        step: the step of the checkpoint; None for a file of weights.
        absent: the paths of parameters that were not in the weights, so that they are random.
    """

    name: str
    config: ml_collections.ConfigDict
    model: Model
    params: Params
    fingerprint: str
    step: int | None
    absent: tuple[str, ...] = ()


@runtime_checkable
class Bar(Protocol):
    """A progress bar."""

    def update(self, count: int, /) -> Any:
        """Advances the bar by a number of units."""


@runtime_checkable
class Tools(Protocol):
    """What a task uses while it runs. All processes call each method at the same points.

    Attributes:
        mesh: the devices.
        folder: where the task leaves files and unfinished work; None where nothing is written.
        seed: the seed of all random draws of the task.
    """

    mesh: Mesh
    folder: epath.Path | None
    seed: int

    def features(self, source: Source, view: View) -> Features:
        """Returns the features of this process's share of a source, computed once per view."""

    def whole(self, features: Features) -> Features:
        """Returns the same features with the rows of all processes."""

    def between(self, save: bool = False) -> bool:
        """Raises Interrupted, on all processes, if one of them was asked to stop.

        Args:
            save: whether this process asks all to save their unfinished work.

        Returns:
            Whether to save it now; the same on all processes.
        """

    def at_once(self) -> AbstractContextManager[None]:
        """Returns a context that raises Interrupted as soon as the process is asked to stop.

        It is for long calls of other packages, which cannot call `between`. With several processes
        it does nothing, because all must stop together.
        """

    def progress(self, total: int, unit: str) -> AbstractContextManager[Bar]:
        """Returns a context that shows a progress bar, in the first process."""

    def note(self, text: str) -> None:
        """Prints a line for people, in the first process."""


@runtime_checkable
class Open(Protocol):
    """Opens the data of a task, in seconds; raises UserError for all that the user can fix."""

    def __call__(
        self,
        config: ml_collections.ConfigDict,
        settings: ml_collections.ConfigDict,
        data: Mapping[str, Any],
    ) -> Any:
        """Returns the inputs of the task.

        Args:
            config: the settings of the run whose network is evaluated. The task may change
                `config.data` to the data that it uses.
            settings: the settings of the task.
            data: the flags that name data, without the prefix `data.`, see `data.named.name_data`.
        """


@runtime_checkable
class Run(Protocol):
    """Measures a network; raises Interrupted between batches."""

    def __call__(
        self, subject: Subject, inputs: Any, settings: ml_collections.ConfigDict, tools: Tools
    ) -> dict[str, Any]:
        """Returns numbers that JSON can hold, the same on all processes; None where undefined."""


class Task(NamedTuple):
    """An evaluation.

    Attributes:
        does: what it measures, in a few words, for `--help`.
        expects: the data that it needs, its layout, and where to download it.
        settings: returns the settings with their defaults, which are the papers'.
        rules: the values that each setting can have.
        open: opens the data.
        run: measures a network.
        table: maps the result and the settings to tables for people, with the papers' numbers.
        place: the name of its data's folder below `--root`.
        sources: maps the inputs to the sources by split, which identify the data in the results.
        paths: the settings that are paths, in which `~` is expanded.
        free: the settings that do not affect the results.
        view: maps the settings of the run and of the task to what the features are; None if the
            task has no such settings.
        during_training: whether it is fast enough to run on the way; its result must be flat.
    """

    does: str
    expects: str
    settings: Callable[[], ml_collections.ConfigDict]
    rules: Mapping[str, Rule]
    open: Open
    run: Run
    table: Callable[[Mapping[str, Any], ml_collections.ConfigDict], Sequence[Part]]
    place: str
    sources: Callable[[Any], Mapping[str, Source | None]]
    paths: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    view: Callable[[ml_collections.ConfigDict, ml_collections.ConfigDict], View] | None = None
    during_training: bool = False


def check_unused(
    task: Task, settings: ml_collections.ConfigDict, names: Iterable[str], reason: str
) -> None:
    """Checks that settings which have no effect have their defaults.

    Args:
        task: the task.
        settings: its settings.
        names: those that have no effect.
        reason: why, for the message.

    Raises:
        UserError: one of them differs from its default.
    """
    defaults = task.settings()
    for name in names:
        if settings[name] != defaults[name]:
            raise UserError(
                f"--eval.{name}={settings[name]} would have no effect: {reason}; expected its "
                "default; leave it out"
            )
