"""The states of a run once more, bit for bit: torch's own optimizer, run again on recorded gradients.

`replay` gives the coefficients of a step, equal to torch's arithmetic up to rounding; this gives what torch itself computes.
"""

import numpy as np
import torch
from torch import Tensor

from ..layout import Layout
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
        groups = [
            {"params": [p], **rule.options(self._named(row))} for p, row in zip(self.parameters, hyper, strict=True)
        ]
        self._optimizer = kind(groups)
        accumulators = {key: layout.unflatten(value) for key, value in state.items()}
        for name, p, row in zip(layout.names, self.parameters, hyper, strict=True):
            own = {key: value[name].clone() for key, value in accumulators.items()}
            found = rule.resume(self._named(row), own)
            if found:
                self._optimizer.state[p] = found

    def step(self, hyper: np.ndarray, gradient: Tensor) -> Tensor:
        """(K, H + 1), (P,) -> the parameters after the step, (P,)."""
        rows = zip(self._optimizer.param_groups, self.parameters, self._layout.slices(), hyper, strict=True)
        for group, p, (_, part), row in rows:
            group.update(self._rule.options(self._named(row)))
            p.grad = gradient[part].view_as(p).clone() if row[-1] else None
        self._optimizer.step()
        return self._layout.flatten(self.parameters)

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

    def _named(self, row: np.ndarray) -> dict[str, float]:
        return dict(zip(self._rule.hyper, row.tolist(), strict=False))
