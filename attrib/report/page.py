"""The report: one HTML file that needs no network, with everything in it (extra `report`).

`payload` makes the numbers, page.html, page.css and SCRIPTS show them; plotly.js and the numbers stand in the file
compressed. Nothing from the data is ever parsed as HTML: the page sets it as text.
"""

import gzip
from base64 import b64encode
from html import escape
from importlib.resources import files
from pathlib import Path

from ..result import Difference, Labelled
from .extras import need
from .files import check_file, replacing, to_json
from .payload import payload
from .shown import Describe

SCRIPTS = ("tools.js", "charts.js", "tree.js", "tokens.js", "examples.js", "page.js")  # one after the other, one script
MARK = '<meta name="generator" content="attrib">'


def write(
    result: Labelled,
    path: str | Path,
    describe: Describe | None = None,
    describe_query: Describe | None = None,
    tag: Describe | None = None,
    title: str | None = None,
    progress: bool = True,
    difference: Difference | None = None,
) -> Path:
    """Write a result as one HTML page that can be opened, sent and printed. Its head says which question it answers.

    Args:
        result: from `attrib.attribute`, `attrib.influence`, `attrib.difference` or `attrib.open_result`. For tables of
            windows of steps it must have been kept along step and example, for the bars along step and group.
        path: of the file; an earlier report there is replaced.
        describe: train example id, a number or a string -> how it is shown: a string, an image (H, W), (H, W, 3) or
            (3, H, W), or a pair (image, string).
        describe_query: query -> the same.
        tag: train example id -> class, source or the like, that the ledger's waterfall sums by.
        title: by default the question, for the chosen query.
        difference: of the run of the result and another one, by the same measurement: what was really done to examples, and
            what came of it, stands beside what the result says of them.

    Returns:
        The path.

    Raises:
        TypeError: it is no result.
        ValueError: the difference is of another run or measurement.
        MissingExtraError: the extra `report` is not installed.
        KeptAxesError: the result was not kept along the examples.
        DescriptionError: `describe`, `describe_query` or `tag` failed, or returned something that cannot be shown.
        StoreExistsError: there is a file that is no report.

    Example:
        >>> attrib.report.write(result, "report.html", describe=lambda i: f"example {i}", tag=lambda i: int(y[i])).name
        'report.html'
    """
    if not isinstance(result, Labelled):
        raise TypeError(
            f"a page shows a result: got {type(result).__name__}, expected one of attrib.attribute or the like."
        )
    path = Path(path)
    check_file(path, overwrite=is_report(path))
    library = need("plotly.offline", "report").get_plotlyjs()
    page = payload(result, describe, describe_query, tag, progress, difference)
    page["title"] = title
    parts = {
        "mark": MARK,
        "title": escape(title or f"{result.question.capitalize()}: {page['measurement']} - attrib"),
        "style": _part("page.css"),
        "script": "\n".join(map(_part, SCRIPTS)),
        "library": _packed(library),
        "page": _packed(to_json(page)),
    }
    with replacing(path) as beside:
        beside.write_text(_filled("page.html", parts), encoding="utf-8")
    return path


def is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return MARK in file.read(1000)


def _part(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _filled(name: str, parts: dict[str, str]) -> str:
    """A file with what stands in the place of its comments."""
    text = _part(name)
    for mark, value in parts.items():
        text = text.replace(f"<!--{mark}-->", value, 1)
    return text


def _packed(text: str) -> str:
    """Compressed, in base64: a browser unpacks it by itself."""
    return b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()
