"""Follow the user's own passes through hooks, so that recording shares costs no second forward or backward.

The sites are noted during the forward pass of the model, and what the backward pass brings to their outputs is kept. A step
that made no pass, several, or one that is not that of the loss, is computed again instead.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .assignment import Trace
from .sites import SiteTracer


class Watch:
    """Hooks on a model; takes them off with `remove`. They hold nothing of the recorder, so a model may be copied.

    parameters: name -> the model's own tensor. busy: while the recorder runs the model itself.
    """

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]) -> None:
        self.busy = False
        self._parameters = parameters
        self._passes = 0
        self._tracer: SiteTracer | None = None
        self._hooks = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        self._open = False

    def seen(self, size: int) -> tuple[Trace, list[Tensor | None]] | None:
        """The sites of the one pass since `clear` and the gradients of their outputs, or None."""
        tracer = self._tracer
        if tracer is None or self._passes != 1:
            return None
        trace = Trace(tracer.parameters, tracer.sites, tracer.unsplit, torch.empty(size), read=tuple(tracer.read))
        return trace, [tracer.deltas.get(n) for n in range(len(tracer.sites))]

    def clear(self) -> None:
        """Forget the passes."""
        self._tracer, self._passes = None, 0

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or self.busy or not torch.is_grad_enabled():
            return
        self._passes += 1
        moving = {name: p for name, p in self._parameters.items() if p.requires_grad}
        self._tracer = SiteTracer(moving, tree_leaves((args, kwargs)), keep=True)
        self._tracer.__enter__()
        self._open = True

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and self._open and self._tracer is not None:
            self._open = False
            self._tracer.__exit__(None, None, None)

    def __deepcopy__(self, memo: Any) -> "Watch":
        copied = object.__new__(Watch)
        copied.busy, copied._parameters, copied._passes, copied._tracer = True, {}, 0, None
        copied._hooks, copied._open = [], False
        return copied
