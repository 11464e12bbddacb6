"""How an example or a query is shown: as text, as an image, or as both.

`describe(id)` returns a string; an array or tensor (H, W), (H, W, C) or (C, H, W) as an image, uint8 as it is, other types
stretched from their smallest to their largest value; or a pair (image, string).
"""

from base64 import b64encode
from collections.abc import Callable
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np

from .extras import need

Describe = Callable[[int], Any]
PIXELS = 96  # larger images are scaled down to this
LETTERS = 300  # longer text is cut


class Shown(NamedTuple):
    """text: may be empty. image: a data URI, or empty."""

    text: str
    image: str = ""


def show(value: Any) -> Shown:
    """What `describe` returned, ready for a page.

    Raises:
        TypeError: neither text nor an image nor a pair of them.
    """
    if isinstance(value, str):
        return Shown(value if len(value) <= LETTERS else value[: LETTERS - 3] + "...")
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], str):
        return Shown(show(value[1]).text, _uri(value[0]))
    return Shown("", _uri(value))


def said(describe: Describe | None, number: int) -> str:
    """What is said of an example where there is room for text only."""
    return (show(describe(number)).text if describe is not None else "") or f"example {number}"


def _uri(image: Any) -> str:
    pixels = _pixels(image)
    picture = need("PIL.Image", "report").fromarray(pixels)
    picture.thumbnail((PIXELS, PIXELS))
    file = BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()


def _pixels(image: Any) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8."""
    array = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype.kind not in "uifb" or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise TypeError(
            f"a description is no text and no image: got {type(image).__name__} of shape {array.shape} and type "
            f"{array.dtype}, expected a string, an image (H, W), (H, W, 3) or (3, H, W), or a pair (image, string). "
            f"Return one of these from describe(id)."
        )
    if array.dtype == np.uint8:
        return array
    values = np.nan_to_num(array.astype(np.float64), posinf=0.0, neginf=0.0)
    return ((values - values.min()) / (np.ptp(values) or 1.0) * 255).astype(np.uint8)
