"""The page of a study: text, figures, tables and claims in one HTML file that needs no network.

Nothing that is put in is parsed as HTML: it is shown as text. Figures (extra `plot`) are drawn when they are put in, so
that a drawing that fails leaves the page as it was, and are part of the file.
"""

import re
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from io import BytesIO
from math import isfinite
from numbers import Integral, Real
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd

from .extras import need
from .figures import COLOURS
from .files import check_file, replacing
from .page import MARK, is_report

VERDICTS = {"holds": "✓", "fails": "✗", "depends": "~"}  # each with a sign of its own: read without colour, too
LARGEST_SVG = 300_000  # characters; beyond, a picture is smaller
CSS_PIXELS = 96  # per inch
STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#595959",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "svg.fonttype": "path",  # no font of the reader's: labels are as wide as they were laid out
    "svg.hashsalt": "attrib",  # the same figure is the same text
}


@dataclass(frozen=True)
class Claim:
    """What somebody wrote, and what our numbers say of it.

    Attributes:
        said: the claim in our words.
        source: where it stands, such as "ExPLAIND, section 4.2".
        verdict: "holds", "fails" or "depends".
        numbers: the evidence, with numbers.

    Raises:
        ValueError: another verdict.
    """

    said: str
    source: str
    verdict: str
    numbers: str

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(
                f"a claim's verdict is none that there is: got {self.verdict!r}, expected one of {list(VERDICTS)}, "
                f"at the claim {self.said!r}. Say which holds of it, and the conditions in `numbers`."
            )


class Article:
    """A page, built from top to bottom.

    Args:
        title: of the page.
        lead: what it found, in a few sentences.

    Example:
        >>> page = Article("Grokking", "Where the circuit comes from.")
        >>> page.section("Setup", "Three seeds, modulus 59.")
        >>> page.claims([Claim("Weight decay is needed.", "a paper", "depends", "3 of 5 seeds")])
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self._title, self._lead = title, lead
        self._parts: list[str] = []
        self._headings: dict[str, str] = {}  # id -> heading
        self._counts: Counter[str] = Counter()  # of what has a number
        self._tables = 0  # claims too

    def section(self, heading: str, *paragraphs: str) -> None:
        """A heading, which the table of contents lists, and the first paragraphs under it."""
        stem = re.sub(r"\W+", "-", heading.lower()).strip("-") or "section"
        name, n = stem, 1
        while name in self._headings:
            name, n = f"{stem}-{n + 1}", n + 1
        self._headings[name] = heading
        self._parts.append(f'<h2 id="{escape(name)}">{escape(heading)}</h2>')
        self.text(*paragraphs)

    def text(self, *paragraphs: str) -> None:
        """Paragraphs, as they stand."""
        self._parts += [f"<p>{escape(p)}</p>" for p in paragraphs]

    def figure(self, draw: Callable[[Any], Any], caption: str, width: float = 9, height: float = 4) -> None:
        """A figure: `draw` fills an empty matplotlib figure of width by height inches.

        Vector graphics, or a picture where those would be larger than LARGEST_SVG. The caption is also its text for
        those who do not see it. Up to nine and a half inches stand in their own size on a wide screen, wider ones are
        made smaller.

        Raises:
            MissingExtraError: the extra `plot` is not installed.
            Whatever `draw` raises; the page is then as it was before.
        """
        matplotlib = need("matplotlib", "plot")
        style = {**STYLE, "axes.prop_cycle": matplotlib.cycler(color=COLOURS)}
        number = self._counts["Figure"] + 1
        with matplotlib.rc_context(style):
            figure = need("matplotlib.figure", "plot").Figure(figsize=(width, height), layout="constrained")
            draw(figure)
            shown = _svg(figure, caption, f"f{number}-")
            if len(shown) > LARGEST_SVG:
                shown = _picture(figure, caption)
        self._parts.append(
            f"<figure>\n{shown}\n<figcaption>{self._numbered('Figure')}{escape(caption)}</figcaption>\n</figure>"
        )

    def table(self, table: pd.DataFrame, caption: str, digits: int = 3) -> None:
        """A table, its index as the first columns unless it merely counts the rows.

        Args:
            table: up to some 18 columns go on paper. Numbers are shown column by column: whole ones as such, others
                with so many digits after the point, or one where a column reaches a thousand. Very small and very large
                ones are powers of ten, what is missing is a dash.
            caption: above it.
            digits: after the point.
        """
        shown = _columns(table, digits)
        head = "".join(f'<th scope="col"{c.align}>{escape(c.name)}</th>' for c in shown)
        rows = ["".join(c.cell(k) for c in shown) for k in range(len(table))]
        self._table("wide" if len(shown) > 9 else "", f"{self._numbered('Table')}{escape(caption)}", head, rows)

    def lines(self, text: str) -> None:
        """Text in which every character has the same width and lines stay lines, such as a printed ledger."""
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def claims(self, claims: Sequence[Claim]) -> None:
        """A table of claims, each with its verdict and the evidence."""
        counts = Counter(c.verdict for c in claims)
        caption = "Claims: " + ", ".join(f"{v} {counts[v]}" for v in VERDICTS)
        head = "".join(f'<th scope="col">{name}</th>' for name in ("Claim", "Verdict", "Evidence"))
        rows = [
            f'<td>{escape(c.said)}<span class="source">{escape(c.source)}</span></td><td>{_badge(c.verdict)}</td>'
            f"<td>{escape(c.numbers)}</td>"
            for c in claims
        ]
        self._table("claims", caption, head, rows)

    def write(self, path: str | Path) -> Path:
        """The page as one file.

        Args:
            path: of the file; a page there that attrib wrote is replaced, in one move.

        Returns:
            The path.

        Raises:
            StoreExistsError: there is a file that attrib did not write.
            NotADirectoryError: there is no folder for it.
        """
        path = Path(path)
        check_file(path, overwrite=is_report(path))
        items = "\n".join(
            f'<li><a href="#{escape(name)}">{escape(heading)}</a></li>' for name, heading in self._headings.items()
        )
        parts = {
            "mark": MARK,
            "style": _part("article.css"),
            "title": escape(self._title),
            "lead": f'<p class="lead">{escape(self._lead)}</p>' if self._lead else "",
            "contents": f'<nav aria-label="Contents"><ol>\n{items}\n</ol></nav>' if items else "",
            "body": "\n".join(self._parts),
        }
        text = re.sub(r"<!--(\w+)-->", lambda found: parts[found[1]], _part("article.html"))
        with replacing(path) as beside:
            beside.write_text(text, encoding="utf-8")
        return path

    def _numbered(self, kind: str) -> str:
        self._counts[kind] += 1
        return f"<b>{kind} {self._counts[kind]}.</b> "

    def _table(self, kind: str, caption: str, head: str, rows: Sequence[str]) -> None:
        """The caption stands outside what scrolls, as wide as the page whatever the table's width."""
        self._tables += 1
        name = f"t{self._tables}"
        body = "\n".join(f"<tr>{row}</tr>" for row in rows)
        self._parts.append(
            f'<figure class="table">\n<figcaption id="{name}">{caption}</figcaption>\n<div class="scroll">'
            f'<table class="{kind}" aria-labelledby="{name}">\n<thead><tr>{head}</tr></thead>\n<tbody>'
            f"\n{body}\n</tbody>\n</table></div>\n</figure>"
        )


