"""Each invalid setting is reported, with a valid one, before any work starts."""

from typing import Any

import ml_collections
import pytest

from sop_jax import config as config_lib
from sop_jax.check import (
    RULES,
    check_config,
    check_trace,
    check_used,
    cls_only_settings,
    without_use,
)
from sop_jax.config import paper
from sop_jax.errors import UserError
from sop_jax.models import FAMILIES
from sop_jax.objectives.methods import METHODS
from sop_jax.settings import flatten


def changed(settings: dict[str, Any]) -> ml_collections.ConfigDict:
    config = config_lib.paper()
    with config.unlocked(), config.ignore_type():
        for key, value in settings.items():
            config.update_from_flattened_dict({key: value})
    return config


def test_the_papers_settings_pass() -> None:
    check_config(config_lib.paper())


def test_each_setting_has_a_rule() -> None:
    assert RULES.keys() == flatten(paper()).keys()


# Invalid values of each setting.
NAN, INF = float("nan"), float("inf")
WHOLE = (-1, 1.5, NAN, True, "3", None)  # never valid for a count
# Never valid for a number. True is not listed, because ConfigDict converts it to 1.0.
REAL = (-0.1, NAN, INF, -INF, 1e39, "0.5", None)
PROBABILITY = (*REAL, 1.1)
NUMBERS = ((), (0.1,), (0.1, 0.2, 0.3, 0.4), 0.1, (0.1, NAN), (0.1, -0.1), (INF, INF))
RANGE = (*NUMBERS, (0.2, 0.1), (True, True))
WRONG: dict[str, tuple[Any, ...]] = {
    "seed": (*WHOLE, 2**32),
    "init_from": (3,),
    "epochs": REAL,
    "method": ("magic", "", 3),
    "steps": (0, -1, 1.5, True, 2**31),
    "batch_size": (*WHOLE, 0),
    "accumulate": (*WHOLE, 0),
    "log_every": WHOLE,
    "eval_every": WHOLE,
    "checkpoint_every": WHOLE,
    "tracker": ("", "none", "WandB", 3),
    "profile_steps": ((), (1, 2, 3), (1.5, 2.5), (-1, 2), (5, 3), (0, 3), 3),
    "data.source": ("magic", 3),
    "data.path": (3,),
    "data.name": (3,),
    "data.train_split": (3,),
    "data.test_split": (3,),
    "data.workers": WHOLE,
    "data.threads": WHOLE,
    "data.max_corrupt_share": PROBABILITY,
    "data.orientation": ("magic",),
    "data.white": REAL,
    "data.max_pixels": (*WHOLE, 0),
    "data.retry_seconds": REAL,
    "augment.resample": ("magic",),
    "augment.global_size": (*WHOLE, 0),
    "augment.local_size": (*WHOLE, 0),
    "augment.global_crops": (*WHOLE, 0, 1, 10**9),
    "augment.local_crops": (*WHOLE, 10**9),
    "augment.global_scale": (*RANGE, (0.0, 1.0), (0.5, 1.1)),
    "augment.local_scale": (*RANGE, (0.0, 1.0), (0.5, 1.1)),
    "augment.flip": PROBABILITY,
    "augment.jitter": PROBABILITY,
    "augment.brightness": REAL,
    "augment.contrast": REAL,
    "augment.saturation": REAL,
    "augment.hue": (*REAL, 3.0, 0.51),
    "augment.grayscale": PROBABILITY,
    "augment.blur": (*NUMBERS, (0.1, 0.2), (1.1, 0.1, 0.1)),
    "augment.blur_sigma": (*RANGE, (0.0, 2.0), (1.0, 1e30)),
    "augment.solarize": PROBABILITY,
    "mask.kind": ("magic",),
    "mask.ratio": (*RANGE, (0.5, 1.1)),
    "mask.none": PROBABILITY,
    "mask.start_epochs": REAL,
    "mask.start_steps": (-1, 1.5, True, 2**31),
    "model.family": ("magic",),
    "model.size": ("magic", 3),
    "model.width": (*WHOLE, 0),
    "model.depth": (*WHOLE, 0),
    "model.heads": (*WHOLE, 0),
    "model.stage_depths": ((), (2, 2, 0, 2), (2, 2, 1.5, 2), 2),
    "model.block": ("magic",),
    "model.stage_heads": ((), (3, 6, 12), (3, 6, 0, 24), (3, 6, True, 24), 3),
    "model.patch": (*WHOLE, 0),
    "model.window": (*WHOLE, 0),
    "model.registers": WHOLE,
    "model.layer_scale": REAL,
    "model.pool": ("magic",),
    "model.positions": ("magic",),
    "model.norm_eps": (*REAL, 0.0),
    "model.drop_path": (*REAL, 1.0, 1 - 1e-11),
    "model.init_std": REAL,
    "model.position_std": REAL,
    "model.remat": ("magic",),
    "model.attention": ("magic",),
    "model.stem": ("magic", "conv"),
    "model.unroll": ("magic", True),
    "model.dtype": ("magic", "float16"),
    "model.precision": ("magic",),
    "head.layers": WHOLE,
    "head.hidden": (*WHOLE, 0),
    "head.dim": (*WHOLE, 0),
    "head.batch_norm": (1, "yes"),
    "head.batch_norm_views": ("both", True),
    "head.unit": (1, "yes"),
    "sop.cls.memory": (*WHOLE, 0),
    "sop.cls.anchors": (*WHOLE, 0),
    "sop.cls.supports": WHOLE,
    "sop.cls.tasks": (*WHOLE, 0),
    "sop.cls.votes": ("magic",),
    "sop.cls.weight": REAL,
    "sop.patch.memory": WHOLE,
    "sop.patch.anchors": (*WHOLE, 0),
    "sop.patch.supports": WHOLE,
    "sop.patch.tasks": WHOLE,
    "sop.patch.votes": ("magic",),
    "sop.patch.weight": REAL,
    "sop.pool": ("magic",),
    "sop.smoothing": PROBABILITY,
    "sop.anchors": ("magic",),
    "sop.search_precision": ("magic",),
    "sop.student_temperature": (*REAL, 0.0, 1e-40),
    "sop.teacher_temperature": (*NUMBERS, (0.0, 0.07), (True, 0.1)),
    "sop.temperature_warmup_epochs": REAL,
    "sop.temperature_warmup_steps": (-1, 1.5, True, 2**31),
    "optim.kind": ("magic",),
    "optim.sgd_momentum": (*REAL, 1.0),
    "optim.trust": (*REAL, 0.0),
    "optim.lr": REAL,
    "optim.min_lr": REAL,
    "optim.warmup_epochs": REAL,
    "optim.warmup_steps": (-1, 1.5, True, 2**31),
    "optim.weight_decay": NUMBERS,
    "optim.clip": REAL,
    "optim.clip_kind": ("magic",),
    "optim.momentum": (*NUMBERS, (0.9, 1.1)),
    "eval.resize": (*WHOLE, 0),
    "eval.crop": (*WHOLE, 0),
    "eval.batch_size": (*WHOLE, 0),
    "eval.tasks": ((), ("knn", "no"), "knn", ("tsne",)),
    "eval.knn_k": ((), (0,), (0, -5), (10, 1.5), (True,), 10),
    "eval.knn_temperature": (*REAL, 0.0),
    "checkpoint.minutes": REAL,
    "checkpoint.keep_last": (*WHOLE, 0),
    "checkpoint.keep_every": WHOLE,
    "mesh.data": WHOLE,
    "mesh.fsdp": (*WHOLE, 0),
}

