"""Follow one forward pass and note each call where a parameter meets the data: its *sites*.

A `TorchFunctionMode` sees every torch call that the model makes, whether from a module, a functional or plain tensor
arithmetic, so tied weights, bare `nn.Parameter`s and reused layers need no case of their own. Three kinds of tensor:

    data      came from the batch, or was computed from something that did
    weight    a parameter, or computed from parameters alone (a transpose, a slice, a weight norm)
    constant  neither

Of data it is noted whether which row is whose may depend on its content: `ragged` where the very shape does (packing,
selecting by a mask), `volatile` where rows were picked by an index that is data itself (a batch sorted inside), where
Python read a value of the data, or where it came out of a call that is not seen from here (an autograd.Function).

A call with data and weight among its arguments is a site: y = f(data, weight). By the chain rule the share of
example i along a direction U of the parameters is sum over sites of <dl_i/dy, df/dweight U>.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from ..autocast import Autocast, current
from ..functional import load_forward_mode
from ..generators import random_state
from .functions import FUNCTIONS, unwritten


@dataclass(frozen=True)
class Weight:
    """A tensor made of parameters alone: which ones, and how it was made (None for a parameter itself)."""

    tensor: Tensor
    names: frozenset[str]
    maker: "Call | None" = None


@dataclass(frozen=True)
class Call:
    """One torch call: flat arguments, and which of them are weights (position in `leaves` -> Weight).

    output: which element, where the call returns a tuple. random: the generator's state before the call, where it has
    no closed form and may have to run again (dropout inside attention). autocast: what it ran under.
    """

    function: Callable[..., Any]
    leaves: tuple[Any, ...]
    spec: Any
    weights: dict[int, Weight]
    output: int | None = None
    random: Tensor | None = None
    autocast: Autocast | None = None

    def run(self, replaced: dict[int, Tensor]) -> Tensor:
        """Call again with some of the flat arguments replaced."""
        leaves = [replaced.get(i, leaf) for i, leaf in enumerate(self.leaves)]
        args, kwargs = tree_unflatten(leaves, self.spec)
        with self.autocast.entered() if self.autocast else nullcontext():
            out = self.function(*args, **kwargs)
        return out if self.output is None else out[self.output]

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tree_unflatten(list(self.leaves), self.spec)


@dataclass(frozen=True)
class Site:
    """A call where weights meet data: its output's shape, place in the autograd graph and, on request, value.

    volatile: which of its rows are whose may differ from batch to batch of one shape. placed: the same, where Python reads
    what it read here. mixed: rows of the data had met other rows of it by then.
    """

    call: Call
    shape: torch.Size
    edge: GradientEdge
    value: Tensor | None = None
    volatile: bool = False
    placed: bool = False
    mixed: bool = False


class SiteTracer(TorchFunctionMode):
    """Collects the sites of the calls made while it is active.

    parameters: name -> the very tensor that the model will use. data: the tensors of the batch. values: keep a copy of
    every site's output. keep: keep the gradient of every site's output when a backward pass comes by.
    """

    def __init__(
        self, parameters: dict[str, Tensor], data: Sequence[Any], values: bool = False, keep: bool = False
    ) -> None:
        super().__init__()
        self.parameters = parameters
        self.deltas: dict[int, Tensor] = {}  # by number of the site, what a backward pass brought to it
        self._values, self._keep = values, keep
        self.sites: list[Site] = []
        self.bytes = 0  # that the calls on data returned
        # parameters used by a call that cannot run a second time, or on data whose layout depends on their content
        self.unsplit: set[str] = set()
        self.escaped = False  # whether Python has read a value of the data
        self.read: list[str | None] = []  # the values; None for what is none
        self.mixed = False  # whether rows of the data met other rows of it, so that losses may depend on each other
        self._data = WeakTensorKeyDictionary()
        self._ragged = WeakTensorKeyDictionary()
        self._volatile = WeakTensorKeyDictionary()
        self._weights = WeakTensorKeyDictionary()
        for t in data:
            if isinstance(t, Tensor):
                self._data[t] = True
        for name, p in parameters.items():
            self._weights[p] = Weight(p, frozenset([name]))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _COMPOSITES:
            with self:
                return _COMPOSITES[func](*args, **kwargs)
        leaves, spec = tree_flatten(unwritten(func, args, kwargs))
        tensors = [(i, t) for i, t in enumerate(leaves) if isinstance(t, Tensor)]
        weights = {i: self._weights[t] for i, t in tensors if t in self._weights}
        self._meet(t for i, t in tensors if i not in weights)
        random = torch.get_rng_state() if weights and func not in FUNCTIONS else None
        out = func(*args, **kwargs)
        if _name(func) in _ESCAPES and any(t in self._data for _, t in tensors):
            self.escaped = True
            self.read.append(_shown(out))
        outputs = [t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)]
        if _writes(func) and tensors:
            outputs.append(tensors[0][1])
        ragged, volatile = self._spread(func, tensors, outputs)
        if weights and outputs:
            if ragged or _writes(func):
                self.unsplit.update(*(w.names for w in weights.values()))
            else:
                on = current(outputs[0].device.type)
                self._note(Call(func, tuple(leaves), spec, weights, None, random, on), out, volatile)
        return out

    def _meet(self, tensors: Iterable[Tensor]) -> None:
        """What has a gradient and comes from nowhere came out of a call that was not seen: taken for data of any layout."""
        for t in tensors:
            if t.requires_grad and t not in self._data:
                self._data[t] = self._volatile[t] = True

    def _spread(self, func: Any, tensors: list[tuple[int, Tensor]], outputs: list[Tensor]) -> tuple[bool, bool]:
        """Whether the outputs are ragged, and volatile, whatever Python read: noted for each, as whether they are data."""
        read = [t for _, t in tensors if t in self._data]
        data = bool(read)
        self.mixed = self.mixed or (len(read) > 1 and _mixes(func, read))
        ragged = any(t in self._ragged for t in read) or (data and _is_ragged(func, tensors))
        volatile = data and (any(t in self._volatile for t in read) or _picks_by_data(func, read))
        for t in outputs:
            if data:
                self._data[t] = True
                self.bytes += t.nbytes
            if ragged:
                self._ragged[t] = True
            if volatile:
                self._volatile[t] = True
        return ragged, volatile

    def _note(self, call: Call, out: Any, volatile: bool) -> None:
        several = isinstance(out, tuple | list)
        for k, t in enumerate(out if several else (out,)):
            if not (isinstance(t, Tensor) and t.requires_grad):
                continue
            this = replace(call, output=k) if several else call
            if t in self._data:
                value = t.detach().clone() if self._values else None
                if self._keep:
                    t.register_hook(partial(self._note_gradient, len(self.sites)))
                self.sites.append(
                    Site(this, t.shape, get_gradient_edge(t), value, volatile or self.escaped, volatile, self.mixed)
                )
            else:
                names = frozenset().union(*(w.names for w in call.weights.values()))
                self._weights[t] = Weight(t, names, this)

    def _note_gradient(self, site: int, delta: Tensor) -> None:
        known = self.deltas.get(site)
        self.deltas[site] = delta if known is None else known + delta


def _opened(function: Any) -> Any:
    """The same function without the check that hands the whole of it to a mode, so that the calls inside are seen."""
    scope = {**function.__globals__, "has_torch_function": lambda _: False}
    opened = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


_COMPOSITES = {F.multi_head_attention_forward: _opened(F.multi_head_attention_forward)}

# calls whose output's layout over examples depends on the content of the data: packing, selecting
_RAGGED = {"masked_select", "nonzero", "argwhere", "_pack_padded_sequence", "unique", "unique_consecutive"}

# calls that place or order the rows of one tensor by the content of another, or of itself
_PICKING = {"__getitem__", "__setitem__", "index_select", "gather", "take", "take_along_dim", "index_put", "index_add"}
_PICKING |= {"index_copy", "scatter", "scatter_add", "scatter_reduce", "index_put_", "index_add_", "index_copy_"}
_PICKING |= {"scatter_", "scatter_add_", "scatter_reduce_", "masked_scatter", "masked_scatter_"}
_ORDERING = {"sort", "topk", "msort", "kthvalue"}

_MIXING = {"matmul", "__matmul__", "__rmatmul__", "mm", "cdist", "einsum", "linear", "cosine_similarity"}

# calls that hand a value of a tensor to Python
_ESCAPES = {
    "tolist",
    "item",
    "numpy",
    "equal",
    "allclose",
    "is_nonzero",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
}
_ESCAPES |= {"__contains__", "__array__", "__iter__"}


def _shown(value: Any) -> str | None:
    """What tells a value that Python read from others."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {value.tobytes().hex()}"
    return repr(value) if isinstance(value, bool | int | float | list) else None


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", ""))


