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
SHOWN = 8  # queries printed


@dataclass(frozen=True)
class Ledger:
    """The terms, each (query,), in the measurement's units, in order; printed, or shown as a table in a notebook.

    identities: name -> the largest relative gap over the steps where it was checked, NaN for none (see the README for what
    each is relative to). sizes: of a term that may be anything, in words how large it is.
    """

    terms: xr.Dataset
    identities: dict[str, float]
    sizes: dict[str, str] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        if name in ("terms", "identities", "sizes"):
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
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        table = self.to_pandas()
        formats = {said(n): (lambda v, n=n: _number(n, v)) for n in table}
        shown = table.rename(columns=said).head(SHOWN).to_html(formatters=formats, escape=True, border=0)
        more = f"<p>... and {len(table) - SHOWN} more queries</p>" if len(table) > SHOWN else ""
        gaps = "; ".join(f"{escape(name)} {_gap(gap)}" for name, gap in self.identities.items())
        sizes = "".join(f"<p>{escape(said(name))}: {escape(size)}</p>" for name, size in self.sizes.items())
        return f"{shown}{more}<p>Identities, largest gap: {gaps}</p>{sizes}"


def said(term: str) -> str:
    """How a term is called where people read it."""
    return term.replace("_", " ")


def terms_of(dataset: xr.Dataset) -> list[str]:
    """Those of TERMS that a result has."""
    return [name for name in TERMS if name in dataset]


def _gap(gap: float) -> str:
    return f"{gap:.2e}" if gap == gap else "not checked"


def query_names(labelled: xr.Dataset | xr.DataArray) -> list[str]:
    """What the queries are called: the measurement's names, or their numbers."""
    return [str(v) for v in labelled["query_name" if "query_name" in labelled.coords else "query"].values]


def _number(term: str, value: float) -> str:
    return f"{value:.2e}" if term == "residual" else f"{value:.6f}"
