"""Results as they are opened again: which of the questions a saved one answers stands with it."""

from typing import Any, TypeVar

import numpy as np

from ..errors import StoreError
from ..store import open_dataset
from .difference import Difference
from .influence import Influence
from .labelled import LABELS, Labelled
from .result import Result

Kind = TypeVar("Kind", bound=Labelled)


def accounting(store: Any) -> Result:
    """Open an account; raises ValueError where the result answers another question."""
    return _of_kind(store, Result, "accounts", "attrib.attribute")


def difference_of(store: Any) -> Difference:
    """Open a difference; raises ValueError where the result answers another question."""
    return _of_kind(store, Difference, "differences", "attrib.difference")


def _of_kind(store: Any, kind: type[Kind], what: str, call: str) -> Kind:
    found = open_result(store)
    if not isinstance(found, kind):
        raise ValueError(
            f"this is about {what}: got {type(found).__name__} at {store}, expected a result of {call}. Its page: "
            f"attrib report {store}"
        )
    return found


KINDS: dict[str, type[Labelled]] = {kind.question: kind for kind in (Result, Difference, Influence)}


def open_result(store: Any) -> Any:
    """Open what `save` of a result wrote, read-only and lazily.

    Returns:
        A `Result`, `Difference` or `Influence`, as it was saved.

    Raises:
        StoreError: nothing there, not a result, or a file of it is missing or damaged; also when it is read.

    Example:
        >>> result.save("result.zarr")
        >>> attrib.open_result("result.zarr").by("example").shape
        (2, 24)
    """
    dataset, _, where = open_dataset(store)
    labels = dataset.attrs.pop("attrib_labels", None)
    if not isinstance(labels, dict) or not set(labels) <= set(LABELS):
        raise StoreError(f"the store is not a result: got labels {labels!r}, at {where}. Save the result again.")
    if "example" in labels:  # as in a run: in an array of numpy's own strings each takes as much room as the longest
        labels["example"] = np.array(labels["example"], dtype=object)
    question = dataset.attrs.pop("question", Result.question)
    kind = KINDS.get(question)
    if kind is None:
        raise StoreError(
            f"this attrib cannot read the result: got one of {question!r}, expected one of "
            f"{', '.join(KINDS)}, at {where}. Update attrib."
        )
    return kind(dataset.assign_coords({name: (LABELS[name], values) for name, values in labels.items()}))
