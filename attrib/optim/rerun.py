"""The states of a run once more, bit for bit: torch's own optimizers, run again on recorded gradients.

`replay` gives the coefficients of a step, equal to torch's arithmetic up to rounding; this gives what torch itself computes.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..layout import Layout
from .known import kind_at
from .rules import Rules, read_hyper, read_state
from .together import Together


class Rerun:
    """The optimizers of a run over copies of the parameters.

    Args:
        theta: (P,), the parameters before the next step. state: the accumulators there, (P,) each.
        hyper: (K, H + 1), the numbers of the next step, as `read_hyper` reads them.
    """

    def __init__(
        self, rules: Rules, layout: Layout, theta: Tensor, state: dict[str, Tensor], hyper: np.ndarray
    ) -> None:
        self._rules, self._layout = rules, layout
        self.parameters = [t.clone() for t in layout.unflatten(theta).values()]
        self._optimizer = resume(rules, layout, self.parameters, state, hyper)

    def step(self, hyper: np.ndarray, gradient: Tensor) -> Tensor:
        """(K, H + 1), (P,) -> the parameters after the step, (P,)."""
        set_options(self._optimizer, self._rules, hyper)
        for p, (_, part), row in zip(self.parameters, self._layout.slices(), hyper, strict=True):
            p.grad = gradient[part].view_as(p).clone() if row[-1] else None
        self._optimizer.step()
        return self._layout.flatten(self.parameters)

    def hyper(self) -> np.ndarray:
        """(K, H + 1), the numbers of the next step where its options are those of the last."""
        return read_hyper(self._rules, self._optimizer)

    def state(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The accumulators before the next step, (P,) each; as they begin where torch has made none yet. dtype: what they
        are computed with; None for their own type."""
        return read_state(self._rules, self._optimizer, self.parameters, dtype)

    def put(self, theta: Tensor) -> None:
        """The parameters before the next step, (P,)."""
        for p, value in zip(self.parameters, self._layout.unflatten(theta).values(), strict=True):
            p.copy_(value)


def resume(
    rules: Rules, layout: Layout, parameters: Sequence[Tensor], state: dict[str, Tensor], hyper: np.ndarray
) -> torch.optim.Optimizer:
    """Torch's optimizers over `parameters`, in the layout's order, a group each, as they were before the next step: with the
    accumulators `state` (P,) and the numbers `hyper` (K, H + 1)."""
    options = [rule.options(row) for rule, row in zip(rules, rules.named(hyper), strict=True)]
    optimizers = []
    for number, mover in enumerate(rules.movers):
        mine = [tensor for tensor, owner in enumerate(rules.owners) if owner == number]
        groups = [{"params": [parameters[tensor]], **options[tensor]} for tensor in mine]
        optimizer = cast(Any, kind_at(mover.place))(groups)  # its other options are the defaults
        optimizer.defaults.update({key: options[mine[0]][key] for key in optimizer.defaults if key in options[mine[0]]})
        optimizers.append(optimizer)
    whole = optimizers[0] if len(optimizers) == 1 else Together(optimizers)
    for p, held in zip(parameters, torch_states(rules, layout, state, hyper), strict=True):
        if held:
            whole.state[p] = held
    return whole


def torch_states(rules: Rules, layout: Layout, state: dict[str, Tensor], hyper: np.ndarray) -> list[dict[str, Tensor]]:
    """Torch's state of each parameter tensor, from the accumulators (P,) and the numbers (K, H + 1) of the next step."""
    return [
        rule.resume(row, {key: value[part] for key, value in state.items()}, shape)
        for rule, row, (_, part), shape in zip(rules, rules.named(hyper), layout.slices(), layout.shapes, strict=True)
    ]


def set_options(optimizer: torch.optim.Optimizer, rules: Rules, hyper: np.ndarray) -> None:
    """The options of the next step, (K, H + 1), for an optimizer made by `resume`."""
    for group, rule, row in zip(optimizer.param_groups, rules, rules.named(hyper), strict=True):
        group.update(rule.options(row))
