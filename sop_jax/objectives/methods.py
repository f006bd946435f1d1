"""The methods of training, by the names that `config.method` gives them."""

import ml_collections
from jax.sharding import Mesh

from sop_jax.errors import UserError, nearest
from sop_jax.models import Model, build, token_side
from sop_jax.objectives.capi.settings import CAPI
from sop_jax.objectives.carp import CARP
from sop_jax.objectives.decoupled import DECOUPLED
from sop_jax.objectives.dino import DINO
from sop_jax.objectives.ibot import IBOT
from sop_jax.objectives.massl import MASSL
from sop_jax.objectives.msn import MSN, PMSN
from sop_jax.objectives.objective import Method, Objective
from sop_jax.objectives.sop.settings import SOP
from sop_jax.objectives.swav import SWAV
from sop_jax.schedules import Length

METHODS: dict[str, Method] = {
    "sop": SOP,
    "massl": MASSL,
    "dino": DINO,
    "ibot": IBOT,
    "swav": SWAV,
    "msn": MSN,
    "pmsn": PMSN,
    "carp": CARP,
    "decoupled": DECOUPLED,
    "capi": CAPI,
}


def method_of(config: ml_collections.ConfigDict) -> Method:
    """Returns the method of a run's config.

    Raises:
        UserError: there is no such method.
    """
    if config.method not in METHODS:
        raise UserError(
            f"method is {config.method!r}; expected one of {', '.join(METHODS)}"
            f"{nearest(str(config.method), list(METHODS))}; for example, set --config.method=sop"
        )
    return METHODS[config.method]


def objective_of(config: ml_collections.ConfigDict, mesh: Mesh) -> tuple[Model, Objective]:
    """Returns the network and the objective of a run; the schedules are those of no run.

    They are for reading what a run saved, without training it.
    """
    model = build(config, config.augment.global_size)
    side = config.augment.global_size // token_side(config.model)
    any_length = Length(steps=1, epoch=1.0)
    objective = method_of(config).build(config, model.dim, mesh, any_length, (side, side))
    return model, objective
