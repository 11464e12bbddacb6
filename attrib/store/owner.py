"""What stands at a place, and whether it is ours: what attrib did not write is neither overwritten nor deleted."""

import os
import re
from pathlib import Path
from typing import Any

from zarr.abc.store import Store
from zarr.core.sync import sync

from ..errors import StoreError, StoreExistsError
from .lease import Lease
from .metadata import HEADER
from .place import Place, is_part, locate, occupied, readable, writable
from .schema import NAMES
from .seal import Attributes, Unsealed, fetch, opened

KINDS = {"run": "attrib.open_run", "result": "attrib.open_result", "cube": "xarray.open_zarr"}


def same_place(a: Any, b: Any) -> bool:
    """Whether two targets are one store, links followed."""
    first, second = locate(a), locate(b)
    if isinstance(first, Path) and isinstance(second, Path):
        return first.resolve() == second.resolve()
    return first is second or (isinstance(first, str) and first == second)


def read_header(store: Store, where: Any) -> Attributes | None:
    """The attributes of a store's root as they were sealed; None where nothing is.

    Raises:
        StoreError: damaged. Unsealed: another's.
    """
    content = fetch(store, HEADER)
    return None if content is None else opened(content, where)


def stands(target: Any) -> bool:
    """Whether anything is there."""
    place = locate(target)
    return occupied(place) if isinstance(place, Path) else fetch(readable(place), HEADER) is not None


def check_target(target: Any, overwrite: bool, kind: str = "run") -> None:
    """Raise StoreExistsError where something is stored already that must not be overwritten.

    Asked or not, overwritten is only what attrib wrote, of the same kind, with nothing of anybody else in it, and not while
    it is being written.

    Raises:
        StoreExistsError. StoreError: the place cannot be written to at all.
    """
    place = locate(target)
    writable(place)
    if isinstance(place, Path) and not occupied(place):
        return
    try:
        attributes = read_header(readable(place), place)
    except FileNotFoundError:  # a link that leads nowhere
        attributes = None
    except (StoreError, Unsealed) as error:
        _refuse(place, f"no store of attrib's, or a damaged one ({error})" if isinstance(error, StoreError) else None)
    if attributes is None:
        if isinstance(place, Path):
            _refuse(place, None)
        return
    found = attributes["attrib"].get("kind")
    if not overwrite or found != kind:
        raise StoreExistsError(
            f"a store exists already, a {found}: got {place}, expected an empty place. Choose another path"
            + (", or pass overwrite=True." if found == kind else ".")
        )
    if isinstance(place, Path):
        if kind == "run" and place.is_dir():
            Lease(place.resolve()).release()
        if stranger := _stranger(place, set(attributes["attrib"]["sealed"]["arrays"])):
            _refuse(place, f"a {kind} with something else in it, {stranger}")


def clear(place: Place) -> None:
    """Take out of a store that is no folder what attrib wrote there; it was checked before."""
    store = writable(place)
    attributes = read_header(store, place)
    for name in () if attributes is None else attributes["attrib"]["sealed"]["arrays"]:
        sync(store.delete_dir(name))
    if attributes is not None:
        sync(store.delete(HEADER))


def _refuse(place: Place, what: str | None) -> None:
    raise StoreExistsError(
        f"something other than a store of attrib's is there: got {place}"
        + (f", {what}" if what else "")
        + ", expected a "
        "new path or an empty folder. Choose another path; attrib does not delete what it did not write."
    )


def _stranger(folder: Path, arrays: set[str]) -> str | None:
    """The first entry of a store's folder that is no part of its arrays, nor of one whose first commit never came; of a
    store that was killed while it was made, which names none yet, nor of any that a run may have."""
    inner = {name.rsplit("/", n)[0] for name in arrays for n in range(1, name.count("/") + 1)}
    for root, folders, files in os.walk(folder):
        at = "" if root == str(folder) else os.path.relpath(root, folder).replace(os.sep, "/")
        array = at.split("/c/")[0].removesuffix("/c")
        if array in arrays or _TABLE.fullmatch(array) or (not arrays and at != array):  # its chunks, by number
            parts = [] if at == array else at[len(array) :].strip("/").split("/")
            wrong = [name for name in (*files, *folders) if not _part_of_an_array(parts, name)]
        else:
            known = {
                name for name in folders for path in (f"{at}/{name}" if at else name,) if _ours(path, arrays, inner)
            }
            wrong = [name for name in folders if name not in known] + [name for name in files if not _document(name)]
        if wrong:
            return os.path.join(at, wrong[0])
    return None


_TABLE = re.compile(r"examples/\d+/\d+")


def _ours(path: str, arrays: set[str], inner: set[str]) -> bool:
    if not arrays:
        return path.split("/")[0] in NAMES
    return path in arrays or path in inner or re.fullmatch(r"examples(/\d+){0,2}", path) is not None


def _part_of_an_array(parts: list[str], name: str) -> bool:
    plain = name.split(".")[0] if name.endswith(".part") else name  # of a writer that was killed
    return plain.isdigit() if parts else plain == "c" or _document(name)


def _document(name: str) -> bool:
    return name == HEADER or is_part(name, HEADER)
