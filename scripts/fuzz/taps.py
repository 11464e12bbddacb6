"""The file operations of a process, seen one by one before they happen: to count them, to die in one, to log them.

Linux: what a file descriptor stands for is read from /proc.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from attrib.store import disk, place

Do = Callable[[], Any]


class Operation(NamedTuple):
    """kind: mkdir, create, write, fsync, replace, exchange or remove. paths: absolute. content: that is written, behind what
    is there."""

    kind: str
    paths: tuple[str, ...]
    content: bytes = b""


Seen = Callable[[Operation, Do], Any]  # called for each instead of it; does it, or not


@contextmanager
def tapped(folder: Path, seen: Seen) -> Iterator[None]:
    """Hand all operations on files in a folder to `seen`."""

    def pass_on(kind: str, do: Do, *paths: str, content: bytes = b"") -> Any:
        inside = any(os.path.commonpath([str(folder), path]) == str(folder) for path in paths)
        return seen(Operation(kind, paths, content), do) if inside else do()

    def through(kind: str, name: str) -> Callable[..., Any]:
        plain = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            count = 2 if kind == "replace" else 1
            paths = [_absolute(path, options.get("dir_fd")) for path in args[:count]]
            return pass_on(kind, lambda: plain(*args, **options), *paths)

        return call

    def opened(path: Any, mode: str) -> Any:
        return Tapped(pass_on("create", lambda: open(path, mode), str(path)), str(path), pass_on)

    def exchanged(a: Path, b: Path, plain: Callable[..., None] = place.exchange) -> None:
        pass_on("exchange", lambda: plain(a, b), str(a), str(b))

    names = {"mkdir": "mkdir", "replace": "replace", "rename": "replace", "fsync": "fsync"}
    with ExitStack() as stack:
        for name, kind in {**names, "unlink": "remove", "rmdir": "remove"}.items():
            stack.enter_context(patch.object(os, name, through(kind, name)))
        stack.enter_context(patch.object(disk, "open", opened, create=True))
        stack.enter_context(patch.object(place, "exchange", exchanged))
        yield


def _absolute(path: Any, folder: int | None) -> str:
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    parent = os.getcwd() if folder is None else os.readlink(f"/proc/self/fd/{folder}")
    return os.path.join(parent, os.fspath(path))


class Tapped:
    """A file that is written to."""

    def __init__(self, file: Any, path: str, pass_on: Callable[..., Any]) -> None:
        self._file, self._path, self._pass_on = file, path, pass_on

    def write(self, content: Any) -> None:
        self._pass_on("write", lambda: self.put(content), self._path, content=bytes(content))

    def put(self, content: Any) -> None:
        self._file.write(content)
        self._file.flush()

    def __enter__(self) -> "Tapped":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Counter:
    """How many there were; at number `fatal` the process is killed, with a part of what it wrote."""

    def __init__(self, fatal: int | None = None, share: float = 0.0) -> None:
        self.count, self._fatal, self._share = 0, fatal, share
        self._lock = threading.Lock()

    def __call__(self, operation: Operation, do: Do) -> Any:
        with self._lock:
            self.count += 1
            if self.count == self._fatal:
                if operation.kind == "write":
                    part = operation.content[: round(self._share * len(operation.content))]
                    with open(operation.paths[0], "ab") as file:
                        file.write(part)
                os.kill(os.getpid(), signal.SIGKILL)
            return do()
