"""Tables of what `bench_influence.py` wrote: the linear datamodelling score of every method, per setting and share left out.

    python scripts/influence_table.py influence-out                                  # as far as it is done
    python scripts/influence_table.py influence-out --page docs/influence_table.md   # the page
    python scripts/influence_table.py influence-out --short                          # a row per setting

A cell is the mean over queries and seeds of Spearman's correlation, over the retrainings of a seed, between what was
foretold and what came; and an interval of 95 % by resampling the retrainings. They are independent between seeds, so that
the halves of the seeds' intervals add as variances do.
"""

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from influence_settings import QUERIES, SETTINGS

import attrib

METHODS = {  # as they are called in the files -> in the tables, in their order
    "influence": "influence",
    "influence, Gauss-Newton": "influence, Gauss-Newton",
    "difference": "difference, to the run at weight .8",
    "accounting": "accounting",
    "TracIn, every step": "TracIn, every step",
    "captum TracInCP": "TracIn, 5 states (captum)",
    "traker TRAK": "TRAK, one model (traker)",
    "dattri TRAK": "TRAK, one model (dattri)",
    "kronfluence EK-FAC": "EK-FAC (kronfluence)",
    "gradient dot": "gradient dot",
    "train loss": "training loss",
    "random": "random",
}
SHORT = ("influence", "difference", "accounting", "captum TracInCP", "traker TRAK", "kronfluence EK-FAC", "gradient dot",
         "random")  # fmt: skip


HEAD = """# Which scores foretell what leaving examples out does

Networks are trained again without a share of their examples, drawn at random, many times; the scores of the examples that
went are summed, and held against what came of {queries} queries, log-probabilities of held-out data. A cell is Spearman's
correlation over the retrainings, its mean over queries and seeds, and an interval of 95 % by resampling the retrainings.
Queries and examples are the same in all seeds. "[2 x 30]": of 2 seeds and 30 retrainings only. CPU seconds are those of
all queries together, start-up included, the median over the seeds, on a machine that did other work too. A TRAK of several
models, and an EK-FAC of other dampings, may do better than those of one model and of the package's own choice.

Influence is a derivative at the run as it was; difference, here, the ledger of a run in which every example weighs .8;
accounting says what happened, not what would have, and is here to show that these are different questions.

Made by `scripts/influence_table.py` from the files of `scripts/bench_influence.py`. In float64 where nothing else is said,
packages of others in float32. Machine: {machines}."""

LIMITS = """The same parts of the examples, weighing less instead of being left out, the mean over all as before. Where the
weights go to 1, a correct derivative foretells all. What it misses further out is the curvature in the weights; and, under
Adam, jumps: its first steps are nearly the signs of the gradients, and a change of the weights flips some. No derivative
sees that, and a warm-up, which makes these steps small, does away with most of it."""


@dataclass(frozen=True)
class Held:
    """Scores against outcomes, of one seed."""

    mean: float
    half: float
    retrainings: int


@dataclass(frozen=True)
class Seed:
    """The folder of one."""

    folder: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "setting.json").read_text())
        return found

    @cached_property
    def outcomes(self) -> dict[tuple[float, float | None], attrib.Outcomes]:
        """(share, weight; None where left out) -> of the most retrainings that there are."""
        found: dict[tuple[float, float | None], attrib.Outcomes] = {}
        for place in self.folder.glob("outcomes-*.jsonl"):
            share, weight = re.fullmatch(r"outcomes-([\d.]+)-\d+(?:-weight([\d.]+))?", place.stem).groups()  # type: ignore[union-attr]
            key, opened = (float(share), None if weight is None else float(weight)), attrib.open_outcomes(place)
            if len(opened.values) > (len(found[key].values) if key in found else 2):
                found[key] = opened
        return found

    def scores(self, method: str) -> tuple[np.ndarray, float] | None:
        """(queries, examples), and the seconds of CPU; None where they are not there."""
        for folder in ("own", "scores"):
            place = self.folder / folder / f"{method}.npz"
            if place.exists():
                found = np.load(place)
                return found["scores"], float(found["seconds"])
        return None

    def held(self, scores: np.ndarray, share: float, weight: float | None = None) -> Held:
        outcomes = self.outcomes[share, weight]
        found = attrib.lds(scores, None, outcomes)
        return Held(
            float(found["mean"]), float(found["mean_high"] - found["mean_low"]) / 2, int(found.attrs["subsets"])
        )

    @property
    def derivatives(self) -> Any:
        """by (queries, examples), growth (queries,); None where they were not written."""
        place = self.folder / "influence-exact.npz"
        return np.load(place) if place.exists() else None


@dataclass(frozen=True)
class Results:
    """A setting, as far as it is done."""

    name: str
    seeds: list[Seed]

    @property
    def shares(self) -> list[float]:
        return sorted({share for seed in self.seeds for share, weight in seed.outcomes if weight is None})

    def held(self, method: str, share: float) -> list[Held]:
        """Of the seeds that have it."""
        found = ((seed, seed.scores(method)) for seed in self.seeds if (share, None) in seed.outcomes)
        return [seed.held(scores[0], share) for seed, scores in found if scores is not None]

    def weighed(self, share: float, weight: float | None) -> list[Held]:
        """Of the influence, where examples weigh less and the mean is over all as before; None: where they are left out. Of
        the seeds that were weighed."""
        seeds = [s for s in self.seeds if (share, weight) in s.outcomes and any(w is not None for _, w in s.outcomes)]
        if weight is None:
            return Results(self.name, seeds).held("influence", share)
        return [s.held(s.derivatives["by"], share, weight) for s in seeds if s.derivatives is not None]

    def seconds(self, method: str) -> float:
        return float(np.median([found[1] for seed in self.seeds if (found := seed.scores(method)) is not None]))

    @property
    def growth(self) -> float:
        """Of the sensitivity on its way back: of the median query, in the worst seed; NaN where it is not known."""
        found = [np.median(d["growth"]) for seed in self.seeds if (d := seed.derivatives) is not None]
        return float(max(found, default=np.nan))


