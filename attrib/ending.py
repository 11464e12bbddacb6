"""What is still to be done when the process ends and nobody did it.

At its end, normal or by an exception, before Python lets go of its thread pools (a plain `atexit` comes after); on SIGTERM
where that would end the process at once: it is done, and then the process ends as it would have. Not in forked children, and
not on SIGKILL.
"""

import atexit
import itertools
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

_waiting: dict[int, Callable[[], None]] = {}
_number = itertools.count()
_process = 0


def at_end(do: Callable[[], None]) -> Callable[[], None]:
    """Have it done at the end of this process; the function that is returned cancels that."""
    global _process
    if _process != os.getpid():  # the first, or the first of a forked child
        _waiting.clear()
        _process = os.getpid()
        getattr(threading, "_register_atexit", atexit.register)(_end)
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminated)
    number = next(_number)
    _waiting[number] = do

    def cancel() -> None:
        _waiting.pop(number, None)

    return cancel


def _end() -> None:
    if _process == os.getpid():
        for number in list(_waiting):
            if (do := _waiting.pop(number, None)) is not None:
                do()


def _terminated(number: int, frame: FrameType | None) -> None:
    _end()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
