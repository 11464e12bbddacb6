"""Many retrainings side by side: R copies of every parameter in one tensor (R, *shape), one pass and one optimizer for all.

    loss      = sum_r sum_i c_{r,i} l(theta_r, i)        copies do not see each other: d loss / d theta_r is that of r alone
    c_{r,i}   = the weight of example i in retraining r, times that of the mean or the sum that the loop took
    optimizer = torch's own over the tensors (R, *shape): every rule but those of whole matrices works entry by entry

Equal to one retraining at a time up to the order of sums.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..constants import is_low
from ..functional import Functional, mapped
from ..intervention.schedule import Scheduled
from ..layout import Layout
from ..optim import read_state, resume, set_options
from ..run import Run


def obstacle(run: Run) -> str | None:
    """Why retrainings of a run are not trained side by side; None where they may be."""
    settled = run.header["settled"]
    reasons = {
        "the loss draws random numbers": settled["stochastic"],
        "the losses of a batch depend on each other": settled.get("coupled", False),
        "shares are by rows": run.definition == "rows",
        "training changes buffers": bool(run.trajectory.buffers),
        "the optimizer works on whole matrices": any(rule.whole for rule in run.rules),
        "the loss holds a penalty": "penalty" in run.reader,
        "the loop did more than take the mean or the sum": run.declares_remainder,
        "passes round to few bits": is_low(run.precision) or run.autocast is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class Stack:
    """R copies of a run's state before a step, trained on. loss: (parameters by name, *batch) -> (B,)."""

    def __init__(self, run: Run, loss: Functional, step: int, count: int, device: torch.device) -> None:
        self._run, self._loss, self._count, self.first = run, loss, count, step
        single = {name: t.to(device) for name, t in run.parameters(step).items()}
        state = read_state(run.rules, run.optimizer(single, step), list(single.values()))
        self.parameters = {name: self._copies(t).requires_grad_() for name, t in single.items()}
        wide = Layout(run.layout.names, tuple((count, *shape) for shape in run.layout.shapes))
        states = {
            key: wide.flatten(map(self._copies, run.layout.unflatten(value).values())) for key, value in state.items()
        }
        hyper = run.reader.read("hyper", step)
        self._optimizer = resume(run.rules, wide, list(self.parameters.values()), states, hyper)

    def _copies(self, t: Tensor) -> Tensor:
        return t.detach().expand(self._count, *t.shape).clone()

    def backward(self, scheduled: Scheduled, factors: Tensor) -> None:
        """The gradients of a step. factors (R, B): c."""
        self._optimizer.zero_grad()
        at = 0
        for each in scheduled.passes:
            weights, args = factors[:, at : at + len(each.ids)], each.batch.args
            self._total(args, weights).backward()
            at += len(each.ids)

    def _total(self, args: tuple[Any, ...], weights: Tensor) -> Tensor:
        """Attention by plain mathematics: torch maps other over copies one by one."""

        def one(named: dict[str, Tensor], w: Tensor) -> Tensor:
            return (w * self._loss(named, *args)).sum()

        with sdpa_kernel(SDPBackend.MATH):
            total: Tensor = mapped(one)(self.parameters, weights).sum()
        return total

    def step(self, scheduled: Scheduled, factors: Tensor) -> None:
        self.backward(scheduled, factors)
        set_options(self._optimizer, self._run.rules, scheduled.hyper)
        self._optimizer.step()

    def vectors(self) -> Tensor:
        """(R, P)."""
        return _joined(self.parameters.values())

    def gradients(self) -> Tensor:
        """(R, P): zeros where there is none."""
        return _joined(torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters.values())


def _joined(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten(1) for t in tensors], 1)


class Weighing:
    """What the examples weigh in each retraining.

    Args:
        kind: "mean", "pooled" or "sum", what the loop took of the losses.
        changed: (R, N) bool over `run.numbers`. weight: (R,), of the changed ones; NaN leaves them out of their batch.
    """

    def __init__(self, run: Run, kind: str, changed: np.ndarray, weight: np.ndarray) -> None:
        self._numbers, self._kind = run.numbers, kind
        dropped = np.isnan(weight)[:, None]
        self._kept = ~(changed & dropped)
        self._weights = np.where(changed, np.where(dropped, 0.0, weight[:, None]), 1.0)

    def factors(self, numbers: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
        """(R, B): c of a step. numbers: of its examples, filled with -1; sizes: of its passes."""
        at = np.searchsorted(self._numbers, numbers[numbers >= 0])
        weights, kept = self._weights[:, at], self._kept[:, at]
        if self._kind == "sum":
            return weights
        owner = np.repeat(np.arange(len(sizes)), sizes)
        counts = np.stack([kept[:, owner == n].sum(1) for n in range(len(sizes))], 1)  # (R, passes)
        if self._kind == "pooled":
            return weights / counts.sum(1)[:, None]
        return weights / np.maximum(counts, 1)[:, owner] / (counts > 0).sum(1)[:, None]
