"""What the train step asks of a training objective, and what it gives in return.

A step embeds the views with the teacher, hands the embeddings of the whole batch to `teach`, and
minimises `loss` over the student's embeddings, one microbatch at a time. Everything that belongs
to a method stands behind these functions: prototypes, memories, centers, temperatures.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import optax
from jaxtyping import Array, Bool, Float, Int, Key

from sop_jax.schedules import Schedule

Now = Mapping[str, Float[Array, ""] | float]  # the values of all schedules at this step
Params = dict[str, Any]  # the objective's own, {} for one that learns none


class Outputs(NamedTuple):
    """What a network makes of the V views that it sees, of which the first Q are global.

    Attributes:
        cls: unit embeddings of [CLS] in float32.
        patches: unit embeddings of the selected patches of the global views in float32.
        cls_features: [CLS] before the head.
        patch_features: the selected patches before the head.
    """

    cls: Float[Array, "B V d"]
    patches: Float[Array, "B Q M d"]
    cls_features: Float[Array, "B V D"]
    patch_features: Float[Array, "B Q M D"]


class Places(NamedTuple):
    """Which patches of the global views a network sees, and which it gives embeddings of.

    Attributes:
        patches: those that the head sees, row by row; of the kept ones where some are dropped.
        kept: those that enter the encoder, row by row; None for all. Only a ViT can drop patches.
    """

    patches: Int[Array, "B Q M"]
    kept: Int[Array, "B Q T"] | None = None


class Selection(NamedTuple):
    """The patches of both networks.

    Attributes:
        student: of the student, whose masked patches show the mask token.
        teacher: of the teacher, which sees no mask.
        masked: which of the student's selected patches are masked.
    """

    student: Places
    teacher: Places
    masked: Bool[Array, "B Q M"]


@runtime_checkable
class Init(Protocol):
    """Makes the start of what an objective learns and of what it carries from step to step."""

    def __call__(self, key: Key[Array, ""]) -> tuple[Params, Any]:
        """Its parameters, which learn by gradient and are averaged as the network is; the rest."""


@runtime_checkable
class Select(Protocol):
    """Chooses patches."""

    def __call__(self, mask: Bool[Array, "B Q h w"], keys: Key[Array, " B"]) -> Selection:
        """The selection for a batch; each image draws from a key of its own."""


@runtime_checkable
class Teach(Protocol):
    """Makes the targets, from the whole batch and without gradient."""

    def __call__(
        self,
        student: Params,
        teacher: Params,
        carried: Any,
        outputs: Outputs,
        index: Int[Array, " B"],
        now: Now,
        key: Key[Array, ""],
    ) -> tuple[Any, Any, Any]:
        """What all images share, the targets of each (leading axis B), and what is carried on.

        Targets may be embeddings that become probabilities in `loss`: the probabilities of a
        large batch take gigabytes.

        Args:
            student: the objective's parameters in the student.
            teacher: their moving average.
            carried: from the step before.
            outputs: the teacher's.
            index: the data set's index of each image.
            now: the values of all schedules.
            key: of this step.
        """


@runtime_checkable
class Loss(Protocol):
    """The loss of some images."""

    def __call__(
        self,
        params: Params,
        shared: Any,
        targets: Any,
        student: Outputs,
        masked: Bool[Array, "b Q M"],
        now: Now,
    ) -> tuple[Array, dict[str, Array]]:
        """The loss and its terms, each a mean over the images given.

        Args:
            params: the objective's parameters in the student.
            shared: what all images share.
            targets: of these images.
            student: the student's outputs.
            masked: which of its patches are masked.
            now: the values of all schedules.
        """


@runtime_checkable
class Measure(Protocol):
    """Measures the signs of health."""

    def __call__(
        self, carried: Any, shared: Any, targets: Any, student_cls: Float[Array, "B V d"], now: Now
    ) -> dict[str, Array]:
        """Scalars by name, of the whole batch; `carried` is what `teach` gave."""


@runtime_checkable
class Verdict(Protocol):
    """Puts the signs of health in words."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> str | None:
        """Words for a person when the logged rows show that training goes wrong, else None."""


class Objective(NamedTuple):
    """A method of self-supervised training.

    Attributes:
        student_views: the views that the student sees, at least one of them global. Global views
            are numbered from 0, local ones follow.
        teacher_views: the views that the teacher sees.
        schedules: by name; their values reach all functions as `now`.
        optimizers: for sub-trees of the objective's parameters, by their name. Other parameters
            are optimized as the network is.
        terms: the names of the terms of the loss.
        init: see `Init`.
        select: see `Select`.
        teach: see `Teach`.
        loss: see `Loss`.
        measure: see `Measure`.
        verdict: see `Verdict`.
    """

    student_views: tuple[int, ...]
    teacher_views: tuple[int, ...]
    schedules: Mapping[str, Schedule]
    optimizers: Mapping[str, optax.GradientTransformation]
    terms: tuple[str, ...]
    init: Init
    select: Select
    teach: Teach
    loss: Loss
    measure: Measure
    verdict: Verdict
