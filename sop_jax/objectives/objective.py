"""The interface between the train step and a training objective.

A step embeds the views with the teacher, passes the embeddings of the whole batch to `teach`, and
minimises `loss` over the student's embeddings, one microbatch at a time. Everything that is
specific to a method is behind these functions: prototypes, memories, centers, temperatures.

In the shapes, B images have V views each, Q of them global; M patches are selected of each global
view. The backbone's features have D numbers, the head's embeddings d.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import ml_collections
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from sop_jax.rules import Rule
from sop_jax.schedules import Length, Schedule

Now = Mapping[str, Float[Array, ""] | float]  # the values of all schedules at the current step
Params = dict[str, Any]  # the parameters of the objective itself; {} if it learns none


class Outputs(NamedTuple):
    """The outputs of a network for the V views that it sees, the first Q of which are global.

    Attributes:
        cls: unit embeddings of [CLS], in float32.
        patches: unit embeddings of the selected patches of the global views, in float32.
        cls_features: the features of [CLS] before the head.
        patch_features: the features of the selected patches before the head.
    """

    cls: Float[Array, "B V d"]
    patches: Float[Array, "B Q M d"]
    cls_features: Float[Array, "B V D"]
    patch_features: Float[Array, "B Q M D"]


class PatchIndices(NamedTuple):
    """Which patches of the global views a network encodes, and which of them it embeds.

    Patches are numbered row by row from 0.

    Attributes:
        patches: the patches that the head embeds. Where some patches are dropped, these are
            positions among the kept ones.
        kept: the patches that enter the encoder; None for all. Only a ViT can drop patches.
    """

    patches: Int[Array, "B Q M"]
    kept: Int[Array, "B Q T"] | None = None


class Selection(NamedTuple):
    """The patches that student and teacher encode and embed.

    Attributes:
        student: the student's patches; the masked ones are replaced by the mask token.
        teacher: the teacher's patches; the teacher sees no mask.
        masked: which of the student's selected patches are masked.
    """

    student: PatchIndices
    teacher: PatchIndices
    masked: Bool[Array, "B Q M"]


@runtime_checkable
class Init(Protocol):
    """Initializes an objective."""

    def __call__(self, key: Key[Array, ""]) -> tuple[Params, Any]:
        """Returns the objective's parameters, and what it carries from step to step.

        The parameters learn by gradient and are averaged in the teacher as the network's are.
        """


@runtime_checkable
class Select(Protocol):
    """Selects the patches of a batch."""

    def __call__(self, mask: Bool[Array, "B Q h w"], keys: Key[Array, " B"]) -> Selection:
        """Returns the patches that both networks encode and embed.

        Args:
            mask: the masked patches of each global view, on its grid of h x w patches.
            keys: a key for each image, so that what it draws does not depend on the others.
        """


@runtime_checkable
class Teach(Protocol):
    """Makes the targets from the whole batch, without gradient."""

    def __call__(
        self,
        student_params: Params,
        teacher_params: Params,
        carried: Any,
        teacher: Outputs,
        masked: Bool[Array, "B Q M"],
        index: Int[Array, " B"],
        now: Now,
        key: Key[Array, ""],
    ) -> tuple[Any, Any, Any]:
        """Returns `(shared, targets, carried)`.

        `shared` is what all images share, such as prototypes. `targets` has one entry per image on
        its leading axis of size B; these may be embeddings that `loss` turns into probabilities,
        since the probabilities of a large batch take gigabytes. `carried` goes to the next step.

        Args:
            student_params: the objective's parameters in the student.
            teacher_params: their moving average in the teacher.
            carried: what the step before returned, or `init`.
            teacher: the teacher's outputs.
            masked: which of the student's selected patches are masked, of all global views.
            index: the index of each image in the data set.
            now: the values of all schedules.
            key: the key of this step.
        """


@runtime_checkable
class Loss(Protocol):
    """Computes the loss of a microbatch."""

    def __call__(
        self,
        params: Params,
        shared: Any,
        targets: Any,
        student: Outputs,
        masked: Bool[Array, "b Q M"],
        now: Now,
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the loss and its terms by name, each a mean over the b images given.

        Args:
            params: the objective's parameters in the student.
            shared: what all images share, from `teach`.
            targets: the targets of these images, from `teach`.
            student: the student's outputs.
            masked: which of the student's selected patches are masked, of the views it sees.
            now: the values of all schedules.
        """


