"""The account of a sweep: what is kept of the contributions of every step, and the labelled dataset that it ends in."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr

from .accounting import relative
from .gradients import random_weights
from .layout import grouped
from .ledger import TERMS, share_said
from .marginals import Axes, Slots
from .parts import PREFIX
from .result import IDENTITIES
from .run import Run
from .sensitivity import Terms
from .shares import ROUNDED, Contributions, Shares, Split, drawn
from .steps import RecordedStep
from .tally import Tally

log = logging.getLogger("attrib")

LITTLE = 1e3  # eps of what gradients are in the mean: of a gradient above it there is more than rounding
ASIDE = "rounding alone"  # how tensors that are set aside are called together
UPDATES = ("update_remainder", "buffers")  # rows that stand on the step that moved the parameters


def share_bound(recorded: torch.dtype, computed: torch.dtype) -> float:
    """What rounding of shares may be, relative to their size: in the coarser of the two types."""
    return float(max(torch.finfo(recorded).eps, torch.finfo(computed).eps) ** 0.5)


def rounding_alone(run: Run, shares: Shares, window: range) -> np.ndarray | None:
    """(K,): the tensors whose gradient is rounding alone, of every example, at each of a few steps; None where there are
    none. Such is a bias before batch normalisation, where losses depend on each other; an optimizer may divide it by as
    little, and a measurement see it."""
    if not run.header["settled"].get("coupled") or shares.definition == "rows" or not shares.has_loss:
        return None
    eps, parts = float(torch.finfo(run.precision).eps), [part for _, part in run.layout.slices()]
    alone, moved = np.ones(len(parts), bool), np.zeros(len(parts), bool)
    for number in sorted(drawn(window)):
        ((step,),) = run.blocks(number, number + 1)
        squares = np.array([float(step.examples[part].double().square().mean()) for part in parts])
        usual = float(step.examples.double().square().mean())
        alone, moved = alone & (squares <= (LITTLE * eps) ** 2 * usual), moved | (squares > 0)
        if not (alone & moved).any():
            return None
        for n, recorded in enumerate(step.passes):
            plain, change = shares.rounding(step, n, random_weights(recorded.size, number, step.theta))
            within = [float(plain[part].square().sum()) <= ROUNDED**2 * float(change[part].sum()) for part in parts]
            alone &= np.array(within)
    if not (alone & moved).any():
        return None
    names = [name for name, aside in zip(run.groups, alone & moved, strict=True) if aside]
    log.info("gradients that are rounding alone are no example's, and a row of the ledger (remainder): %s", names)
    return alone & moved


def apart(member: np.ndarray, aside: np.ndarray) -> np.ndarray:
    """(K, G), which tensors make a group, and (K,): with those set aside in a group of their own, the last; (K, G + 1)."""
    return np.column_stack([np.where(aside[:, None], 0, member), aside]).astype(member.dtype)


class Losses(NamedTuple):
    """mean (T,): of each step as recorded, NaN where it was not checked. bound: what rounding may make of the largest.

    Where gradients may hold anything beyond the shares, a wrong loss or a wrong model would be part of that, unseen.
    """

    mean: np.ndarray
    bound: float

    def failure(self, step: int, now: float | None) -> dict[str, str]:
        """What is wrong with the mean loss of a step as it is computed now; nothing where there is none to compare with."""
        recorded = float(self.mean[step])
        if now is None or np.isnan(recorded) or abs(now - recorded) <= self.bound * np.nanmax(np.abs(self.mean)):
            return {}
        sentence = (
            f"the losses are not those that were recorded: got a mean of {now:.6g}, expected {recorded:.6g}, at step "
            f"{step}. Pass the loss that was given to attrib.record, and the model that was trained."
        )
        return {"loss": sentence}


@dataclass(frozen=True)
class Account:
    """What is kept.

    labels: the G groups. member (K, G): which tensors make a group. kept: the axes of the marginals. slots: whether the
    contributions are kept one by one. bound: what rounding of the shares may be, relative to their size. remainder: how
    large what the recorded gradient holds beyond the shares may be, relative to them, as a row of its own: of what passes
    round, or inf, where it may be anything and there is no gap to be had; None for no row. losses: those that were
    recorded, to hold those of now against. aside (K,): tensors whose gradient is no example's, and so in that row; None for
    none.
    """

    labels: tuple[str, ...]
    member: np.ndarray
    kept: tuple[Axes, ...]
    slots: bool
    bound: float
    remainder: float | None = None
    losses: Losses | None = None
    aside: np.ndarray | None = None

    def grouped(self, values: np.ndarray) -> np.ndarray:
        """(..., K) -> (..., G)."""
        return grouped(values, self.member)

    def tallies(
        self,
        steps: Sequence[RecordedStep],
        contributed: Sequence[Contributions],
        gradient: np.ndarray,
        terms: Terms,
        splits: Mapping[int, Split],
    ) -> list[Tally]:
        """Of n consecutive steps: their contributions (Q, B, K), which must sum to `gradient` (n, Q, K), group by group;
        what is no example's; and of some the split. A tally each, the last first."""
        rows = {name: (values @ self.member).swapaxes(0, 1) for name, values in terms.rows.items()}
        slots: Slots | None = None
        tallies = []
        for n in reversed(range(len(steps))):
            step, contributions = steps[n], self.grouped(self._examples(contributed[n].values))
            if slots is None or not np.array_equal(slots.ids, step.ids):
                slots = Slots(step.ids)
            shares = contributions.sum(1)
            whole = self.grouped(self._examples(gradient[n]))
            remainder = self.grouped(gradient[n]) - (whole if self.remainder is None else shares)
            sums = {"examples": shares.sum(1), "gross": (np.abs(shares) + np.abs(remainder)).sum(1)}
            sizes = sums["sizes"] = np.array([np.abs(c).sum() for c in contributions])
            sums |= {name: values[n] + sums.get(name, 0.0) for name, values in terms.sums.items()}
            accounted = self.remainder is not None or self.aside is not None
            left = {"remainder": remainder[:, None]} if accounted else {}
            gap = np.nan if self.remainder == np.inf else self._gap(sizes, shares, whole, terms.seen_at(n))
            split = splits.get(step.number)
            gaps = dict.fromkeys(IDENTITIES, np.array([np.nan])) | {
                name: g[n : n + 1] for name, g in terms.gaps.items()
            }
            gaps |= {"batch": np.array([gap]), "split": np.array([np.nan if split is None else split.gap])}
            tally = Tally(
                steps=range(step.number, step.number + 1),
                examples=slots.examples,
                marginals=slots.sums(self.kept, contributions),
                rows={name: values[:, n : n + 1] for name, values in rows.items()} | left,
                states={name: np.stack([a[n], b[n]], 1) for name, (a, b) in terms.states.items()},
                sums=sums,
                gaps=gaps,
                failures={**terms.failures, **self._failures(step, contributed[n], gap, split)},
                slots=((step.ids, contributions),) if self.slots else (),
            )
            tallies.append(tally)
        return tallies

    def _examples(self, values: np.ndarray) -> np.ndarray:
        """(..., K): what of them is the examples'."""
        return values if self.aside is None else np.where(self.aside, 0.0, values)

    def _gap(self, sizes: np.ndarray, shares: np.ndarray, gradient: np.ndarray, seen: np.ndarray | float) -> float:
        """Of the batch identity. Of what is smaller than rounding of the measurement, `seen` (Q,), as it is where nothing is
        left to learn, the gap is that of rounding."""
        return float(relative(np.abs(shares - gradient).max(1), np.maximum(sizes, self.bound * seen)))

    def _failures(
        self, step: RecordedStep, contributed: Contributions, gap: float, split: Split | None
    ) -> dict[str, str]:
        found = {} if self.losses is None else self.losses.failure(step.number, contributed.loss)
        if self.remainder is not None and gap > self.remainder:  # in its row it would pass
            found["batch"] = (
                f"the shares miss the recorded gradient by more than rounding: got a gap of {gap:.3g} of their size, "
                f"expected at most {self.remainder:.1g}, at step {step.number}. Pass the loss that was given to "
                f"attrib.record, and the model that was trained."
            )
        if split is None or split.group is None:
            return found
        group = [*self.labels, ASIDE][split.group]
        sentence = (
            f"shares are not those of their own examples: got a gap of {split.gap:.3g} of their size, expected at most "
            f"{split.bound:.1g}, at step {step.number}, example {split.example!r}, group {group!r}. "
            f"Does the loss draw random numbers outside of model(...), keep something from call to call, or let examples "
            f"see each other in some batches only?"
        )
        return {**found, "split": sentence}

    def dataset(self, tally: Tally, inherited: np.ndarray, facts: Mapping[str, Any]) -> xr.Dataset:
        """Of a whole tally, and inherited (Q, K)."""
        curve, inherited = tally.states["curve"], inherited @ self.member
        initial, final = curve[:, 0], curve[:, -1]
        rows = {name: tally.rows[name] for name in TERMS if name in tally.rows}
        explained = tally.sums["examples"] + inherited.sum(1) + sum(row.sum((1, 2)) for row in rows.values())
        variables: dict[str, Any] = {
            "initial": (("query",), initial),
            "final": (("query",), final),
            "residual": (("query",), final - initial - explained),
            "rounding": (("query",), tally.sums["rounding"]),
            "spacing": (("query",), tally.sums["spacing"]),
            "sizes": (("query",), tally.sums["sizes"]),
            "gross": (("query",), tally.sums["gross"] + np.abs(inherited).sum(1)),
            **{name: (("query", "update_step" if name in UPDATES else "step", "group"), a) for name, a in rows.items()},
            "inherited": (("query", "group"), inherited),
            "timeline": (("query", "update_step", "group"), tally.rows["timeline"]),
            "curve": (("query", "state"), curve),
            **{f"{name}_identity": (("step",), gaps) for name, gaps in tally.gaps.items()},
            **{"_".join((PREFIX, *axes)): (("query", *axes), a) for axes, a in tally.marginals.items()},
        }
        first, stop = tally.steps.start, tally.steps.stop
        coordinates = {
            "query": np.arange(len(curve)),
            "step": np.arange(first, stop),
            "update_step": np.arange(first, stop),
            "state": np.arange(first, stop + 1),
            "example": tally.examples,
            "group": list(self.labels),
        }
        failures = {f"{name}_failure": sentence for name, sentence in tally.failures.items()}
        facts = {**facts, "share": share_said(facts["shares"], tally.coupled), **failures, "window": [first, stop]}
        return xr.Dataset(variables, coordinates, facts)
