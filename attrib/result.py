"""What attribution gives: a labelled dataset in which every term has its name, and the ledger that they add up in.

Dimensions: query, step (whose batch supplied the gradient), example (recorded ids, numbers or strings), group; update_step
(which moved the parameters) stands only in `timeline`. Positive contributions raised the measurement. Units: the
measurement's.
"""

import os
from collections.abc import Sequence
from html import escape
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

from .errors import (
    AttribError,
    BatchIdentityError,
    CompletenessError,
    KeptAxesError,
    LimitIdentityError,
    LossError,
    SplitIdentityError,
    StoreError,
)
from .ledger import Ledger, query_names, terms_of
from .marginals import order
from .parts import PREFIX, check_parts, kept_axes, rounding_allowed, size_of
from .store import check_target, local_path, open_dataset, save_dataset

# string coordinates and their dimension: kept as JSON on disk, Zarr v3 has no settled string type
LABELS = {"group": "group", "query_name": "query", "example": "example"}
SUMMED = ("batch", "step", "measurement")  # the identities that completeness is made of
IDENTITIES = (*SUMMED, "split", "limit")


def join(parts: Sequence[xr.Dataset], names: Sequence[str] = ()) -> xr.Dataset:
    """One dataset from those of several sweeps over the same steps, each with queries of its own.

    names: what the queries are called, from the first on.
    """
    whole = parts[0]
    if len(parts) > 1:
        whole = xr.concat(parts, "query", data_vars="minimal", coords="minimal", compat="override")
        for name in (n for n, values in parts[0].items() if "query" not in values.dims):  # the gaps: the largest counts
            whole[name] = xr.concat([p[name] for p in parts], "sweep").max("sweep")
    for failure in (k for p in parts for k in p.attrs if k.endswith("_failure")):
        whole.attrs.setdefault(failure, next(p.attrs[failure] for p in parts if failure in p.attrs))
    whole = whole.assign_coords(query=np.arange(whole.sizes["query"]))
    return whole.assign_coords(query_name=("query", list(names[: whole.sizes["query"]]))) if names else whole


_ROUNDING = (
    " A bias before batch normalisation has a gradient of rounding alone, which Adam divides by its own size: build its "
    'layer with bias=False, or record with remainder="account".'
)