@runtime_checkable
class Measure(Protocol):
    """Measures the signs of health."""

    def __call__(
        self, carried: Any, shared: Any, targets: Any, student_cls: Float[Array, "B V d"], now: Now
    ) -> dict[str, Array]:
        """Returns scalars by name.

        Args:
            carried: what `teach` returned at this step.
            shared: what all images share, from `teach`.
            targets: the targets of the whole batch, from `teach`.
            student_cls: the student's [CLS] embeddings of the whole batch.
            now: the values of all schedules.
        """


class Bank(NamedTuple):
    """Vectors with which embeddings are compared: prototypes, or a memory that stands for them.

    Attributes:
        rows: the vectors, of any lengths other than 0.
        images: the index in the data set of the image that each row of a memory is from, -1 for
            the initial random rows; None for prototypes.
        compared: what is compared with them, one of COMPARED. `cls` and `patches` are embeddings of
            views and of patches; `patch_features` are those of patches before the head;
            `predictions` depend on masks and so are not determined by an image.
    """

    rows: Float[Array, "K d"]
    images: Int[Array, " K"] | None
    compared: str


COMPARED = ("cls", "patches", "patch_features", "predictions")


class Supports(NamedTuple):
    """Prototypes with the rows of a memory that vote for them, see `FindSupports`.

    Attributes:
        rows: for each of K prototypes S unit embeddings, the anchor and its supports, nearest
            first.
        images: the index in the data set of the image of each row; -1 where it is from none or
            unknown.
        votes: the share of the vote of each row that is for its own prototype, in [0, 1].
    """

    rows: Float[Array, "S K d"]
    images: Int[Array, "S K"]
    votes: Float[Array, "S K"]


@runtime_checkable
class FindSupports(Protocol):
    """Gives the anchors and supports of a state, for people to look at."""

    def __call__(self, carried: Any, key: Key[Array, ""]) -> dict[str, Supports]:
        """Returns the prototypes of one task by the name of their level.

        Args:
            carried: what the last step returned.
            key: draws what is drawn anew in each step.
        """


@runtime_checkable
class Banks(Protocol):
    """Gives the prototypes of a state, for their diagnosis."""

    def __call__(
        self,
        student_params: Params,
        teacher_params: Params,
        carried: Any,
        key: Key[Array, ""],
        taught: bool,
    ) -> dict[str, Bank]:
        """Returns prototypes and memories by name, the most important first.

        Args:
            student_params: the objective's parameters in the student.
            teacher_params: their moving average in the teacher.
            carried: what the last step returned.
            key: draws what is drawn anew in each step.
            taught: True for the prototypes of the targets, False for those to which the student is
                assigned, where these differ.
        """


@runtime_checkable
class Verdict(Protocol):
    """Judges the signs of health."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> str | None:
        """Returns a warning if the logged rows, newest last, show a failing run, else None."""


@runtime_checkable
class Network(Protocol):
    """Makes the optimizer of the network's parameters."""

    def __call__(self, late: int = 0, plain: bool = False) -> optax.GradientTransformation:
        """Returns the optimizer, with schedules that begin at step `late`.

        Args:
            late: the step of its first update, for parameters that are frozen before.
            plain: whether it neither clips gradients nor decays weights.
        """


@runtime_checkable
class Optimize(Protocol):
    """Makes the optimizer of a sub-tree of the objective's parameters."""

    def __call__(self, network: Network) -> optax.GradientTransformation:
        """Returns the optimizer, which clips its gradients itself, if at all.

        Args:
            network: makes the optimizer of the network's parameters, to adapt.
        """


