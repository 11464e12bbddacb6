"""Where a store stands: a folder of this machine by its absolute path, a zip file, an address, or a zarr Store.

A path is made absolute once, so that a later change of the working folder moves nothing. Folders are swapped whole.
"""

import ctypes
import errno
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import FsspecStore, ZipStore

from ..errors import StoreError, StoreExistsError
from .disk import Disk, sync_path
from .metadata import HEADER

Place = Path | str | Store

_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux


def locate(target: Any) -> Place:
    """An absolute path, an address, or the Store itself. `~` is the user's folder, file://... a path; links are kept."""
    if isinstance(target, Store):
        return target
    text = os.fspath(target)
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    return text if "://" in text else Path(os.path.abspath(os.path.expanduser(text)))


def local_path(target: Any) -> Path | None:
    """Of a store on a disk of this machine; None for an address or a Store."""
    place = locate(target)
    return place if isinstance(place, Path) else None


def is_zip(place: Place) -> bool:
    return isinstance(place, ZipStore) or (isinstance(place, Path) and place.suffix == ".zip" and not place.is_dir())


def readable(place: Place) -> Store:
    """The Store at a place, for reading only.

    Raises:
        FileNotFoundError: nothing is there. StoreError: the address cannot be used.
    """
    if isinstance(place, Store):
        return place if place.read_only else place.with_read_only(True)
    if isinstance(place, str):
        return _address(place, read_only=True)
    if not place.exists():
        raise FileNotFoundError(place)
    return sync(ZipStore.open(place, mode="r")) if is_zip(place) else Disk(place, read_only=True)


def writable(place: Place) -> Store:
    """The Store at a place, to be written to.

    Raises:
        StoreError: it cannot be.
    """
    if is_zip(place):
        raise StoreError(
            f"a zip file cannot be recorded to, since nothing in it can be replaced: got {place}, expected a folder. "
            f"Record to a folder and zip it afterwards; attrib.open_run reads the zip file."
        )
    if isinstance(place, Store):
        if place.read_only:
            raise StoreError(f"the store is read-only: got {place}, expected one that can be written to. Open it so.")
        return place
    return _address(place, read_only=False) if isinstance(place, str) else Disk(place)


def _address(address: str, read_only: bool) -> Store:
    try:
        return FsspecStore.from_url(address, read_only=read_only)
    except (ImportError, ValueError) as error:
        raise StoreError(
            f"the address cannot be used: got {address} ({error}), expected one that fsspec opens. Install the package that "
            f"it needs, or give a path."
        ) from None


def beside(path: Path) -> Path:
    """A name of its own in the same folder, which nobody else uses."""
    return path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex[:12]}.part")


def occupied(path: Path) -> bool:
    """Whether anything but an empty folder is there; a link is, wherever it leads; half a header is nothing."""
    if path.is_symlink() or path.is_file():
        return True
    return path.is_dir() and not all(is_part(entry.name, HEADER) for entry in path.iterdir())


def is_part(name: str, whole: str) -> bool:
    """Whether a file is what a killed writer left of another."""
    return name.startswith(whole + ".") and name.endswith(".part")


def settle(made: Path, path: Path, overwrite: bool) -> Path | None:
    """Put the folder `made` to `path`, whole and for good; what stood there has its name then, which is returned.

    Raises:
        StoreExistsError: something came to be there meanwhile, and must not be overwritten.
    """
    if overwrite and occupied(path):
        exchange(made, path)
        sync_path(path.parent)  # before anybody discards what stood there
        return made
    try:
        os.rename(made, path)  # an empty folder gives way
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise StoreExistsError(
            f"something came to be there meanwhile: got {path}, expected an empty place. Choose another path."
        ) from None
    sync_path(path.parent)
    return None


def exchange(a: Path, b: Path) -> None:
    """Swap two names. On Linux at one stroke; elsewhere there is a moment in which `b` is not there."""
    with suppress(AttributeError, OSError):
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        if rename(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0:
            return
    aside = beside(b)
    os.rename(b, aside)
    try:
        os.rename(a, b)
    except BaseException:
        os.rename(aside, b)
        raise
    os.rename(aside, a)


def discard(path: Path) -> None:
    """Remove what was looked at before; of a link the link."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)


def folder_bytes(folder: Path) -> int:
    """Of all files in it. (Zarr's own count waits for each of them: twenty times as long.)"""
    size, folders = 0, [str(folder)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    with suppress(FileNotFoundError):  # a run that goes on being recorded has files for a moment
                        size += entry.stat(follow_symlinks=False).st_size
    return size
