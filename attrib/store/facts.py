"""What the header of a run says. A header is sealed, so these are as they were written; who writes one by hand is told."""

from collections.abc import Callable
from typing import Any

from ..batch import places, tree_of
from ..constants import is_type
from ..errors import StoreError


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _length(value: Any) -> bool:
    return _count(value) and value > 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(kind, value))


def _dict_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(kind, value.values()))


def _layout(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _list_of(_text)(value.get("names"))
        and _list_of(_list_of(_count))(value.get("shapes"))
        and len(value["names"]) == len(value["shapes"])
    )


def _constant(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and _text(value[0])
        and _list_of(_count)(value[1])
        and _text(value[2])
    )


def _form(value: Any) -> bool:
    return (
        isinstance(value, dict) and _list_of(_leaf)(value.get("leaves")) and _tree(value.get("tree"), value["leaves"])
    )


def _leaf(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and value[0] in ("rows", "shared", "number")
        and (value[1] in ("float", "int", "bool") if value[0] == "number" else is_type(value[1]))
        and _list_of(_count)(value[2])
    )


def _tree(value: Any, leaves: list[Any]) -> bool:
    try:
        return len(places(tree_of(value))) == len(leaves)
    except (ValueError, RecursionError):
        return False


def _factor(value: Any) -> bool:
    return isinstance(value, dict) and _text(value.get("kind"))


def _optimizer(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(map(_text, map(value.get, ("type", "rule"))))
        and _list_of(_text)(value.get("hyper"))
    )


def _anything(value: Any) -> bool:
    return True


FACTS_OF_A_RUN: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("id", "dtype", "optimizer", "rule", "model", "recorded"), _text),
    "capture": lambda value: value in ("replay", "gradients", "factors"),
    "factors": lambda value: value is None or _dict_of(_list_of(_factor))(value),
    **dict.fromkeys(("block", "states_every", "frame", "check_every"), _length),
    **dict.fromkeys(("committed_steps", "written_steps", "slots", "passes"), _count),
    **dict.fromkeys(("rows", "shared"), _list_of(_count)),
    "forms": _list_of(_form),
    "ids": lambda value: _list_of(_count)(value) and len(value) == 2,
    **dict.fromkeys(("training", "constants"), _list_of(_text)),
    "optimizers": _list_of(_optimizer),
    "owners": _list_of(_count),
    "complete": lambda value: isinstance(value, bool),
    "layout": _layout,
    "digests": _dict_of(_constant),
    "versions": _dict_of(_text),
    "asked": _dict_of(_anything),
    "settled": _dict_of(_anything),
}

LATER: dict[str, Callable[[Any], bool]] = {"buffers": _list_of(_text)}  # that runs of this format need not have


def check_facts(header: dict[str, Any], where: Any) -> None:
    """Raise StoreError at the first fact that is not there, or not such as a recorder writes."""
    for name, kind in (FACTS_OF_A_RUN | {name: kind for name, kind in LATER.items() if name in header}).items():
        if name not in header or not kind(header[name]):
            raise StoreError(
                f"the header is not one that a recorder writes: got {name} {str(header.get(name))[:60]!r}, at {where}. If "
                f"it came from somebody else, do not trust it."
            )
    if not len(header["forms"]) == len(header["rows"]) == len(header["shared"]):
        raise StoreError(f"the header is not one that a recorder writes: got forms that do not fit, at {where}.")
    if not set(header.get("buffers", ())) <= set(header["digests"]):
        raise StoreError(f"the header is not one that a recorder writes: got buffers without a type, at {where}.")
    owners, optimizers = header["owners"], header["optimizers"]
    if sorted(set(owners)) != list(range(len(optimizers))) or len(owners) != len(header["layout"]["names"]):
        raise StoreError(f"the header is not one that a recorder writes: got owners that do not fit, at {where}.")
    factors = None if header["factors"] is None else sorted(header["factors"])
    if factors != (sorted(header["layout"]["names"]) if header["capture"] == "factors" else None):
        raise StoreError(f"the header is not one that a recorder writes: got factors that do not fit, at {where}.")