class Result:
    """The decomposition of one or more measurements. Made by `attrib.attribute` or `attrib.open_result`.

    dataset: xarray.Dataset with initial, final, residual, rounding, spacing, gross (query);
        decay (query, step, group); inherited (query, group); where there is one, remainder (query, step, group) and
        update_remainder and buffers (query, update_step, group);
        timeline (query, update_step, group); curve (query, state); one array per kept marginal; the identities by step.
    """

    def __init__(self, dataset: xr.Dataset) -> None:
        self.dataset = dataset

    @property
    def initial(self) -> xr.DataArray:
        """(query,): the measurement before the first step."""
        return self.dataset["initial"]

    @property
    def final(self) -> xr.DataArray:
        """(query,): the measurement after the last step."""
        return self.dataset["final"]

    @property
    def residual(self) -> xr.DataArray:
        """(query,): final minus initial minus all terms; measured, never spread over them."""
        return self.dataset["residual"]

    @property
    def decay(self) -> xr.DataArray:
        """(query, step, group): weight decay and a penalty in the loss, no example's; zeros where there was none."""
        return self.dataset["decay"]

    @property
    def inherited(self) -> xr.DataArray:
        """(query, group): momentum that was there before the first step; zeros where there was none."""
        return self.dataset["inherited"]

    @property
    def remainder(self) -> xr.DataArray:
        """(query, step, group): what the gradients held beyond the examples' shares (noise, clipping by value, hooks, what a
        pass in few bits rounds, gradients that are rounding alone); zeros where there is none."""
        return self._row("remainder", self.decay)

    @property
    def update_remainder(self) -> xr.DataArray:
        """(query, update_step, group): what updates held beyond what their rule makes of the gradients; zeros where a rule
        makes all of it."""
        return self._row("update_remainder", self.timeline())

    @property
    def buffers(self) -> xr.DataArray:
        """(query, update_step, group): what changes of buffers did that training made (running statistics), each at the
        group of its module's parameters; zeros where it made none."""
        return self._row("buffers", self.timeline())

    def _row(self, name: str, like: xr.DataArray) -> xr.DataArray:
        return self.dataset[name] if name in self.dataset else xr.zeros_like(like).rename(name)

    @property
    def curve(self) -> xr.DataArray:
        """(query, state): the measurement at every state of the window."""
        return self.dataset["curve"]

    @property
    def kept(self) -> list[tuple[str, ...]]:
        """The axes that contributions were kept along; anything summed from these can be had too."""
        return kept_axes(self.dataset)

    def has(self, *axes: str) -> bool:
        """Whether `by(*axes)` can be had."""
        return any(set(axes) <= set(kept) for kept in self.kept)

    def by(self, *axes: str) -> xr.DataArray:
        """Contributions of the training examples, (query, *axes), summed over the other axes.

        Args:
            axes: some of "step", "example", "group"; none gives the total (query,).

        Raises:
            KeptAxesError: no kept array has these axes; it says which `keep=` would have them.
        """
        wanted = order(axes)
        arrays = {kept: self.dataset["_".join((PREFIX, *kept))] for kept in self.kept}
        for kept, array in sorted(arrays.items(), key=lambda item: item[1].size):
            if set(wanted) <= set(kept):
                return (
                    array.sum([a for a in kept if a not in wanted], skipna=False)
                    .transpose("query", *axes)
                    .rename(PREFIX)
                )
        available = "; ".join(", ".join(k) for k in self.kept)
        raise KeptAxesError(
            f"contributions were not kept along these axes: got by({', '.join(map(repr, axes))}), expected axes out of "
            f"one of: {available}. Attribute again with keep={wanted!r}."
        )

    def to_pandas(self, *axes: str) -> pd.DataFrame:
        """`by(*axes)` as a tidy table: columns query, the axes, contribution; a row per entry."""
        array = self.by(*axes).drop_vars("query_name", errors="ignore")
        return array.to_series().reset_index()

    def to_numpy(self, *axes: str) -> np.ndarray:
        """`by(*axes)` as a float64 array (Q, *axes), one's own copy."""
        return self.by(*axes).to_numpy().copy()

    def to_torch(self, *axes: str) -> torch.Tensor:
        """`by(*axes)` as a float64 tensor (Q, *axes) on the CPU."""
        return torch.from_numpy(self.to_numpy(*axes))

    def select(self, queries: Sequence[int]) -> "Result":
        """The result for some of the queries, by their position; nothing is read from disk for it."""
        return Result(self.dataset.isel(query=list(queries)))

    @property
    def names(self) -> list[str]:
        """What the queries are called: the measurement's `names`, or their numbers."""
        return query_names(self.dataset)

    @property
    def units(self) -> str:
        """Of the measurement, and so of every term; empty where it names none."""
        return str(self.dataset.attrs.get("units", ""))

    def timeline(self) -> xr.DataArray:
        """(query, update_step, group): the change that each step's update made, decay, momentum and buffers included.

        The other clock: it sums to final - initial as `by` does with its terms, but stands on the step that moved the
        parameters, not on the one whose batch supplied the gradient.
        """
        return self.dataset["timeline"]

    def top(self, n: int = 10) -> pd.DataFrame:
        """The n largest and the n smallest (most negative) contributions of examples: 2n rows a query.

        Columns query, example, contribution.
        """
        contributions = self.by("example")
        frames = []
        for q in range(contributions.sizes["query"]):
            values = contributions.values[q]
            down = np.argsort(-values, kind="stable")
            chosen = down if len(down) <= 2 * n else np.concatenate([down[:n], down[len(down) - n :]])
            frames.append(
                pd.DataFrame(
                    {
                        "query": contributions["query"].values[q],
                        "example": contributions["example"].values[chosen],
                        "contribution": values[chosen],
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)

    def ledger(self) -> Ledger:
        """The terms summed, per query, whether or not they add up: see `check`."""
        rows = {name: self.dataset[name] for name in terms_of(self.dataset)}
        terms = xr.Dataset(
            {
                "initial": self.initial,
                "examples": self.by(),
                **{name: row.sum([d for d in row.dims if d != "query"]) for name, row in rows.items()},
                "residual": self.residual,
                "final": self.final,
            }
        )
        sizes = {name: self._size(row) for name, row in rows.items() if name.endswith("remainder")}
        share = [str(self.dataset.attrs.get(name, "")) for name in ("shares", "share")]
        return Ledger(terms, {name: self._gap(name) for name in IDENTITIES}, sizes, *share)

    def _size(self, row: xr.DataArray) -> str:
        """How large a row is that may hold anything: through U, and as it was recorded."""
        gross = self.dataset["gross"].values
        share = abs(row).sum([d for d in row.dims if d != "query"]).values / np.where(gross > 0, gross, 1.0)
        shown = f"{share.max():.2e} of the gross"
        largest, count = self.dataset.attrs.get(str(row.name), (0.0, 0))
        return f"{shown}; at most {largest:.2e} of |p.grad| at {count} checked steps" if count else shown

    def _gap(self, name: str) -> float:
        """The largest of an identity; NaN where it was not checked at all."""
        gaps = self.dataset.get(f"{name}_identity")
        known = np.array([]) if gaps is None else gaps.values[~np.isnan(gaps.values)]
        return float(known.max()) if len(known) else float("nan")

    def check(self, rtol: float = 1e-6) -> Ledger:
        """Check that initial + examples + decay + inherited == final, with a remainder where there is one, as far as numbers
        can be stored, and that all arrays of the result say the same.

        Args:
            rtol: bound on |residual|, relative to the gross size of what is summed: the largest of |initial|, |final| and
                the sum over steps and tensors of |contributions|, |decay|, |remainder| and |buffers|. On top of it, the part
                of the residual that was measured to come from rounding the stored parameters (`dataset["rounding"]`) is
                allowed for, as far as their spacing explains it; in float64 that is nothing.

        Raises:
            CompletenessError: with the worst query, its residual and the identity that is furthest off; also where a number
                is not finite, or two arrays do not add up to the same.
            StoreError: a file of a result that was opened is missing or damaged.
            SplitIdentityError: a share is not that of its example, though all add up; names step, example and group.
            LimitIdentityError: the path's vector is not a gradient in the limit; names query and parameter.
            LossError, BatchIdentityError: the run accounts for a remainder, and the losses are not those that were recorded,
                or the remainder is more than the rounding that it is accounted for.
        """
        ledger = self.ledger()
        failing: list[tuple[str, type[AttribError]]] = [("split", SplitIdentityError), ("limit", LimitIdentityError)]
        if "remainder" in self.dataset:  # else the terms would not add up
            failing += [("loss", LossError), ("batch", BatchIdentityError)]
        for name, error in failing:
            if (failure := self.dataset.attrs.get(f"{name}_failure")) is not None:
                raise error(f"{failure}\n{ledger}")
        residual = np.abs(ledger.terms["residual"].values)
        gross = size_of(self.dataset)
        gap = np.maximum(residual - rounding_allowed(self.dataset), 0.0) / np.where(gross > 0, gross, 1.0)
        gap = np.where(np.isfinite(residual), gap, np.inf)
        worst = int(np.argmax(gap))
        if not gap[worst] <= rtol:
            summed = {n: gap for n, gap in ledger.identities.items() if n in SUMMED and not np.isnan(gap)}
            name = max(summed, key=summed.__getitem__)
            at = self.dataset[f"{name}_identity"]
            step = int(at["step"].values[int(np.nanargmax(at.values))])
            hint = " Are model and loss those that were recorded?" if name == "batch" else ""
            hint = _ROUNDING if "buffers" in self.dataset and "remainder" not in self.dataset else hint
            raise CompletenessError(
                f"the terms do not add up: got a residual of {gap[worst]:.3g} of what is summed, expected at most "
                f"{rtol:.3g}, at query {self.dataset['query'].values[worst]}. The {name} identity is furthest off, by "
                f"{ledger.identities[name]:.3g} at step {step}.{hint}\n{ledger}"
            )
        check_parts(self.dataset, rtol)
        return ledger

    def save(self, store: Any, overwrite: bool = False) -> None:
        """Write the dataset to a path or zarr Store, to be opened again with `attrib.open_result`.

        Raises:
            StoreExistsError: something is there and overwrite is False, or it is no result of attrib's.
        StoreError: it could not be written; what stood there stands there still.
        """
        check_place(store, overwrite)
        text = [name for name in LABELS if name in self.dataset.coords and self.dataset[name].dtype.kind in "OU"]
        labels = {name: [str(v) for v in self.dataset[name].values] for name in text}
        plain = self.dataset.drop_vars(list(labels)).assign_attrs({**self.dataset.attrs, "attrib_labels": labels})
        save_dataset(plain, store, {"versions": {"attrib": version("attrib")}}, overwrite)

    def __repr__(self) -> str:
        return f"{self._head()}\n{self.ledger()}"

    def _head(self) -> str:
        sizes = self.dataset.sizes
        kept = "; ".join(", ".join(k) for k in self.kept)
        return (
            f"<attrib.Result: {sizes['query']} queries over {sizes['step']} steps, {sizes['example']} examples, "
            f"{sizes['group']} groups; kept: {kept}>"
        )

    def _repr_html_(self) -> str:
        """For notebooks: the ledger, and the largest contributions to the first query where examples were kept."""
        shown = f"<p>{escape(self._head())}</p>{self.ledger()._repr_html_()}"
        if self.has("example"):
            first = self.select([0])
            table = first.top(3).drop(columns="query").to_html(index=False, border=0, float_format="{:+.4f}".format)
            units = f" ({escape(self.units)})" if self.units else ""
            shown += f"<p>Largest and smallest contributions to query {escape(first.names[0])}{units}</p>{table}"
        return shown


def check_place(store: Any, overwrite: bool) -> None:
    """Raise StoreExistsError where a result cannot be saved: see `Result.save`."""
    check_target(store, overwrite, "result")
    path = local_path(store)
    if path is not None:
        parent = next(p for p in path.parents if p.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            raise NotADirectoryError(
                f"nothing can be written there: got {store}, expected a place in a folder, at {parent}."
            )


def open_result(store: Any) -> Result:
    """Open what `Result.save` wrote, read-only and lazily.

    Raises:
        StoreError: nothing there, not a result, or a file of it is missing or damaged; also when it is read.
    """
    dataset, _, where = open_dataset(store)
    labels = dataset.attrs.pop("attrib_labels", None)
    if not isinstance(labels, dict) or not set(labels) <= set(LABELS):
        raise StoreError(f"the store is not a result: got labels {labels!r}, at {where}. Save the result again.")
    if "example" in labels:  # as in a run: in an array of numpy's own strings each takes as much room as the longest
        labels["example"] = np.array(labels["example"], dtype=object)
    return Result(dataset.assign_coords({name: (LABELS[name], values) for name, values in labels.items()}))
