"""What separates two runs, pulled back through both at once; the derivative by an example's weight where they are one.

    m(theta'_T) - m(theta_T) = <lambda_T, theta'_T - theta_T>                   the path of the measurement
    V_s                        sensitivity to the gradient of step s, through the optimizers at their two ends
    c' g' - c g                = (c' - c) (g + g') / 2   +   (c + c') / 2 (g' - g)      what was done | how it went on
    K V                        = H V + (<V, y> - <H V, d>) d / |d|^2,  d = theta' - theta, H at their middle: K d = y exactly
    lambda_s                   = what the optimizers hand on + K V

g, g' are taken at the parameters of either run. via="cause": every example whose weight differs has what was done to it;
that those that remain weigh more where a batch is smaller, the reduction, is no example's; nor is it that they find
themselves in another batch or under other masks, the context. via="reaction": all that every example did otherwise,
(c' g' - c g), and no curvature: lambda goes through the optimizers alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .accounting import over_tensors
from .kernels import clipping
from .optim import Back, Carried, pulled_back
from .pair import Aligned, Pair
from .recomputed import Curved
from .side import Made

VIA = ("cause", "reaction")
ROUNDED = 1e-5  # differences of what two runs reduce with, relative to these, that are rounding


class Done(NamedTuple):
    """A step. examples (U,), values (Q, U, K): what was done to each; rows (Q, K) by name: what was done beside; V (Q, P);
    made: of either run. along (Q, B): <V, g_i> of the batch whose curvature was taken, where it came with that."""

    examples: np.ndarray
    values: np.ndarray
    rows: dict[str, np.ndarray]
    gradient: Tensor
    made: tuple[Made, Made]
    along: np.ndarray | None = None


class Injected(NamedTuple):
    """values (Q, U, K), reduction and context (Q, K); propagates: H V at the middle of the parameters."""

    values: np.ndarray
    reduction: np.ndarray
    context: np.ndarray
    propagates: Callable[[], Curved]

    @property
    def total(self) -> np.ndarray:
        """(Q,)."""
        return self.values.sum((1, 2)) + self.reduction.sum(1) + self.context.sum(1)


@dataclass(frozen=True)
class Causes:
    """pair: the runs. via: see above. curvature: "exact", or "gauss-newton". checked: whether what comes with H V is held
    against a gradient, where the caller does not hold it against the recorded one."""

    pair: Pair
    via: str = "cause"
    curvature: str = "exact"
    checked: bool = True

    def gaps(self, done: Done) -> dict[str, float]:
        """Of a step the identities of the batch and the split, the larger of either run's."""
        sides = list(zip(self.pair.sides, done.made, strict=True))[: 1 if self.pair.itself else 2]
        return {
            "batch": max(side.batch_gap(m) for side, m in sides),
            "split": max(side.split_gap(m, done.gradient) for side, m in sides),
        }

    def step(self, number: int, after: Carried) -> tuple[Done, Carried]:
        """The step `number` of the pair, from the sensitivities to what it leaves to those to what it found."""
        active = frozenset().union(*(side.active(number) for side in self.pair.sides))
        a = self.pair.base.made(number, active)
        b = a if self.pair.itself else self.pair.changed.made(number, active)
        base = self.pair.base.run
        back = pulled_back(base.rules, base.layout, (a.hyper, b.hyper), (a.end, b.end), after)
        v = clipping.pulled_back(back.gradient, (a.unclipped, b.unclipped), (a.clip, b.clip))
        back = replace(back, gradient=v)
        aligned = self.pair.aligned((a, b))
        rows = {"penalty": self._penalty(v, (a, b))}
        if back.options is not None:
            rows["options"] = over_tensors(base.layout, back.options)
        if self.via == "reaction":
            values = self._reaction(v, (a, b), aligned)
            return Done(aligned.examples, values, rows, v, (a, b)), back.before
        injected = self._injected(v, (a, b), aligned)
        before, along = self._handed_on(back, (a, b), injected)
        rows |= {"reduction": injected.reduction, "context": injected.context}
        return Done(aligned.examples, injected.values, rows, v, (a, b), along), before

    def start(self, before: Carried) -> np.ndarray:
        """(Q, K): what the runs began with otherwise, the parameters and the accumulators."""
        base = self.pair.base.run
        a, b = (side.begin() for side in self.pair.sides)
        found = self._along(before.theta, b.theta.double() - a.theta.double())
        for name, sensitivity in before.state.items():
            found = found + over_tensors(base.layout, sensitivity * (b.state[name].double() - a.state[name].double()))
        return found

    def _handed_on(self, back: Back, made: tuple[Made, Made], injected: Injected) -> tuple[Carried, np.ndarray | None]:
        """With K V; and what came with H V."""
        v, (a, b) = back.gradient, made
        product, along = injected.propagates()
        if (bent := self.pair.base.penalised(a, v)) is not None:
            product = product + bent
        moved = torch.zeros(0) if a is b else b.end.theta.double() - a.end.theta.double()
        if size := float(moved @ moved):
            left = v @ (b.examples - a.examples) - torch.from_numpy(injected.total)
            product = product + ((left - product @ moved) / size)[:, None] * moved
        return Carried(back.before.theta + product, back.before.state), along

    def _along(self, v: Tensor, vector: Tensor) -> np.ndarray:
        """<V, vector> over each tensor, (Q, K)."""
        return over_tensors(self.pair.base.run.layout, v * vector.double())

    def _penalty(self, v: Tensor, made: tuple[Made, Made]) -> np.ndarray:
        """What the penalties of the runs asked otherwise."""
        a, b = (m.penalty for m in made)
        if a is b:
            return np.zeros((len(v), len(self.pair.base.run.layout.names)))
        zero = torch.zeros(v.shape[1], dtype=torch.float64)
        return self._along(v, (zero if b is None else b) - (zero if a is None else a))

    def _reaction(self, v: Tensor, made: tuple[Made, Made], aligned: Aligned) -> np.ndarray:
        """(Q, U, K): c' g' - c g of all."""
        found = []
        for n, (side, m) in enumerate(zip(self.pair.sides, made, strict=True)):
            each = side.shares.products(m.recorded, v) * m.factors[:, None]
            found.append(aligned.spread(n, each))
        return found[1] - found[0]

    # what was done at a step

    def _injected(self, v: Tensor, made: tuple[Made, Made], aligned: Aligned) -> Injected:
        scales = [aligned.of(n, m.scales) for n, m in enumerate(made)]
        weights = [aligned.of(n, m.weights) for n, m in enumerate(made)]
        both = (aligned.at[0] >= 0) & (aligned.at[1] >= 0)
        scales[1] = np.where(np.abs(scales[1] - scales[0]) < ROUNDED * np.abs(scales[0]), scales[0], scales[1])
        total = scales[1] * weights[1] - scales[0] * weights[0]
        done = np.where(both, (scales[0] + scales[1]) / 2 * (weights[1] - weights[0]), total)
        coupled = any(side.shares.couples for side in self.pair.sides)
        drawn = any(p.random is not None for m in made for p in m.recorded.passes)
        if aligned.alike or (aligned.wider is not None and not coupled and not drawn):
            return self._of_one_batch(v, made, aligned, Factors(done, total - done), whole=coupled or drawn)
        return self._of_two_batches(v, made, aligned, Factors(done, total - done))

    def _of_one_batch(
        self, v: Tensor, made: tuple[Made, Made], aligned: Aligned, factors: "Factors", whole: bool
    ) -> Injected:
        """The losses are the same functions in both runs: those of the wider batch."""
        n = aligned.wider
        assert n is not None
        side, m, at = self.pair.sides[n], made[n], aligned.at[n]
        middle = middle_of(made)
        mean = (aligned.of(0, made[0].factors) + aligned.of(1, made[1].factors)) / 2
        weights = np.zeros(len(m.slots))
        weights[at] = mean

        def propagates() -> Curved:
            return side.shares.curved(m.at(middle), v, weights, self.curvature, self.checked)

        nothing = np.zeros((len(v), len(self.pair.base.run.layout.names)))
        touched = factors.done != 0
        even = None if whole else evenly(touched, *(aligned.of(k, made[k].factors) for k in (0, 1)))
        chosen = np.zeros(len(m.slots), bool)
        chosen[at] = touched | ((factors.reduced != 0) & (even is None))
        if not chosen.any():
            values = np.zeros((len(v), len(aligned.examples), nothing.shape[1]))
            return Injected(values, nothing, nothing, propagates)
        ends = [made[0].end.theta, made[1].end.theta]
        ends = ends if not torch.equal(*ends) else ends[:1]
        each = [side.shares.products(m.at(t), v, None if whole else chosen)[:, at] for t in ends]
        mean_each = np.stack(each).mean(0)
        reduction = np.einsum("quk,u->qk", mean_each, factors.reduced * (1.0 if even is None else touched))
        if even is not None:
            reduction = reduction + self._rest(
                v, made, aligned, (each[0] * touched[:, None], each[-1] * touched[:, None]), even
            )
        return Injected(mean_each * factors.done[:, None], reduction, nothing, propagates)

    def _rest(
        self, v: Tensor, made: tuple[Made, Made], aligned: Aligned, touched: tuple[np.ndarray, np.ndarray], ratio: float
    ) -> np.ndarray:
        """(Q, K): sum (c' - c) (g + g') / 2 over those that nothing was done to, where c' = ratio c: the gradients less what
        of them is the others', `touched` (Q, U, K) at either end."""
        if ratio == 1.0:
            return np.zeros((len(v), touched[0].shape[2]))
        rests = [
            self._along(v, m.examples) - np.einsum("quk,u->qk", products, aligned.of(n, m.factors))
            for n, (m, products) in enumerate(zip(made, touched, strict=True))
        ]
        return ((ratio - 1) * rests[0] + (1 - 1 / ratio) * rests[1]) / 2

    def _of_two_batches(self, v: Tensor, made: tuple[Made, Made], aligned: Aligned, factors: "Factors") -> Injected:
        """Each run's losses, at the parameters of both."""
        middle = middle_of(made)
        ends = [made[0].end.theta, made[1].end.theta]
        ends = ends if not torch.equal(*ends) else ends[:1]
        each = []
        for n, (side, m) in enumerate(zip(self.pair.sides, made, strict=True)):
            products = np.stack([side.shares.products(m.at(t), v) for t in ends]).mean(0)
            each.append(aligned.spread(n, products))
        both = (aligned.at[0] >= 0) & (aligned.at[1] >= 0)
        here = [np.where(both[:, None], (each[0] + each[1]) / 2, p) for p in each]
        mean = (
            np.where(aligned.at[1] >= 0, 1, 0)[:, None] * here[1] + np.where(aligned.at[1] < 0, 1, 0)[:, None] * here[0]
        )
        factor = (aligned.of(0, made[0].factors) + aligned.of(1, made[1].factors)) / 2
        context = np.einsum("quk,u->qk", each[1] - each[0], np.where(both, factor, 0.0))

        def propagates() -> Curved:
            products = (
                side.shares.curved(m.at(middle), v, m.factors, self.curvature).hessian
                for side, m in zip(self.pair.sides, made, strict=True)
            )
            return Curved(torch.stack([*products]).mean(0), None)

        reduction = np.einsum("quk,u->qk", mean, factors.reduced)
        return Injected(mean * factors.done[:, None], reduction, context, propagates)


def middle_of(made: tuple[Made, Made]) -> Tensor:
    """(P,): of the parameters of both."""
    a, b = (m.end.theta for m in made)
    return a if a is b else (a + b) / 2


def evenly(touched: np.ndarray, before: np.ndarray, after: np.ndarray) -> float | None:
    """The one ratio of the factors (U,) of all that nothing was done to; None where there are several."""
    counted = ~touched & (before != 0)  # what weighs nothing in both runs has none
    rest = after[counted] / before[counted]
    if not len(rest):
        return 1.0
    ratio = float(rest[0])
    return ratio if np.allclose(rest, ratio, rtol=1e-12, atol=0.0) else None


class Factors(NamedTuple):
    """How the factors of the examples differ, (U,): by what was done to each; by the reduction alone."""

    done: np.ndarray
    reduced: np.ndarray
