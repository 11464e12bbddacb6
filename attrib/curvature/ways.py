"""Which way products go for batches of one kind: each is tried once, and compared with the other on the batch at hand.

Where both work and agree, several directions go forward, one alone by a second backward pass: by measurement, on networks of
10 000 to a million parameters. Where they disagree the second backward pass is right, which is what training's own is made
of. The first derivative along V is compared with the gradient's at every batch, sum_i w_i <V, g_i> = <G(w), V>: whatever
forward mode sees that a backward pass does not, or a second backward pass misses of the first, shows there.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..constants import rounding
from ..errors import LossError
from ..generators import set_generators
from ..losses import check_finite, first_line
from .exact import double, forward
from .newton import check_outputs, gauss_newton
from .point import Found, Named, Point, pulled

log = logging.getLogger("attrib")

Way = Callable[[Point, Named], Found]
WAYS: dict[str, dict[str, Way]] = {
    "exact": {"double": double, "forward": forward},
    "gauss-newton": {"double": gauss_newton},
}


def restart(start: Tensor | None) -> None:
    """Put the generators to a state; None where nothing is drawn."""
    if start is not None:
        set_generators(start)


class Ways:
    """Args: kind: of the products, a key of WAYS."""

    def __init__(self, kind: str) -> None:
        self._all = WAYS[kind]
        self._newton = kind == "gauss-newton"
        self._works: dict[Any, list[str]] = {}  # by kind of batch

    def of(self, point: Point, directions: Named, start: Tensor | None) -> str:
        """The name of one. start: the state of the generators that passes start from."""
        kind = point.moving, point.batch.kind
        if kind not in self._works:
            if self._newton:
                restart(start)
                check_outputs(point)
            one = {n: v[:1] for n, v in directions.items()}
            self._works[kind] = self._tried(replace(point, checked=True), one, start)
            log.debug("products with the Hessian go by %s", " or ".join(self._works[kind]))
        works, several = self._works[kind], any(len(v) > 1 for v in directions.values())
        return "forward" if "forward" in works and (several or "double" not in works) else "double"

    def fail(self, point: Point, way: str) -> bool:
        """An operation that was not met before lacks what a way needs: whether there is another."""
        works = self._works[point.moving, point.batch.kind]
        if len(works) == 1:
            return False
        works.remove(way)
        return True

    def run(self, way: str, point: Point, directions: Named) -> Found:
        """Products by a way of that name."""
        return self._all[way](point, directions)

    def _tried(self, point: Point, one: Named, start: Tensor | None) -> list[str]:
        found: dict[str, Found] = {}
        reasons: list[str] = []
        for name in self._all:
            restart(start)
            try:
                products = self.run(name, point, one)
                if self._newton:
                    products = first_order(point, one, products, start)
                found[name] = check_right(products, point)
            except LossError:
                raise
            except RuntimeError as error:  # of an operation without such a derivative
                log.debug("no products with the Hessian by %s: %s", name, error)
                reasons.append(first_line(error))
        if len(found) == 2 and agree(found["forward"], found["double"], point):
            return [*found]
        works = "double" if "double" in found else next(iter(found), None)
        if works is None:
            raise lacking(reasons)
        if not self._newton and not differs_as_told(point, one, found[works].hessian, start):
            log.warning(
                "the Hessian of the loss by a second backward pass is not how its gradient changes: a part is computed "
                "without gradients, or the backward of an operation is not its derivative. Products take what a second "
                "backward pass says"
            )
        return [works]


def lacking(reasons: list[str]) -> LossError:
    """What to say where there is no way."""
    return LossError(
        f"the loss has no second derivative: got {'; '.join(reasons)}, expected operations that can be differentiated "
        f"twice. Write such an operation out of others, or give its function a backward that is made of torch's."
    )


def check_right(found: Found, point: Point) -> Found:
    """Raise RuntimeError where the first derivative along a direction is not what the gradient says: then the second is not
    to be trusted either. It is missed by order one; rounding leaves far less. LossError: a loss is not finite."""
    check_finite(found.losses)
    loss = point.loss
    bound = rounding(loss.precision) if loss.coarse else float(torch.finfo(found.gap.dtype).eps ** 0.5)
    gap = float(found.gap.max())
    if gap > bound:
        raise RuntimeError(f"a derivative along a direction is off by {gap:.1g} of its terms")
    return found


def gradient(point: Point, start: Tensor | None) -> list[Tensor]:
    """Of the weighted losses by the parameters that move: one backward pass."""
    restart(start)
    leaves = point.leaves()
    with torch.enable_grad(), point.bound(leaves):
        return pulled([point.weighted(point.losses(), point.weights)], [*leaves.values()])


def first_order(point: Point, one: Named, found: Found, start: Tensor | None) -> Found:
    """With the gap to the gradient that a backward pass of its own has."""
    return found._replace(gap=point.gap(found.along, gradient(point, start), [*one.values()]))


def differs_as_told(point: Point, one: Named, hessian: Named, start: Tensor | None) -> bool:
    """Whether H V is what differences of gradients say, where they say anything: in double precision, and the same for half
    the step, as they do not where kinks are crossed."""
    if point.weights.dtype != torch.float64 or point.loss.coarse:
        return True
    told = torch.cat([hessian[name].flatten() for name in one])

    def moved(by: float) -> list[Tensor]:
        named = {name: point.parameters[name] + by * v[0] for name, v in one.items()}
        return gradient(replace(point, parameters={**point.parameters, **named}), start)

    size = float(torch.cat([v.flatten() for v in one.values()]).norm())
    differences = []
    for step in (1e-5 / size, 5e-6 / size) if size else ():
        pairs = zip(moved(step), moved(-step), strict=True)
        differences.append(torch.cat([(a - b).flatten() for a, b in pairs]) / (2 * step))
    if not differences:
        return True
    gap, between = float((differences[1] - told).norm()), float((differences[1] - differences[0]).norm())
    return gap <= 0.01 * float(differences[1].norm()) or between > 0.1 * gap


def agree(one: Found, other: Found, point: Point) -> bool:
    """Whether two ways found the same, to rounding: of every parameter to half of the digits, of what is nothing but the
    rounding of others to three quarters of theirs. To few bits each way rounds in places of its own."""
    pairs = [(one.hessian[n], other.hessian[n]) for n in point.moving]
    whole = [torch.cat([t.flatten().double() for t in side]) for side in zip(*pairs, strict=True)] if pairs else []
    if not whole:
        return True
    size = float(whole[1].norm())
    if point.loss.coarse:
        return float((whole[0] - whole[1]).norm()) <= 4 * rounding(point.loss.precision) * size
    eps = float(torch.finfo(point.weights.dtype).eps)
    gaps = [float((a - b).norm()) <= eps**0.5 * float(b.norm()) + eps**0.75 * size for a, b in pairs]
    along = float((one.along - other.along).norm()) <= eps**0.5 * float(other.along.norm())
    return along and all(gaps)
