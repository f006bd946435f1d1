"""The settings that methods with prototypes share: defaults, valid values and combinations."""

import hashlib
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np
from etils import epath
from ml_collections import config_dict

from sop_jax.errors import UserError
from sop_jax.models.head import check_unit
from sop_jax.objectives import temperatures
from sop_jax.objectives.checks import check_masked, check_views, check_whole_batch, no_masks
from sop_jax.objectives.objective import Warmup
from sop_jax.objectives.prototypical import layers, marginals
from sop_jax.objectives.prototypical.koleo import REDUCTIONS
from sop_jax.objectives.prototypical.priors import check_prior, power_law
from sop_jax.rules import (
    COUNT,
    NOT_NEGATIVE,
    SHARE,
    STEPS,
    TEXT,
    Rule,
    one_of,
    unset_or,
)

DIRECTIONS = ("mean_to_prior", "prior_to_mean")
PRIORS = ("none", "uniform", "power")  # or the path of a file


def settings(**own: Any) -> ml_collections.ConfigDict:
    """Returns the settings that all methods with prototypes share, as in DINO.

    Args:
        **own: defaults that differ, and settings that only one method has.
    """
    shared = dict(
        prototypes=65536,
        layer="weight_norm",  # weight_norm | unit | vmf | normalized (as in SwAV)
        freeze_epochs=1.0,  # the prototypes do not learn before
        freeze_steps=config_dict.placeholder(int),
        marginal="centering",  # centering | probability_centering | sinkhorn |
        # sinkhorn_probabilities | none
        center_momentum=0.9,
        sinkhorn_iterations=3,
        **temperatures.settings(temperature_by_epoch=True),
        prior="none",  # none | uniform (ME-MAX) | power | a .npy file: of the mean assignment
        prior_weight=1.0,
        prior_exponent=0.25,
        prior_direction="mean_to_prior",  # KL(mean || prior); prior_to_mean for the reverse
        koleo_prototypes=0.0,  # weights of the KoLeo terms; 0 for none
        koleo_partition=2048,
        koleo_reduction="sum",  # sum | mean, over partitions
        koleo_data=0.0,
    )
    return ml_collections.ConfigDict({**shared, **own})


RULES: dict[str, Rule] = {
    "prototypes": COUNT,
    "layer": one_of(layers.KINDS),
    "freeze_epochs": NOT_NEGATIVE,
    "freeze_steps": unset_or(STEPS),
    "marginal": one_of(marginals.KINDS),
    "center_momentum": SHARE,
    "sinkhorn_iterations": COUNT,
    **temperatures.RULES,
    **temperatures.BY_EPOCH,
    "prior": TEXT,
    "prior_weight": NOT_NEGATIVE,
    "prior_exponent": NOT_NEGATIVE,
    "prior_direction": one_of(DIRECTIONS),
    "koleo_prototypes": NOT_NEGATIVE,
    "koleo_partition": COUNT,
    "koleo_reduction": one_of(REDUCTIONS),
    "koleo_data": NOT_NEGATIVE,
}


def rules(name: str, **own: Rule) -> dict[str, Rule]:
    """Returns the rules of a method's settings by their dotted names.

    Args:
        name: the name of the method.
        **own: the rules of settings that only this method has.
    """
    return {f"{name}.{key}": rule for key, rule in {**RULES, **own}.items()}


def check(config: ml_collections.ConfigDict, unit: bool = True, patches: bool = False) -> None:
    """Checks that the settings of a method with prototypes fit each other and those of the run.

    Args:
        config: the config of the run.
        unit: whether the method needs embeddings of unit norm.
        patches: whether it has a loss of masked patches, as set.

    Raises:
        UserError: there is only one prototype, or too few images, views or microbatches for what
            the settings ask for.
    """
    name, section = config.method, config[config.method]
    if section.prototypes < 2:
        raise UserError(
            f"{name}.prototypes is {section.prototypes}; expected 2 or more, because targets over "
            f"one prototype are all the same; for example, set --config.{name}.prototypes=1024"
        )
    check_views(config)
    if unit or section.layer == "vmf":
        check_unit(config)
    if section.layer == "vmf" and config.head.dim < 3:
        raise UserError(
            f"{name}.layer is vmf, but head.dim is {config.head.dim}; expected 3 or more, because "
            "the densities are on a sphere; for example, set --config.head.dim=64, or "
            f"--config.{name}.layer=unit"
        )
    if patches:
        weight = f"{name}.patch_weight"
        check_masked(
            config,
            f"{weight} is {section.patch_weight:g}, for a loss of masked patches",
            f"--config.mask.none=0.5 --config.mask.ratio=0.1,0.5, or --config.{weight}=0",
        )
    if patches and section.patch_prototypes == 1:
        raise UserError(
            f"{name}.patch_prototypes is 1; expected 2 or more, or 0 for those of [CLS], because "
            f"targets over one prototype are all the same; set --config.{name}.patch_prototypes=0"
        )
    if section.koleo_prototypes and section.koleo_partition < 2:
        raise UserError(
            f"{name}.koleo_partition is 1; expected 2 or more, because a prototype needs another "
            f"one to keep away from; for example, set --config.{name}.koleo_partition=2048"
        )
    if section.marginal in marginals.SINKHORN and config.batch_size < 2:
        raise UserError(
            f"{name}.marginal is {section.marginal}, but batch_size is {config.batch_size}: "
            "Sinkhorn-Knopp balances the prototypes over the images of a batch, and cannot do so "
            f"with one; use a larger batch, or --config.{name}.marginal=centering"
        )
    check_prior_setting(config)
    whole = [key for key in ("prior", "koleo_data") if section[key] not in ("none", 0)]
    check_whole_batch(config, [f"{name}.{key} is {section[key]}" for key in whole])


