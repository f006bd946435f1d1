"""The golden numbers of MSN and PMSN."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from golden_numbers import Found, differences, load, unnoticed
from small import small_config

from sop_jax.models.head import unit
from sop_jax.objectives.health import entropy
from sop_jax.objectives.msn import MSN
from sop_jax.objectives.objective import Outputs
from sop_jax.objectives.prototypical.layers import logits
from sop_jax.parallel.mesh import make_mesh
from sop_jax.schedules import Length

TOLERANCE = 1e-5  # relative to the largest magnitude
FAMILY = load("family.npz")
INPUTS = ("msn/anchors", "msn/targets", "msn/prototypes", "pmsn/exponent", "pmsn/prior")


def found(value: Any) -> Found:
    return Found(value, TOLERANCE)


def single(name: str) -> jax.Array:
    return jnp.asarray(FAMILY[f"msn/{name}"], jnp.float32)


def outputs(cls: jax.Array) -> Outputs:
    """Returns the outputs of a network for raw embeddings [V B d], without patches."""
    cls = unit(jnp.moveaxis(cls, 0, 1))
    patches = jnp.zeros((len(cls), 2, 0, cls.shape[-1]))
    return Outputs(cls, patches, cls, patches)


def loss_of(**own: Any) -> tuple[jax.Array, dict[str, jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns the targets [B K], the loss and its terms, and gradients by anchors and prototypes.

    Args:
        **own: settings that differ from MSN's.
    """
    anchors, prototypes = single("anchors"), single("prototypes")
    count, dim = prototypes.shape
    config = small_config(method="msn", batch_size=anchors.shape[1])
    config.augment.local_crops = len(anchors) - 1
    config.msn.update(prototypes=count, **own)
    objective = MSN.build(config, dim, make_mesh(1), Length(10, 5.0), (2, 2))
    now = {name: schedule(0) for name, schedule in objective.schedules.items()}
    _, carried = objective.init(jax.random.key(0))
    masked = jnp.zeros((anchors.shape[1], 2, 0), bool)
    teacher = outputs(single("targets")[None])

    def params(prototypes: jax.Array) -> Any:
        return {"prototypes": {"cls": {"direction": prototypes}}}

    def loss(anchors: jax.Array, prototypes: jax.Array) -> Any:
        shared, targets, _ = objective.teach(
            student_params=jax.lax.stop_gradient(params(prototypes)),
            teacher_params=params(jnp.zeros_like(prototypes)),  # both use the student's
            carried=carried,
            teacher=teacher,
            masked=masked,
            index=jnp.arange(anchors.shape[1]),
            now=now,
            key=jax.random.key(1),
        )
        total, terms = objective.loss(
            params(prototypes), shared, targets, outputs(anchors), masked, now
        )
        raised = logits("unit", shared["prototypes"]["cls"], targets["cls"][:, 0], 0.025)
        return total, (terms, jax.nn.softmax(raised + shared["offsets"]["cls"]))

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (total, (terms, target)), gradients = compiled(anchors, prototypes)
    return target, {**terms, "total": total}, gradients


def numbers() -> dict[str, Found]:
    computed = {}
    for name, marginal in (("plain", "none"), ("sinkhorn", "sinkhorn_probabilities")):
        target, terms, (by_anchors, by_prototypes) = loss_of(marginal=marginal)
        computed |= {
            f"msn/target_{name}": found(target),
            f"msn/ce_{name}": found(terms["cls"]),
            f"msn/total_{name}": found(terms["total"]),
            f"msn/grad_anchors_{name}": found(by_anchors),
            f"msn/grad_prototypes_{name}": found(by_prototypes),
            "msn/memax": found(terms["prior"]),
        }
    p = jax.nn.softmax(unit(single("anchors")) @ unit(single("prototypes")).T / 0.1)
    computed["msn/entropy"] = found(entropy(p).mean())  # which the authors' recipe weighs by 0
    power = dict(prior="power", prior_exponent=float(FAMILY["pmsn/exponent"]))
    _, terms, (by_anchors, _) = loss_of(**power)
    _, without, (by_anchors_without, _) = loss_of(**power, prior_weight=0.0)
    assert without["total"] == terms["cls"]
    computed["pmsn/kl_mean_prior"] = found(terms["prior"])
    computed["pmsn/grad_anchors_kl_mean_prior"] = found(by_anchors - by_anchors_without)
    _, terms, _ = loss_of(**power, prior_direction="prior_to_mean")
    computed["pmsn/kl_prior_mean"] = found(terms["prior"])
    computed["pmsn/total_lightly"] = found(terms["total"])
    return computed


@pytest.mark.medium
def test_every_number_of_msn_and_pmsn_is_as_expected() -> None:
    computed = numbers()
    expected = {key for key in FAMILY if key.startswith(("msn/", "pmsn/")) and key not in INPUTS}
    assert set(computed) == expected
    assert differences(FAMILY, computed) == []
    assert unnoticed(FAMILY, computed) == []
