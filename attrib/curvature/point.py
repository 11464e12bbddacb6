"""Where products are taken: the losses of a batch as a function of the parameters that move, and how to differentiate it
for several directions on one primal pass."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ..batch import Batch
from ..errors import LossError
from ..functional import Functional, unwarned
from ..losses import check_graph, check_shape, first_line

log = logging.getLogger("attrib")

Named = dict[str, Tensor]


class Written(TorchFunctionMode):
    """Within it the norm of a weight normalisation is written out: torch's second derivative of it lacks a part."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    others = [d for d in range(v.dim()) if d != dim % v.dim()] if dim != -1 else [*range(v.dim())]
    return v * (g / v.square().sum(others, keepdim=True).sqrt())


class Found(NamedTuple):
    """losses (B,), or an objective (1,); along (Q, B): d loss_i / d theta times each direction; hessian: by name of a
    parameter that moves (Q, *shape). gap (Q,): how far sum_i w_i along_i is from <G(w), V>, G(w) the gradient that training
    has, relative to their terms."""

    losses: Tensor
    along: Tensor
    hessian: Named
    gap: Tensor


@dataclass(frozen=True)
class Point:
    """parameters, moving: all of them by name, and the names of those that move. weights: (B,), of the losses. buffers: in
    the place of those that `loss` holds. checked: whether a gap is asked for; without, the gradient of the parameters need
    not be made."""

    loss: Functional
    parameters: Named
    moving: tuple[str, ...]
    batch: Batch
    weights: Tensor
    buffers: Named
    checked: bool = True

    @contextmanager
    def bound(self, moving: Named) -> Iterator[None]:
        """The model holds these; attention goes by plain mathematics: the fused kernels have one derivative."""
        with sdpa_kernel(SDPBackend.MATH), self.loss.bound({**self.parameters, **moving}, self.buffers):
            yield

    def losses(self) -> Tensor:
        """(B,), or an objective as (1,): within `bound`."""
        with Written():
            values = self.loss.run(*self.batch.args)
        self.loss.check_constants()
        return values[None] if isinstance(values, Tensor) and values.dim() == 0 else check_shape(values, self.batch)

    def values(self) -> Tensor:
        """The same by a pass of their own."""
        with torch.enable_grad(), self.bound(self.leaves()):  # a loss may differentiate on its way
            return self.losses().detach()

    def weighted(self, losses: Tensor, weights: Tensor) -> Tensor:
        """sum_i w_i loss_i, in the type of the losses; an objective has one weight."""
        return (losses * weights[: len(losses)].to(losses.dtype)).sum()

    def gap(self, along: Tensor, gradient: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
        """That of `Found`, from the gradient of the weighted losses; zeros where it is not asked for."""
        if not self.checked:
            return along.new_zeros(len(along))
        terms = along * self.weights[: along.shape[1]].to(along.dtype)
        gap, size = terms.sum(1), terms.abs().sum(1)
        for g, v in zip(gradient, directions, strict=True):
            flat, rows = g.detach().flatten(), v.flatten(1) if v.dim() > 1 else v[:, None]
            gap, size = gap - rows @ flat, size + rows.norm(dim=1) * flat.norm()
        return gap.abs() / size.clamp(min=torch.finfo(size.dtype).tiny)

    def leaves(self) -> Named:
        """Of those that move."""
        return {name: self.parameters[name].detach().requires_grad_() for name in self.moving}


def pulled(
    values: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor] | None = None, create: bool = False
) -> list[Tensor]:
    """The gradient of a number, or of tensors times cotangents, by the inputs, with a graph of its own where `create`;
    zeros of what there is no way to."""
    if not any(v.requires_grad for v in values):
        return [torch.zeros_like(i) for i in inputs]
    found = _grad(values, inputs, cotangents, create_graph=create)
    return [torch.zeros_like(i) if f is None else f for i, f in zip(inputs, found, strict=True)]


def times(values: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of `values` times cotangents (Q, *value), of each of the Q: (Q, *input); all at once where every
    operation maps over them."""
    count, moving = len(cotangents[0]), [n for n, v in enumerate(values) if v.requires_grad]
    values, cotangents = [values[n] for n in moving], [cotangents[n] for n in moving]
    each = _times(values, inputs, cotangents, count) if moving else [None for _ in inputs]
    return [i.new_zeros(count, *i.shape) if f is None else f for i, f in zip(inputs, each, strict=True)]


def _times(
    values: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], count: int
) -> Sequence[Tensor | None]:
    if count > 1:
        try:
            with unwarned():
                return _grad(values, inputs, cotangents, is_grads_batched=True)
        except LossError:
            raise
        except RuntimeError as error:  # of an operation that does not map
            log.debug("products with the Hessian one by one: %s", first_line(error))
    rows = zip(*(_grad(values, inputs, [c[q] for c in cotangents]) for q in range(count)), strict=True)
    return [None if row[0] is None else torch.stack([t for t in row if t is not None]) for row in rows]


def _grad(
    values: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor] | None, **options: bool
) -> Sequence[Tensor | None]:
    grad: Callable[..., tuple[Tensor | None, ...]] = torch.autograd.grad
    try:
        return grad(values, inputs, cotangents, allow_unused=True, retain_graph=True, **options)
    except RuntimeError as error:
        check_graph(error)
        raise
