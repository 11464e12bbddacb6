"""Products with the Hessian of the loss itself, and two ways to them.

    forward   d/de of (losses, G(w)) at theta + e V       dual numbers through a backward pass, mapped over V: what does not
                                                          depend on V is computed once
    double    <G(w), V>, differentiated by theta and w    a backward pass through the backward pass: H V, and (<V, g_i>)_i

with G(w) = d (w . losses) / d theta. `double` is what training's own backward passes say, so it is the truth of the two:
forward mode goes through `torch.no_grad()`, and through operations whose backward is not the derivative of their forward.
Both cost two more passes there and back for each V by count; `forward` has less to do again for several V, more for one.
Source: Pearlmutter 1994.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..functional import load_forward_mode, mapped
from .point import Found, Named, Point, pulled, times

jvp: Callable[..., Any] = torch.func.jvp  # typed by torch as if they always returned auxiliary values
vjp: Callable[..., Any] = torch.func.vjp


def forward(point: Point, directions: Named) -> Found:
    """directions: by name of a parameter that moves (Q, *shape)."""
    load_forward_mode()
    fixed = {name: point.parameters[name].detach() for name in point.moving}

    def losses(moving: Named) -> Tensor:
        with point.bound(moving):
            return point.losses()

    def gradient(moving: Named) -> tuple[Named, Tensor]:
        found, back = vjp(losses, moving)
        return back(point.weights[: len(found)].to(found.dtype))[0], found

    def one(direction: Named) -> tuple[Named, Tensor, Tensor, Named]:
        (slope, found), (hessian, along) = jvp(gradient, (fixed,), (direction,))
        return hessian, along, found, slope

    hessian, along, found, slope = mapped(one, randomness="same")(directions)
    along, names = along.detach(), [*directions]
    gap = point.gap(along, [slope[name][0] for name in names], [directions[name] for name in names])
    return Found(found[0].detach(), along, {name: h.detach() for name, h in hessian.items()}, gap)


def double(point: Point, directions: Named) -> Found:
    """directions: by name of a parameter that moves (Q, *shape)."""
    leaves = point.leaves()
    weights = point.weights.detach().requires_grad_()
    with torch.enable_grad(), point.bound(leaves):
        losses = point.losses()
        gradient = pulled([point.weighted(losses, weights)], [*leaves.values()], create=True)
        found = times(gradient, [*leaves.values(), weights], [directions[name] for name in leaves])
    along = found.pop()[:, : len(losses)]
    gap = point.gap(along, gradient, [directions[name] for name in leaves])
    return Found(losses.detach(), along, dict(zip(leaves, found, strict=True)), gap)
