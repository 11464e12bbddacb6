"""A folder as a zarr Store: no link is followed out of it, and what was written can be made to outlast a loss of power.

Every file is written under a name of its own and renamed. What replaces another is on the disk before it takes its place (an
empty file under the right name is what a machine that loses power may leave otherwise); what is new need not be
before `flush`, which is what a commit waits for.
"""

import asyncio
import os
import stat
import uuid
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from typing import Any

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from ..errors import StoreError
from .metadata import HEADER


class Disk(LocalStore):
    """The folder `root`, made with its first file."""

    def __init__(self, root: Path | str, *, read_only: bool = False) -> None:
        super().__init__(root, read_only=read_only)
        self._files: set[Path] = set()  # written since the last flush
        self._folders: set[Path] = set()  # in which there are other names since

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        self._inside(key)
        return await super().get(key, prototype, byte_range)

    async def getsize(self, key: str) -> int:
        self._inside(key)
        return await super().getsize(key)

    def size(self, key: str) -> int:
        """Of a file, in bytes."""
        self._inside(key)
        return os.lstat(self.root / key).st_size

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        await self._ensure_open()
        await asyncio.to_thread(self.put, key, [value.as_buffer_like()])

    def put(self, key: str, parts: Iterable[Any]) -> None:
        """Write a file of some bytes, one behind the other."""
        self._write(self.root / key, parts)

    def file(self, key: str, size: int) -> FileIO | None:
        """A file that holds so many bytes, to be read; None where it is not there or of another size."""
        self._inside(key)
        try:
            file = FileIO(self.root / key)
        except OSError:
            return None
        if os.fstat(file.fileno()).st_size == size:
            return file
        file.close()
        return None

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        if not (self.root / key).exists():
            await self.set(key, value)

    async def _open(self, *, mode: str | None = None) -> None:
        if not self.read_only:
            self.make()
        await super()._open()

    def make(self) -> None:
        """Make the folder, and those above it."""
        self._make(self.root)

    def flush(self) -> None:
        """Return when all that was written, and the names that it was written under, are on the disk."""
        for path in self._files:
            sync_path(path)
        for folder in sorted(self._folders, key=lambda folder: len(folder.parts), reverse=True):
            sync_path(folder)
        self._files.clear()
        self._folders.clear()

    def _write(self, path: Path, parts: Iterable[Any]) -> None:
        self._make(path.parent)
        # never empty under its name: what replaces another file, and the header, before which there is nothing
        at_once = path.exists() or path == self.root / HEADER
        beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
        try:
            with open(beside, "wb") as file:
                for part in parts:
                    file.write(part)
                if at_once:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        if not at_once:
            self._files.add(path)
        self._folders.add(path.parent)

    def _make(self, folder: Path) -> None:
        if not folder.is_dir():
            self._make(folder.parent)
            folder.mkdir(exist_ok=True)
            self._folders.add(folder.parent)

    def _inside(self, key: str) -> None:
        """Raise StoreError where a link, or something that is no file, stands on the way to a key."""
        path = self.root / key
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return
        if (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) and os.path.realpath(path) == os.path.join(self._real, key):
            return
        raise StoreError(
            f"a file of the store is a link or no plain file: expected all of it in one folder, at {key} in {self.root}. "
            f"Put the file itself there."
        )

    @property
    def _real(self) -> str:
        return os.path.realpath(self.root)


def sync_path(path: Path) -> None:
    """Return when a file's contents, or a folder's names, are on the disk."""
    try:
        file = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, PermissionError):  # taken away meanwhile; a folder where folders cannot be opened
        return
    try:
        os.fsync(file)
    finally:
        os.close(file)
