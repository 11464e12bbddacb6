"""The derivative by each example's weight, summed backwards over the steps of a run.

influence(i, s, group) = <V_s, s_i g_i>_group         G_s = sum_i s_i w_i g_i, w_i the weight that loss i had
lost(i)                = sum over s of w_i influence(i, s)        what leaving i out takes, to first order
rescaled(i)            = sum over s of the mean of w_j influence(j, s) over the batch of i     what a mean over fewer gives
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from .account import Account
from .asked import Question, nothing
from .backwards import backwards
from .causes import Causes, Done
from .kernels import clipping
from .marginals import Slots
from .optim import End, pushed_forward
from .path import Midpoint
from .result import Influence
from .run import Run
from .sensitivity import Terms, along_tensors
from .shares import Contributions, drawn
from .side import Made
from .tally import Tally

TANGENT_STEPS = 8  # that a tangent is carried through, the last


@dataclass(frozen=True)
class Sweep:
    """Backwards through a run. split, tangent: which identities are checked. uniform: the weight that all losses were given
    beside those that they had."""

    causes: Causes
    question: Question
    account: Account
    split: bool
    tangent: bool
    uniform: float = 1.0

    @property
    def _run(self) -> Run:
        return self.causes.pair.base.run

    def dataset(self, part: int, heard: Callable[[], Any] = nothing) -> xr.Dataset:
        """Of a part of the queries."""
        run, query = self._run, self.question.parts[part]
        whole, size = query.example, query.parameters.size
        final = Midpoint(1).bind(query)(whole, whole)
        last = final.gradient.double()[:, :size].cpu().contiguous()
        weights = Weights(run) if self.tangent else None
        swept = np.zeros(query.count)
        each = {name: np.zeros((query.count, len(run.numbers))) for name in ("lost", "rescaled")}

        def taken(number: int, done: Done, growth: tuple[np.ndarray, np.ndarray]) -> Tally:
            tally, found = self._tally(number, done, growth)
            self._leave_out(each, done.made[0], found * (done.made[0].weights / self.uniform))
            if weights is not None and number >= weights.first:
                swept[:] += found @ weights.of(number)
            return tally

        summed, _ = backwards(self.causes, last, run.numbers, taken, heard)
        tangent = np.full(query.count, np.nan) if weights is None else (last @ self._pushed(weights)).numpy()
        beside = {"final": final.end.double().cpu().numpy(), "tangent": tangent, "swept": swept}
        return self._labelled(summed, beside, each)

    def _tally(self, number: int, done: Done, growth: tuple[np.ndarray, np.ndarray]) -> tuple[Tally, np.ndarray]:
        """And the influence of every slot, (Q, B)."""
        made, v, shares = done.made[0], done.gradient, self.causes.pair.base.shares
        along = done.along if len(self.account.labels) == 1 else None
        each = shares.products(made.recorded, v) if along is None else along[:, :, None]
        values, examples = each * made.scales[:, None], made.examples[None]
        scales = made.pass_scales
        weighted = Contributions(values * made.weights[:, None], scales)
        gradient = along_tensors(self._run.layout, v[None], lambda part: [examples[:, part]])[0]
        terms = Terms(states={"growth": (growth[0][None], growth[1][None])})
        splits = {}
        if self.split and number in drawn(range(self._run.steps)):
            split = shares.split(made.recorded, v, Contributions(values, scales), 0.0)
            splits = {} if split is None else {number: split}
        (tally,) = self.account.tallies([made.recorded], [weighted], gradient, terms, splits)
        if not (made.weights == 1).all():  # the derivative is that by the weight itself
            sums = Slots(made.recorded.ids).sums(self.account.kept, self.account.grouped(values))
            tally = replace(tally, marginals=sums)
        return tally, values.sum(2)

    def _pushed(self, weights: "Weights") -> Tensor:
        """(P,): how the last parameters move where the examples of the last steps weigh more by `weights`."""
        run, side = self._run, self.causes.pair.base
        begin = side.made(weights.first, side.active(weights.first))
        theta = torch.zeros(run.layout.size, dtype=torch.float64)
        state = {name: torch.zeros_like(theta) for name in begin.end.state}
        for number in range(weights.first, run.steps):
            made = side.made(number, side.active(number))
            curvature, checked = self.causes.curvature, self.causes.checked
            gradient = side.shares.curved(made.recorded, theta[None], made.factors, curvature, checked).hessian[0]
            gradient = gradient + side.shares.gradient(made.recorded, made.scales * weights.of(number))
            if (bent := side.penalised(made, theta[None])) is not None:
                gradient = gradient + bent[0]
            gradient = clipping.pushed_forward(gradient, made.unclipped, made.clip)
            theta, state = pushed_forward(run.rules, run.layout, made.hyper, made.end, End(state, gradient, theta))
        return theta

    def _leave_out(self, into: Mapping[str, np.ndarray], made: Made, found: np.ndarray) -> None:
        """Add what goes with each example, and what those that remain gain where a loss is a mean over the batch. found:
        (Q, B)."""
        for row, value in zip(into["lost"], found, strict=True):
            np.add.at(row, made.slots, value)
        kinds = self._run.header["settled"]["reduction"][0]
        passes = [p.slots for p in made.recorded.passes] if "mean" in kinds else [slice(0, len(made.slots))]
        for slots in passes if kinds != ["sum"] else ():
            mean = found[:, slots].mean(1, keepdims=True)
            for row, value in zip(into["rescaled"], mean[:, 0], strict=True):
                np.add.at(row, made.slots[slots], value)

    def _labelled(self, whole: Tally, beside: Mapping[str, np.ndarray], each: Mapping[str, np.ndarray]) -> xr.Dataset:
        beside = {**beside, "restored": (1 - self.uniform) * each["lost"].sum(1)}
        variables: dict[str, Any] = {
            **{name: (("query",), values) for name, values in beside.items()},
            **{name: (("query", "example"), values) for name, values in each.items()},
            "growth": (("query", "state"), whole.states["growth"]),
            **{f"{name}_identity": (("step",), whole.gaps[name]) for name in ("batch", "split")},
            **{"_".join((Influence.word, *axes)): (("query", *axes), a) for axes, a in whole.marginals.items()},
        }
        coordinates = {
            "query": np.arange(len(each["lost"])),
            "step": np.arange(self._run.steps),
            "state": np.arange(self._run.steps + 1),
            "example": whole.examples,
            "group": list(self.account.labels),
        }
        failures = {f"{name}_failure": sentence for name, sentence in whole.failures.items()}
        return xr.Dataset(variables, coordinates, failures)


class Weights:
    """Random changes of the weights of the examples of the last steps, from step `first` on."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.first = max(0, run.steps - TANGENT_STEPS)

    def of(self, number: int) -> np.ndarray:
        """(B,): of a step."""
        return np.random.default_rng(number).standard_normal(len(self._run.index(number)))
