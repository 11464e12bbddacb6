"""The study's page: one section per question, the data of every figure saved beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..parts import Parts
from . import moved, watched
from .setting import Setting
from .tables import Page, Tables

LEAD = (
    "A network is trained on a part of the sums a + b modulo p. It knows its training pairs by heart early and gets "
    "the others right late. Every run is recorded; its predictions are accounted for exactly; and layers are moved "
    "between its steps. All figures are medians over seeds with their range, unless one seed is named."
)


def write_page(setting: Setting, found: Sequence[dict[str, Any]], parts: Parts) -> Path:
    """index.html, and data/*.json: `xarray.DataArray.from_dict(json.load(file)).astype(float)`."""
    page = Page(Tables(setting, found), parts.folder, LEAD)
    watched.opening(page)
    if page.t.runs:
        for section in (
            *(watched.answer, watched.claims, watched.layers, watched.circuits, watched.carriers),
            *(moved.swaps, moved.transplants, moved.reinsertions, moved.controls, moved.pruning),
            watched.ledgers,
        ):
            section(page)
    return page.write()
