"""The numbers of the report page, small enough to open at once.

    timeline  (Q, F, groups)   change per fine bin of steps              trace (Q, F + 1)
    layers    (Q, B, groups)   what is said of examples, and of what is no example's, per bin of the steps that
                               windows are made of; `tree`, of every group, (Q, b, G)
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

from ..errors import KeptAxesError
from ..ledger import said, terms_of
from ..optim import describe_options
from ..result import Difference, Labelled
from .beside import Beside, beside, changes_of, matched
from .shown import LETTERS, Describe, Shown, show, tagged
from .thin import Bins, bin_steps, by_tag, fold_groups
from .words import TOKENS, words_of

RANKS = 10  # rows of the tables of largest and of smallest contributions
FINE = 512  # bins of the timeline, at most
WINDOWS = 128  # bins that windows are made of, at most
NUMBERS = 600_000  # contributions of examples in the page, all queries together
SUMS = 200_000  # numbers of the timeline, of the groups' bars, and of their tree, all queries together
IMAGES = 1 << 20  # bytes of pictures in the page
TEXTS = 1 << 20  # letters that describe examples; of each, and of each query:
LONG = 4000  # at most, where that many fit
RANKED = 40_000_000  # sums of windows that are ranked for a query: a second's work
SERIES, BARS = 8, 24  # groups in the timeline and in the bars


class Chosen(NamedTuple):
    """bins of the table; per query: positions of the chosen examples (n,), their sums (b, n), those of the others (b,)."""

    bins: Bins
    queries: list[tuple[np.ndarray, np.ndarray, np.ndarray]]


def payload(
    result: Labelled,
    describe: Describe | None,
    describe_query: Describe | None,
    tag: Describe | None,
    progress: bool,
    difference: Difference | None = None,
) -> dict[str, Any]:
    """Everything the page shows, as JSON; arrays are float32 in base64, ids are strings, for JavaScript rounds numbers."""
    dataset, first = result.dataset, int(result.dataset["step"].values[0])
    really = [] if difference is None else beside(result, matched(result, difference))
    changes = _timeline(result)
    series = changes.sizes["query"] * max(1, changes.sizes["group"])
    fine = bin_steps(dataset.sizes["step"], min(FINE, SUMS // series))
    table = _table(result, fine, progress)
    by_steps = result.has("step", "example")
    bins = table.bins if by_steps else fine.merged(_windows(result))
    notices = _notices(result, fine, bins, table)
    ids = dataset["example"].values
    tags, size = None if tag is None else tagged(tag, ids), _sizes(ids, table, really)
    shown, omitted = _descriptions(size, describe)
    if omitted:
        notices.append(f"{omitted} examples are shown without their picture or text, for the size of this file.")
    return {
        "measurement": dataset.attrs.get("measurement", "measurement"),
        "units": result.units,
        "measured_units": result.measured_units,
        "words": words_of(result)._asdict(),
        "facts": _facts(result),
        "notices": notices,
        "identities": result.ledger().identities,
        "queries": _queries(result, describe_query, tags),
        "tokens": dataset.attrs.get("measurement") == TOKENS,  # a query is a token of a text
        "edges": (fine.edges + first).tolist(),
        "windows": np.searchsorted(fine.edges, bins.edges).tolist(),  # where among the edges
        "timeline": _floats(fine.sum(changes.values, 1)),
        "timeline_groups": [str(g) for g in changes["group"].values],
        "trace": {"values": _floats(result.trace.values[:, fine.edges]), "logarithmic": result.trace.name == "sensitivity"},
        "layers": _layers(result, bins),
        "ranks": RANKS,
        "by_steps": by_steps,
        "tables": [
            {"ids": [str(e) for e in ids[at].tolist()], "values": _floats(values),
             "others": _floats(others), "left": dataset.sizes["example"] - len(at)} for at, values, others in table.queries
        ],
        "shown": shown,
        "tags": {str(e): t for e, t in zip(ids.tolist(), tags or (), strict=False) if e in size},
        "really": [{**each._asdict(), "ids": [str(e) for e in each.ids], "terms": each.terms.tolist()} for each in really],
    }  # fmt: skip


# examples


def _table(result: Labelled, fine: Bins, progress: bool) -> Chosen:
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


def _sizes(ids: np.ndarray, table: Chosen, really: list[Beside]) -> dict[Any, float]:
    """Id -> how much it counts, of those that stand in the page."""
    size: dict[Any, float] = {}
    seen = [(ids[at].tolist(), np.abs(values).sum(0)) for at, values, _ in table.queries]
    seen += [(each.ids[: 2 * RANKS], np.abs(each.terms[: 2 * RANKS])) for each in really]
    for examples, sums in seen:
        for e, v in zip(examples, sums.tolist(), strict=True):
            size[e] = max(size.get(e, 0.0), v)
    return size


def _descriptions(size: dict[Any, float], describe: Describe | None) -> tuple[dict[str, Shown], int]:
    """id -> what is shown, the most important examples first, and how many are left out or lack their picture."""
    shown: dict[str, Shown] = {}
    images, letters, omitted, each = IMAGES, TEXTS, 0, _letters(len(size))
    order = sorted(size, key=lambda e: -size[e]) if describe is not None else []
    for n, e in enumerate(order):
        found = show(describe, e, each)
        images, letters = images - len(found.image), letters - len(found.text)
        if letters < 0:
            return shown, omitted + len(order) - n
        if found.image and images < 0:
            found, omitted = found._replace(image=""), omitted + 1
        shown[str(e)] = found
    return shown, omitted


def _letters(count: int) -> int:
    """How many letters of a text, so that `count` of them fit."""
    return max(LETTERS, min(LONG, TEXTS // max(1, count)))


# steps and groups


def _timeline(result: Labelled) -> xr.DataArray:
    """(Q, T, groups): no groups where it was not kept along steps and groups."""
    try:
        return fold_groups(result.timeline(), SERIES)
    except KeptAxesError:
        sizes = result.dataset.sizes
        empty = np.zeros((sizes["query"], sizes["step"], 0))
        return xr.DataArray(empty, {"group": np.array([], dtype=str)}, ("query", "step", "group"))


def _rows(result: Labelled) -> dict[str, xr.DataArray]:
    """(Q, T, groups) each: what is no example's, on the clock of the examples or, buffers, on both."""
    rows = {name: result.dataset[name] for name in terms_of(result.dataset) if result.dataset[name].ndim == 3}
    return {
        "weight decay" if name == "decay" else name: row for name, row in rows.items() if name != "update_remainder"
    }