def results(folder: Path) -> Iterator[Results]:
    for name in SETTINGS:
        places = sorted((folder / name.replace(" ", "-")).glob("seed*/setting.json"))
        seeds = [seed for place in places if (seed := Seed(place.parent)).outcomes and seed.scores("influence")]
        if seeds:
            yield Results(name, seeds)


def number(value: float) -> str:
    """.96, -.04, .00, 1.00"""
    rounded = f"{round(value, 2) + 0.0:.2f}"  # no -0.00
    return rounded.replace("0.", ".", 1)


def cell(seeds: list[Held], most: tuple[int, int] | None = None) -> str:
    """most: seeds and retrainings; where there are fewer, it is said."""
    if not seeds:
        return ""
    mean = float(np.mean([s.mean for s in seeds]))
    half = float(np.sqrt(np.sum([s.half**2 for s in seeds]))) / len(seeds)
    asked = len(seeds), min(s.retrainings for s in seeds)
    fewer = "" if most in (None, asked) else f" [{asked[0]} x {asked[1]}]"
    return f"{number(mean)} ({number(max(-1.0, mean - half))} to {number(min(1.0, mean + half))}){fewer}"


def rows(header: list[str], body: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body))


def section(found: Results) -> str:
    """The table of a setting."""
    shares = found.shares
    held = {method: [found.held(method, share) for share in shares] for method in METHODS}
    first = held["influence"]
    most = max(map(len, first)), max(s.retrainings for seeds in first for s in seeds)
    body = [
        [METHODS[method], *(cell(seeds, most) for seeds in each), f"{found.seconds(method):.2g}"]
        for method, each in held.items()
        if any(each)
    ]
    losses = np.mean([seed.facts["losses"] for seed in found.seeds], axis=0)
    by_seed = "; ".join(
        f"{share:.0%}: {' '.join(number(s.mean) for s in seeds)}" for share, seeds in zip(shares, first, strict=True)
    )
    grown = "" if np.isnan(found.growth) else f" On its way back the sensitivity grows {found.growth:.2g}-fold at most."
    says = SETTINGS[found.name].says
    return (
        f"{says[:1].upper()}{says[1:]}. {most[0]} seed{'s' * (most[0] > 1)}, {most[1]} retrainings each. "
        f"Loss at the end: {losses[0]:.2g} on what it was trained on, {losses[1]:.2g} on the queries.{grown}\n\n"
        + rows(["left out", *(f"{share:.0%}" for share in shares), "CPU s"], body)
        + f"\n\nInfluence, seed by seed: {by_seed}."
    )


def limits(found: list[Results]) -> str:
    """What keeps the influence from foretelling all: how far the examples' weights go."""
    weights = sorted({w for r in found for seed in r.seeds for _, w in seed.outcomes if w is not None}, reverse=True)
    body = [
        [r.name, *(cell(r.weighed(min(r.shares), weight)) for weight in (*weights, None))]
        for r in found
        if any(r.weighed(min(r.shares), weight) for weight in weights)
    ]
    if not body:
        return ""
    return "\n\n".join(
        [
            "## What limits the influence at the smallest share",
            LIMITS,
            rows(["setting", *(f"weight {w:g}" for w in weights), "left out"], body),
        ]
    )


def _mean(seeds: list[Held], asked: int) -> str:
    fewer = "" if len(seeds) == asked else f" [{len(seeds)}]"
    return number(float(np.mean([s.mean for s in seeds]))) + fewer


def short(found: list[Results], shares: tuple[float, ...] = (0.01, 0.2)) -> str:
    """A row per setting and its seeds: at each share. In brackets the seeds where there are fewer."""
    header = [
        f"left out {'; '.join(f'{s:.0%}' for s in shares)}",
        *(METHODS[m].split(",")[0] if "(" not in METHODS[m] else METHODS[m] for m in SHORT),
    ]
    body = []
    for r in found:
        held = {m: [r.held(m, s) for s in shares] for m in SHORT}
        means = {m: "; ".join(_mean(h, len(r.seeds)) for h in each if h) for m, each in held.items()}
        means["influence"] = "; ".join(cell(h) for h in held["influence"] if h)
        body.append([f"{r.name} ({len(r.seeds)})", *means.values()])
    return rows(header, body)


def page(found: list[Results]) -> str:
    machines = sorted({seed.facts["machine"] for r in found for seed in r.seeds})
    head = HEAD.format(queries=QUERIES, machines="; ".join(machines))
    left = [name for name in SETTINGS if name not in [r.name for r in found]]
    if left:
        head += f" Not run yet: {', '.join(left)}."
    parts = [head, *(f"## {r.name}\n\n{section(r)}" for r in found), limits(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def printed(folder: Path, name: str) -> str:
    """The table of one setting, for the terminal."""
    return "\n".join(f"{r.name}: {section(r)}" for r in results(folder) if r.name == name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--page", type=Path, help="write the page there")
    parser.add_argument("--short", action="store_true", help="a row per setting")
    options = parser.parse_args()
    found = list(results(options.folder))
    if options.page:
        options.page.write_text(page(found))
    else:
        print(short(found) if options.short else page(found))


if __name__ == "__main__":
    main()
