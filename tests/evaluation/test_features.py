"""Features of a source: complete, in order, and the same for any batch size and device count."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from small import small_config

from sop_jax.data.pipeline import eval_batches
from sop_jax.data.sources import DigitsSource
from sop_jax.evaluation.features import host_batches, make_extractor
from sop_jax.evaluation.views import view_of
from sop_jax.models import Model, Params, build
from sop_jax.parallel.mesh import make_mesh

WIDTH = 32


def make_config(**changes: Any) -> ml_collections.ConfigDict:
    config = small_config(
        model=dict(width=WIDTH),
        head=dict(hidden=32),
        augment=dict(global_size=16, local_size=8),
        eval=dict(resize=18, crop=16, batch_size=16),
    )
    config.update_from_flattened_dict(changes)
    return config


@functools.cache
def network(dtype: str) -> tuple[Model, Params]:
    config = make_config(**{"model.dtype": dtype})
    model = build(config, config.augment.global_size)
    params = model.init(jax.random.key(0))
    noise = jax.random.key(1)
    return model, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(noise, x.shape), params)


class Some(DigitsSource):
    """The first digits, some of which cannot be read."""

    def __init__(self, count: int, broken: tuple[int, ...] = ()) -> None:
        super().__init__("test")
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return b"no image" if index in self.broken else super().__getitem__(index)


@pytest.mark.medium
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [1, 16, 37])
def test_are_the_class_token_of_every_image_in_order(count: int, dtype: str) -> None:
    config, (model, params) = make_config(), network(dtype)
    source = Some(count)
    found = make_extractor(model, config, make_mesh(1))(params, source)
    (batch,) = eval_batches(source, 18, 16, count)
    (tokens,) = model.features(params, jnp.asarray(batch["image"]))
    assert found.vectors.dtype == np.float32 and found.vectors.shape == (count, WIDTH)
    tolerance = 1e-5 if dtype == "float32" else 0.05
    np.testing.assert_allclose(
        found.vectors, np.asarray(tokens[:, 0], np.float32), atol=tolerance, rtol=tolerance
    )
    assert found.patches is None and found.corrupt == []
    np.testing.assert_array_equal(found.index, np.arange(count))


def test_do_not_depend_on_devices_or_batch() -> None:
    model, params = network("float32")
    source = Some(45)
    one = make_extractor(model, make_config(), make_mesh(1))(params, source)
    for batch_size in (1, 10):  # rounded up to a multiple of the devices
        config = make_config(**{"eval.batch_size": batch_size})
        mesh = make_mesh()
        many = make_extractor(model, config, mesh)(params, source)
        np.testing.assert_allclose(many.vectors, one.vectors, atol=1e-5)
        np.testing.assert_array_equal(many.index, one.index)


def test_patches_come_row_by_row_where_asked_for() -> None:
    config, (model, params) = make_config(), network("float32")
    found = make_extractor(model, config, make_mesh(1), view_of(config, patches=True))(
        params, Some(20)
    )
    assert found.patches is not None
    assert found.patches.dtype == np.float16 and found.patches.shape == (20, 16, WIDTH)
    (batch,) = eval_batches(Some(20), 18, 16, 20)
    (tokens,) = model.features(params, jnp.asarray(batch["image"]))
    np.testing.assert_allclose(found.patches, tokens[:, 1:], atol=2e-2)


@pytest.mark.medium
def test_a_swin_gives_the_mean_of_its_tokens_and_all_of_them() -> None:
    settings = {"model.family": "swin", "model.width": 8, "model.stage_depths": (2, 2, 2, 2)}
    settings |= {"model.stage_heads": (1, 1, 2, 2), "augment.global_size": 64}
    config = make_config(**settings | {"eval.crop": 64, "eval.resize": 64})
    model = build(config, 64)
    params = jax.jit(model.init)(jax.random.key(0))
    found = make_extractor(model, config, make_mesh(1), view_of(config, patches=True))(
        params, Some(20)
    )
    assert found.patches is not None and found.patches.shape == (20, 4, 64)
    assert found.vectors.shape == (20, 64)
    np.testing.assert_allclose(found.patches.astype(np.float32).mean(1), found.vectors, atol=1e-2)
    assert np.abs(found.vectors[0] - found.vectors[1]).max() > 1e-2


def test_corrupt_images_have_no_row_and_are_named() -> None:
    config, (model, params) = make_config(), network("float32")
    broken = (0, 17, 36)
    extract = make_extractor(model, config, make_mesh(1))
    found, whole = extract(params, Some(37, broken)), extract(params, Some(37))
    assert found.corrupt == list(broken)
    rest = np.setdiff1d(np.arange(37), broken)
    np.testing.assert_array_equal(found.index, rest)
    np.testing.assert_allclose(found.vectors, whole.vectors[rest], atol=1e-6)


def test_nothing_readable_gives_no_rows() -> None:
    config, (model, params) = make_config(), network("float32")
    found = make_extractor(model, config, make_mesh(1))(params, Some(3, (0, 1, 2)))
    assert found.vectors.shape == (0, WIDTH) and found.corrupt == [0, 1, 2]


def test_progress_counts_every_image_once() -> None:
    config, (model, params) = make_config(), network("float32")
    done: list[int] = []
    make_extractor(model, config, make_mesh(1))(params, Some(37, (5,)), done.append)
    assert done == [16, 16, 5]


@pytest.mark.parametrize("count", [1, 8, 13])
def test_hosts_share_the_images(count: int) -> None:
    source, hosts = Some(count, (0, count - 1)), 3
    (whole,) = eval_batches(source, 18, 16, count)
    seen, corrupt, batches = [], [], []
    for host in range(hosts):
        made = list(host_batches(source, view_of(make_config()), 2, host, hosts))
        batches.append(len(made))
        for batch in made:
            seen += batch["index"][batch["valid"]].tolist()
            corrupt += batch["corrupt"][batch["corrupt"] >= 0].tolist()
            for row in np.flatnonzero(batch["valid"]):
                expected = whole["image"][batch["index"][row]]
                np.testing.assert_array_equal(batch["image"][row], expected)
                assert batch["label"][row] == source.labels[batch["index"][row]]
    assert len(set(batches)) == 1  # otherwise some would wait for others for ever
    assert sorted(corrupt) == sorted({0, count - 1})
    assert sorted(seen + corrupt) == list(range(count))
