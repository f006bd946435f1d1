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
from sop_jax.models.attention import attend, choose


def settings(asked: str, dtype: str = "bfloat16") -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({"attention": asked, "dtype": dtype})


def gpu() -> Any:
    """The attributes of a GPU that `choose` reads."""
    return SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")


def test_is_softmax_attention() -> None:
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 3, 8))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(8)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("bnts,bsnh->btnh", weights, v)
    np.testing.assert_allclose(attend(q, k, v, implementation="xla"), expected, atol=1e-5)


@pytest.mark.parametrize("asked", ["auto", "xla"])
def test_processors_take_xla(asked: str) -> None:
    assert choose(settings(asked), 64, jax.devices()[0]) == "xla"


def test_cudnn_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.attention=cudnn does not work here: the device"):
        choose(settings("cudnn"), 64, jax.devices()[0])


def test_cudnn_in_float32_is_refused_and_auto_does_without() -> None:
    with pytest.raises(UserError, match="cuDNN's attention does not support float32"):
        choose(settings("cudnn", "float32"), 64, gpu())
    assert choose(settings("auto", "float32"), 64, gpu()) == "xla"


def test_auto_takes_what_a_trial_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first trial fails, as without cuDNN, and the second works."""
    assert choose(settings("auto"), 64, gpu()) == "xla"
    with pytest.raises(UserError, match="does not work here: .*; choose auto or xla"):
        choose(settings("cudnn"), 64, gpu())
    monkeypatch.setattr(attention, "attend", lambda q, k, v, **_: q + k + v)
    assert choose(settings("auto"), 64, gpu()) == "cudnn"


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
def test_cudnn_agrees_with_xla() -> None:
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 197, 3, 64), jnp.bfloat16)

    def both(implementation: str) -> Any:
        def loss(q: jax.Array) -> jax.Array:
            return (attend(q, k, v, implementation=implementation).astype(jnp.float32) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss))(q)

    for fused, plain in zip(both("cudnn"), both("xla"), strict=True):
        fused, plain = (np.asarray(x, np.float32) for x in (fused, plain))
        assert np.linalg.norm(fused - plain) < 2e-2 * np.linalg.norm(plain)
