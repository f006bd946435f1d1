"""The settings of a small run, which tests adapt."""

from typing import Any

import ml_collections

from sop_jax.config import paper


def small_config(**changes: Any) -> ml_collections.ConfigDict:
    """Returns the paper's settings with a network of two layers of width 16, and these changes.

    Args:
        **changes: settings by name; those of a section are a dictionary.
    """
    config = paper()
    config.model.update(size="custom", width=16, dtype="float32")
    if changes.get("model", {}).get("family", "vit") == "vit":  # other families have stages
        config.model.update(depth=2, heads=2, patch=4)
    config.head.update(hidden=16, dim=8)
    config.update(changes)
    return config
