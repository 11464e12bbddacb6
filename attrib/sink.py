"""Where the terms of a sweep go: kept marginals, timeline, decay, the gap of each identity, and on request the cube."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr

from .marginals import Marginals, Places
from .path import Limit, limit_bound
from .result import PREFIX
from .run import Run
from .source import Split
from .store import CubeWriter

log = logging.getLogger("attrib")


@dataclass(frozen=True)
class Terms:
    """Everything that n steps add: of each the contributions (Q, B, K); the other sums (n, Q, K); (n, Q): the measurement
    at both ends, and sum_p |Gbar_p theta_p|, which times eps bounds what rounding of the stored parameters can do."""

    contributions: list[np.ndarray]
    decay: np.ndarray
    moved: np.ndarray
    replayed: np.ndarray
    gradient: np.ndarray
    start: np.ndarray
    end: np.ndarray
    leverage: np.ndarray


class Sink:
    """Sums tensors into groups, keeps the marginals and the identities of each step, and makes the dataset."""

    def __init__(
        self,
        run: Run,
        start: int,
        labels: tuple[str, ...],
        member: np.ndarray,
        sizes: dict[str, int],
        kept: list[tuple[str, ...]],
        cube: Any,
        compute: torch.dtype,
        queries: int,
    ) -> None:
        self.run, self.first, self.labels, self.member = run, start, labels, member
        steps, groups = sizes["step"], sizes["group"]
        self.marginals = Marginals(kept, queries, sizes)
        self.decay = np.zeros((queries, steps, groups))
        self.timeline = np.zeros((queries, steps, groups))
        self.curve = np.full((queries, steps + 1), np.nan)
        self.inherited = np.zeros((queries, groups))
        self.examples = np.zeros(queries)
        self.gross = np.zeros(queries)
        self.rounding = np.zeros(queries)
        self.spacing = np.zeros(queries)
        self._eps = torch.finfo(run.dtype).eps
        self._bound = max(self._eps, torch.finfo(compute).eps) ** 0.5  # on the shares, computed in `compute`
        self._warned = False
        self._places: Places | None = None
        self.gaps = {name: np.zeros(steps) for name in ("batch", "step", "measurement")}
        self.gaps |= {name: np.full(steps, np.nan) for name in ("split", "limit")}
        self.failures: dict[str, str] = {}  # of an identity, in a sentence
        self._recorded = run.log("split_identity") if run.capture != "replay" else None
        self._cube = None if cube is None else CubeWriter(cube, start, queries, steps, labels)

    def add(self, first: int, index: list[np.ndarray], t: Terms) -> None:
        """The terms of the steps from `first` on; `index`: of each the ids of its examples, (B,)."""
        at = slice(first - self.first, first - self.first + len(index))
        for n in reversed(range(len(index))):
            seen = np.abs(t.start[n]) + np.abs(t.end[n])
            self._add_examples(at.start + n, index[n], t.contributions[n], t.gradient[n], self._bound * seen)
        self.decay[:, at] = (t.decay @ self.member).swapaxes(0, 1)
        self.timeline[:, at] = (t.moved @ self.member).swapaxes(0, 1)
        self.curve[:, at], self.curve[:, at.start + 1 : at.stop + 1] = t.start.T, t.end.T
        # each gap relative to the gross size of what is summed, so that cancellation does not blow it up
        self.gross += np.abs(t.decay).sum((0, 2))
        self.rounding += (t.moved - t.replayed).sum((0, 2))
        self.spacing += self._eps * t.leverage.sum(0)
        moved = np.abs(t.moved).sum(2)
        self.gaps["step"][at] = _gap(
            np.abs(t.moved - t.replayed).max(2), np.maximum(moved, self._eps**0.5 * t.leverage)
        )
        gross = moved + np.abs(t.start) + np.abs(t.end)
        self.gaps["measurement"][at] = _gap(np.abs(t.moved.sum(2) - (t.end - t.start)), gross)

    def _add_examples(
        self, n: int, index: np.ndarray, contributions: np.ndarray, gradient: np.ndarray, least: np.ndarray
    ) -> None:
        """One step: (B,) ids, (Q, B, K), and <U, gradient> (Q, K), which contributions must sum to, group by group; least
        (Q,): of what is smaller, as it is where nothing is left to learn, the gap is that of rounding."""
        if self._places is None or not np.array_equal(self._places.ids, index):
            self._places = Places(self.run.examples, index)
        if len(self.labels) < len(self.member):
            contributions, gradient = contributions @ self.member, gradient @ self.member
        shares = contributions.sum(1)
        self.gross += np.abs(shares).sum(1)
        sizes = np.array([np.abs(c).sum() for c in contributions])
        self.gaps["batch"][n] = _gap(np.abs(shares - gradient).max(1), np.maximum(sizes, least))
        self._warn(self.first + n, self.gaps["batch"][n])
        self.examples += shares.sum(1)
        self.marginals.add(n, self._places, contributions)
        if self._cube is not None:
            self._cube.put(n, index, contributions)

    def add_split(self, step: int, index: np.ndarray, split: Split | None) -> None:
        """The gap of a drawn step; without a loss, what was recorded with it."""
        if split is None:
            if self._recorded is not None:
                known = slice(self.first, self.first + len(self.gaps["split"]))
                self.gaps["split"] = self._recorded[known].copy()
            return
        self.gaps["split"][step - self.first] = split.gap
        if split.slot is not None and split.group is not None:
            self._fail(
                "split",
                f"shares are not those of their own examples: got a gap of {split.gap:.3g} of their size, expected at most "
                f"{self._bound:.1g}, at step {step}, example {index[split.slot]}, group {self.labels[split.group]!r}. Does "
                f"the loss draw random numbers outside of model(...), keep something from call to call, or let examples see "
                f"each other in some batches only?",
            )

    def add_limit(self, limit: Limit, dtype: torch.dtype) -> None:
        """The gap at the start of the sweep, in the last step of the window."""
        self.gaps["limit"][-1] = limit.gap
        if limit.tensor is not None:
            self._fail(
                "limit",
                f"the path does not tend to the gradient of the measurement: got a gap of {limit.gap:.3g}, expected "
                f"at most {limit_bound(dtype):.1g}, at query {limit.query}, parameter {limit.tensor!r}. An operation of the "
                f"measurement has a wrong derivative under this path: try another, such as "
                f"path=attrib.GaussLegendre(nodes=4).",
            )

    def _fail(self, name: str, sentence: str) -> None:
        if name not in self.failures:
            self.failures[name] = sentence
            log.warning("the %s identity fails: %s", name, sentence)

    def _warn(self, step: int, gap: float) -> None:
        if gap > self._bound and not self._warned:
            self._warned = True
            log.warning(
                "the shares miss the recorded gradient by %.2g of their size at step %d: the model or the loss is not the "
                "one that was recorded, or the loss holds a small penalty that is no example's",
                *(gap, step),
            )

    def close(self, inherited: np.ndarray, complete: bool = True) -> None:
        """After the last step; inherited (Q, K)."""
        self.inherited = inherited @ self.member
        if self._cube is not None:
            self._cube.close(complete)

    def dataset(self, facts: dict[str, Any], reached: int) -> xr.Dataset:
        """The steps from `reached` on, which must be those that were added."""
        queries, steps, _ = self.decay.shape
        skipped = reached - self.first
        initial, final = self.curve[:, skipped], self.curve[:, -1]
        explained = self.examples + self.decay.sum((1, 2)) + self.inherited.sum(1)
        variables: dict[str, Any] = {
            "initial": (("query",), initial),
            "final": (("query",), final),
            "residual": (("query",), final - initial - explained),
            "rounding": (("query",), self.rounding),
            "spacing": (("query",), self.spacing),
            "gross": (("query",), self.gross + np.abs(self.inherited).sum(1)),
            "decay": (("query", "step", "group"), self.decay),
            "inherited": (("query", "group"), self.inherited),
            "timeline": (("query", "update_step", "group"), self.timeline),
            "curve": (("query", "state"), self.curve),
            **{f"{name}_identity": (("step",), gap) for name, gap in self.gaps.items()},
            **{"_".join((PREFIX, *axes)): (("query", *axes), a) for axes, a in self.marginals.arrays.items()},
        }
        coordinates = {
            "query": np.arange(queries),
            "step": np.arange(self.first, self.first + steps),
            "update_step": np.arange(self.first, self.first + steps),
            "state": np.arange(self.first, self.first + steps + 1),
            "example": self.run.examples,
            "group": list(self.labels),
        }
        failures = {f"{name}_failure": sentence for name, sentence in self.failures.items()}
        facts = {**facts, **failures, "window": [reached, self.first + steps]}
        done = dict.fromkeys(("step", "update_step", "state"), slice(skipped, None))
        return xr.Dataset(variables, coordinates, facts).isel(done)


def _gap(difference: np.ndarray, gross: np.ndarray) -> np.ndarray:
    """Largest |difference| over the gross size, (..., Q) each, over the queries."""
    return np.max(difference / np.where(gross > 0, gross, 1.0), axis=-1)