def _windows(result: Labelled) -> int:
    """How many bins windows may be made of, so that the groups' bars fit."""
    sizes, rows = result.dataset.sizes, 1 + len(_rows(result))
    return max(1, min(WINDOWS, SUMS // (rows * sizes["query"] * min(BARS, sizes["group"]))))


def _layers(result: Labelled, bins: Bins) -> dict[str, Any] | None:
    """What is said of the examples, and of what is no example's, in each bin, per group; None where it was not kept."""
    if not result.has("step", "group"):
        return None
    rows = {"train examples": result.by("step", "group"), **_rows(result)}
    size = np.sum([np.abs(values.values).sum((0, 1)) for values in rows.values()], 0)
    folded = {name: fold_groups(values, BARS, size) for name, values in rows.items()}
    return {
        "groups": [str(g) for g in folded["train examples"]["group"].values],
        "rows": [{"name": name, "values": _floats(bins.sum(values.values, 1))} for name, values in folded.items()],
        "tree": _tree(rows, bins),
    }


def _tree(rows: dict[str, xr.DataArray], bins: Bins) -> dict[str, Any]:
    """The same of every group, (Q, b, G); b = B, or 1 where that is too much: the sum of all steps."""
    first, *_ = rows.values()
    by_window = len(rows) * first.sizes["query"] * first.sizes["group"] * bins.count <= SUMS
    kept = bins if by_window else Bins(bins.steps, bins.steps)
    return {
        "groups": [str(g) for g in first["group"].values],
        "values": [_floats(kept.sum(values.values, 1)) for values in rows.values()],
        "by_window": by_window,
    }


# facts


def _queries(result: Labelled, describe_query: Describe | None, tags: list[str] | None) -> list[dict[str, Any]]:
    found, letters = [], _letters(result.dataset.sizes["query"])
    for q, (name, number) in enumerate(zip(result.names, result.dataset["query"].values, strict=True)):
        one, shown = result.select([q]), show(describe_query, int(number), letters)
        sums, ledger = [] if tags is None else by_tag(one.by("example").values[0], tags), one.ledger()
        terms = {said(term): value for term, value in ledger.to_pandas().iloc[0].to_dict().items()}
        sizes = {said(term): size for term, size in ledger.sizes.items()}
        found.append(
            {"name": name, "number": int(number), "shown": shown, "terms": terms, "tags": sums, "sizes": sizes,
             "warning": one.warning}
        )  # fmt: skip
    return found


def _facts(result: Labelled) -> list[tuple[str, str]]:
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
        "changed run": attrs.get("changed", ""),
        "done in it": changes_of(result) if isinstance(result, Difference) else "",
        "curvature": attrs.get("curvature", ""),
        "recorded": attrs.get("recorded", ""),
        "written with": versions,
    }
    return [(name, str(value)) for name, value in rows.items() if value]


def _notices(result: Labelled, fine: Bins, bins: Bins, table: Chosen) -> list[str]:
    found, sizes = [], result.dataset.sizes
    if fine.width > 1:
        found.append(f"The timeline shows {fine.steps} steps in bins of {fine.width}; the last may be shorter.")
    if bins.width > 1:
        found.append(f"Windows are made of bins of {bins.width} steps.")
    if not result.has("step", "example"):
        found.append(
            f"{result.word.capitalize()}s of examples were not kept along the steps: their table is of all steps, whatever "
            "the window. "
            'Attribute again with keep=[("step", "example"), ("step", "group")] for tables of windows.'
        )
    if not result.has("step", "group"):
        found.append(f"{result.word.capitalize()}s were not kept along steps and groups: groups are not shown apart.")
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
