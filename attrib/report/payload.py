"""The numbers of the report page, small enough to open at once.

    timeline  (Q, F, groups)   change per fine bin of update steps       curve (Q, F + 1)
    layers    (Q, B, groups)   contributions of examples, of weight decay, of a remainder and of buffers per bin of steps
                               that windows are made of
    examples  (b, n) a query   contributions of the examples that stand in the page; b = B, or 1 where they were not kept
                               along the steps

Windows are runs of the B bins. The n examples of a query are all, or those that are among the `RANKS` largest or smallest of
*some* window: the tables then rank rightly in every window that can be chosen. B is halved until that fits.
"""

from base64 import b64encode
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from tqdm import tqdm

from ..ledger import said
from ..optim import describe_options
from ..result import Result
from .shown import Describe, Shown, show, tagged
from .thin import Bins, bin_steps, by_tag, fold_groups

RANKS = 10  # rows of the tables of largest and of smallest contributions
FINE = 512  # bins of the timeline, at most
WINDOWS = 128  # bins that windows are made of, at most
NUMBERS = 600_000  # contributions of examples in the page, all queries together
SUMS = 200_000  # numbers of the timeline, and of the groups' bars, all queries together
IMAGES = 1 << 20  # bytes of pictures in the page
TEXTS = 1 << 20  # letters that describe examples
RANKED = 40_000_000  # sums of windows that are ranked for a query: a second's work
SERIES, BARS = 8, 24  # groups in the timeline and in the bars


class Chosen(NamedTuple):
    """bins of the table; per query: positions of the chosen examples (n,), their sums (b, n), those of the others (b,)."""

    bins: Bins
    queries: list[tuple[np.ndarray, np.ndarray, np.ndarray]]


