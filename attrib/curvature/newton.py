"""Products with the generalised Gauss-Newton matrix: the curvature of the loss in what the model returns.

    out = model(...), whatever the loss calls it with, however often        losses = l(out)
    J = d out / d theta       A = d2 (w . l) / d out2       H V  ->  J^T A J V

It lacks the curvature of the model itself; where l is convex it has no negative directions. J V by the transposed product:
<J^T u, V>, differentiated by u, so that a second derivative is all it asks of an operation. A call that is given what others
returned is followed through them. What the loss does with parameters beside the model has no part in H; the derivative of
the losses along V has all. Source: Schraudolph 2002.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..errors import LossError
from ..losses import first_line
from .outputs import Output, cut_off
from .point import Found, Named, Point, pulled, times

Pull = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


def gauss_newton(point: Point, directions: Named) -> Found:
    """directions: by name of a parameter that moves (Q, *shape)."""
    leaves = point.leaves()
    weights, inputs = point.weights.detach().requires_grad_(), [*leaves.values()]
    along_of = [directions[name] for name in leaves]
    with torch.enable_grad(), point.bound(leaves), cut_off(point.loss.model) as calls:
        losses = point.losses()
        ends = [o.leaf for call in calls for o in call]
        slopes = pulled([point.weighted(losses, weights)], [*ends, *inputs], create=True)
        inner, beside = slopes[: len(ends)], slopes[len(ends) :]
        u = [torch.zeros_like(end, requires_grad=True) for end in ends]
        moved = times(_back(calls, u, inputs, partial(pulled, create=True)), u, along_of)
        *curved, along = times(inner, [*ends, weights], moved)
        (direct,) = times(beside, [weights], along_of)
        found = _back(calls, curved, inputs, times)
    along = (along + direct)[:, : len(losses)]
    return Found(losses.detach(), along, dict(zip(leaves, found, strict=True)), along.new_zeros(len(along)))


def _back(
    calls: Sequence[Sequence[Output]], cotangents: Sequence[Tensor], inputs: Sequence[Tensor], pull: Pull
) -> list[Tensor]:
    """From what the calls returned to the inputs, the last call first: what it was given of others' goes to theirs."""
    rest, total = list(cotangents), list[Tensor]()
    for n in reversed(range(len(calls))):
        mine = [rest.pop() for _ in calls[n]][::-1]
        before = [o.leaf for call in calls[:n] for o in call]
        found = pull([o.made for o in calls[n]], [*inputs, *before], mine)
        total = [a + b for a, b in zip(total, found, strict=False)] or found[: len(inputs)]
        rest = [a + b for a, b in zip(rest, found[len(inputs) :], strict=True)]
    return total


def check_outputs(point: Point) -> None:
    """Raise LossError where the loss has no curvature in what the model returns."""
    leaves = point.leaves()
    with torch.enable_grad(), point.bound(leaves), cut_off(point.loss.model) as calls:
        try:
            total = point.weighted(point.losses(), point.weights)
        except RuntimeError as error:  # it differentiates the model on its way
            raise LossError(
                f"the loss is no function of what the model returns: got {first_line(error)} where outputs are cut off from "
                f"the model, expected a loss that takes their values alone. Leave the curvature exact."
            ) from error
        ends = [o.leaf for call in calls for o in call]
        slopes = _reached(total, ends)
        if not slopes:
            raise LossError(
                f"the loss takes nothing that the model returns: got {len(calls)} calls of the model, none of which it "
                f"depends on, expected one. Gauss-Newton is the curvature of the loss in what the model returns: call the "
                f"model itself in the loss, not its parts, or leave the curvature exact."
            )
        try:
            curved = any(_reached(slope.sum(), ends) for slope in slopes)
        except RuntimeError:  # an operation has no second derivative, which is found out by the first products
            return
        if not curved:
            raise LossError(
                "the loss is linear in what the model returns: got a second derivative of nothing, expected a loss that is "
                "computed from outputs such as logits. Compute it outside of the model's forward, or leave the curvature "
                "exact."
            )


def _reached(value: Tensor, ends: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of a number by those of the ends that it depends on."""
    if not value.requires_grad or not ends:
        return []
    found = torch.autograd.grad(value, ends, create_graph=True, allow_unused=True)
    return [slope for slope in found if slope is not None]
