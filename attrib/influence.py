"""influence(): what would change if an example weighed a little more or less.

    d m(theta_T) / d w_i = sum_s <V_s, c_i g_i>          w_i in front of loss i, c_i what the loop reduces it with

V_s, the sensitivity to the gradient of step s, is carried backwards through the optimizer and the curvature of every batch:
`causes`, of a run and itself. (Maclaurin, Duvenaud, Adams 2015; Hara, Nitanda, Maehara 2019, for SGD.)
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from .account import Account, share_bound
from .asked import Asked, described
from .causes import Causes, Done
from .curvature import KINDS
from .functional import differentiable, uncompiled
from .kernels import clipping
from .matching import check_model
from .optim import Carried, End, pushed_forward
from .pair import alone
from .path import Measured, Midpoint
from .result import Influence
from .result.influence import CHAOTIC
from .run import Run
from .sensitivity import Terms, along_tensors
from .shares import drawn
from .side import Made
from .tally import Tally, total

log = logging.getLogger("attrib")
TANGENT_STEPS = 8  # that a tangent is carried through at least, a tenth of all where that is more
IDENTITIES = ("split", "tangent")


@differentiable
def influence(
    run: Run,
    model: nn.Module,
    measurement: Any,
    *,
    loss: Callable[..., Tensor],
    curvature: str = "exact",
    keep: Sequence[str] | Sequence[Sequence[str]] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    memory: int | None = None,
    identities: Sequence[str] = IDENTITIES,
) -> Influence:
    """Differentiate the final measurement by the weight of each example's loss, at every step, through every group.

    A derivative, for a counterfactual: `attrib.attribute` says what happened, `attrib.difference` why two runs differ.

    Args:
        run: from `attrib.open_run`, of SGD, Adam or AdamW.
        model: of the recorded architecture; given back as it was.
        measurement: `model -> (Q,)`, or one of `attrib.measure`.
        loss: as given to `attrib.record`.
        curvature: of the loss, "exact"; or "gauss-newton", of what it makes of the model's outputs alone: stabler where
            training is chaotic, and then no longer the derivative.
        keep, groups, dtype, progress, memory: see `attrib.attribute`.
        identities: those that are checked: "split", at a few steps, each influence against the derivative of its own loss;
            "tangent", over the last steps, the sensitivities against a tangent that is carried forwards.

    Raises:
        ReplayError: an optimizer whose derivative was not derived, or a loop that did what the record does not hold.
        ModelMismatchError, MeasurementError, LossError, StoreError, KeptAxesError, ValueError.

    Example:
        >>> found = attrib.influence(run, model, measurement, loss=loss)  # doctest: +SKIP
        >>> found.predict([[3, 14], [15]])  # without examples 3 and 14, without example 15  # doctest: +SKIP
    """
    if isinstance(identities, str) or not set(identities) <= set(IDENTITIES):
        raise ValueError(f"identities are none: got {identities!r}, expected some of {IDENTITIES}, such as ('split',).")
    if curvature not in KINDS:
        raise ValueError(f"unknown curvature: got {curvature!r}, expected one of {', '.join(map(repr, KINDS))}.")
    model, asked = uncompiled(model), Asked(keep, groups, dtype, progress, memory)
    check_model(run, model)
    grouping = asked.grouping(run)
    pair = alone(run, model, loss, grouping.member)
    question = asked.question(pair, model, measurement, grouping)
    account = Account(*grouping, question.kept, False, share_bound(run.compute, run.compute))
    causes = Causes(pair.within(question.slices), curvature=curvature)
    sweep = Sweep(causes, account, "split" in identities, "tangent" in identities)
    found = asked.answered(question, "influence", run.steps, sweep.dataset)
    facts = _facts(run, measurement, curvature)
    result = Influence(found.assign_coords(example=run.examples).assign_attrs(facts))
    if float(result.growth.max()) >= CHAOTIC:
        log.warning("%s", result.said)
    return result


def _facts(run: Run, measurement: Any, curvature: str) -> dict[str, Any]:
    units = getattr(measurement, "units", "")
    return {
        **described(run, measurement),
        "units": f"{units} per unit of weight" if units else "",
        "bound": share_bound(run.compute, run.compute),
        "curvature": curvature,
        "meaning": "derivatives of the final measurement by the weight of each example's loss; they do not add up",
    }


@dataclass(frozen=True)
class Sweep:
    """Backwards through a run."""

    causes: Causes
    account: Account
    split: bool
    tangent: bool

    @property
    def _run(self) -> Run:
        return self.causes.pair.base.run

    def dataset(self, query: Measured, heard: Callable[[], Any]) -> xr.Dataset:
        """Of some of the queries."""
        run, size = self._run, query.parameters.size
        whole = query.example
        final = Midpoint(1).bind(query)(whole, whole)
        carried = Carried.of(run.rules, final.gradient.double()[:, :size].cpu().contiguous())
        last = carried.theta
        checked = drawn(range(run.steps)) if self.split else frozenset()
        weights = Weights(run) if self.tangent else None
        swept, rescaled = np.zeros(query.count), np.zeros((query.count, len(run.numbers)))

        def tallies() -> Iterator[Tally]:
            nonlocal carried, swept
            for number in reversed(range(run.steps)):
                after = carried
                done, carried = self.causes.step(number, after)
                tally, each = self._tally(done, (carried, after), number in checked)
                self._rescale(rescaled, done.made[0], each)
                if weights is not None and number >= weights.first:
                    swept = swept + each @ weights.of(number)
                yield tally
                heard()

        summed = total(tallies(), range(run.steps), run.numbers)
        assert summed is not None
        tangent = np.full(query.count, np.nan) if weights is None else (last @ self._pushed(weights)).numpy()
        beside = {"final": final.end.double().cpu().numpy(), "tangent": tangent, "swept": swept}
        return self._labelled(summed, beside, rescaled)

    def _tally(self, done: Done, ends: tuple[Carried, Carried], checked: bool) -> tuple[Tally, np.ndarray]:
        """And the influence of every slot, (Q, B)."""
        made, v, shares = done.made[0], done.gradient, self.causes.pair.base.shares
        v, examples = v / made.clip, made.clip * made.examples[None]  # the shares of the record are clipped
        gradient = along_tensors(self._run.layout, v[None], lambda part: [examples[:, part]])[0]
        found = shares.contract(made.recorded, v, gradient[0])
        each = found.values.sum(2)
        terms = Terms(
            states={"growth": (ends[0].norms[None], ends[1].norms[None])},
        )
        splits = {}
        if checked and (split := shares.split(made.recorded, v, found, 0.0)) is not None:
            splits[made.recorded.number] = split
        (tally,) = self.account.tallies([made.recorded], [found], gradient, terms, splits)
        return tally, each

    def _pushed(self, weights: "Weights") -> Tensor:
        """(P,): how the last parameters move where the examples of the last steps weigh more by `weights`."""
        run, side = self._run, self.causes.pair.base
        begin = side.made(weights.first, side.active(weights.first))
        theta = torch.zeros(run.layout.size, dtype=torch.float64)
        state = {name: torch.zeros_like(theta) for name in begin.end.state}
        for number in range(weights.first, run.steps):
            made = side.made(number, side.active(number))
            gradient = side.shares.hvp(made.recorded, theta[None], made.factors, self.causes.curvature)[0]
            gradient = gradient + side.shares.gradient(made.recorded, made.factors * weights.of(number))
            gradient = clipping.pushed_forward(gradient, made.unclipped, made.clip)
            theta, state = pushed_forward(run.rules, run.layout, made.hyper, made.end, End(state, gradient, theta))
        return theta

    def _rescale(self, into: np.ndarray, made: Made, each: np.ndarray) -> None:
        """Add what those that remain gain where an example goes: of the mean over a batch, its mean influence."""
        kinds = self._run.header["settled"]["reduction"][0]
        passes = [p.slots for p in made.recorded.passes] if "mean" in kinds else [slice(0, len(made.slots))]
        for slots in passes if kinds != ["sum"] else ():
            mean = each[:, slots].mean(1, keepdims=True)
            for row, value in zip(into, mean[:, 0], strict=True):
                np.add.at(row, made.slots[slots], value)

    def _labelled(self, whole: Tally, beside: Mapping[str, np.ndarray], rescaled: np.ndarray) -> xr.Dataset:
        variables: dict[str, Any] = {
            **{name: (("query",), values) for name, values in beside.items()},
            "rescaled": (("query", "example"), rescaled),
            "growth": (("query", "state"), whole.states["growth"]),
            **{f"{name}_identity": (("step",), whole.gaps[name]) for name in ("batch", "split")},
            **{"_".join((Influence.word, *axes)): (("query", *axes), a) for axes, a in whole.marginals.items()},
        }
        coordinates = {
            "query": np.arange(len(rescaled)),
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
        self.first = max(0, run.steps - max(TANGENT_STEPS, run.steps // 10))

    def of(self, number: int) -> np.ndarray:
        """(B,): of a step."""
        return np.random.default_rng(number).standard_normal(len(self._run.index(number)))
