"""One writer at a time: a lock on the store's folder, held while a recorder lives and let go by the system when it dies.

Nothing is written for it. Where folders cannot be locked (not a POSIX system, a store that is no folder) there is none, and
the run's id, compared at every commit, is what keeps two runs apart.
"""

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import StoreExistsError

fcntl: Any = import_module("fcntl") if os.name == "posix" else None


class Lease:
    """Of a folder, from now until `release`.

    Raises:
        StoreExistsError: another writer has it.
    """

    def __init__(self, folder: Path) -> None:
        self._file: int | None = None
        if fcntl is None:
            return
        file = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise StoreExistsError(
                f"another recorder is writing there: got {folder}, expected a store that no recorder has open. Close that "
                f"recorder (recorder.close()) or end its process, or choose another path."
            ) from None
        except OSError:  # a file system without locks
            os.close(file)
            return
        self._file = file
        _held.add(file)

    def release(self) -> None:
        if self._file in _held:  # not in a child, where it is gone
            fcntl.flock(self._file, fcntl.LOCK_UN)
            _let_go(self._file)
        self._file = None


_held: set[int] = set()  # files that hold a lock in this process


def _let_go(*files: int) -> None:
    for file in files:
        os.close(file)
        _held.discard(file)


# a worker that is forked is no writer, and must not keep the lock of one that died
if fcntl is not None:
    os.register_at_fork(after_in_child=lambda: _let_go(*_held))
