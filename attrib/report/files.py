"""Files that other programs read: JSON that any of them takes, and places that are looked at before the work."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import StoreExistsError

WHOLE = 2**53 - 1  # up to here a float64 is one whole number and no other


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON in which a number that is not finite is null, and numpy's numbers are numbers; whole ones that are rounded where
    all numbers are floats, as in JavaScript, are strings.

    Args:
        value: dicts, lists, tuples, texts, numbers, None, each within the other.
        indent: of nested lines; None for one line.

    Raises:
        TypeError: something else.

    Example:
        >>> attrib.report.to_json({"gap": float("nan"), "steps": np.int64(12)})
        '{"gap": null, "steps": 12}'
    """
    return json.dumps(_plain(value), allow_nan=False, indent=indent)


def check_file(path: Path, overwrite: bool) -> None:
    """Raise StoreExistsError where something is that must not be replaced, NotADirectoryError where there is no folder."""
    if not path.parent.is_dir():
        raise NotADirectoryError(
            f"there is no such folder: got {path.parent}, at {path}. Make it, or choose another path."
        )
    if path.is_dir() or (path.exists() and not overwrite):
        raise StoreExistsError(
            f"something is there already: got {path}, expected nothing. Choose another path, or ask for it to be replaced "
            f"(overwrite=True, --overwrite)."
        )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; what is written takes the path's place when all is well, else it is removed."""
    beside = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, int) and abs(value) > WHOLE:
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
