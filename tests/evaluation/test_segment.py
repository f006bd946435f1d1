"""The task of segmentation: settings, errors, training, validation, and what it writes."""

import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import processes
import pytest
from etils import epath
from PIL import Image
from runs import make_run
from small import small_config

from sop_jax.check import check_rules
from sop_jax.data import ade20k
from sop_jax.errors import Interrupted, UserError
from sop_jax.evaluation import areas, fit, segment
from sop_jax.evaluation.tables import text_of
from sop_jax.evaluation.task import Subject
from sop_jax.evaluation.tools import Toolbox
from sop_jax.models import build
from sop_jax.parallel.mesh import make_mesh, replicated
from sop_jax.settings import flatten
from sop_jax.training import checkpoint
from sop_jax.weights import files

CROP = 64
SCORES = ("mIoU", "mAcc", "aAcc", "IoU")


@pytest.fixture
def ade(shared: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """The three real pairs, as both splits."""
    real = shared / "data" / "fixtures" / "ade20k"
    for kind in ("images", "annotations"):
        for split in ade20k.SPLITS:
            shutil.copytree(real / kind / "validation", tmp_path / "ade" / kind / split)
    return tmp_path / "ade"


@pytest.fixture
def reduced(ade: pathlib.Path) -> pathlib.Path:
    """The same pairs with an eighth of the height and width."""
    for path in ade.glob("*/*/*"):
        with Image.open(path) as picture:
            small = picture.resize((picture.width // 8, picture.height // 8), Image.NEAREST)
        small.save(path)
    return ade


def settings(**changes: Any) -> ml_collections.ConfigDict:
    found = segment.settings()
    small = dict(crop=CROP, stride=40)
    if not changes.get("weights"):
        small |= dict(iterations=6, batch_size=8, warmup=1)
    if changes.get("head") == "upernet":
        small |= dict(channels=8)
    found.update(small | changes)
    check_rules(flatten(found), segment.RULES, flatten(segment.settings()), "--eval.")
    return found


def config(**model: Any) -> ml_collections.ConfigDict:
    found = small_config()
    found.augment.global_size = 32
    found.model.update(dict(depth=4, patch=16, init_std=0.2) | model)
    found.data.workers = 0
    return found


def subject() -> Subject:
    own = config()
    model = build(own, own.augment.global_size)
    everywhere = replicated(make_mesh())
    params = jax.jit(model.init, out_shardings=everywhere)(jax.random.key(0))
    return Subject("", own, model, params, "", None)


def toolbox(folder: pathlib.Path | None, stop: int = 0) -> Toolbox:
    """Returns tools that raise Interrupted between steps `stop` and `stop` + 1, if it is not 0."""
    calls = 0

    class Stopping(Toolbox):
        def between(self, save: bool = False) -> bool:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise Interrupted("stop")
            return save

    place = epath.Path(folder) if folder else None
    return Stopping(subject(), make_mesh(), place, seed=1, shown=False)


def measured(ade: pathlib.Path, tools: Toolbox, **changes: Any) -> dict[str, Any]:
    asked, own = settings(**changes), subject()
    inputs = segment.open_inputs(own.config, asked, {"path": str(ade)})
    result = segment.run(own, inputs, asked, tools)
    assert "this network" in text_of(segment.table(result, asked))
    return result


@pytest.mark.medium
@pytest.mark.parametrize("head", ["linear", pytest.param("upernet", marks=pytest.mark.slow)])
def test_real_pairs_from_training_to_scores(ade, tmp_path, head):
    tools = toolbox(tmp_path / "out")
    result = measured(ade, tools, head=head, every=3, pictures=2, lr=1e-3)
    assert [row["step"] for row in result["validations"]] == [3, 6]
    assert all(0 <= result[name] <= 1 for name in ("mIoU", "mAcc", "aAcc"))
    assert len(result["IoU"]) == 150 and None in result["IoU"]
    shares = [share for share in result["IoU"] if share is not None]
    assert result["mIoU"] == pytest.approx(np.mean(shares))
    first, last = (row["loss"] for row in result["validations"])
    assert last < first < 1.5 * np.log(150)
    chosen = {"lr", "layers"} | (
        {"layer_decay", "drop_path", "channels"} if head != "linear" else set()
    )
    assert set(result["chosen"]) == chosen
    assert len(result["files"]) == 3
    assert all((tmp_path / "out" / name).exists() for name in result["files"])

    pictures = sorted((tmp_path / "out" / "predictions").iterdir())
    assert [path.name for path in pictures] == ["ADE_val_00000001.png", "ADE_val_00000002.png"]
    with Image.open(pictures[0]) as picture:
        assert picture.mode == "P"
        with Image.open(ade / "images" / "validation" / "ADE_val_00000001.jpg") as image:
            assert picture.size == image.size
        assert 1 <= np.asarray(picture).min() and np.asarray(picture).max() <= 150

    # What was written can be measured, with the same scores.
    again = measured(ade, tools, head=head, weights=str(tmp_path / "out" / segment.WEIGHTS))
    assert {name: again[name] for name in SCORES} == {name: result[name] for name in SCORES}


def test_weights_of_another_head_are_refused(tmp_path):
    files.write(
        tmp_path / "x.safetensors", {"decode_head.conv_seg.weight": np.zeros((7, 64, 1, 1))}
    )
    with pytest.raises(
        UserError, match=r"(?s)x.safetensors: .*is \[7, 64, 1, 1\], expected \[150, 64"
    ):
        segment.read_weights(tmp_path / "x.safetensors", config(), settings())


@pytest.mark.medium
def test_weights_without_a_final_norm_are_read_if_it_is_not_used(tmp_path):
    asked = settings(head="upernet", norm=False)
    _, segmenter = segment.make_segmenter(config(), asked)
    segment.write_weights(epath.Path(tmp_path), jax.jit(segmenter.init)(jax.random.key(0)))
    with files.opened(tmp_path / segment.WEIGHTS) as arrays:
        kept = {f"state_dict.{name}": arrays[name] for name in arrays if ".norm." not in name}
    files.write(tmp_path / "x.safetensors", kept)
    leaves = segment.read_weights(tmp_path / "x.safetensors", config(), asked)
    np.testing.assert_array_equal(
        leaves["decode_head/conv_seg/bias"], kept["state_dict.decode_head.conv_seg.bias"]
    )
    assert "backbone/norm/scale" not in leaves
    with pytest.raises(UserError, match=r"missing: backbone.norm.weight"):
        segment.read_weights(tmp_path / "x.safetensors", config(), settings(head="upernet"))


@pytest.mark.medium
def test_interrupted_and_resumed_equals_uninterrupted(reduced, tmp_path):
    whole = measured(reduced, toolbox(tmp_path / "whole"), head="upernet", iterations=3)
    for stop in (2, 1):  # after the second step, and while the third one is validated
        with pytest.raises(Interrupted, match=r"step \d of 3"):
            measured(reduced, toolbox(tmp_path / "out", stop), head="upernet", iterations=3)
    resumed = measured(reduced, toolbox(tmp_path / "out"), head="upernet", iterations=3)
    assert resumed == whole  # the losses too
    with files.opened(tmp_path / "out" / segment.WEIGHTS) as found:
        with files.opened(tmp_path / "whole" / segment.WEIGHTS) as expected:
            for name in expected:
                np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.mark.medium
def test_devices_share_windows_and_change_no_area(reduced):
    asked, own = settings(), subject()
    pairs = segment.open_inputs(own.config, asked, {"path": str(reduced)}).test
    _, segmenter = segment.make_segmenter(own.config, asked)
    params = segmenter.init(jax.random.key(0))
    params["decode_head"]["conv_seg"]["kernel"] *= 100  # so that many classes are predicted
    params = jax.device_put(params, replicated(make_mesh()))
    several, one = (
        segment.validate(
            segment.make_logits(segmenter, devices)(params), pairs, asked, toolbox(None)
        )
        for devices in (jax.local_devices(), jax.local_devices()[:1])
    )
    np.testing.assert_array_equal(one, several)
    labels = [pairs.pair(i).mask for i in range(len(pairs))]
    assert several[3].sum() == sum((label != ade20k.IGNORED).sum() for label in labels)
    assert np.count_nonzero(several[2]) > 3


@pytest.mark.medium
def test_prediction_has_the_size_of_the_image():
    _, segmenter = segment.make_segmenter(config(), settings())
    params = segmenter.init(jax.random.key(0))
    params = jax.device_put(params, replicated(make_mesh()))
    logits_of = segment.make_logits(segmenter, jax.local_devices())(params)
    sizes = [(100, 90), (20, 200), (64, 64)]  # the second is scaled by its longer side
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]
    together = segment.predict(logits_of, images, settings())
    assert [x.shape for x in together] == sizes
    for image, found in zip(images, together, strict=True):
        np.testing.assert_array_equal(segment.predict(logits_of, [image], settings())[0], found)


def test_sizes_choose_what_is_unset():
    small, base, large = (segment.tuning(*size) for size in ((384, 12), (768, 12), (1024, 24)))
    assert (small.rate, base.rate, large.rate) == (3e-5, 8e-5, 2e-5)
    assert (small.decay, base.decay, large.decay) == (0.9, 0.65, 0.95)
    assert segment.layers_of(segment.settings(), 12) == (3, 5, 7, 11)
    assert segment.layers_of(segment.settings(), 24) == (7, 11, 15, 23)
    assert segment.layers_of(segment.settings(), 4) == (0, 1, 2, 3)
    for depth in range(4, 41):
        assert len(set(segment.layers_of(segment.settings(), depth))) == 4
    chosen, _ = segment.make_segmenter(config(drop_path=0.3), settings())
    assert (chosen.lr, chosen.drop_path, chosen.layer_decay) == (8e-4, None, None)
    chosen, _ = segment.make_segmenter(config(), settings(head="upernet", lr=0.5, drop_path=0.0))
    assert (chosen.lr, chosen.drop_path, chosen.layer_decay) == (0.5, 0.0, 0.9)


def test_positions_of_other_grids_are_resized():
    table = jnp.arange(10.0).reshape(5, 2)
    np.testing.assert_array_equal(segment.resized_positions(table, 2), table)
    larger = segment.resized_positions(table, 4)
    assert larger.shape == (17, 2)
    np.testing.assert_array_equal(larger[0], table[0])
    np.testing.assert_allclose(larger[1:].mean(0), table[1:].mean(0), atol=1e-5)


def test_loss_is_divided_by_ignored_pixels_too():
    logits = jnp.zeros((1, 2, 2, 5))
    labels = jnp.array([[[0, 1], [255, 255]]])
    assert segment.pixel_loss(logits, labels) == pytest.approx(np.log(5) / 2)
    assert segment.pixel_accuracy(logits, labels) == 1 / 4


def test_areas_of_all_processes_are_summed_beyond_int32(monkeypatch):
    total = np.array([[2**40 + 5, 7], [0, 2**24], [1, 2], [2**33, 2**24 - 1]])
    total = np.pad(total, ((0, 0), (0, 148)))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(segment, "process_allgather", lambda x: np.stack([x, x]))
    np.testing.assert_array_equal(segment.summed(total), 2 * total)


def test_palette_differs_between_labels():
    colours = segment.palette()
    assert len(np.unique(colours, axis=0)) == len(colours) == 151


@pytest.mark.parametrize(
    "model, changes, message",
    [
        (dict(family="resnet"), {}, "a resnet does not have"),
        (dict(family="swin"), {}, "a swin does not have"),
        ({}, dict(layers=(1, 4)), r"layers \[1, 4\] .* has 4 layers"),
        ({}, dict(head="upernet", layers=(1, 2)), "UPerNet combines 4"),
        ({}, dict(crop=8, stride=8), "eval.crop is 8"),
        ({}, dict(crop=64, stride=65), "eval.stride 65 is larger"),
        ({}, dict(batch_size=7), r"eval.batch_size 7 cannot be split over 8 devices"),
        (dict(depth=3), {}, "the network has 3 layers, but the default is 4 different ones"),
        ({}, dict(iterations=40, warmup=1500), "eval.warmup is 1500, but there are only 40 iter"),
        ({}, dict(layer_decay=0.9), "--eval.layer_decay=0.9 would have no effect: it is for"),
        ({}, dict(drop_path=0.3), "--eval.drop_path=0.3 would have no effect: it is for"),
        ({}, dict(channels=8), "--eval.channels=8 would have no effect: it is for"),
        ({}, dict(decay_tokens=True), "--eval.decay_tokens=True would have no effect"),
        ({}, dict(weights="x", lr=0.1), "--eval.lr=0.1 would have no effect: nothing is trained"),
        ({}, {}, "--data.path is missing. Expected the scene parsing benchmark"),
    ],
)
def test_what_cannot_work_is_refused_before_work(model, changes, message):
    own = small_config(model=dict(family=model["family"])) if "family" in model else config(**model)
    with pytest.raises(UserError, match=message):
        segment.open_inputs(own, settings(**changes), {})


def test_flags_of_the_run_do_not_apply_to_the_pairs():
    with pytest.raises(UserError, match="--data.source=folder would have no effect"):
        segment.open_inputs(config(), settings(), {"path": "x", "source": "folder"})


def test_the_data_that_is_recorded_is_that_of_the_task(reduced):
    own = config()
    segment.open_inputs(own, settings(), {"path": str(reduced)})
    assert (own.data.source, own.data.path, own.data.test_split) == ("folder", str(reduced), "")


@pytest.mark.medium
@pytest.mark.parametrize("split", ade20k.SPLITS)
def test_pairs_that_fail_later_do_not_repeat_the_training(reduced, tmp_path, split):
    whole = measured(reduced, toolbox(tmp_path / "whole"), iterations=3)
    own, asked = subject(), settings(iterations=3)
    own.config.data.threads = 0  # so that no batch is made in advance
    inputs = segment.open_inputs(own.config, asked, {"path": str(reduced)})
    mask = reduced / "annotations" / split / "ADE_val_00000003.png"
    kept, calls = mask.read_bytes(), []

    class Damaging(Toolbox):
        def between(self, save: bool = False) -> bool:
            calls.append(save)
            if len(calls) == 2:
                Image.new("L", (4, 4)).save(mask)
            return False

    place = epath.Path(tmp_path / "out")
    with pytest.raises(UserError, match="ADE_val_00000003.png has 4 x 4 pixels"):
        segment.run(own, inputs, asked, Damaging(own, make_mesh(), place, seed=1, shown=False))
    mask.write_bytes(kept)
    assert checkpoint.latest_step(place / fit.UNFINISHED) == (2 if split == "training" else 3)
    assert measured(reduced, toolbox(tmp_path / "out"), iterations=3) == whole


def test_areas_need_no_predictions_of_labelled_classes():
    total = areas.areas(np.zeros((2, 2), int), np.full((2, 2), 3), 5)
    assert areas.scores(total)["mIoU"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_the_command_gives_the_same_on_two_processes(reduced, tmp_path, head):
    sizes = {"augment.global_size": 32, "augment.local_size": 16, "model.patch": 16}
    make_run(tmp_path / "run", steps=(3,), **sizes, **{"data.workers": 0})
    command = [
        *("-m", "sop_jax.evaluate", f"--workdir={tmp_path / 'run'}", "--task=segment"),
        *(f"--data.path={reduced}", f"--eval.head={head}", "--eval.layers=0,0,1,1"),
        *(f"--eval.crop={CROP}", "--eval.stride=40", "--eval.batch_size=8"),
        *(["--eval.channels=8"] if head == "upernet" else []),
        *("--eval.iterations=4", "--eval.warmup=1", "--eval.lr=0.01"),
    ]
    found = []
    for count, devices in ((1, 1), (2, 4)):
        own = [*command, f"--out={tmp_path / f'{head}{count}'}"]
        others = processes.among(count) if count > 1 else [["--processes=1"]]
        ended = processes.run(
            [own + other for other in others], tmp_path / "logs", devices=devices, timeout=400
        )
        assert all(one.code == 0 for one in ended), ended
        assert "SOP" in ended[0].out
        found.append(json.loads(ended[0].out.splitlines()[-1])["results"])
    one, several = found
    # Rounding may change the class of a few pixels.
    assert several["loss"] == pytest.approx(one["loss"], rel=1e-4)
    for name in ("mIoU", "mAcc", "aAcc"):
        assert several[name] == pytest.approx(one[name], abs=2e-3), name
