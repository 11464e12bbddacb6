"""The states of a run once more, bit for bit: torch's own optimizer, run again on recorded gradients.

`replay` gives the coefficients of a step, equal to torch's arithmetic up to rounding; this gives what torch itself computes.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..layout import Layout
from .replay import read_hyper
from .rule import Rule


class Rerun:
    """An optimizer of the recorded type over copies of the parameters.

    Args:
        kind: the optimizer's type.
        theta: (P,), the parameters before the next step. state: the accumulators there, (P,) each.
        hyper: (K, H + 1), the numbers of the next step, as `replay.read_hyper` reads them.
    """

    def __init__(
        self,
        kind: type[torch.optim.Optimizer],
        rule: Rule,
        layout: Layout,
        theta: Tensor,
        state: dict[str, Tensor],
        hyper: np.ndarray,
    ) -> None:
        self._rule, self._layout = rule, layout
        self.parameters = [t.clone() for t in layout.unflatten(theta).values()]
        self._optimizer = resume(kind, rule, layout, self.parameters, state, hyper)

    def step(self, hyper: np.ndarray, gradient: Tensor) -> Tensor:
        """(K, H + 1), (P,) -> the parameters after the step, (P,)."""
        set_options(self._optimizer, self._rule, hyper)
        for p, (_, part), row in zip(self.parameters, self._layout.slices(), hyper, strict=True):
            p.grad = gradient[part].view_as(p).clone() if row[-1] else None
        self._optimizer.step()
        return self._layout.flatten(self.parameters)

    def hyper(self) -> np.ndarray:
        """(K, H + 1), the numbers of the next step where its options are those of the last."""
        return read_hyper(self._rule, self._optimizer)

    def state(self) -> dict[str, Tensor]:
        """The accumulators before the next step, (P,) each; zeros where torch has made none yet."""
        states = [self._optimizer.state.get(p, {}) for p in self.parameters]
        return {
            key: self._layout.flatten(
                torch.zeros_like(p) if s.get(key) is None else s[key]
                for s, p in zip(states, self.parameters, strict=True)
            )
            for key in self._rule.state
        }


def resume(
    kind: type[torch.optim.Optimizer],
    rule: Rule,
    layout: Layout,
    parameters: Sequence[Tensor],
    state: dict[str, Tensor],
    hyper: np.ndarray,
) -> torch.optim.Optimizer:
    """Torch's optimizer over `parameters`, in the layout's order, a group each, as it was before the next step: with the
    accumulators `state` (P,) and the numbers `hyper` (K, H + 1)."""
    groups = [{"params": [p], **rule.options(_named(rule, row))} for p, row in zip(parameters, hyper, strict=True)]
    optimizer = cast(Any, kind)(groups)  # its other options are the defaults
    for p, found in zip(parameters, torch_states(rule, layout, state, hyper), strict=True):
        if found:
            optimizer.state[p] = found
    return optimizer


def torch_states(rule: Rule, layout: Layout, state: dict[str, Tensor], hyper: np.ndarray) -> list[dict[str, Tensor]]:
    """Torch's state of each parameter tensor, from the accumulators (P,) and the numbers (K, H + 1) of the next step."""
    parts = {key: layout.unflatten(value) for key, value in state.items()}
    return [
        rule.resume(_named(rule, row), {key: value[name].clone() for key, value in parts.items()})
        for name, row in zip(layout.names, hyper, strict=True)
    ]


def set_options(optimizer: torch.optim.Optimizer, rule: Rule, hyper: np.ndarray) -> None:
    """The options of the next step, (K, H + 1), for an optimizer made by `resume`."""
    for group, row in zip(optimizer.param_groups, hyper, strict=True):
        group.update(rule.options(_named(rule, row)))


def _named(rule: Rule, row: np.ndarray) -> dict[str, float]:
    return dict(zip(rule.hyper, row.tolist(), strict=False))
