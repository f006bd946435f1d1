"""The attention that a run uses, and messages if an implementation does not work."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from sop_jax.errors import UserError
from sop_jax.models import attention
from sop_jax.models.attention import attend, choose, padded_length

TOKENS = (197, 37)  # of the views of 224 and 96 pixels


def settings(asked: str, dtype: str = "bfloat16") -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({"attention": asked, "dtype": dtype})


def gpu() -> Any:
    """A device of this machine that says that it is a GPU."""
    return SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")


def test_is_softmax_attention() -> None:
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 3, 8))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(8)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("bnts,bsnh->btnh", weights, v)
    np.testing.assert_allclose(attend(q, k, v, implementation="xla"), expected, atol=1e-5)


@pytest.mark.usefixtures("promotion")  # JAX's own attention promotes bfloat16 in its gradient
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_padding_changes_nothing_and_gets_no_gradient(dtype: Any) -> None:
    """JAX passes the same lengths to cuDNN, whose softmax leaves out the padding too."""
    q, k, v, weights = jax.random.normal(jax.random.key(0), (4, 2, 6, 3, 8), dtype)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, length: int | None) -> jax.Array:
        mixed = attend(q, k, v, implementation="xla", length=length)
        return (mixed * weights[:, : len(mixed[0])]).astype(jnp.float32).sum()

    both = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)
    value, gradients = both(q, k, v, 5)
    expected, short = both(q[:, :5], k[:, :5], v[:, :5], None)
    limit = 1e-6 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(value, expected, rtol=limit)
    for found, plain in zip(gradients, short, strict=True):
        found, plain = (np.asarray(x, np.float32) for x in (found, plain))
        np.testing.assert_allclose(found[:, :5], plain, atol=limit)
        assert not found[:, 5].any()


def test_only_cudnn_needs_an_even_number_of_tokens() -> None:
    assert [padded_length(n, "cudnn") for n in (197, 198)] == [198, 198]
    assert padded_length(197, "xla") == 197


@pytest.mark.parametrize("asked", ["auto", "xla"])
def test_processors_take_xla(asked: str) -> None:
    assert choose(settings(asked), 64, jax.devices()[0], TOKENS) == "xla"


def test_cudnn_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.attention=cudnn does not work here: the device"):
        choose(settings("cudnn"), 64, jax.devices()[0], TOKENS)


def test_cudnn_in_float32_is_refused_and_auto_does_without() -> None:
    with pytest.raises(UserError, match="cuDNN's attention does not support float32"):
        choose(settings("cudnn", "float32"), 64, gpu(), TOKENS)
    assert choose(settings("auto", "float32"), 64, gpu(), TOKENS) == "xla"


def test_auto_takes_what_a_trial_of_the_real_sizes_on_the_device_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first trial fails, as without cuDNN, and the second works."""
    assert choose(settings("auto"), 64, gpu(), TOKENS) == "xla"
    with pytest.raises(UserError, match="does not work here: .*; choose auto or xla"):
        choose(settings("cudnn"), 64, gpu(), TOKENS)
    tried, where = [], []

    def attended(q: jax.Array, k: jax.Array, v: jax.Array, length: int, **_: Any) -> jax.Array:
        tried.append((q.shape, length))
        return q + k + v

    def placed(device: Any) -> jax.sharding.Sharding:
        where.append(device)
        return jax.sharding.SingleDeviceSharding(jax.devices()[1])

    monkeypatch.setattr(attention, "attend", attended)
    monkeypatch.setattr(attention, "SingleDeviceSharding", placed)
    assert choose(settings("auto"), 64, device := gpu(), TOKENS) == "cudnn"
    assert where == [device]
    assert sorted(tried) == [((1, 38, 1, 64), 37), ((1, 198, 1, 64), 197)]


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
def test_cudnn_agrees_with_xla() -> None:
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 198, 3, 64), jnp.bfloat16)

    def both(implementation: str) -> Any:
        def loss(q: jax.Array) -> jax.Array:
            mixed = attend(q, k, v, implementation=implementation, length=197)
            return (mixed.astype(jnp.float32) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss))(q)

    for fused, plain in zip(both("cudnn"), both("xla"), strict=True):
        fused, plain = (np.asarray(x, np.float32) for x in (fused, plain))
        assert np.linalg.norm(fused - plain) < 2e-2 * np.linalg.norm(plain)
