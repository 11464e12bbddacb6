"""Follow one forward pass and note each call where a parameter meets the data: its *sites*.

A `TorchFunctionMode` sees every torch call that the model makes, whether from a module, a functional or plain tensor
arithmetic, so tied weights, bare `nn.Parameter`s and reused layers need no case of their own. Three kinds of tensor:

    data      came from the batch, or was computed from something that did
    weight    a parameter, or computed from parameters alone (a transpose, a slice, a weight norm)
    constant  neither

A call with data and weight among its arguments is a site: y = f(data, weight). By the chain rule the share of
example i along a direction U of the parameters is sum over sites of <dl_i/dy, df/dweight U>.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class Weight:
    """A tensor made of parameters alone: which ones, and how it was made (None for a parameter itself)."""

    tensor: Tensor
    names: frozenset[str]
    maker: "Call | None" = None


@dataclass(frozen=True)
class Call:
    """One torch call: flat arguments, and which of them are weights (position in `leaves` -> Weight)."""

    function: Callable[..., Any]
    leaves: tuple[Any, ...]
    spec: Any
    weights: dict[int, Weight]
    output: int | None = None  # which element, where the call returns a tuple

    def run(self, replaced: dict[int, Tensor]) -> Tensor:
        """Call again with some of the flat arguments replaced."""
        leaves = [replaced.get(i, leaf) for i, leaf in enumerate(self.leaves)]
        args, kwargs = tree_unflatten(leaves, self.spec)
        out = self.function(*args, **kwargs)
        return out if self.output is None else out[self.output]

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tree_unflatten(list(self.leaves), self.spec)


@dataclass(frozen=True)
class Site:
    """A call where weights meet data, its output's shape and its place in the autograd graph."""

    call: Call
    shape: torch.Size
    edge: GradientEdge


class SiteTracer(TorchFunctionMode):
    """Collects the sites of the calls made while it is active.

    parameters: name -> the very tensor that the model will use. data: the tensors of the batch.
    """

    def __init__(self, parameters: dict[str, Tensor], data: Sequence[Any]) -> None:
        super().__init__()
        self.sites: list[Site] = []
        self.unsplit: set[str] = set()  # parameters used by a call that cannot be run a second time
        self._data = WeakTensorKeyDictionary()
        self._weights = WeakTensorKeyDictionary()
        for t in data:
            if isinstance(t, Tensor):
                self._data[t] = True
        for name, p in parameters.items():
            self._weights[p] = Weight(p, frozenset([name]))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        outputs = [t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)]
        if not outputs:
            return out
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [(i, t) for i, t in enumerate(leaves) if isinstance(t, Tensor)]
        weights = {i: self._weights[t] for i, t in tensors if t in self._weights}
        if any(t in self._data for _, t in tensors):
            for t in outputs:
                self._data[t] = True
        elif not weights:
            return out
        if weights:
            self._note(func, tuple(leaves), spec, weights, out)
        return out

    def _note(self, func: Any, leaves: tuple[Any, ...], spec: Any, weights: dict[int, Weight], out: Any) -> None:
        if getattr(func, "__name__", "").rstrip("_") + "_" == getattr(func, "__name__", ""):  # in place
            self.unsplit.update(*(w.names for w in weights.values()))
            return
        several = isinstance(out, tuple | list)
        for k, t in enumerate(out if several else (out,)):
            if not (isinstance(t, Tensor) and t.requires_grad):
                continue
            call = Call(func, leaves, spec, weights, k if several else None)
            if t in self._data:
                self.sites.append(Site(call, t.shape, get_gradient_edge(t)))
            else:
                names = frozenset().union(*(w.names for w in weights.values()))
                self._weights[t] = Weight(t, names, call)


def tangent(weight: Weight, name: str, direction: Tensor) -> Tensor:
    """How a weight moves when the parameter `name` moves along `direction`: (*parameter) -> (*weight)."""
    if weight.maker is None:
        return direction
    call = weight.maker
    moving = {i: w for i, w in call.weights.items() if name in w.names}
    return jvp(call, {i: (w.tensor, tangent(w, name, direction)) for i, w in moving.items()})


@cache
def _load_forward_mode() -> None:
    """torch compiles its forward-mode rules at first use, with a deprecated compiler of its own that warns the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))


def jvp(call: Call, moving: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
    """Forward-mode derivative of a call along (primal, tangent) of some of its flat arguments."""
    positions = list(moving)

    def run(*primals: Tensor) -> Tensor:
        return call.run(dict(zip(positions, primals, strict=True)))

    _load_forward_mode()
    primals = tuple(moving[i][0].detach() for i in positions)
    tangents = tuple(moving[i][1].to(moving[i][0].dtype) for i in positions)
    return torch.func.jvp(run, primals, tangents)[1]
