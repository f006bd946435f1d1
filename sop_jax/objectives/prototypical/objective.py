"""The objective of methods with prototypes, composed of its parts.

The teacher assigns each view to K prototypes, and the student learns to predict the assignments of
the other views. The targets are softmax(u W / τ + a), where u are the teacher's embeddings, W the
prototypes and a an offset per prototype that the marginal sets. So `teach` passes embeddings on as
targets, and the loss turns those of a microbatch into probabilities.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from sop_jax.objectives.checks import check_memory
from sop_jax.objectives.losses import by_view, cls_loss, different_views, mim_loss, views_at_once
from sop_jax.objectives.objective import (
    Bank,
    Network,
    Now,
    Objective,
    Optimize,
    Outputs,
    Params,
    PatchIndices,
    Selection,
)
from sop_jax.objectives.patches import masked_first
from sop_jax.objectives.prototypical import health
from sop_jax.objectives.prototypical.koleo import koleo, koleo_of_prototypes, partitions
from sop_jax.objectives.prototypical.layers import (
    Prototypes,
    init_prototypes,
    logits,
    rows,
    scaled_before,
)
from sop_jax.objectives.prototypical.marginals import CENTERS, Marginal, marginal
from sop_jax.objectives.prototypical.priors import mean_to_prior, prior_to_mean
from sop_jax.objectives.prototypical.settings import prior_of
from sop_jax.objectives.temperatures import temperatures
from sop_jax.parallel.mesh import gatherer
from sop_jax.schedules import Length, duration

Levels = dict[str, Prototypes]  # the prototypes of "cls" and, if they have a loss, of "patch"


@runtime_checkable
class InitSource(Protocol):
    """Initializes prototypes."""

    def __call__(self, key: Key[Array, ""]) -> tuple[Params, Any]:
        """Returns the parameters that learn by gradient, and what is carried between steps."""


@runtime_checkable
class TeachSource(Protocol):
    """Gives the prototypes of the targets."""

    def __call__(
        self,
        student_params: Params,
        teacher_params: Params,
        carried: Any,
        teacher: Outputs,
        now: Now,
    ) -> tuple[Levels, Any]:
        """Returns the prototypes, and what is carried to the next step.

        Args:
            student_params: the objective's parameters in the student.
            teacher_params: their moving average in the teacher.
            carried: what the step before returned, or `InitSource`.
            teacher: the teacher's outputs for the whole batch.
            now: the values of all schedules.
        """


@runtime_checkable
class LearnSource(Protocol):
    """Gives the prototypes of the student."""

    def __call__(self, params: Params, taught: Levels) -> Levels:
        """Returns the prototypes to which the student is assigned.

        Args:
            params: the objective's parameters in the student.
            taught: the prototypes of the targets.
        """


@runtime_checkable
class ReadSource(Protocol):
    """Gives the prototypes of a state, between two steps."""

    def __call__(
        self, student_params: Params, teacher_params: Params, carried: Any, taught: bool
    ) -> Levels:
        """Returns the prototypes.

        Args:
            student_params: the objective's parameters in the student.
            teacher_params: their moving average in the teacher.
            carried: what the last step returned.
            taught: whether those of the targets, or those of the student.
        """


@runtime_checkable
class Views(Protocol):
    """Compares the views of the student with those of the teacher."""

    def __call__(
        self,
        learning: Prototypes,
        shared: dict[str, Any],
        targets: Float[Array, "b Q d"],
        student: Float[Array, "b V d"],
        now: Now,
    ) -> dict[str, Array]:
        """Returns the loss "cls" and, if the settings name a prior, "prior".

        Args:
            learning: the prototypes of [CLS] to which the student is assigned.
            shared: the prototypes and offsets of the targets, and the key of the step.
            targets: the teacher's embeddings of [CLS].
            student: the student's embeddings of [CLS].
            now: the values of all schedules.
        """


class Source(NamedTuple):
    """Where prototypes come from.

    Attributes:
        init: see `InitSource`.
        teach: see `TeachSource`.
        learn: see `LearnSource`.
        read: see `ReadSource`.
        optimizers: see `Objective.optimizers`.
    """

    init: InitSource
    teach: TeachSource
    learn: LearnSource
    read: ReadSource
    optimizers: dict[str, Optimize]


def counts_of(section: ml_collections.ConfigDict, patches: bool = False) -> dict[str, int]:
    """Returns the number of prototypes of each level.

    Args:
        section: the settings of the method.
        patches: whether there is a loss of patches, which may share the prototypes of [CLS].
    """
    own = section.patch_prototypes if patches else 0
    return {"cls": section.prototypes} | ({"patch": own} if own else {})


def learnt(
    config: ml_collections.ConfigDict,
    dim: int,
    length: Length,
    counts: Mapping[str, int],
    average: bool = True,
    plain: bool = False,
) -> Source:
    """Returns prototypes that learn by gradient.

    Args:
        config: the config of the run.
        dim: d, the numbers in an embedding.
        length: the length of the run.
        counts: the number of prototypes of each level that learns, see `counts_of`.
        average: whether the targets use the moving average of the prototypes, as in DINO, or the
            student's own, as in MSN.
        plain: whether their gradients are neither clipped nor decayed, as in MSN.
    """
    section = config[config.method]

    def init(key: Key[Array, ""]) -> tuple[Params, Any]:
        keys = jax.random.split(key, len(counts))
        return {
            "prototypes": {
                name: init_prototypes(level_key, section.layer, count, dim)
                for (name, count), level_key in zip(counts.items(), keys, strict=True)
            }
        }, {}

    def read(student_params, teacher_params, carried, taught):
        del carried
        params = teacher_params if average and taught else student_params
        return params["prototypes"]

    def teach(student_params, teacher_params, carried, teacher, now):
        del teacher, now
        return read(student_params, teacher_params, carried, True), carried

    def learn(params, taught):
        del taught
        return params["prototypes"]

    def optimize(network: Network) -> optax.GradientTransformation:
        optimizer = frozen(network, freeze, plain) if freeze else network(plain=plain)
        return scaled_before(optimizer) if section.layer == "normalized" else optimizer

    freeze = duration(section, "freeze_", length.epoch)
    own = bool(freeze) or plain or section.layer == "normalized"
    return Source(init, teach, learn, read, {"prototypes": optimize} if own else {})


def frozen(network: Network, steps: int, plain: bool) -> optax.GradientTransformation:
    """Returns the network's optimizer for parameters that do not change in the first steps.

    Nothing of the optimizer's state changes either, as in DINO's code.

    Args:
        network: see `Network`.
        steps: the number of steps.
        plain: see `Network`.
    """
    begun = network(late=steps, plain=plain)
    return optax.transforms.conditionally_mask(begun, lambda step: step >= steps)


def prototypical(
    config: ml_collections.ConfigDict,
    dim: int,
    mesh: Mesh,
    length: Length,
    *,
    source: Source | None = None,
    views: Views | None = None,
    of_cls: Marginal | None = None,
    per_view: bool = False,
    student_views: Sequence[int] | None = None,
    teacher_views: Sequence[int] | None = None,
    most_masked: int = 0,
) -> Objective:
    """Returns the objective of the method that the config names, as set in its section.

    Args:
        config: the config of the run.
        dim: d, the numbers in an embedding.
        mesh: the devices.
        length: the length of the run.
        source: where prototypes come from; `learnt` by default.
        views: compares the views of [CLS]; by the cross-entropy of all pairs of different views by
            default.
        of_cls: the marginal of [CLS]; the one that the settings name by default.
        per_view: whether each view has a marginal of its own, as in SwAV.
        student_views: the views that the student sees; all by default.
        teacher_views: the views that the teacher sees; all global ones by default.
        most_masked: the largest number of masked patches in a view, which is the number of patches
            per view that the student's head embeds; 0 for no loss of patches.

    Raises:
        UserError: the prototypes do not fit the devices.
    """
    section = config[config.method]
    counts = counts_of(section, patches=most_masked > 0)
    settings = {"cls": "prototypes", "patch": "patch_prototypes"}
    by_setting = {f"{config.method}.{settings[name]}": count for name, count in counts.items()}
    check_memory(config, by_setting, dim, mesh)
    globals_, locals_ = config.augment.global_crops, config.augment.local_crops
    student_views = tuple(range(globals_ + locals_) if student_views is None else student_views)
    teacher_views = tuple(range(globals_) if teacher_views is None else teacher_views)
    pairs = different_views(student_views, teacher_views)
    source = source or learnt(config, dim, length, counts)
    gather = gatherer(mesh)
    layer, prior = section.layer, prior_of(config)

    def of(count: int) -> Marginal:
        return marginal(
            section.marginal, count, section.center_momentum, section.sinkhorn_iterations
        )

    marginals = {"cls": of_cls or of(section.prototypes)}
    if most_masked:
        marginals["patch"] = of(counts.get("patch", counts["cls"]))
    # A center averages the logits of all patches, as in iBOT; what balances a batch does so over
    # the patches that have a loss, as in DINOv2.
    all_patches = section.marginal in CENTERS
    sharps = {"cls": "teacher_temperature", "patch": "patch_teacher_temperature"}

    def of_level(prototypes: Levels, name: str) -> Prototypes:
        return prototypes.get(name, prototypes["cls"])  # patches can share those of [CLS]

    def init(key: Key[Array, ""]) -> tuple[Params, dict[str, Any]]:
        params, carried = source.init(key)
        states = {name: marginal.init for name, marginal in marginals.items()}
        if per_view:
            count = len(teacher_views)
            states["cls"] = jax.tree.map(lambda x: jnp.stack([x] * count), states["cls"])
        return params, {"source": carried, "marginals": states}

    def select(mask: Bool[Array, "B Q h w"], keys: Key[Array, " B"]) -> Selection:
        """Selects the masked patches, and for the teacher all if its center averages them."""
        del keys
        every, is_masked = masked_first(mask, None if all_patches and most_masked else most_masked)
        student = every[..., :most_masked]
        return Selection(PatchIndices(student), PatchIndices(every), is_masked[..., :most_masked])

    def teach(
        student_params: Params,
        teacher_params: Params,
        carried: dict[str, Any],
        teacher: Outputs,
        masked: Bool[Array, "B Q M"],
        index: Int[Array, " B"],
        now: Now,
        key: Key[Array, ""],
    ) -> tuple[dict[str, Any], dict[str, Array], dict[str, Any]]:
        """Returns the prototypes and offsets, and the teacher's embeddings as targets."""
        del index
        taught, source_carried = source.teach(
            student_params, teacher_params, carried["source"], teacher, now
        )
        taught = gather(taught)
        embeddings = {"cls": by_view(teacher.cls)}
        weights = {"cls": jnp.ones(embeddings["cls"].shape[:2])}
        if most_masked:
            patches = jnp.moveaxis(teacher.patches, 0, 2)  # [Q M B d]
            embeddings["patch"] = patches.reshape(-1, *patches.shape[2:])
            counted = jnp.ones(patches.shape[:3]) if all_patches else jnp.moveaxis(masked, 0, 2)
            weights["patch"] = counted.reshape(-1, counted.shape[-1]).astype(jnp.float32)
        offsets, states = {}, {}
        for name, own in marginals.items():
            sharp, prototypes = now[sharps[name]], of_level(taught, name)

            def offset(rows, weight, state, own=own, sharp=sharp, prototypes=prototypes):
                return own.offset(
                    lambda u: logits(layer, prototypes, u, sharp), rows, weight, state, sharp
                )

            given = embeddings[name], weights[name], carried["marginals"][name]
            if per_view and name == "cls":
                groups = (given[0][:, None], given[1][:, None], given[2])
                offsets[name], states[name] = jax.vmap(offset)(*groups)
            else:
                offsets[name], states[name] = offset(*given)
        targets = {"cls": teacher.cls}
        if most_masked:
            targets["patch"] = teacher.patches[:, :, :most_masked]
        shared = {"prototypes": taught, "offsets": offsets, "key": key}
        return shared, targets, {"source": source_carried, "marginals": states}

    def log_targets(shared: dict[str, Any], name: str, u: Array, now: Now) -> Array:
        """Returns the logarithm of the targets of the teacher's embeddings."""
        prototypes = of_level(shared["prototypes"], name)
        raised = logits(layer, prototypes, u, now[sharps[name]]) + shared["offsets"][name]
        return jax.nn.log_softmax(raised)

    def log_predictions(learnt: Prototypes, u: Array, now: Now) -> Array:
        """Returns the logarithm of the student's assignments."""
        return jax.nn.log_softmax(logits(layer, learnt, u, now["student_temperature"]))

    def cross_entropies(
        learning: Prototypes,
        shared: dict[str, Any],
        targets: Float[Array, "b Q d"],
        student: Float[Array, "b V d"],
        now: Now,
    ) -> dict[str, Array]:
        """Returns the mean over all pairs of different views, and the match of the prior."""

        def log_p(learnt: Prototypes, u: Array) -> Array:
            return log_predictions(learnt, u, now)

        terms = {
            "cls": cls_loss(
                student,
                jnp.exp(log_targets(shared, "cls", targets, now)),
                log_p,
                learning,
                views_at_once(student, section.prototypes, mesh),
                pairs,
            )
        }
        if prior is not None:
            p = jnp.exp(jax.checkpoint(log_p)(learning, student)).mean((0, 1))
            matches = mean_to_prior if section.prior_direction == "mean_to_prior" else prior_to_mean
            terms["prior"] = matches(p, jnp.asarray(prior, jnp.float32))
        return terms

    def loss(
        params: Params,
        shared: dict[str, Any],
        targets: dict[str, Array],
        student: Outputs,
        masked: Bool[Array, "b Q M"],
        now: Now,
    ) -> tuple[Array, dict[str, Array]]:
        learning = gather(source.learn(params, shared["prototypes"]))
        terms = (views or cross_entropies)(
            learning["cls"], shared, targets["cls"], student.cls, now
        )
        total = terms["cls"]
        if prior is not None:
            total += section.prior_weight * terms["prior"]
        if most_masked:
            prototypes = of_level(learning, "patch")
            count = counts.get("patch", counts["cls"])
            terms["mim"] = mim_loss(
                *(student.patches, targets["patch"], masked),
                assign=lambda learnt, u: log_predictions(learnt, u, now),
                assign_teacher=lambda u: log_targets(shared, "patch", u, now),
                learnt=prototypes,
                at_once=views_at_once(student.patches, count, mesh),
            )
            total += section.patch_weight * terms["mim"]
        if section.koleo_prototypes:
            terms["koleo_prototypes"] = spread(learning, shared["key"])
            total += section.koleo_prototypes * terms["koleo_prototypes"]
        if section.koleo_data:
            features = by_view(student.cls_features)[: sum(v < globals_ for v in student_views)]
            terms["koleo_data"] = jax.lax.map(koleo, features).sum()
            total += section.koleo_data * terms["koleo_data"]
        return total, terms

    def spread(learning: Levels, key: Key[Array, ""]) -> Array:
        """Returns KoLeo of the prototypes of every level, in partitions drawn anew."""
        total = jnp.zeros(())
        for name, prototypes in learning.items():
            weight = rows(prototypes)
            own_key = jax.random.fold_in(key, list(learning).index(name))
            drawn = partitions(own_key, len(weight), section.koleo_partition)
            total += koleo_of_prototypes(weight, drawn, section.koleo_reduction)
        return total

    def measure(
        carried: dict[str, Any],
        shared: dict[str, Any],
        targets: dict[str, Array],
        student_cls: Float[Array, "B V d"],
        now: Now,
    ) -> dict[str, Array]:
        del carried
        assigned = jnp.exp(log_targets(shared, "cls", targets["cls"], now))
        return health.measure(student_cls, targets["cls"], assigned, pairs)

    def banks(
        student_params: Params,
        teacher_params: Params,
        carried: dict[str, Any],
        key: Key[Array, ""],
        taught: bool,
    ) -> dict[str, Bank]:
        """Returns the prototypes of [CLS] and, if they have their own, of patches."""
        del key
        found = source.read(student_params, teacher_params, carried["source"], taught)
        compared = {"cls": "cls", "patch": "patches"}
        return {
            name: Bank(rows(found[name]), None, kind)
            for name, kind in compared.items()
            if name in found
        }

    terms = ["cls"] + ["mim"] * bool(most_masked) + ["prior"] * (prior is not None)
    terms += [name for name in ("koleo_prototypes", "koleo_data") if section[name]]
    return Objective(
        student_views=student_views,
        teacher_views=teacher_views,
        schedules=temperatures(section, length, patches=most_masked > 0),
        optimizers=source.optimizers,
        terms=tuple(terms),
        init=init,
        select=select,
        teach=teach,
        loss=loss,
        measure=measure,
        verdict=health.verdict,
        masks=most_masked > 0,
        banks=banks,
    )
