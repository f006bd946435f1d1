"""What several methods require of a run: views, masks, whole batches, and the devices' memory."""

from collections.abc import Mapping

import ml_collections
from jax.sharding import Mesh

from sop_jax.compiled.device_memory import bytes_limit, in_gib
from sop_jax.errors import UserError
from sop_jax.models import token_side

COPIES = 5  # of each prototype: student, teacher, gradient, and two moments of AdamW


def check_views(config: ml_collections.ConfigDict) -> None:
    """Checks that there are two global views, so that each view has another one to predict.

    Raises:
        UserError: there are fewer.
    """
    if config.augment.global_crops < 2:
        raise UserError(
            f"augment.global_crops is {config.augment.global_crops}; expected 2 or more, because "
            "each view learns from the other global views; for example, set "
            "--config.augment.global_crops=2"
        )


def check_masked(config: ml_collections.ConfigDict, reason: str, remedy: str) -> None:
    """Checks that masks can hide patches of the global views, for a loss that needs some.

    Args:
        config: the config of the run.
        reason: what needs them, for the message.
        remedy: settings to set instead, for the message.

    Raises:
        UserError: no patch is ever masked.
    """
    mask, patches = config.mask, (config.augment.global_size // token_side(config.model)) ** 2
    if mask.none == 1 or mask.ratio[1] * patches < 1:
        raise UserError(
            f"mask.none is {mask.none:g} and mask.ratio {tuple(mask.ratio)}, so that none of the "
            f"{patches} patches of a view is ever masked, but {reason}; for example, set {remedy}"
        )


def no_masks(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Returns the settings of masks, which have no effect, and the reason for each."""
    reason = f"method={config.method} has no loss of masked patches, and masks none"
    return {f"mask.{key}": reason for key in config.mask}


def check_whole_batch(config: ml_collections.ConfigDict, reasons: list[str]) -> None:
    """Checks that a batch is not split if the loss needs all of the student's embeddings at once.

    Raises:
        UserError: it is split, and one of `reasons` needs the whole batch.
    """
    if reasons and config.accumulate > 1:
        raise UserError(
            f"accumulate is {config.accumulate}, but {' and '.join(reasons)}, which compares all "
            "images of a batch with each other; microbatches would give another loss. Set "
            "--config.accumulate=1, and use a smaller --config.batch_size, more devices or "
            "--config.model.remat=full to save memory"
        )


def check_memory(
    config: ml_collections.ConfigDict, counts: Mapping[str, int], dim: int, mesh: Mesh
) -> None:
    """Checks that prototypes, or rows that serve as such, fit the memory of a device.

    This is arithmetic: what counts are their copies in the state, and the teacher's logits.

    Args:
        config: the config of the run.
        counts: the numbers of prototypes, by the settings that they are from.
        dim: the numbers in a prototype.
        mesh: the devices.

    Raises:
        UserError: they do not fit.
    """
    limit, total = bytes_limit(list(mesh.devices.flat)), sum(counts.values())
    views = config.batch_size * config.augment.global_crops / mesh.devices.size
    wanted = COPIES * total * (dim + 1) * 4 / mesh.shape["fsdp"] + views * total * 4
    if limit is not None and wanted > limit:
        raise UserError(
            " and ".join(f"{name} is {count}" for name, count in counts.items())
            + f": with {dim} numbers each, their copies in student, teacher and optimizer and the "
            f"teacher's logits of {views:g} views per device take {in_gib(wanted)} of the "
            f"{in_gib(limit)} per device; expected less; use fewer with "
            f"--config.{max(counts, key=lambda name: counts[name])}, or more devices with "
            "--config.mesh.fsdp"
        )
