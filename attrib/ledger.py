"""The ledger: initial + examples + decay + inherited + residual = final, per query, and the five identities of the run.

Where there is a remainder, an update that no rule explains, or buffers that training changes, they have a column of their
own before the residual.
"""

from dataclasses import dataclass, field
from html import escape
from typing import Any

import pandas as pd
import xarray as xr

TERMS = (
    "decay",
    "inherited",
    "remainder",
    "update_remainder",
    "buffers",
)  # what is no example's; of the last three, those there are
DIFFERENCES = ("start", "reduction", "options", "penalty", "context", "buffers")  # the same, of a difference
SHARE = {  # what a share is, and is not
    "example": "what each example's own loss asked for, not what passed through its rows of the batch",
    "rows": "what passed through each example's rows of the batch, not what its own loss asked for where losses depend on "
    "each other",
}
COUPLED = (
    "here the losses of a batch do depend on each other, so it goes through what the other examples did to it, too"
)
SHOWN = 8  # queries printed


@dataclass(frozen=True)
class Ledger:
    """The terms, each (query,), in the measurement's units, in order; printed, or shown as a table in a notebook.

    identities: name -> the largest relative gap over the steps where it was checked, NaN for none (docs/theory.md has what
    each is relative to). sizes: of a term that may be anything, in words how large it is. shares: "example" or "rows";
    share: what that means.
    """

    terms: xr.Dataset
    identities: dict[str, float]
    sizes: dict[str, str] = field(default_factory=dict)
    shares: str = ""
    share: str = ""

    def __getattr__(self, name: str) -> Any:
        if name in ("terms", "identities", "sizes", "shares", "share"):
            raise AttributeError(name)
        try:
            return self.terms[name]
        except KeyError:
            raise AttributeError(name) from None

    def to_pandas(self) -> pd.DataFrame:
        """A row per query, a column per term."""
        names = query_names(self.terms)
        return pd.DataFrame({str(n): v.values for n, v in self.terms.items()}, index=pd.Index(names, name="query"))

    def __str__(self) -> str:
        table = self.to_pandas()
        width = max(10, *(len(name) + 2 for name in table.index[:SHOWN]))
        columns = {n: max(14, len(n) + 2) for n in table}
        lines = ["query".ljust(width) + "".join(said(n).rjust(columns[n]) for n in table)]
        for name, row in table.head(SHOWN).iterrows():
            lines.append(str(name).ljust(width) + "".join(_number(n, row[n]).rjust(columns[n]) for n in table))
        if len(table) > SHOWN:
            lines.append(f"... and {len(table) - SHOWN} more queries")
        lines += [f"{name} identity".ljust(24) + _gap(gap) for name, gap in self.identities.items()]
        lines += [said(name).ljust(24) + size for name, size in self.sizes.items()]
        lines += [f"shares by {self.shares}".ljust(24) + self.share] if self.share else []
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        table = self.to_pandas()
        formats = {said(n): (lambda v, n=n: _number(n, v)) for n in table}
        shown = table.rename(columns=said).head(SHOWN).to_html(formatters=formats, escape=True, border=0)
        more = f"<p>... and {len(table) - SHOWN} more queries</p>" if len(table) > SHOWN else ""
        gaps = "; ".join(f"{escape(name)} {_gap(gap)}" for name, gap in self.identities.items())
        sizes = "".join(f"<p>{escape(said(name))}: {escape(size)}</p>" for name, size in self.sizes.items())
        share = f"<p>Shares by {escape(self.shares)}: {escape(self.share)}</p>" if self.share else ""
        return f"{shown}{more}<p>Identities, largest gap: {gaps}</p>{sizes}{share}"


def share_said(shares: str, coupled: bool) -> str:
    """What a share is in a result. coupled: whether a batch was met whose losses depend on each other."""
    return f"{SHARE[shares]}; {COUPLED}" if coupled and shares == "example" else SHARE[shares]


def said(term: str) -> str:
    """How a term is called where people read it."""
    return term.replace("_", " ")


def terms_of(dataset: xr.Dataset) -> list[str]:
    """Those of TERMS, or of DIFFERENCES, that a result has."""
    return [name for name in dict.fromkeys((*TERMS, *DIFFERENCES)) if name in dataset]


def _gap(gap: float) -> str:
    return f"{gap:.2e}" if gap == gap else "not checked"


def query_names(labelled: xr.Dataset | xr.DataArray) -> list[str]:
    """What the queries are called: the measurement's names, or their numbers."""
    return [str(v) for v in labelled["query_name" if "query_name" in labelled.coords else "query"].values]


def _number(term: str, value: float) -> str:
    return f"{value:.2e}" if term == "residual" else f"{value:.6f}"
