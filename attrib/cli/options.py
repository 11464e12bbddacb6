"""What several commands take, and how it is read."""

import argparse
from typing import Any

from ..result import Labelled

AXES = "axes, such as step,example"
FOLDERS = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/", "tcsh": "d"}  # as shtab completes folders


def command(commands: Any, name: str, call: Any, what: str, *places: str, json: bool = True) -> argparse.ArgumentParser:
    """A command of some stores; `call` is called with the options and returns the exit status."""
    made: argparse.ArgumentParser = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    for place in places:
        action: Any = made.add_argument(place.lower(), metavar=place)
        action.complete = FOLDERS
    if json:
        made.add_argument("--json", action="store_true", help="for machines")
    made.set_defaults(call=call, parser=made)
    return made


def add_setup(made: argparse.ArgumentParser, required: bool) -> None:
    what = "function that returns (model, loss, measurement) or an attrib.Setup: my_script:setup"
    made.add_argument("--setup", metavar="MODULE:FUNCTION", required=required, help=what)


def add_query(made: argparse.ArgumentParser) -> None:
    made.add_argument("--query", metavar="Q", help="number or name of a query; by default the first, with --json all")


def chosen_queries(result: Labelled, query: str | None, every: bool) -> list[int]:
    """Positions of the queries that were asked for.

    Raises:
        ValueError: there is none of that number or name.
    """
    if query is None:
        return list(range(len(result.names))) if every else [0]
    numbers = [str(v) for v in result.dataset["query"].values]
    for known in (result.names, numbers):
        if query in known:
            return [known.index(query)]
    raise ValueError(
        f"no such query: got {query!r}, expected one of {', '.join(result.names[:8])}{', ...' * (len(numbers) > 8)}."
    )


def size(text: str) -> int:
    """512, 500M, 2G: powers of 1024."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    try:
        return int(float(text[:-1]) * units[text[-1].upper()]) if text[-1:].upper() in units else int(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"not a number of bytes: got {text!r}, expected such as 2G or 500M") from None


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"not a count: got {text!r}, expected such as 10")
    return int(text)


def count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"not a step: got {text!r}, expected such as 0 or 500")
    return int(text)


def axes(text: str) -> tuple[str, ...]:
    """step,example."""
    return tuple(part for part in text.split(",") if part)


def numbers(text: str) -> list[int]:
    """0,3,5:8 -> 0, 3, 5, 6, 7."""
    found: list[int] = []
    try:
        for part in text.split(","):
            first, colon, last = part.partition(":")
            found += range(int(first), int(last)) if colon else [int(first)]
    except ValueError:
        found = []
    if not found:
        raise argparse.ArgumentTypeError(f"not a list of numbers: got {text!r}, expected such as 0,3,5:8")
    return found


def ids(text: str, strings: bool) -> list[Any]:
    """Of train examples: doc-3,doc-17 where they are strings, else as `numbers`.

    Raises:
        ValueError: they are no numbers.
    """
    if strings:
        return text.split(",")
    try:
        return numbers(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{error}, since the ids of the run are numbers.") from None


def window(text: str) -> slice:
    """100:200, or 100: and :200."""
    try:
        first, last = text.split(":")
        return slice(int(first) if first else None, int(last) if last else None)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a window of steps: got {text!r}, expected such as 100:200") from None