def _is_ragged(func: Any, tensors: list[tuple[int, Tensor]]) -> bool:
    picks = _name(func) == "__getitem__" and any(t.dtype in (torch.bool, torch.uint8) for _, t in tensors[1:])
    return picks or _name(func) in _RAGGED or (_name(func) == "where" and len(tensors) == 1)


def _picks_by_data(func: Any, read: list[Tensor]) -> bool:
    """read: the arguments that are data."""
    name = _name(func)
    index = any(not (t.is_floating_point() or t.is_complex()) for t in read)
    return name in _ORDERING or (name in _PICKING and index and len(read) > 1)


def _mixes(func: Any, read: list[Tensor]) -> bool:
    """Products and distances of rows with rows; over batches of matrices they stay within an example."""
    return _name(func) in _MIXING and all(t.dim() <= 2 for t in read)


def _writes(func: Any) -> bool:
    name = _name(func)
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"


def tangent(weight: Weight, name: str, direction: Tensor, known: dict[int, Tensor] | None = None) -> Tensor:
    """How a weight moves when the parameter `name` moves along `direction`: (*parameter) -> (*weight).

    known: by id of a weight's tensor, what was found for this direction already: a weight may be used many times over.
    """
    if weight.maker is None:
        return direction
    known = {} if known is None else known
    if id(weight.tensor) not in known:
        moving = {i: w for i, w in weight.maker.weights.items() if name in w.names}
        along = {i: (w.tensor, tangent(w, name, direction, known)) for i, w in moving.items()}
        known[id(weight.tensor)] = jvp(weight.maker, along).to(direction.dtype)
    return known[id(weight.tensor)]


