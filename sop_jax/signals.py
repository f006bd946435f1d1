"""Signals at moments in which Python would drop the exception of their handler."""

import _weakrefset
import gc
import os
import threading
import types
import weakref

_WEAK = (weakref.__file__, _weakrefset.__file__)  # whose functions are callbacks of weak references


def sent_again(number: int, frame: types.FrameType | None) -> bool:
    """Sends a signal again a moment later if an exception that its handler raises would be dropped.

    Python drops it in a callback of its garbage collector, of which JAX has one, or of a weak
    reference, as when arrays are freed.

    Args:
        number: the signal.
        frame: the innermost frame that the handler interrupts.

    Returns:
        Whether the signal is sent again, so that the handler has nothing to do now.
    """
    callbacks = [getattr(callback, "__code__", None) for callback in gc.callbacks]
    while frame is not None:
        if frame.f_code in callbacks or frame.f_code.co_filename in _WEAK:
            threading.Timer(0.05, os.kill, [os.getpid(), number]).start()
            return True
        frame = frame.f_back
    return False
