"""Self-Organizing Visual Prototypes: self-supervised pretraining of vision transformers in JAX."""

import signal
import sys

__version__ = "0.5.0"

# While a command imports JAX, which takes seconds, Ctrl-C ends it at once: Python would print a
# traceback, or drop the exception if it is raised in a callback. `cli.run` takes over.
_IS_COMMAND = sys.argv[:1] == ["-m"]  # until `python -m sop_jax.COMMAND` has found its module
if _IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
