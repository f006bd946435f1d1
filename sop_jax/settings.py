"""Settings by their dotted names, and which of them are paths or can be empty."""

from typing import Any

# The settings that are paths, in which the commands expand `~`.
PATHS = ("data.path", "init_from")

# The only settings and flags that can be empty. An empty value means that there is none, or that a
# default is used.
MAY_BE_EMPTY = (*PATHS, "data.name", "data.train_split", "data.test_split", "splits")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the settings by their dotted names, with tuples as lists, as JSON returns them."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if hasattr(value, "items"):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
