"""How an example or a query is shown: as text, as an image, or as both.

`describe(id)`, of a number or a string as the run has them, returns a string; an array or tensor (H, W), (H, W, C) or
(C, H, W) as an image, uint8 as it is, other types stretched from their smallest to their largest value; or a pair (image,
string).
"""

import re
from base64 import b64encode
from collections.abc import Callable
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np

from ..errors import DescriptionError
from .extras import need

Describe = Callable[[Any], Any]
PIXELS = 96  # larger images are scaled down to this
LETTERS = 300  # longer text is cut, between words
NAME = 32  # a longer id loses its middle where there is little room


class Shown(NamedTuple):
    """text: may be empty. image: a data URI, or empty."""

    text: str
    image: str = ""


def show(describe: Describe | None, which: int | str, letters: int = LETTERS) -> Shown:
    """What is shown of an example or query, of its text so many letters.

    Raises:
        DescriptionError: `describe` failed, or returned neither text nor an image nor a pair of them.
    """
    if describe is None:
        return Shown("")
    value = ask(describe, which)
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], str):
        return Shown(_cut(value[1], letters), _uri(_pixels(value[0], which)))
    return Shown(_cut(value, letters)) if isinstance(value, str) else Shown("", _uri(_pixels(value, which)))


def said(describe: Describe | None, example: int | str) -> str:
    """What is said of an example where there is room for text only: "17: a cat", or "example 17"."""
    value = None if describe is None else ask(describe, example)
    text = value[1] if isinstance(value, tuple) and len(value) == 2 else value
    words = " ".join(text.split()) if isinstance(text, str) else ""
    return f"{called(example)}: {_cut(words)}" if words else f"example {called(example)}"


def called(example: int | str) -> str:
    """An id on one line, of letters that can be seen; a long one without its middle, the empty one as its quotes."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(example)) or '""'
    return text if len(text) <= NAME else f"{text[: NAME // 2 - 1]}...{text[2 - NAME // 2 :]}"


def tagged(tag: Describe, examples: np.ndarray) -> list[str]:
    """The tag of each example, by its id."""
    return [str(ask(tag, e)) for e in examples.tolist()]


def ask(function: Describe, which: int | str) -> Any:
    """What the user's function returns; its failure is told with where it was."""
    try:
        return function(which)
    except Exception as error:
        raise DescriptionError(
            f"{getattr(function, '__name__', 'describe')} failed: got {type(error).__name__}: {error}, at {which!r}. It is "
            f"called with the id of a train example, or the number of a query."
        ) from error


def _cut(text: str, letters: int = LETTERS) -> str:
    """At most so many letters, and no word in part unless it is endless."""
    if len(text) <= letters:
        return text
    # a letter more than stays: where it is a space, the word before it is whole
    start = re.sub(r"(?<!\S)\S{1,40}\Z", "", text[: letters - 2])
    return start[: letters - 3].rstrip() + "..."


def _uri(pixels: np.ndarray) -> str:
    picture = need("PIL.Image", "report").fromarray(pixels)
    picture.thumbnail((PIXELS, PIXELS))
    file = BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()


def _pixels(image: Any, which: int | str) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8."""
    array = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if (
        array.dtype.kind not in "uifb"
        or array.ndim not in (2, 3)
        or array.size == 0
        or (array.ndim == 3 and array.shape[2] != 3)
    ):
        raise DescriptionError(
            f"a description is no text and no image: got {type(image).__name__} of shape {array.shape} and type "
            f"{array.dtype}, expected a string, an image (H, W), (H, W, 3) or (3, H, W), or a pair (image, string), at "
            f"{which!r}. Return one of these from describe."
        )
    if array.dtype == np.uint8:
        return array
    values = np.nan_to_num(array.astype(np.float64), posinf=0.0, neginf=0.0)
    return ((values - values.min()) / (np.ptp(values) or 1.0) * 255).astype(np.uint8)
