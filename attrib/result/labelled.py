"""A labelled dataset of what examples did to queries: summed along any axes that were kept, ranked, saved, opened again.

Dimensions: query, step (whose batch supplied the gradient), example (recorded ids, numbers or strings), group.
"""

import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
import xarray as xr

from ..errors import BatchIdentityError, KeptAxesError, SplitIdentityError
from ..ledger import Ledger, query_names
from ..marginals import order
from ..parts import PREFIX, kept_axes
from ..store import check_target, local_path, save_dataset

# string coordinates and their dimension: kept as JSON on disk, Zarr v3 has no settled string type
LABELS = {"group": "group", "query_name": "query", "example": "example"}


class Labelled:
    """What examples did to queries, `word` what that is called: base of all results.

    dataset: xarray.Dataset with an array for each set of axes that was kept, named after the word and the axes. question:
    which of the three is answered.
    """

    word = PREFIX
    question: str

    def __init__(self, dataset: xr.Dataset) -> None:
        self.dataset = dataset

    @property
    def kept(self) -> list[tuple[str, ...]]:
        """The axes that arrays were kept along; anything summed from these can be had too."""
        return kept_axes(self.dataset, self.word)

    def has(self, *axes: str) -> bool:
        """Whether `by(*axes)` can be had."""
        return any(set(axes) <= set(kept) for kept in self.kept)

    def by(self, *axes: str) -> xr.DataArray:
        """What the training examples did, (query, *axes), summed over the other axes.

        Args:
            axes: some of "step", "example", "group"; none gives the total (query,).

        Raises:
            KeptAxesError: no kept array has these axes; it says which `keep=` would have them.
        """
        wanted = order(axes)
        arrays = {kept: self.dataset["_".join((self.word, *kept))] for kept in self.kept}
        for kept, array in sorted(arrays.items(), key=lambda item: item[1].size):
            if set(wanted) <= set(kept):
                return (
                    array.sum([a for a in kept if a not in wanted], skipna=False)
                    .transpose("query", *axes)
                    .rename(self.word)
                )
        available = "; ".join(", ".join(k) for k in self.kept)
        raise KeptAxesError(
            f"{self.word}s were not kept along these axes: got by({', '.join(map(repr, axes))}), expected axes out of "
            f"one of: {available}. Attribute again with keep={wanted!r}."
        )

    @property
    def warning(self) -> str:
        """Why little is to be read from it, in a sentence; empty where there is no reason."""
        return ""

    @property
    def trace(self) -> xr.DataArray:
        """(query, state): what goes along with the timeline: the measurement, or the size of the sensitivity."""
        raise NotImplementedError

    def timeline(self) -> xr.DataArray:
        """(query, a step, group): what stands at each step, of whatever kind.

        Raises:
            KeptAxesError: it was not kept along steps and groups.
        """
        return self.by("step", "group").rename("timeline")

    def ledger(self) -> Ledger:
        """The terms, per query, and how they were checked."""
        raise NotImplementedError

    def to_pandas(self, *axes: str) -> pd.DataFrame:
        """`by(*axes)` as a tidy table: columns query, the axes, the word; a row per entry."""
        array = self.by(*axes).drop_vars("query_name", errors="ignore")
        return array.to_series().reset_index()

    def to_numpy(self, *axes: str) -> np.ndarray:
        """`by(*axes)` as a float64 array (Q, *axes), one's own copy."""
        return self.by(*axes).to_numpy().copy()

    def to_torch(self, *axes: str) -> torch.Tensor:
        """`by(*axes)` as a float64 tensor (Q, *axes) on the CPU."""
        return torch.from_numpy(self.to_numpy(*axes))

    def gap(self, name: str) -> float:
        """The largest of an identity over the steps; NaN where it was not checked at all."""
        gaps = self.dataset.get(f"{name}_identity")
        known = np.array([]) if gaps is None else gaps.values[~np.isnan(gaps.values)]
        return float(known.max()) if len(known) else float("nan")

    def check_shares(self) -> None:
        """Raise BatchIdentityError or SplitIdentityError where a gap is above what rounding explains."""
        bound = float(self.dataset.attrs["bound"])
        if self.gap("batch") > bound:
            raise BatchIdentityError(
                f"the gradients of the examples do not sum to the recorded one: got a gap of {self.gap('batch'):.3g}, "
                f"expected at most {bound:.1g}. Pass the loss that was given to attrib.record, and the model that was "
                f"trained."
            )
        if self.gap("split") > bound:
            raise SplitIdentityError(
                f"what is said of single examples is not theirs: got a gap of {self.gap('split'):.3g}, expected at most "
                f"{bound:.1g}. Does the loss draw random numbers outside of model(...), or let examples see each other in "
                f"some batches only?"
            )

    def select(self, queries: Sequence[int]) -> Self:
        """The result for some of the queries, by their position; nothing is read from disk for it."""
        return type(self)(self.dataset.isel(query=list(queries)))

    @property
    def names(self) -> list[str]:
        """What the queries are called: the measurement's `names`, or their numbers."""
        return query_names(self.dataset)

    @property
    def units(self) -> str:
        """Of the measurement, and so of every term; empty where it names none."""
        return str(self.dataset.attrs.get("units", ""))

    @property
    def measured_units(self) -> str:
        """Of the measurement itself."""
        return self.units

    def top(self, n: int = 10) -> pd.DataFrame:
        """The n largest and the n smallest (most negative) of the examples: 2n rows a query.

        Columns query, example, and the word.
        """
        summed = self.by("example")
        frames = []
        for q in range(summed.sizes["query"]):
            values = summed.values[q]
            down = np.argsort(-values, kind="stable")
            chosen = down if len(down) <= 2 * n else np.concatenate([down[:n], down[len(down) - n :]])
            frames.append(
                pd.DataFrame(
                    {
                        "query": summed["query"].values[q],
                        "example": summed["example"].values[chosen],
                        self.word: values[chosen],
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)

    def save(self, store: Any, overwrite: bool = False) -> None:
        """Write the dataset to a path or zarr Store, to be opened again with `attrib.open_result`.

        Raises:
            StoreExistsError: something is there and overwrite is False, or it is no result of attrib's.
        StoreError: it could not be written; what stood there stands there still.
        """
        check_place(store, overwrite)
        text = [name for name in LABELS if name in self.dataset.coords and self.dataset[name].dtype.kind in "OU"]
        labels = {name: [str(v) for v in self.dataset[name].values] for name in text}
        plain = self.dataset.drop_vars(list(labels)).assign_attrs(
            {**self.dataset.attrs, "question": self.question, "attrib_labels": labels}
        )
        save_dataset(plain, store, {"versions": {"attrib": version("attrib")}}, overwrite)


def grown(dataset: xr.Dataset) -> xr.DataArray:
    """(query, state): the norms of a sensitivity, each over that at the end."""
    norms = dataset["growth"]
    return (norms / norms.isel(state=-1)).rename("sensitivity")


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