@dataclass(frozen=True)
class _Column:
    """A column as it is shown; `heads` where it names the rows."""

    name: str
    cells: list[str]
    number: bool
    heads: bool

    @property
    def align(self) -> str:
        return ' class="number"' if self.number else ""

    def cell(self, row: int) -> str:
        tag, scope = ("th", ' scope="row"') if self.heads else ("td", "")
        return f"<{tag}{scope}{self.align}>{escape(self.cells[row])}</{tag}>"


def _columns(table: pd.DataFrame, digits: int) -> list[_Column]:
    index = table.index
    counts = isinstance(index, pd.RangeIndex) and index.name is None
    levels = [] if counts else [index.get_level_values(k) for k in range(index.nlevels)]
    heads = [_column("" if level.name is None else level.name, list(level), digits, True) for level in levels]
    # by position: two columns may have the same name
    return heads + [_column(name, list(table.iloc[:, k]), digits, False) for k, name in enumerate(table.columns)]


def _column(name: Any, values: list[Any], digits: int, heads: bool) -> _Column:
    there = [v for v in values if not _missing(v)]
    number = all(isinstance(v, Real) and not isinstance(v, bool | np.bool_) for v in there)
    # a missing value makes pandas hold whole numbers as floats
    whole = number and all(isinstance(v, Integral) or not isfinite(v) or float(v).is_integer() for v in there)
    decimals = 0 if whole else 1 if number and any(isfinite(v) and abs(v) >= 1000 for v in there) else digits
    cells = [_shown(v, decimals) if number else "–" if _missing(v) else str(v) for v in values]
    said = " / ".join(map(str, name)) if isinstance(name, tuple) else str(name)
    return _Column(said, cells, number, heads)


def _missing(value: Any) -> bool:
    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


def _shown(value: Any, decimals: int) -> str:
    if _missing(value):
        return "–"
    if isinstance(value, Integral) and decimals == 0:
        return str(int(value)).replace("-", "−")  # as it is: a float has 53 bits
    if not isfinite(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    power = decimals > 0 and (0 < size < 10**-decimals or size >= 1e9)
    text = f"{value:.{max(0, decimals - 1)}e}" if power else f"{value:.{decimals}f}"
    return text.replace("e-0", "e-").replace("e+0", "e+").replace("-", "−")  # a minus as wide as a plus


def _badge(verdict: str) -> str:
    return f'<span class="verdict {verdict}"><span aria-hidden="true">{VERDICTS[verdict]}</span> {verdict}</span>'


def _svg(figure: Any, alt: str, prefix: str) -> str:
    """Vector graphics for the midst of a page: without namespaces, outside addresses and styles that reach beyond it;
    ids start with the prefix, as no two of a page may be the same."""
    drawn = BytesIO()
    figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(drawn.getvalue())
    for parent in list(root.iter()):
        parent.tag = parent.tag.rpartition("}")[2]
        for child in [c for c in parent if c.tag.endswith(("}metadata", "}style"))]:
            parent.remove(child)
        given = {name.rpartition("}")[2]: value for name, value in parent.attrib.items()}
        parent.attrib.clear()
        parent.attrib.update({name: _local(name, value, prefix) for name, value in given.items()})
    width, height = figure.get_size_inches() * CSS_PIXELS
    root.attrib.update({"width": f"{width:.0f}", "height": f"{height:.0f}", "role": "img", "aria-label": alt})
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return prefix + value
    if name == "href":
        return f"#{prefix}{value[1:]}" if value.startswith("#") else value if value.startswith("data:") else ""
    return value.replace("url(#", f"url(#{prefix}")


def _picture(figure: Any, alt: str) -> str:
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=2 * CSS_PIXELS)
    width, height = figure.get_size_inches() * CSS_PIXELS
    data = b64encode(drawn.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}" width="{width:.0f}" height="{height:.0f}">'


def _part(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")
