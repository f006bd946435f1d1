"""Self-Organizing Visual Prototypes: self-supervised pretraining of vision transformers in JAX.

In programs and notebooks, `pretrain` trains on a folder of images, and `load` and `neighbours` use
trained networks. They are imported when they are first used, so that `import sop_jax` does not
import JAX.
"""

import importlib
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sop_jax.errors import UserError
    from sop_jax.nearest import neighbours
    from sop_jax.network import Network, load
    from sop_jax.pretraining import Pretrained, pretrain

__version__ = "0.7.0"

__all__ = [
    "Network",
    "Pretrained",
    "UserError",
    "__version__",
    "load",
    "neighbours",
    "pretrain",
]

# The modules of the names above. No module can be called like a function of another one, because
# importing it would replace the function.
_MODULES = {
    "Network": "network",
    "UserError": "errors",
    "load": "network",
    "neighbours": "nearest",
    "Pretrained": "pretraining",
    "pretrain": "pretraining",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# While a command imports JAX, which takes seconds, Ctrl-C ends it at once: Python would print a
# traceback, or drop the exception if it is raised in a callback. `cli.run` takes over.
_IS_COMMAND = sys.argv[:1] == ["-m"]  # until `python -m sop_jax.COMMAND` has found its module
if _IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
