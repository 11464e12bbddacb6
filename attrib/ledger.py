"""The ledger: initial + examples + decay + inherited + residual = final, per query, and the five identities of the run."""

from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd
import xarray as xr

TERMS = ("initial", "examples", "decay", "inherited", "residual", "final")
SHOWN = 8  # queries printed


@dataclass(frozen=True)
class Ledger:
    """The terms, each (query,), in the measurement's units; printed, or shown as a table in a notebook.

    identities: name -> the largest relative gap over the steps where it was checked, NaN for none (see the README for what
    each is relative to).
    """

    terms: xr.Dataset
    identities: dict[str, float]

    def __getattr__(self, name: str) -> Any:
        if name in ("terms", "identities"):
            raise AttributeError(name)
        try:
            return self.terms[name]
        except KeyError:
            raise AttributeError(name) from None

    def to_pandas(self) -> pd.DataFrame:
        """A row per query, a column per term."""
        names = query_names(self.terms)
        return pd.DataFrame({n: self.terms[n].values for n in TERMS}, index=pd.Index(names, name="query"))

    def __str__(self) -> str:
        table = self.to_pandas()
        width = max(10, *(len(name) + 2 for name in table.index[:SHOWN]))
        lines = ["query".ljust(width) + "".join(n.rjust(14) for n in TERMS)]
        for name, row in table.head(SHOWN).iterrows():
            lines.append(str(name).ljust(width) + "".join(_number(n, row[n]).rjust(14) for n in TERMS))
        if len(table) > SHOWN:
            lines.append(f"... and {len(table) - SHOWN} more queries")
        lines += [f"{name} identity".ljust(24) + _gap(gap) for name, gap in self.identities.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        table = self.to_pandas()
        formats = {n: (lambda v, n=n: _number(n, v)) for n in TERMS}
        shown = table.head(SHOWN).to_html(formatters=formats, escape=True, border=0)
        more = f"<p>... and {len(table) - SHOWN} more queries</p>" if len(table) > SHOWN else ""
        gaps = "; ".join(f"{escape(name)} {_gap(gap)}" for name, gap in self.identities.items())
        return f"{shown}{more}<p>Identities, largest gap: {gaps}</p>"


def _gap(gap: float) -> str:
    return f"{gap:.2e}" if gap == gap else "not checked"


def query_names(labelled: xr.Dataset | xr.DataArray) -> list[str]:
    """What the queries are called: the measurement's names, or their numbers."""
    return [str(v) for v in labelled["query_name" if "query_name" in labelled.coords else "query"].values]


def _number(term: str, value: float) -> str:
    return f"{value:.2e}" if term == "residual" else f"{value:.6f}"
