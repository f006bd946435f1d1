"""CAPI as a training objective (Darcet et al., 2025).

The teacher sees whole views and clusters their patches. The student's encoder sees the visible
patches of each view only, and the predictor predicts the clusters of hidden ones.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from sop_jax.data.masks import most_masked
from sop_jax.models import size_of, start_of
from sop_jax.models.head import unit
from sop_jax.models.predictor import predictor
from sop_jax.objectives.capi.clustering import (
    Balance,
    assign,
    balance,
    cluster_logits,
    clustering_loss,
    clustering_optimizer,
    init_clustering,
)
from sop_jax.objectives.capi.health import verdict
from sop_jax.objectives.checks import check_memory
from sop_jax.objectives.losses import cross_entropy, views_at_once
from sop_jax.objectives.objective import (
    Bank,
    Now,
    Objective,
    Outputs,
    Params,
    PatchIndices,
    Selection,
)
from sop_jax.objectives.prototypical.health import assignment_signs
from sop_jax.objectives.prototypical.layers import init_prototypes, logits
from sop_jax.objectives.prototypical.layers import rows as rows_of
from sop_jax.parallel.mesh import gatherer
from sop_jax.schedules import Length, Schedule, duration, learning_rate


def patch_places(grid: tuple[int, int]) -> Float[Array, "L 2"]:
    """Returns the row and the column of each patch of a grid, from 0 at its first to 1 at its last.

    Patches are numbered row by row.
    """
    rows, columns = (np.linspace(0, 1, side, dtype=np.float32) for side in grid)
    return jnp.asarray(np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2))


def visible_patches(masked: Bool[Array, "B Q L"], count: int) -> Int[Array, "B Q {count}"]:
    """Returns the positions of the first `count` patches that are not masked, in order."""
    return jnp.argsort(masked, axis=-1, stable=True)[..., :count]


def hidden_patches(
    masked: Bool[Array, "B Q L"], count: int, key: Key[Array, ""]
) -> Int[Array, "B Q {count}"]:
    """Returns the positions of `count` random masked patches, and others where there are fewer."""
    order = jnp.where(masked, jax.random.uniform(key, masked.shape), 1.0)
    return jnp.argsort(order, axis=-1)[..., :count]


def of_patches(
    x: Shaped[Array, "B Q L *d"], where: Int[Array, "B Q P"]
) -> Shaped[Array, "B Q P *d"]:
    """Returns the entries of the patches at some positions."""
    index = where.reshape(*where.shape, *(1,) * (x.ndim - 3))
    return jnp.take_along_axis(x, index, axis=2)


def clustering_rate(config: ml_collections.ConfigDict, length: Length) -> Schedule:
    """Returns the learning rate of the clustering, which warms up as the network's does."""
    warmup = min(duration(config.optim, "warmup_", length.epoch), length.steps)
    return learning_rate(config.capi.lr, 0.0, warmup, length.steps)


