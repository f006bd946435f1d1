"""The golden numbers of the parts: vMF densities, KoLeo, and the priors of ME-MAX and PMSN."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_numbers import Found, differences, load, unnoticed

from sop_jax.objectives.losses import cross_entropy
from sop_jax.objectives.prototypical.koleo import koleo, koleo_of_prototypes, koleo_of_unit
from sop_jax.objectives.prototypical.priors import mean_to_prior, memax, power_law, prior_to_mean
from sop_jax.objectives.prototypical.vmf import log_c, vmf_logits

TOLERANCE = 1e-5  # relative to the largest magnitude
LOG_C = 3e-3  # absolute; only differences between prototypes matter
RATIO = 1e-3  # absolute; the ratio of Bessel functions is at most 1
FAMILY = load("family.npz")


def single(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def value_and_grad(function: Callable[..., jax.Array], x: np.ndarray) -> tuple[Found, Found]:
    value, gradient = jax.jit(jax.value_and_grad(function))(single(x))
    return Found(value, TOLERANCE), Found(gradient, TOLERANCE)


def vmf_numbers() -> dict[str, Found]:
    kappa = single(FAMILY["vmf/kappa"])
    values, slopes, numbers = [], [], {}
    for p in FAMILY["vmf/dims"].tolist():
        values.append(log_c(kappa, p))
        slopes.append(-jax.vmap(jax.grad(lambda k, p=p: log_c(k, p)))(kappa))
        numbers[f"vmf/log_c_zero_{p}"] = Found(log_c(jnp.zeros(()), p), LOG_C, absolute=True)
    numbers["vmf/log_c"] = Found(jnp.stack(values), LOG_C, absolute=True)
    numbers["vmf/ratio"] = Found(jnp.stack(slopes), RATIO, absolute=True)
    y, weight, target = (single(FAMILY[f"vmf/{name}"]) for name in ("y", "weight", "target"))
    for name in ("0.1", "0.04"):

        def loss(y: jax.Array, weight: jax.Array, tau: float = float(name)) -> jax.Array:
            log_p = jax.nn.log_softmax(vmf_logits(y, weight, tau))
            return cross_entropy(target, log_p).mean()

        logits = vmf_logits(y, weight, float(name))
        ce, (by_y, by_weight) = jax.value_and_grad(loss, argnums=(0, 1))(y, weight)
        numbers[f"vmf/logits_{name}"] = Found(logits, LOG_C, absolute=True)
        numbers[f"vmf/probs_{name}"] = Found(jax.nn.softmax(logits), 1e-3)
        numbers[f"vmf/ce_{name}"] = Found(ce, 1e-3)
        numbers[f"vmf/grad_y_{name}"] = Found(by_y, 1e-3)
        numbers[f"vmf/grad_weight_{name}"] = Found(by_weight, 1e-3)
    return numbers


def koleo_numbers() -> dict[str, Found]:
    numbers = {}
    for loss, grad, x, nearest in (
        ("loss", "grad", "x", 1),
        ("loss_top1", "grad_top1", "x", 1),
        ("loss_top3", "grad_top3", "x", 3),
        ("twin_loss", "twin_grad", "twin", 1),
        ("single_loss", "single_grad", "single", 1),
    ):
        value, gradient = value_and_grad(
            lambda x, nearest=nearest: koleo(x, nearest=nearest), FAMILY[f"koleo/{x}"]
        )
        numbers |= {f"koleo/{loss}": value, f"koleo/{grad}": gradient}
    return numbers


def koleo_proto_numbers() -> dict[str, Found]:
    weight, blocks = FAMILY["koleo_proto/weight"], [jnp.asarray(FAMILY["koleo_proto/blocks"])]
    whole = [jnp.arange(len(weight))[None]]
    value, gradient = value_and_grad(lambda w: koleo_of_prototypes(w, blocks, eps=0.0), weight)
    w = single(weight)
    each = [koleo(w[block], eps=0.0) for block in blocks[0]]
    return {
        "koleo_proto/per_block": Found(jnp.stack(each), TOLERANCE),
        "koleo_proto/loss_sum": value,
        "koleo_proto/grad_sum": gradient,
        "koleo_proto/loss_mean": Found(koleo_of_prototypes(w, blocks, "mean", 0.0), TOLERANCE),
        "koleo_proto/loss_sum_eps": Found(koleo_of_prototypes(w, blocks), TOLERANCE),
        "koleo_proto/loss_undivided": Found(koleo_of_prototypes(w, whole, eps=0.0), TOLERANCE),
    }


def prior_numbers() -> dict[str, Found]:
    count, exponent = len(FAMILY["pmsn/prior"]), float(FAMILY["pmsn/exponent"])
    numbers = {"pmsn/prior": Found(power_law(count, exponent), TOLERANCE)}
    prior = single(FAMILY["marginal/prior"])
    for i, logits in enumerate(FAMILY["marginal/logits"]):
        for name, divergence in (
            ("memax", memax),
            ("kl_mean_prior", lambda mean: mean_to_prior(mean, prior)),
            ("kl_prior_mean", lambda mean: prior_to_mean(mean, prior)),
        ):
            value, gradient = value_and_grad(
                lambda x, divergence=divergence: divergence(jax.nn.softmax(x / 0.1).mean(0)), logits
            )
            numbers |= {f"marginal/{name}_{i}": value, f"marginal/{name}_grad_{i}": gradient}
    return numbers


NUMBERS = {
    "vmf/": vmf_numbers,
    "koleo/": koleo_numbers,
    "koleo_proto/": koleo_proto_numbers,
    ("marginal/memax", "marginal/kl_", "pmsn/prior"): prior_numbers,
}
INPUTS = (
    *("vmf/dims", "vmf/kappa", "vmf/y", "vmf/weight", "vmf/target"),
    *("koleo/x", "koleo/twin", "koleo/single", "koleo_proto/weight", "koleo_proto/blocks"),
)


@pytest.mark.medium
@pytest.mark.parametrize("names", NUMBERS, ids=str)
def test_every_number_of_a_section_is_as_expected(names: str | tuple[str, ...]) -> None:
    numbers = NUMBERS[names]()
    expected = {key for key in FAMILY if key.startswith(names) and key not in INPUTS}
    assert set(numbers) == expected
    # Two gradients of 5e6 cancel in this array, so that it need only be finite.
    twin = numbers.pop("koleo/twin_grad", None)
    assert twin is None or np.isfinite(twin.array).all()
    assert differences(FAMILY, numbers) == []
    assert unnoticed(FAMILY, numbers) == []


def test_koleo_of_the_method_file() -> None:
    golden = load("method.npz")
    unit_rows = golden["collapse_prototypes"]
    # The gradient with respect to unit rows, not to the rows before they were normalized.
    value, gradient = value_and_grad(lambda x: koleo_of_unit(x, eps=0.0), unit_rows)
    numbers = {"koleo_loss": value, "koleo_grad": gradient}
    assert differences(golden, numbers) == []
    assert unnoticed(golden, numbers) == []
