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
    """Within it, a first SIGINT is only noted. Outside the main thread, where Python takes no signals, nothing changes."""
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        request.asked = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def shielded() -> Iterator[None]:
    """Within it, a first SIGINT waits until its end and is raised there."""
    with interruptible() as request:
        yield
    if request.asked:
        raise KeyboardInterrupt
