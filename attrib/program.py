"""Run the same function of tensors many times without the cost of following it in Python each time.

At the second call of one kind the function is followed once more and the ATen operations that it makes, forward and
backward, are noted as a graph (torch.fx). The graph is compared once with the function itself on other inputs, and from
then on run in its place. Where Python reads a value of what it computes (`mask.all()`, lengths), the graph gives that value
too, and its results count where it is what it was; else, and where the shape of a result depends on values, the function is
called.
"""

import logging
import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from .generators import drew_beyond_torch, generators, set_generators

log = logging.getLogger("attrib")

TRACE_AFTER = 2  # calls of a kind: what is met once, such as a batch of another length, is not worth it
KINDS = 64  # traced at most


# calls by which Python reads a value of a tensor
_READS = {"tolist", "item", "numpy", "equal", "allclose", "is_nonzero", "__bool__", "__int__", "__float__", "__index__"}
_READS |= {"__contains__", "__array__"}
VIEWS = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default}
MISSES = 4  # results thrown away because a value was another, more than were kept: then the graph goes


class _Reads(TorchFunctionMode):
    """While active, what Python reads off a tensor is noted on the tape. (`tolist` and `numpy` make no ATen operation.)"""

    def __init__(self, tape: "Tape") -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _READS:
            self._tape.guard(args, kwargs)
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """Notes every ATen operation while it is active. Its graph takes `inputs`, then the tensors met from elsewhere.

    (torch's make_fx does more, and takes tens of times as long: it also works out shapes without values and keeps the
    place in the code of every operation.)
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants: list[Tensor] = []
        self._known: dict[int, tuple[fx.Node, Tensor]] = {}  # held, so that no id is given twice
        self._moving: set[fx.Node] = set()  # that depend on the inputs, or on random numbers
        self.guards: list[tuple[Tensor, Tensor]] = []  # tensors that were read, and what they held
        for n, t in enumerate(inputs):
            self._known[id(t)] = self.graph.placeholder(f"input_{n}"), t
        self._moving.update(self.graph.nodes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.dynamic_output_shape in func.tags and _shaped_by_values(
            func, tree_flatten((args, kwargs))[0], self.moves
        ):
            raise TypeError(f"the shape of {func} depends on values")
        out = func(*args, **(kwargs or {}))
        if torch.Tag.data_dependent_output in func.tags:
            self.guard(args, kwargs)
            return out
        node = self.graph.call_function(func, self._node(tuple(args)), self._node(kwargs or {}))
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        if drawn or not self._moving.isdisjoint(node.all_input_nodes):
            self._moving.add(node)
        several = isinstance(out, tuple | list)
        for k, t in enumerate(out if several else (out,)):
            if isinstance(t, Tensor):
                part = self.graph.call_function(operator.getitem, (node, k)) if several else node
                if node in self._moving:
                    self._moving.add(part)
                self._known[id(t)] = part, t
        return out

    def guard(self, args: Any, kwargs: Any) -> None:
        """Python reads values of these."""
        for t in tree_flatten((args, kwargs))[0]:
            if self.moves(t) and not any(t is known for known, _ in self.guards):
                self.guards.append((t, t.detach().clone()))

    def moves(self, t: Any) -> bool:
        """Whether a tensor may hold something else the next time."""
        return id(t) in self._known and self._known[id(t)][0] in self._moving

    def _node(self, value: Any) -> Any:
        """Of a tensor its node, of what holds some the same of these. (A pytree would take as long as all the rest.)"""
        if isinstance(value, list | tuple):
            return type(value)(self._node(v) for v in value)
        if isinstance(value, dict):
            return {key: self._node(v) for key, v in value.items()}
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._known:
            first = self._first_call()
            with nullcontext() if first is None else self.graph.inserting_before(first):
                self._known[id(value)] = self.graph.placeholder(f"constant_{len(self.constants)}"), value
            self.constants.append(value)
        return self._known[id(value)][0]

    def _first_call(self) -> fx.Node | None:
        return next((n for n in self.graph.nodes if n.op != "placeholder"), None)

    def closed(self, outputs: Sequence[Tensor]) -> fx.Graph:
        """It gives the outputs, then what was read."""
        self.graph.output([self._node(t) for t in (*outputs, *(t for t, _ in self.guards))])
        for node in self.graph.nodes:
            if node.target is torch.ops.aten.detach.default:
                node.replace_all_uses_with(node.args[0])
            if node.target in VIEWS:  # of strides that may be others where the graph is mapped
                node.target = torch.ops.aten.reshape.default
        self.graph.eliminate_dead_code()
        return self.graph


def _shaped_by_values(func: Any, leaves: list[Any], moves: Callable[[Any], bool]) -> bool:
    """Whether the shape of what a call returns, one that is tagged so, may be another for other values of what moves.
    (Indexing is tagged so, and is so by masks alone.)"""
    if func is torch.ops.aten.index.Tensor:
        leaves = [t for t in leaves[1:] if isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8)]
    return any(map(moves, leaves))


class Taped:
    """A graph in the place of a function. outside: the tensors that it met on the way; read: the values that Python read
    there."""

    def __init__(self, function: Callable[[Sequence[Tensor]], Any], inputs: Sequence[Tensor]) -> None:
        given = [t.detach() for t in inputs]
        tape = Tape(given)
        with tape, _Reads(tape):
            leaves, self._spec = tree_flatten(function(given))
        outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._graph, self.outside = tape.closed(outputs), tape.constants
        self._constants = [_Here() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.read = [value for _, value in tape.guards]

    @cached_property
    def _code(self) -> Callable[..., list[Tensor]]:
        """The tensors of the result, then what was read. (A module's call takes half as long again.)"""
        forward: Callable[..., list[Tensor]] = fx.GraphModule(torch.nn.Module(), self._graph).forward
        return forward

    def once(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The same, operation by operation: for a single time code is not worth making."""
        values, given = dict[fx.Node, Any](), iter((*inputs, *self.outside))
        for node in self._graph.nodes:
            args, kwargs = (fx.node.map_arg(a, values.__getitem__) for a in (node.args, node.kwargs))
            if node.op == "output":
                return tuple(args[0])
            values[node] = next(given) if node.op == "placeholder" else node.target(*args, **kwargs)
        raise AssertionError("a graph ends in its output")

    def __call__(self, inputs: Sequence[Tensor]) -> list[Any] | None:
        """The leaves of the result; None where something that was read is not what it was, or the graph does not fit it. The
        generators are then as they were."""
        start = generators() if self.read else None
        try:
            with torch.no_grad():
                found = self._code(*inputs, *self.outside)
            kept = len(found) - len(self.read)
            fits = all(map(torch.equal, found[kept:], self.read))
        except (RuntimeError, IndexError):
            if not self.read:
                raise
            fits = False
        if not fits:
            assert start is not None
            set_generators(start)
            return None
        outputs = iter(found[:kept])
        return [next(outputs) if isinstance(c, _Here) else c for c in self._constants]

    def result(self, leaves: list[Any]) -> Any:
        return tree_unflatten(leaves, self._spec)


def taped(function: Callable[[Sequence[Tensor]], Any], inputs: Sequence[Tensor]) -> Taped | None:
    """None where a graph cannot hold what the function does. The generators are as they were."""
    random = generators()
    try:
        found = Taped(function, inputs)
        if drew_beyond_torch(random, generators()):
            raise TypeError("it draws numbers that are not torch's")
        return found
    except Exception as error:  # whatever a model does
        log.debug("not traced, run as it is: %s: %s", type(error).__name__, error)
        return None
    finally:
        set_generators(random)


class Program:
    """`function(inputs) -> pytree of tensors and constants`, for inputs of one kind: same shapes and types, and whatever
    else the function depends on."""

    def __init__(self) -> None:
        self._calls = 0
        self._taped: Taped | None = None
        self._checked = False
        self._misses = 0

    def __call__(self, function: Callable[[Sequence[Tensor]], Any], inputs: Sequence[Tensor]) -> Any:
        self._calls += 1
        if self._taped is not None and self._checked:
            leaves = self._taped(inputs)
            if leaves is not None:
                self._misses = max(0, self._misses - 1)
                return self._taped.result(leaves)
            self._misses += 1
            if self._misses >= MISSES:
                self._taped = None
            return function(inputs)
        result = function(inputs)
        if self._taped is not None:
            self._check(self._taped, result, inputs)
        elif self._calls == TRACE_AFTER:
            self._taped = taped(function, inputs)
        return result

    def _check(self, graph: Taped, result: Any, inputs: Sequence[Tensor]) -> None:
        """Against the function's own result: the graph must not hold what belonged to the inputs it was traced with."""
        random = generators()
        try:
            mine, theirs = graph(inputs), tree_flatten(result)[0]
            if mine is None:  # other values were read: to be compared another time
                self._misses += 1
                self._checked = False
                if self._misses < MISSES:
                    return
            else:
                self._checked = len(mine) == len(theirs) and all(map(_same, mine, theirs))
        except Exception as error:
            log.debug("the traced graph fails: %s", error)
        finally:
            set_generators(random)
        if not self._checked:
            self._taped = None
            log.debug("the traced graph gives other numbers than the loss: it is run as it is")


class _Here:
    """Stands for a tensor that the graph returns."""


class Programs:
    """Programs by kind of input."""

    def __init__(self) -> None:
        self._known: dict[Any, Program] = {}

    def __call__(self, kind: Any, function: Callable[[Sequence[Tensor]], Any], inputs: Sequence[Tensor]) -> Any:
        if kind not in self._known and len(self._known) >= KINDS:
            return function(inputs)
        return self._known.setdefault(kind, Program())(function, inputs)


def kind_of(inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """What a graph is specialised to."""
    return tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return bool(a == b)
    if not a.is_floating_point():
        return torch.equal(a, b)
    bound = torch.finfo(a.dtype).eps ** 0.75
    return a.shape == b.shape and torch.allclose(
        a, b, rtol=bound, atol=bound * float(b.abs().max()) if b.numel() else 0.0
    )
