"""A measurement as a graph of core ATen operations, run at two ends at once and swept backwards by discrete rules.

The graph is traced once (functionalised: no in-place operations; attention through the plain-mathematics backend) and then
interpreted. What depends on neither parameters nor queries is computed once, what does not depend on parameters once
per pair of ends.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UntraceableModelError
from ..functional import as_written
from .ends import Ends, Values, run_node
from .reads import reads
from .rules import pull

aten = torch.ops.aten


def _centred(x: Tensor, dim: Any, correction: float | None, keepdim: bool) -> Tensor:
    dims = list(range(x.dim())) if dim is None or dim == [] else list(dim)
    count = 1
    for d in dims:
        count *= x.shape[d]
    offset = x - x.mean(dims, keepdim=True)
    return (offset * offset).sum(dims, keepdim=keepdim) / (count - (1 if correction is None else correction))


def _var(x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return _centred(x, dim, correction, keepdim)


def _var_mean(
    x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    dims = list(range(x.dim())) if dim is None or dim == [] else list(dim)
    return _centred(x, dim, correction, keepdim), x.mean(dims, keepdim=keepdim)


def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lookups, and sums (0), means (1) or maxima (2) over each bag. torch runs it where it keeps no derivative."""
    starts = offsets[:-1] if include_last_offset else offsets
    bag = (torch.arange(len(indices), device=indices.device).unsqueeze(1) >= starts).sum(1) - 1
    inside = bag == torch.arange(len(starts), device=indices.device).unsqueeze(1)
    if padding_idx >= 0:
        inside = inside & (indices != padding_idx)
    rows = aten.embedding(weight, indices)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(1)
    if mode == 2:
        largest = rows.masked_fill(~inside.unsqueeze(2), -torch.inf).amax(1)
        out = torch.where(inside.any(1).unsqueeze(1), largest, torch.zeros_like(largest))
    else:
        member = inside.to(weight.dtype)
        out = member @ rows
        out = out / member.sum(1, keepdim=True).clamp(min=1.0) if mode == 1 else out
    return out, bag, inside.sum(1), bag


# Normalisations fall apart into products, means and reciprocal roots, each of which has an exact rule.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    **get_decompositions(
        [
            aten.native_layer_norm,
            aten.native_group_norm,
            aten._fused_rms_norm,
            aten.native_batch_norm,
            aten._native_batch_norm_legit_no_training,
            aten.cudnn_batch_norm,
            aten.log_sigmoid_forward,
            aten.linalg_vector_norm,
            aten.addcmul,
            aten.addcdiv,
            aten.std,
            aten.std_mean,
        ]
    ),
    aten._embedding_bag.default: _embedding_bag,
    aten._embedding_bag_forward_only.default: _embedding_bag,
    aten.var.correction: _var,
    aten.var_mean.correction: _var_mean,
}


# operations that read the shape of their input, not its values
SHAPE_ONLY = {aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like}
SHAPE_ONLY |= {aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty}