def payload(
    result: Result, describe: Describe | None, describe_query: Describe | None, tag: Describe | None, progress: bool
) -> dict[str, Any]:
    """Everything the page shows, as JSON; arrays are float32 in base64, ids are strings, for JavaScript rounds numbers."""
    dataset, ledger = result.dataset, result.ledger()
    first = int(dataset["step"].values[0])
    changes = fold_groups(result.timeline(), SERIES)
    fine = bin_steps(dataset.sizes["step"], min(FINE, SUMS // (changes.sizes["query"] * changes.sizes["group"])))
    table = _table(result, fine, progress)
    by_steps = result.has("step", "example")
    bins = table.bins if by_steps else fine.merged(_windows(result))
    notices = _notices(result, fine, bins, table)
    shown, omitted = _descriptions(dataset["example"].values, table, describe)
    if omitted:
        notices.append(f"{omitted} examples are shown without their picture or text, for the size of this file.")
    return {
        "measurement": dataset.attrs.get("measurement", "measurement"),
        "units": result.units,
        "facts": _facts(result),
        "notices": notices,
        "identities": ledger.identities,
        "sizes": {said(name): size for name, size in ledger.sizes.items()},
        "queries": _queries(result, describe_query, tag),
        "edges": (fine.edges + first).tolist(),
        "windows": np.searchsorted(fine.edges, bins.edges).tolist(),  # where among the edges
        "timeline": _floats(fine.sum(changes.values, 1)),
        "timeline_groups": [str(g) for g in changes["group"].values],
        "curve": _floats(result.curve.values[:, fine.edges]),
        "layers": _layers(result, bins),
        "ranks": RANKS,
        "by_steps": by_steps,
        "tables": [
            {"ids": [str(e) for e in dataset["example"].values[at].tolist()], "values": _floats(values),
             "others": _floats(others), "left": dataset.sizes["example"] - len(at)} for at, values, others in table.queries
        ],
        "shown": shown,
    }  # fmt: skip


# examples


def _table(result: Result, fine: Bins, progress: bool) -> Chosen:
    """The finest bins for which the examples fit."""
    queries, count = result.dataset.sizes["query"], result.dataset.sizes["example"]
    if not result.has("step", "example"):
        return _coarsen(fine.merged(1), [v[None] for v in result.by("example").values])
    bins = fine.merged(min(_windows(result), int((2 * RANKED / count) ** 0.5)))
    sums = []
    for q in tqdm(range(queries), desc="report", unit="query", delay=2, disable=not progress):
        values = result.select([q]).by("step", "example").values[0]
        sums.append(bins.sum(values, 0))  # (B, N)
    return _coarsen(bins, sums)


def _coarsen(bins: Bins, sums: list[np.ndarray]) -> Chosen:
    """Half as many bins, until the examples of all queries fit."""
    room = NUMBERS // len(sums)
    while True:
        chosen = []
        for values in sums:
            chosen.append(_in_some_window(values, room // bins.count))
            if chosen[-1] is None:
                break
        else:
            break
        bins = Bins(bins.steps, 2 * bins.width)
        sums = [np.add.reduceat(v, np.arange(0, len(v), 2), 0) for v in sums]
    found = zip([c for c in chosen if c is not None], sums, strict=True)
    return Chosen(bins, [(at, values[:, at], values.sum(1) - values[:, at].sum(1)) for at, values in found])


def _in_some_window(values: np.ndarray, most: int) -> np.ndarray | None:
    """(b, N) -> (n,) positions of the examples that some run of bins ranks among its RANKS largest or smallest; all, if
    they are no more than `most`; None if it would be more. Of one bin they are never too many."""
    bins, count = values.shape
    if count <= (max(most, 2 * RANKS) if bins > 1 else 2 * RANKS):
        return np.arange(count)
    running = np.concatenate([np.zeros((1, count)), np.cumsum(values, 0)])
    member = np.zeros(count, dtype=bool)
    for start in range(bins):
        sums = running[start + 1 :] - running[start]
        ranked = np.argpartition(sums, (RANKS, count - RANKS - 1), axis=1)
        member[ranked[:, :RANKS]] = member[ranked[:, -RANKS:]] = True
        if member.sum() > most and bins > 1:
            return None
    return np.flatnonzero(member)


def _descriptions(ids: np.ndarray, table: Chosen, describe: Describe | None) -> tuple[dict[str, Shown], int]:
    """id -> what is shown, the most important examples first, and how many are left out or lack their picture."""
    size: dict[int, float] = {}
    for at, values, _ in table.queries:
        for e, v in zip(at, np.abs(values).sum(0), strict=True):
            size[int(e)] = max(size.get(int(e), 0.0), float(v))
    shown: dict[str, Shown] = {}
    images, letters, omitted = IMAGES, TEXTS, 0
    order = sorted(size, key=lambda e: -size[e]) if describe is not None else []
    for n, e in enumerate(order):
        (example,) = ids[[e]].tolist()
        found = show(describe, example)
        images, letters = images - len(found.image), letters - len(found.text)
        if letters < 0:
            return shown, omitted + len(order) - n
        if found.image and images < 0:
            found, omitted = found._replace(image=""), omitted + 1
        shown[str(example)] = found
    return shown, omitted


# steps and groups


def _windows(result: Result) -> int:
    """How many bins windows may be made of, so that the groups' bars fit."""
    sizes, rows = result.dataset.sizes, 2 + sum(name in result.dataset for name in ("remainder", "buffers"))
    return max(1, min(WINDOWS, SUMS // (rows * sizes["query"] * min(BARS, sizes["group"]))))


def _layers(result: Result, bins: Bins) -> dict[str, Any] | None:
    """What the examples' gradients, weight decay, a remainder and buffers contributed in each bin, per group; None where it
    was not kept."""
    if not result.has("step", "group"):
        return None
    rows = {"train examples": result.by("step", "group"), "weight decay": result.decay}
    if "remainder" in result.dataset:
        rows["remainder"] = result.remainder
    if "buffers" in result.dataset:  # which stand on both clocks
        rows["buffers"] = result.buffers
    size = np.sum([np.abs(values.values).sum((0, 1)) for values in rows.values()], 0)
    folded = {name: fold_groups(values, BARS, size) for name, values in rows.items()}
    return {
        "groups": [str(g) for g in folded["train examples"]["group"].values],
        "rows": [{"name": name, "values": _floats(bins.sum(values.values, 1))} for name, values in folded.items()],
    }


# facts


def _queries(result: Result, describe_query: Describe | None, tag: Describe | None) -> list[dict[str, Any]]:
    terms, ids = result.ledger().to_pandas(), result.dataset["example"].values
    tags = None if tag is None else tagged(tag, ids)
    found = []
    for q, (name, number) in enumerate(zip(result.names, result.dataset["query"].values, strict=True)):
        sums = [] if tags is None else by_tag(result.select([q]).by("example").values[0], tags)
        shown = show(describe_query, int(number))
        named = {said(term): value for term, value in terms.iloc[q].to_dict().items()}
        found.append({"name": name, "shown": shown, "terms": named, "tags": sums})
    return found


def _facts(result: Result) -> list[tuple[str, str]]:
    attrs, sizes = result.dataset.attrs, result.dataset.sizes
    first, last = attrs.get("window", (0, sizes["step"]))
    versions = ", ".join(f"{name} {v}" for name, v in attrs.get("versions", {}).items())
    rows = {
        "model": f"{attrs.get('model', '')}, {attrs.get('parameters', '?')} parameters, {sizes['group']} groups",
        "optimizer": attrs.get("optimizer", "") + describe_options(attrs.get("options", {})),
        "data": f"{sizes['example']} train examples, at most {attrs.get('batch', '?')} a step",
        "steps": f"{first} to {last} ({last - first})",
        "measured model": attrs.get("average", ""),
        "path": attrs.get("path", ""),
        "computed in": attrs.get("dtype", ""),
        "capture": attrs.get("capture", ""),
        "shares": f"by {attrs['shares']}: {attrs['share']}" if "share" in attrs else "",
        "run": attrs.get("run", ""),
        "recorded": attrs.get("recorded", ""),
        "written with": versions,
    }
    return [(name, str(value)) for name, value in rows.items() if value]


def _notices(result: Result, fine: Bins, bins: Bins, table: Chosen) -> list[str]:
    found, sizes = [], result.dataset.sizes
    if fine.width > 1:
        found.append(f"The timeline shows {fine.steps} steps in bins of {fine.width}; the last may be shorter.")
    if bins.width > 1:
        found.append(f"Windows are made of bins of {bins.width} steps.")
    if not result.has("step", "example"):
        found.append(
            "Contributions of examples were not kept along the steps: their table is of all steps, whatever the window. "
            'Attribute again with keep=[("step", "example"), ("step", "group")] for tables of windows.'
        )
    fewest = min(len(at) for at, _, _ in table.queries)
    if fewest < sizes["example"]:
        found.append(
            f"Of {sizes['example']} train examples at least {fewest} a query stand in this file: all that are among the "
            f"{RANKS} largest or smallest of some window. The others are one line."
        )
    for most, where in ((SERIES, "timeline"), (BARS, "bars")):
        if sizes["group"] > most:
            found.append(
                f"{sizes['group']} groups: in the {where}, {most - 1} that move most are apart, the others are one."
            )
    return found


def _floats(values: np.ndarray | Iterable[float] | xr.DataArray) -> dict[str, Any]:
    array = np.ascontiguousarray(values, dtype="<f4")
    return {"shape": list(array.shape), "float32": b64encode(array.tobytes()).decode()}
