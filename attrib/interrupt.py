"""Ctrl-C in long work: the first asks to stop at the next place where what was done is whole, the second stops at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Any

# what `signal` calls, but for its enumerations, which take ten times as long: this is done at every step
_signal: Any = import_module("_signal")


class Request:
    """Whether Ctrl-C was pressed."""

    asked = False


@contextmanager
def interruptible(signal_number: int = int(signal.SIGINT)) -> Iterator[Request]:
    """Within it, a first SIGINT is only noted; a second is dealt with as outside of it.

    Nothing changes where Python takes no signals (another thread than the main one), where the signal is ignored, and where
    the program's own handler is not Python's. signal_number: another signal, likewise.
    """
    request = Request()
    before = _signal.getsignal(signal_number)
    if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        request.asked = True
        _signal.signal(signal_number, before)

    _signal.signal(signal_number, note)
    try:
        yield request
    finally:
        _signal.signal(signal_number, before)


@contextmanager
def shielded() -> Iterator[None]:
    """Within it, a first SIGINT or SIGTERM waits until its end, and is then dealt with as it would have been."""
    with interruptible() as pressed, interruptible(int(signal.SIGTERM)) as ended:
        yield
    for number, request in ((signal.SIGTERM, ended), (signal.SIGINT, pressed)):
        if request.asked:
            signal.raise_signal(number)