# Invalid values of the settings of all methods other than SOP, without the method's name.
OF_METHODS: dict[str, tuple[Any, ...]] = {
    "prototypes": (*WHOLE, 0),
    "layer": ("magic",),
    "freeze_epochs": REAL,
    "freeze_steps": (-1, 1.5, True, 2**31),
    "marginal": ("magic",),
    "center_momentum": PROBABILITY,
    "sinkhorn_iterations": (*WHOLE, 0),
    "student_temperature": (*REAL, 0.0, 1e-40),
    "teacher_temperature": (*NUMBERS, (0.0, 0.07), (True, 0.1)),
    "temperature_warmup_epochs": REAL,
    "temperature_warmup_steps": (-1, 1.5, True, 2**31),
    "temperature_by_epoch": ("magic", 3),
    "prior": (3,),
    "prior_weight": REAL,
    "prior_exponent": REAL,
    "prior_direction": ("magic",),
    "koleo_prototypes": REAL,
    "koleo_partition": (*WHOLE, 0),
    "koleo_reduction": ("magic",),
    "koleo_data": REAL,
    "patch_prototypes": WHOLE,
    "patch_teacher_temperature": (*NUMBERS, (0.0, 0.07), (True, 0.1)),
    "patch_weight": REAL,
    "predictor_depth": (*WHOLE, 0),
    "predicted": (*REAL, 0.0, 1.5),
    "target_temperature": (*REAL, 0.0),
    "clustering_temperature": (*REAL, 0.0),
    "lr": REAL,
    "patch_drop": (*REAL, 1.0, 1 - 1e-11),
    "queue": WHOLE,
    "queue_start_epochs": REAL,
    "queue_start_steps": (-1, 1.5, True, 2**31),
    "memory": (*WHOLE, 0),
    "block": (*WHOLE, 0),
    "loss": ("magic",),
    "eta": (*REAL, 1.0, 1 - 1e-11),
    "forgetting": ("magic",),
    "beta": (*NUMBERS, (0.0, 0.1), (True, 0.1)),
    "beta_warmup_epochs": REAL,
    "beta_warmup_steps": (-1, 1.5, True, 2**31),
    "variance_floor": (*REAL, 0.0),
    "start_mass": (*REAL, 0.0),
    "start_variance": (*REAL, 0.0),
}
WRONG |= {
    f"{name}.{key}": OF_METHODS[key]
    for name in METHODS
    if name != "sop"
    for key in flatten(METHODS[name].settings())
}