def remade(weight: Weight, leaves: dict[str, Tensor], known: dict[int, Tensor] | None = None) -> Tensor:
    """The weight computed again from parameters by name, with a graph of its own."""
    if weight.maker is None:
        return leaves[next(iter(weight.names))]
    known = {} if known is None else known
    if id(weight.tensor) not in known:
        again = {i: remade(w, leaves, known) for i, w in weight.maker.weights.items()}
        with random_state(weight.maker.random):
            known[id(weight.tensor)] = weight.maker.run(again)
    return known[id(weight.tensor)]


def jvp(call: Call, moving: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
    """Forward-mode derivative of a call along (primal, tangent) of some of its flat arguments."""
    positions = list(moving)

    def run(*primals: Tensor) -> Tensor:
        return call.run(dict(zip(positions, primals, strict=True)))

    load_forward_mode()
    primals = tuple(moving[i][0].detach() for i in positions)
    tangents = tuple(moving[i][1].to(moving[i][0].dtype) for i in positions)
    try:
        with random_state(call.random):
            return torch.func.jvp(run, primals, tangents)[1]
    except (NotImplementedError, RuntimeError) as error:
        try:
            with random_state(call.random):
                return _transposed_twice(run, primals, tangents)
        except RuntimeError:
            raise error from None


def _transposed_twice(run: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    """The same where a call has no forward-mode rule: <c, jvp> = <vjp(c), tangent>, differentiated by c."""
    with torch.enable_grad():
        leaves = [p.detach().requires_grad_() for p in primals]
        out = run(*leaves)
        cotangent = torch.zeros_like(out, requires_grad=True)
        pulled = torch.autograd.grad(out, leaves, cotangent, create_graph=True, allow_unused=True)
        total = sum((p * t).sum() for p, t in zip(pulled, tangents, strict=True) if p is not None)
        found = torch.autograd.grad(total, cotangent, allow_unused=True)[0] if isinstance(total, Tensor) else None
    return torch.zeros_like(out) if found is None else found.detach()