class Graph:
    """Traced from `function(*moving, *rows) -> Tensor`, `moving` being the parameters. It holds for rows that it `fits`.

    kept: the nodes whose values are worth keeping of a state; where there are rows, those that differ from row to row.

    Raises:
        UntraceableModelError: the function cannot be traced.
    """

    def __init__(self, function: Callable[..., Tensor], moving: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
        self.module = _trace(function, [*moving, *rows])
        nodes = list(self.module.graph.nodes)
        inputs = [n for n in nodes if n.op == "placeholder"]
        self.moving, self.rows = inputs[: len(moving)], inputs[len(moving) :]
        self.output, values, shapes = next(n for n in nodes if n.op == "output").args[0]
        active = _downstream(nodes, self.moving)
        varying = _downstream(nodes, self.rows)
        calls = [n for n in nodes if n.op == "call_function"]
        self.active = [n for n in calls if n in active]
        self.per_row = [n for n in calls if n not in active and n in varying]
        self.kept = [n for n in self.active if n in varying] if self.rows else self.active
        attributes = {n: _attribute(self.module, n.target) for n in nodes if n.op == "get_attr"}
        example = {**attributes, **dict(zip(inputs, [*moving, *rows], strict=True))}
        for n in calls:
            example[n] = run_node(n, example)
        for n in self.active:
            if isinstance(example[n], Tensor) and example[n].is_complex():
                raise _untraceable(f"complex numbers at {n.target} (write the transform with cosines and sines)")
        self.fixed = attributes | {n: example[n] for n in calls if n not in active and n not in varying}
        if any(n in active for n in values):
            raise _untraceable("a value that depends on the parameters")
        # shapes that parameters decide are this graph's: where they are others at another end, it has no way through
        self.reads = [(n, example[n]) for n in [*values, *shapes] if n in varying and n not in active]

    def fits(self, rows: Sequence[Tensor]) -> bool:
        """Whether of these rows the same is read as of those that it was traced with."""
        try:
            values = self._common(rows) if self.reads else {}
        except (RuntimeError, IndexError):  # of another shape on the way
            return False
        return all(torch.equal(values[n], held) for n, held in self.reads)

    def _common(self, rows: Sequence[Tensor]) -> Values:
        """The values of all that does not depend on the parameters."""
        common = {**self.fixed, **dict(zip(self.rows, rows, strict=True))}
        for n in self.per_row:
            common[n] = run_node(n, common)
        return common

    def forward(self, moving0: Sequence[Tensor], moving1: Sequence[Tensor], rows: Sequence[Tensor]) -> Ends:
        """Every value at both ends."""
        both = moving0, moving1
        return self.ends(both, rows, [self.values(moving, rows) for moving in both])

    def values(self, moving: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Any]:
        """Those that are kept of one end."""
        found = self._values(self._common(rows), moving)
        return [found[n] for n in self.kept]

    def ends(self, moving: Iterable[Sequence[Tensor]], rows: Sequence[Tensor], kept: Iterable[list[Any]]) -> Ends:
        """Every value at both ends, of each its parameters and what is kept."""
        common = self._common(rows)
        known = (dict(zip(self.kept, values, strict=True)) for values in kept)
        return Ends(*(self._values(common | k, m) for k, m in zip(known, moving, strict=True)))

    def value(self, moving: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
        """The output."""
        found: Tensor = self._values(self._common(rows), moving)[self.output]
        return found

    def _values(self, common: Values, moving: Sequence[Tensor]) -> Values:
        values = {**common, **dict(zip(self.moving, moving, strict=True))}
        for n in self.active:
            if n not in values:
                values[n] = run_node(n, values)
        return values

    def backward(self, c: Tensor, ends: Ends) -> list[Tensor]:
        """Cotangent of the output -> cotangents of the moving inputs, <c, y1 - y0> = sum_i <c_i, dx_i>."""
        moving = {*self.active, *self.moving}
        cotangents: dict[fx.Node, Any] = {self.output: c}
        for n in reversed(self.active):
            if n in cotangents:
                for source, inward in self._pull(n, cotangents.pop(n), ends, moving):
                    known = cotangents.get(source)
                    cotangents[source] = inward if known is None else _add(known, inward)
        return [cotangents[n] if n in cotangents else torch.zeros_like(ends.first[n]) * c.sum() for n in self.moving]

    def _pull(self, node: fx.Node, c: Any, ends: Ends, moving: set[fx.Node]) -> list[tuple[fx.Node, Any]]:
        try:
            return list(pull(node, c, ends, moving))
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise _untraceable(f"no way through {node.target} ({error})") from error


def _add(a: Any, b: Any) -> Any:
    """Cotangents of one value; those of a tuple are dicts by position."""
    if isinstance(a, dict):
        return {k: _add(a[k], b[k]) if k in a and k in b else a.get(k, b.get(k)) for k in {*a, *b}}
    return a + b


def _trace(function: Callable[..., Tensor], inputs: list[Tensor]) -> fx.GraphModule:
    def trace(f: Callable[..., Any]) -> fx.GraphModule:
        return make_fx(f, decomposition_table=DECOMPOSITIONS, tracing_mode="real")(*inputs)

    pure = torch.func.functionalize(function, remove="mutations")

    def read(*given: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        with reads() as read:
            value = pure(*given)
        return value, read.values, read.shapes

    try:
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), as_written():
            module = trace(read)
            if any(_mutates(n) for n in module.graph.nodes):  # some decompositions write in place
                module = trace(torch.func.functionalize(module, remove="mutations"))
    except Exception as error:
        raise _untraceable(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    for n in module.graph.nodes:
        if (
            n.target is aten.embedding.default
        ):  # what else there is changes torch's derivative alone: of a padding row, none
            n.args = n.args[:2]
    module.graph.eliminate_dead_code()
    return module


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _untraceable(reason: str) -> UntraceableModelError:
    return UntraceableModelError(
        f"the measurement cannot be traced to a graph: got {reason}, expected torch operations without data-dependent "
        f"control flow. Pass path=attrib.GaussLegendre(nodes=4), which needs gradients only."
    )


def _downstream(nodes: Sequence[fx.Node], sources: Sequence[fx.Node]) -> set[fx.Node]:
    """All nodes whose values depend on the sources'."""
    reached = set(sources)
    for n in nodes:
        if getattr(n.target, "overloadpacket", None) not in SHAPE_ONLY and any(i in reached for i in n.all_input_nodes):
            reached.add(n)
    return reached


def _attribute(module: fx.GraphModule, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value