def check_prior_setting(config: ml_collections.ConfigDict) -> None:
    """Checks that a prior is one that exists, without memory for all prototypes unless in a file.

    Raises:
        UserError: it is neither a name in PRIORS nor a file with such a prior.
    """
    section, where = config[config.method], f"{config.method}.prior"
    if section.prior not in PRIORS:
        prior_of(config)
    elif section.prior == "power":
        # In logarithms: the last share, relative to a sum between 1 and K.
        least = -(section.prior_exponent + 1) * np.log(section.prototypes)
        if least < np.log(np.finfo(np.float32).tiny):
            raise UserError(
                f"{where}_exponent is {section.prior_exponent:g}, so that the last of "
                f"{section.prototypes} prototypes has a share of nearly 0; expected a smaller one; "
                f"for example, set --config.{where}_exponent=0.25"
            )


def prior_of(config: ml_collections.ConfigDict) -> np.ndarray | None:
    """Returns the prior of the mean assignment [K], which sums to one; None if there is none.

    Raises:
        UserError: it is neither a name in PRIORS nor a file with such a prior.
    """
    section = config[config.method]
    if section.prior == "none":
        return None
    if section.prior == "uniform":
        return power_law(section.prototypes, 0.0)
    if section.prior == "power":
        return power_law(section.prototypes, section.prior_exponent)
    where = f"{config.method}.prior"
    if not section.prior.endswith(".npy"):
        raise UserError(
            f"{where} is {section.prior!r}; expected one of {', '.join(PRIORS)}, or a .npy file "
            f"with the share of each prototype; for example, set --config.{where}=uniform"
        )
    try:
        with epath.Path(section.prior).expanduser().open("rb") as file:
            prior = np.load(file)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{where}: {section.prior} cannot be read ({error}); write the shares of the "
            "prototypes with numpy.save"
        ) from error
    if not isinstance(prior, np.ndarray):
        raise UserError(
            f"{where}: {section.prior} has several arrays; expected one, as numpy.save writes it"
        )
    check_prior(prior, section.prototypes, where)
    return prior


def files(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Returns a digest of the prior if a file has it, see `Method.files`.

    Raises:
        UserError: there is no such file, or it has no prior.
    """
    prior = prior_of(config)
    if prior is None or config[config.method].prior in PRIORS:
        return {}
    shares = np.asarray(prior, "<f4")  # as they are used
    return {f"{config.method}.prior": hashlib.sha256(shares.tobytes()).hexdigest()[:16]}


def without_use(config: ml_collections.ConfigDict, patches: bool = False) -> dict[str, str]:
    """Returns the shared settings that have no effect because of others, and the reasons.

    Args:
        config: the config of the run.
        patches: whether the method has a loss of masked patches, as set.
    """
    name, section = config.method, config[config.method]
    reasons: dict[str, str] = {}

    def unused(keys: tuple[str, ...], because: str) -> None:
        reasons.update({f"{name}.{key}": f"{name}.{because}" for key in keys})

    if not patches:
        reasons |= no_masks(config)
    if section.marginal not in marginals.CENTERS:
        unused(("center_momentum",), f"marginal is {section.marginal}")
    if section.marginal not in marginals.SINKHORN:
        unused(("sinkhorn_iterations",), f"marginal is {section.marginal}")
    if section.prior == "none":
        unused(("prior_weight", "prior_exponent", "prior_direction"), "prior is none")
    elif section.prior != "power":
        unused(("prior_exponent",), f"prior is {section.prior}")
    if not section.koleo_prototypes:
        unused(("koleo_partition", "koleo_reduction"), "koleo_prototypes is 0")
    return reasons


def warmups(name: str, *patches: str) -> Mapping[str, Warmup]:
    """Returns the durations among the shared settings, see `Method.warmups`.

    Args:
        name: the name of the method.
        *patches: the setting of another temperature of the teacher for patches, if there is one.
    """
    freeze = Warmup("the prototypes begin to learn")
    return {**temperatures.warmups(name, *patches), f"{name}.freeze": freeze}