def capi(
    run_config: ml_collections.ConfigDict, mesh: Mesh, length: Length, grid: tuple[int, int]
) -> Objective:
    """Returns the objective that `config.capi` describes.

    Masks decide which patches are hidden. So that shapes are static, the encoder sees as many
    patches as the largest mask leaves visible; where a mask is smaller, the last patches of the
    view are neither seen nor predicted.

    Args:
        run_config: the config of the run.
        mesh: the devices.
        length: the length of the run.
        grid: the rows and columns of patches of a global view.

    Raises:
        UserError: the clusters do not fit the devices, or the predictor cannot have the width of
            the encoder's heads.
    """
    config, model = run_config.capi, run_config.model
    size, places = size_of(model), patch_places(grid)
    check_memory(run_config, {"capi.prototypes": config.prototypes}, size.width, mesh)
    gather = gatherer(mesh)
    network = predictor(
        size.width,
        size.heads,
        config.predictor_depth,
        model.drop_path,
        start_of(model),
        model.remat,
        gather,
    )
    hidden = most_masked(grid, run_config.mask)
    visible, predicted = len(places) - hidden, max(1, int(config.predicted * hidden))
    views = tuple(range(run_config.augment.global_crops))
    rate = clustering_rate(run_config, length)

    def init(key: Key[Array, ""]) -> tuple[Params, dict[str, Any]]:
        clustering_key, predictor_key, student_key = jax.random.split(key, 3)
        return {
            "clustering": init_clustering(clustering_key, size.width, config.prototypes),
            "predictor": network.init(predictor_key),
            "prototypes": init_prototypes(
                student_key, "weight_norm", config.prototypes, size.width
            ),
        }, {}

    def select(mask: Bool[Array, "B Q h w"], keys: Key[Array, " B"]) -> Selection:
        """Selects the visible patches for the student, and all for the teacher."""
        del keys
        masked = mask.reshape(*mask.shape[:2], -1)
        kept = visible_patches(masked, visible)
        every = jnp.broadcast_to(jnp.arange(visible), kept.shape)
        whole = jnp.broadcast_to(jnp.arange(len(places)), masked.shape)
        return Selection(PatchIndices(every, kept), PatchIndices(whole), masked)

    def scores(clustering: Params, x: Float[Array, "*B D"]) -> Float[Array, "*B K"]:
        return cluster_logits(clustering, x) / config.target_temperature

    def teach(
        student_params: Params,
        teacher_params: Params,
        carried: Any,
        teacher: Outputs,
        masked: Bool[Array, "B Q L"],
        index: Int[Array, " B"],
        now: Now,
        key: Key[Array, ""],
    ) -> tuple[dict[str, Any], dict[str, Array], Any]:
        """Balances the patches of each position, and draws the hidden patches to predict.

        The clustering is the one that learns, not its average.
        """
        del teacher_params, index, now
        hidden_key, drop_key = jax.random.split(key)
        clustering = gather(student_params["clustering"])
        features = teacher.patch_features.astype(jnp.float32)
        batch, count = features.shape[:2]

        def position(x: Float[Array, "B Q D"]) -> Balance:
            return balance(scores(clustering, x.reshape(batch * count, -1)))

        rows = features.reshape(batch * count, len(places), -1)
        at_once = views_at_once(rows, config.prototypes, mesh)
        with jax.named_scope("clustering"):
            balanced = jax.lax.map(position, jnp.moveaxis(features, 2, 0), batch_size=at_once)
        samples = jnp.moveaxis(balanced.samples.reshape(-1, batch, count), 0, -1)
        targets = {
            "features": features,
            "samples": samples,
            "hidden": hidden_patches(masked, predicted, hidden_key),
        }
        if model.drop_path:
            targets["drops"] = jax.random.uniform(
                drop_key, (batch, count, config.predictor_depth, 2)
            )
        shared = {
            "clustering": clustering,
            "peaks": balanced.peaks,
            "clusters": balanced.clusters,
        }
        return shared, targets, carried

    def assignments(
        shared: dict[str, Any], targets: dict[str, Array]
    ) -> tuple[Float[Array, "B Q P K"], Float[Array, "B Q P D"]]:
        """Returns the targets of the patches to predict, and the teacher's features of them."""
        where = targets["hidden"]
        features = of_patches(targets["features"], where)
        balanced = Balance(
            peaks=shared["peaks"][where],
            clusters=shared["clusters"][where],
            samples=of_patches(targets["samples"], where),
        )
        return assign(scores(shared["clustering"], features), balanced), features

    def predict(
        params: Params, targets: dict[str, Array], student: Outputs, masked: Bool[Array, "B Q L"]
    ) -> Float[Array, "B Q P D"]:
        """Returns the predicted features of the hidden patches, from the tokens of visible ones.

        The token of the image is at the place (0, 0), as the authors' registers can be.
        """
        batch, count = masked.shape[:2]
        seen = places[visible_patches(masked, visible)]
        seen = jnp.concatenate([jnp.zeros_like(seen[:, :, :1]), seen], axis=2)
        context = jnp.concatenate(
            [student.cls_features[:, :, None], student.patch_features], axis=2
        )
        asked = places[targets["hidden"]]
        drops = targets.get("drops")

        def flat(x: Array) -> Array:
            return x.reshape(batch * count, *x.shape[2:])

        found = network.predict(
            *(params, flat(context), flat(seen), flat(asked)),
            draws=None if drops is None else flat(drops),
        )
        return found.reshape(batch, count, *found.shape[1:])

    def loss(
        params: Params,
        shared: dict[str, Any],
        targets: dict[str, Array],
        student: Outputs,
        masked: Bool[Array, "b Q L"],
        now: Now,
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the sum of the losses of the prediction and of the clustering.

        They share no parameters. The prediction is compared at the hidden patches: the mean over
        those of a view, then over images and views. The clustering learns from all patches.
        """
        del now
        with jax.named_scope("predictor"):
            predictions = predict(params["predictor"], targets, student, masked)
        log_p = jax.nn.log_softmax(
            logits(
                "weight_norm",
                gather(params["prototypes"]),
                unit(predictions),
                config.student_temperature,
            )
        )
        expected, _ = jax.lax.stop_gradient(assignments(shared, targets))
        is_hidden = of_patches(masked, targets["hidden"]).astype(jnp.float32)
        per_patch = cross_entropy(expected, log_p) * is_hidden
        prediction = (per_patch.sum(-1) / jnp.maximum(is_hidden.sum(-1), 1)).mean()

        clustering = gather(params["clustering"])

        @jax.checkpoint
        def position(x: Array, peaks: Array, clusters: Array, samples: Array) -> Array:
            return clustering_loss(
                clustering,
                x,
                Balance(peaks, clusters, samples),
                config.target_temperature,
                config.clustering_temperature,
            ).mean()

        by_position = (
            jnp.moveaxis(targets["features"], 2, 0),
            shared["peaks"],
            shared["clusters"],
            jnp.moveaxis(targets["samples"], 2, 0),
        )
        rows = targets["features"].reshape(-1, *targets["features"].shape[2:])
        at_once = views_at_once(rows, config.prototypes, mesh)
        with jax.named_scope("clustering"):
            losses = jax.lax.map(lambda x: position(*x), by_position, batch_size=at_once)
        terms = {"prediction": prediction, "clustering": losses.mean()}
        return terms["prediction"] + terms["clustering"], terms

    def measure(
        carried: Any,
        shared: dict[str, Any],
        targets: dict[str, Array],
        student_cls: Float[Array, "B V d"],
        now: Now,
    ) -> dict[str, Array]:
        del carried, student_cls, now
        assigned, features = assignments(shared, targets)
        return assignment_signs(
            assigned.reshape(-1, config.prototypes), unit(features).reshape(-1, size.width)
        )

    def banks(
        student_params: Params,
        teacher_params: Params,
        carried: Any,
        key: Key[Array, ""],
        taught: bool,
    ) -> dict[str, Bank]:
        """Returns the clusters of the targets, or the prototypes of the student's predictions."""
        del teacher_params, carried, key
        if taught:
            return {
                "clustering": Bank(student_params["clustering"]["kernel"].T, None, "patch_features")
            }
        return {"prototypes": Bank(rows_of(student_params["prototypes"]), None, "predictions")}

    return Objective(
        student_views=views,
        teacher_views=views,
        schedules={"clustering_lr": rate},
        optimizers={"clustering": lambda network: clustering_optimizer(rate)},
        terms=("prediction", "clustering"),
        init=init,
        select=select,
        teach=teach,
        loss=loss,
        measure=measure,
        verdict=verdict,
        masks=False,  # hidden patches do not enter the encoder
        banks=banks,
    )