def test_each_setting_has_values_that_make_no_sense() -> None:
    assert WRONG.keys() == flatten(paper()).keys()


@pytest.mark.parametrize("key", WRONG)
def test_a_value_that_makes_no_sense_is_named_with_those_that_do(key: str) -> None:
    for value in WRONG[key]:
        with pytest.raises(UserError) as error:
            check_config(changed({key: value}))
        told = str(error.value)
        assert told.startswith(f"{key} is {value!r}; expected "), told
        assert "set --config." in told or key == "model.size", told


# Settings whose values are words, and these words.
CHOICES = {
    key: rule.expected.removeprefix("one of ").split(", ")
    for key, rule in RULES.items()
    if rule.expected.startswith("one of ")
}


@pytest.mark.parametrize("key", CHOICES)
def test_an_unknown_choice_names_those_that_are_known(key: str) -> None:
    with pytest.raises(UserError) as error:
        check_config(changed({key: "magic"}))
    assert f"{key} is 'magic'" in str(error.value)
    assert all(choice in str(error.value) for choice in CHOICES[key])


# Other settings that a choice requires.
RESNET = {"model.family": "resnet", "model.size": "50"} | cls_only_settings(paper())
WITH: dict[str, dict[str, Any]] = {
    "resnet": RESNET,
    "swav": {"optim.momentum": (0.0, 0.0)},
    "capi": {"augment.local_crops": 0},
}


@pytest.mark.parametrize("key", CHOICES)
def test_every_choice_passes(key: str) -> None:
    for choice in CHOICES[key]:
        check_config(changed({key: choice} | WITH.get(choice, {})))


SWIN = {"model.family": "swin", "model.size": "t"}