class Objective(NamedTuple):
    """A method of self-supervised training.

    Attributes:
        student_views: the views that the student sees, at least one of them global. Views are
            numbered from 0, the global ones first.
        teacher_views: the views that the teacher sees, numbered likewise.
        schedules: schedules by name; all functions receive their values as `now`.
        optimizers: see `Optimize`; for sub-trees of the objective's parameters, by the name of
            the sub-tree. All other parameters are optimized as the network's are.
        terms: the names of the terms of the loss.
        init: see `Init`.
        select: see `Select`.
        teach: see `Teach`.
        loss: see `Loss`.
        measure: see `Measure`.
        verdict: see `Verdict`.
        masks: whether the mask token replaces the masked patches of the student's views.
        banks: see `Banks`; None if the objective has no prototypes.
        supports: see `FindSupports`; None if its prototypes have no supports.
    """

    student_views: tuple[int, ...]
    teacher_views: tuple[int, ...]
    schedules: Mapping[str, Schedule]
    optimizers: Mapping[str, Optimize]
    terms: tuple[str, ...]
    init: Init
    select: Select
    teach: Teach
    loss: Loss
    measure: Measure
    verdict: Verdict
    masks: bool = True
    banks: Banks | None = None
    supports: FindSupports | None = None


@runtime_checkable
class Build(Protocol):
    """Builds the objective of a run."""

    def __call__(
        self,
        config: ml_collections.ConfigDict,
        dim: int,
        mesh: Mesh,
        length: Length,
        grid: tuple[int, int],
    ) -> Objective:
        """Returns the objective that the settings describe.

        Args:
            config: the config of the run.
            dim: d, the numbers in an embedding.
            mesh: the devices of the run.
            length: the length of the run.
            grid: the rows and columns of patches of a global view.
        """


class Warmup(NamedTuple):
    """A duration among the settings of a method.

    Attributes:
        happens: what happens during it, for messages.
        ends: the settings whose first value becomes their second one; () if it leads elsewhere.
    """

    happens: str
    ends: tuple[str, ...] = ()


class Method(NamedTuple):
    """A method of training: its objective, and what its settings mean to the rest of a run.

    Settings are given by their dotted names.

    Attributes:
        settings: a function that returns the defaults of its settings, which are the section of a
            config that has the method's name.
        build: see `Build`.
        rules: the values that each of its settings can have.
        check: a function of the config that raises UserError if the settings do not fit each other
            or those of the run. Each setting by itself already has a value that `rules` allow.
        without_use: a function of the config that returns the settings which have no effect
            because of others, and the reason for each.
        batch_limit: a function of the config that returns the number of images in the largest
            batch that the objective's state can hold, and the setting that limits it; None if
            there is no limit.
        any_batch: overrides of settings that make every batch size up to that limit valid.
        cls_only: the settings with which it learns from [CLS] only, for networks without patches.
        warmups: the settings that are durations, without `_steps` or `_epochs`, see `Warmup`.
        scopes: the names of `jax.named_scope` in the objective's functions, by which operations
            are counted.
        files: a function of the config that returns a digest of what the run reads from each file
            that a setting names, by that setting. A run resumes only if they are the same.
    """

    settings: Callable[[], ml_collections.ConfigDict]
    build: Build
    rules: Mapping[str, Rule]
    check: Callable[[ml_collections.ConfigDict], None]
    without_use: Callable[[ml_collections.ConfigDict], dict[str, str]]
    batch_limit: Callable[[ml_collections.ConfigDict], tuple[int, str] | None]
    any_batch: Mapping[str, Any]
    cls_only: Mapping[str, Any]
    warmups: Mapping[str, Warmup]
    scopes: tuple[str, ...]
    files: Callable[[ml_collections.ConfigDict], dict[str, str]] = lambda config: {}
