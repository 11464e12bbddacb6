"""Ctrl-C in long work: the first asks to stop at the next place where what was done is whole, the second stops at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Request:
    """Whether Ctrl-C was pressed."""

    asked = False


@contextmanager
def interruptible() -> Iterator[Request]:
    """Within it, a first SIGINT is only noted; a second is dealt with as outside of it.

    Nothing changes where Python takes no signals (another thread than the main one), where SIGINT is ignored, and where the
    program's own handler is not Python's.
    """
    request = Request()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        request.asked = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def shielded() -> Iterator[None]:
    """Within it, a first SIGINT waits until its end, and is then dealt with as it would have been."""
    with interruptible() as request:
        yield
    if request.asked:
        signal.raise_signal(signal.SIGINT)