BAD = {
    "embeddings of any norm for SOP": (
        {"head.unit": False},
        r"head\.unit is false, but this method compares .* set --config\.head\.unit=true",
    ),
    "more anchors than rows": (
        {"sop.patch.anchors": 8193},
        r"sop\.patch\.anchors 8193 .*sop\.patch\.memory 8192; expected 2 to 8192",
    ),
    "cuDNN for a Swin": (
        {"model.family": "swin", "model.size": "t", "model.attention": "cudnn"},
        r"model\.attention is cudnn, which model\.family=swin does not support; choose auto",
    ),
    "the mean of patches for a Swin": (
        SWIN | {"model.pool": "mean"},
        r"model\.pool is mean, but model\.family=swin always averages .*; set it to cls in",
    ),
    "the mean of patches for a ResNet": (
        RESNET | {"model.pool": "mean"},
        r"model\.pool is mean, but model\.family=resnet always averages .*; set it to cls in",
    ),
    "a trace that ends before it starts": (
        {"profile_steps": (5, 3)},
        r"profile_steps is \(5, 3\); expected the first and the last step to trace, counted from 1",
    ),
    "a trace from step 0": (
        {"profile_steps": (0, 3)},
        r"profile_steps is \(0, 3\); .*counted from 1",
    ),
    "one anchor": ({"sop.cls.anchors": 1}, r"sop\.cls\.anchors 1 .*expected 2 to 65536"),
    "a batch larger than E_P": (
        {"batch_size": 8200},
        r"batch_size 8200 does not fit sop\.patch\.memory 8192.*at most 8192 or a larger memory",
    ),
    "a batch larger than E_C": (
        {"sop.cls.memory": 1000, "sop.cls.anchors": 100},
        r"batch_size 1024 does not fit sop\.cls\.memory 1000",
    ),
    "a batch larger than a memory that no task reads": (
        {"batch_size": 8200, "sop.patch.tasks": 0},
        r"batch_size 8200 does not fit sop\.patch\.memory 8192",
    ),
    "more supports than non-anchors": (
        {"sop.cls.anchors": 65530},
        r"sop\.cls\.supports 8 .* the 6 rows .*non_anchors.*fewer supports or anchors",
    ),
    "more supports than rows": (
        {"sop.pool": "all", "sop.patch.supports": 8192},
        r"sop\.patch\.supports 8192 .* the 8191 rows .*sop\.pool=all",
    ),
    "fewer than no supports": ({"sop.patch.supports": -1}, r"sop\.patch\.supports is -1"),
    "global views of broken patches": (
        {"augment.global_size": 225},
        r"augment\.global_size 225 .*model\.patch 16; choose 224 or 240",
    ),
    "local views of broken patches": (
        {"augment.local_size": 10},
        r"augment\.local_size 10 .*model\.patch 16; choose 16, or another patch",
    ),
    "an evaluation of broken patches": (
        {"model.patch": 32, "eval.crop": 240},
        r"eval\.crop 240 .*model\.patch 32; choose 224 or 256",
    ),
    "a crop larger than its image": (
        {"eval.resize": 200},
        r"eval\.resize 200 is smaller than eval\.crop 224",
    ),
    "no steps": ({"steps": 0}, r"steps is 0; expected a whole number from 1 to 2147483647"),
    "no epochs": (
        {"epochs": 0.0},
        r"no steps: steps is none and epochs is 0\.0; set --config\.steps",
    ),
    "a teacher at zero": (
        {"sop.teacher_temperature": (0.0, 0.07)},
        r"sop\.teacher_temperature is \(0\.0, 0\.07\); expected 2 values, each a finite number "
        r"greater than 0; for example, set --config\.sop\.teacher_temperature=0\.04,0\.07$",
    ),
    "a ResNet with all that a ViT has": (
        {"model.family": "resnet", "model.size": "50"},
        r"\[CLS\] only.*sop\.patch\.tasks is 1, sop\.patch\.memory is 8192, mask\.none is 0\.0, "
        r"model\.drop_path is 0\.1; set --config\.sop\.patch\.tasks=0 "
        r"--config\.sop\.patch\.memory=0 --config\.mask\.none=1\.0 "
        r"--config\.model\.drop_path=0\.0$",
    ),
    "a ResNet with masks": (
        RESNET | {"mask.none": 0.5},
        r"but mask\.none is 0\.5; set --config\.mask\.none=1\.0$",
    ),
    "views smaller than a feature": (
        RESNET | {"augment.global_size": 30},
        r"augment\.global_size is 30; model\.family=resnet needs 32 pixels or more",
    ),
    "views smaller than a feature without the first strides": (
        RESNET | {"model.stem": "small", "augment.global_size": 7},
        r"augment\.global_size is 7; model\.family=resnet needs 8 pixels or more",
    ),
    "a stage without blocks": (
        RESNET | {"model.size": "custom", "model.stage_depths": (3, 0, 1, 1)},
        r"model\.stage_depths is \(3, 0, 1, 1\); expected one or more values, each a whole",
    ),
    "patches without a memory of them": (
        {"sop.patch.memory": 0},
        r"sop\.patch\.memory is 0, but sop\.patch\.tasks is 1; set --config\.sop\.patch\.tasks=0",
    ),
    "masks from before the start": (
        {"mask.start_epochs": -1.0},
        r"mask\.start_epochs is -1\.0; expected a finite number of 0 or more",
    ),
    "a size of another family": (
        {"model.family": "swin", "model.size": "l"},
        r"model\.size is 'l'; expected one of t, s, b for model\.family=swin, or custom",
    ),
    "views of broken tokens": (
        SWIN | {"augment.local_size": 98},
        r"augment\.local_size 98 .*multiple of the 32 pixels of a token; choose 96 or 128$",
    ),
    "a Swin whose layers do not pair": (
        SWIN | {"model.size": "custom", "model.stage_depths": (2, 2, 5, 2)},
        r"model\.stage_depths is \(2, 2, 5, 2\); expected even numbers",
    ),
    "a Swin whose heads do not divide": (
        SWIN | {"model.size": "custom", "model.width": 100},
        r"model\.width 100 makes stage 1 100 wide.* its 3 heads; choose other model\.stage_heads",
    ),
    "heads that do not divide": (
        {"model.size": "custom", "model.width": 100, "model.heads": 3},
        r"model\.width 100 .*model\.heads 3; choose a width",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_an_invalid_combination_is_reported_with_a_remedy(case: str) -> None:
    settings, message = BAD[case]
    with pytest.raises(UserError, match=message):
        check_config(changed(settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"sop.cls.anchors": 65528},
        {"sop.pool": "all", "sop.cls.anchors": 65536},
        {"batch_size": 8192},
        {"steps": 1, "epochs": 0.0},
        {"sop.patch.tasks": 0, "sop.patch.anchors": 9000},
        {"augment.local_crops": 0},
        {"sop.patch.tasks": 0, "sop.patch.memory": 0},
        RESNET | {"batch_size": 9000, "augment.local_size": 45},
        {"model.size": "custom", "model.width": 96, "model.heads": 3},
        {"model.size": "h", "model.patch": 14, "augment.local_size": 98, "model.registers": 4},
        SWIN | {"model.window": 14, "mask.start_steps": 0},
    ],
    ids=str,
)
def test_values_at_the_limits_pass(settings: dict[str, Any]) -> None:
    check_config(changed(settings))


def test_an_unknown_family_is_refused_before_its_settings_are_looked_up() -> None:
    with pytest.raises(UserError, match=r"model\.family is 'bert'; expected one of vit, swin"):
        check_used(changed({"model.family": "bert"}), ["model.family"])


@pytest.mark.parametrize(
    ("changes", "given", "why"),
    [
        ({"data.source": "digits"}, "data.path", "it is for data.source=tfds or folder or packed"),
        ({"data.source": "digits"}, "data.test_split", "data.source is digits"),
        ({"data.source": "folder"}, "data.name", "it is for data.source=tfds"),
        ({}, "model.width", "it is for model.size=custom, but model.size is s"),
        ({"model.size": "custom"}, "model.window", "model.family=vit does not use it"),
        ({"model.family": "swin", "model.size": "t"}, "model.patch", "model.family=swin"),
        ({"model.family": "swin", "model.size": "t"}, "model.pool", "model.family=swin"),
        ({"model.family": "resnet", "model.size": "50"}, "model.pool", "model.family=resnet"),
        ({"model.family": "resnet", "model.size": "50"}, "model.norm_eps", "model.family=resnet"),
        ({"steps": 10}, "epochs", "steps is 10, which takes precedence"),
        ({"optim.warmup_steps": 5}, "optim.warmup_epochs", "optim.warmup_steps is 5"),
        ({"head.layers": 1}, "head.batch_norm", "head.layers is 1, so that none is hidden"),
        ({}, "head.batch_norm_views", "head.batch_norm is false"),
        ({}, "optim.sgd_momentum", "optim.kind=adamw does not use it"),
        ({"optim.kind": "sgd"}, "optim.trust", "optim.kind=sgd does not use it"),
        ({"sop.patch.tasks": 0}, "sop.patch.weight", "sop.patch.tasks is 0"),
        ({"augment.local_crops": 0}, "augment.local_size", "augment.local_crops is 0"),
    ],
)
def test_a_setting_that_is_asked_for_and_has_no_effect_is_refused(
    changes: dict[str, Any], given: str, why: str
) -> None:
    config = paper()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=rf"--config\.{given} would have no effect: .*{why}"):
        check_used(config, [given])
    check_used(config, ["seed", "data.workers", *changes])
    check_used(config, [given], made=config)  # a run can be repeated with its own settings


def test_settings_without_use_are_settings() -> None:
    for family in FAMILIES:
        config = paper()
        config.update_from_flattened_dict({"model.family": family, "model.size": "custom"})
        config.update_from_flattened_dict({"sop.patch.tasks": 0, "steps": 1})
        assert without_use(config).keys() <= flatten(config).keys()


def test_a_trace_beyond_the_end_of_the_run_is_refused() -> None:
    check_trace((5, 10), 10)
    check_trace((0, 0), 10)
    with pytest.raises(UserError, match=r"profile_steps is 20,25, but the run has 10 steps"):
        check_trace((20, 25), 10)
