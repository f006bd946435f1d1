"""The methods of training, by name."""

import ml_collections

from sop_jax.objectives.objective import Method
from sop_jax.objectives.sop.settings import SOP

METHODS: dict[str, Method] = {"sop": SOP}


def method_of(config: ml_collections.ConfigDict) -> Method:
    """Returns the method of a run's config."""
    del config  # there is only one so far
    return METHODS["sop"]
