"""What the examples of a step contributed to its gradient: checked against p.grad, and kept as the run asks.

    replay      nothing is kept: states and inputs say it all
    gradients   the share of every example, (B, P)
    factors     the same in the form its layers give it (`kernels.factors`)

The last two are taken from the user's own backward pass where that can be followed (`gradients.Watch`).
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .checks import RandomWatch, Reduction, ShareBound, batch_identity, split_bound, split_gaps
from .errors import BatchError, BatchIdentityError, LossError, SplitIdentityError
from .generators import generators, random_state
from .gradients import Shares, Watch, describe, random_weights, to_tensors
from .kernels import factors
from .kernels.factors import Factor
from .layout import Layout

log = logging.getLogger("attrib")

CHECK_FIRST = 2
Arrays = dict[str, np.ndarray]  # of a step, by name, (B, ...) each
Found = dict[str, list[Factor]]  # of each parameter the factors that sum to its shares


class Step(NamedTuple):
    """What is at hand when a step is taken. theta, gradient (P,); before: the generators' state before its forward pass."""

    number: int
    theta: Tensor
    gradient: Tensor
    batch: tuple[Tensor, ...]
    before: Tensor


class Capture:
    """The first of the three identities, at the steps that are due, and the arrays to be stored.

    described: with "factors", what each parameter's factors are; for the header, known after the first step.
    """

    def __init__(
        self,
        kind: str,
        loss: Callable[..., Tensor],
        model: nn.Module,
        layout: Layout,
        parameters: list[Tensor],
        check_every: int,
        penalty: Callable[[nn.Module], Tensor] | None = None,
    ) -> None:
        self.kind = kind
        self.described: dict[str, Any] | None = None if kind != "factors" else {}
        self._layout, self._parameters, self._check_every = layout, parameters, check_every
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._model, self._penalty = model, penalty
        self._taken: Tensor | None = None  # the penalty's gradient of the step
        self._shares = Shares(loss, model, layout, parameters[0].dtype)
        self._scale = Reduction(parameters)
        self._random = RandomWatch(model)
        self._watch = Watch(model, dict(zip(layout.names, parameters, strict=True))) if kind != "replay" else None
        log.info("recording %s: batch identity on the first %d steps, then every %d", kind, CHECK_FIRST, check_every)

    @property
    def random(self) -> np.ndarray | None:
        """The generators' state before the forward pass of the step, where the loss draws numbers."""
        stored = self._random.stored
        return None if stored is None else stored.numpy()

    def clear(self) -> None:
        """Forget the step: its gradients are gone, or it is recorded."""
        self._scale.clear()
        self._random.clear()
        if self._watch is not None:
            self._watch.take(0)

    def remove(self) -> None:
        """Take off all hooks."""
        for hooked in (self._random, self._scale, self._watch):
            if hooked is not None:
                hooked.remove()

    def penalty(self) -> Tensor | None:
        """(P,): what of p.grad is the penalty's, clipped as p.grad was; None where the loop has none.

        Raises:
            LossError: it is not a finite scalar.
        """
        if self._penalty is None:
            return None
        with self._quiet(), torch.enable_grad():
            value = self._penalty(self._model)
            if not isinstance(value, Tensor) or value.numel() != 1 or not bool(torch.isfinite(value).all()):
                raise LossError(f"the penalty is not a number: got {value!r}, expected a finite scalar tensor.")
            moved = [p for p in self._parameters if p.grad is not None]
            empty: list[Tensor | None] = [None] * len(moved)
            pulled = torch.autograd.grad(value, moved, allow_unused=True) if value.requires_grad and moved else empty
        found = dict(zip(map(id, moved), pulled, strict=True))
        gradients = (found.get(id(p)) for p in self._parameters)
        filled = (torch.zeros_like(p) if g is None else g for g, p in zip(gradients, self._parameters, strict=True))
        self._taken = self._layout.flatten(filled) * self._scale.clipping()
        return self._taken

    def take(
        self, theta: Tensor, gradient: Tensor, batch: tuple[Tensor, ...], number: int, facts: dict[str, float]
    ) -> tuple[float, Arrays]:
        """The scale of the shares, and what is stored of them; `gradient` (P,) is the examples' part of p.grad. Facts about
        the step are added to `facts`.

        Raises:
            BatchIdentityError, SplitIdentityError, LossError, ChangedOutsideError.
        """
        with self._quiet(), torch.enable_grad():
            size, clip = len(batch[0]), self._scale.clipping()
            if number:
                self._random.check(number)
            active = (n for n, p in zip(self._layout.names, self._parameters, strict=True) if p.grad is not None)
            self._shares = self._shares.at(frozenset(active))
            before = self._random.before if self._random.before is not None else generators()
            step = Step(number, theta, gradient, batch, before)
            found = self._watched(step) if self._watch is not None else None
            due = number < CHECK_FIRST or number % self._check_every == 0
            if due or (self.kind != "replay" and found is None):
                whole = self._check(step, clip, facts)
            else:
                whole = self._scale.expected(size, clip)
            if self.kind == "replay":
                return whole, {}
            scale = whole
            if found is not None:  # the reduction is in the gradients that came back, clipping is not
                scale = clip
            else:
                with random_state(before):
                    found = self._shares.factors(theta, batch)
            if due:
                self._check_found(step, found, scale)
                facts["split_identity"] = self._check_split(step, found, scale, whole)
            return scale, self._arrays(found, scale, batch, number)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """While the model is run here, its hooks do not listen."""
        hooked = [h for h in (self._random, self._watch) if h is not None]
        for h in hooked:
            h.busy = True
        try:
            yield
        finally:
            for h in hooked:
                h.busy = False

    def _watched(self, step: Step) -> Found | None:
        assert self._watch is not None
        seen = self._watch.take(len(step.batch[0]))
        if seen is None:
            return None
        with random_state(step.before):
            return self._shares.watched(step.theta, step.batch, *seen)

    def _check(self, step: Step, clip: float, facts: dict[str, float]) -> float:
        """Compute the shares' sum with the loss as it was given; fit the scale between it and p.grad."""
        with random_state(step.before):
            losses, total = self._shares.total(step.theta, step.batch)
            self._random.settle(step.number, step.before, generators())
        facts["loss"] = float(losses.double().mean())
        bound = ShareBound(step.gradient, lambda: clip * self._gross(step), self._taken)
        scale = self._scale.fit(step.gradient, total, len(losses), clip, bound)
        try:
            facts["batch_identity"] = batch_identity(self._layout, step.gradient, scale * total, step.number, bound)
        except BatchIdentityError as error:
            raise BatchIdentityError(f"{error}{self._hint(step, losses)}") from None
        return scale

    def _hint(self, step: Step, losses: Tensor) -> str:
        """What in the loop may be why shares and p.grad differ."""
        passes = self._random.passes
        if self._random.stochastic and passes > 1:
            return (
                f" The step made {passes} forward passes and the loss draws random numbers (dropout), which are drawn again "
                f"as for one: make one forward pass a step, or put dropout into eval mode."
            )
        with random_state(step.before):
            again = self._shares.vector.values(step.theta, step.batch)
        if torch.equal(losses, again):
            return ""
        return (
            f" The loss gives other values when it is computed again (up to {float((losses - again).abs().max()):.2g} "
            f"apart): it draws random numbers from a generator of its own. Draw them with torch's, Python's or numpy's "
            f"global one."
        )

    def _check_found(self, step: Step, found: Found, scale: float) -> None:
        """What is stored must sum to p.grad as well."""
        sums = step.gradient.new_zeros(self._layout.size)
        for name, part in self._layout.slices():
            for factor in found[name]:
                sums[part] += factors.total(factor)

        def gross() -> float:
            return scale * sum(float(factors.rows(f).double().norm(dim=1).sum()) for s in found.values() for f in s)

        bound = ShareBound(step.gradient, gross, self._taken)
        batch_identity(self._layout, step.gradient, scale * sums, step.number, bound)

    def _check_split(self, step: Step, found: Found, scale: float, whole: float) -> float:
        """And each be its own example's: for random weights they sum to the gradient of the losses so weighted. `whole`: the
        factor between the gradient of a loss and its share, of which `scale` is left to be multiplied.

        Raises:
            SplitIdentityError: naming the parameter and the example.
        """
        names = self._layout.names
        weights = random_weights(len(step.batch[0]), step.number, step.theta)
        with random_state(step.before):
            truth = self._shares.vector.gradient(step.theta, step.batch, weights)[1]
        sums = {n: sum((factors.total(factors.weighted(f, weights)) for f in found[n]), 0.0) for n in names}
        off = np.array([float((scale * sums[n] - whole * truth[n].flatten()).double().norm()) for n in names])
        sizes = np.array([abs(whole) * float(truth[n].double().norm()) for n in names])
        gaps, bound = split_gaps(off, sizes, step.theta.dtype), split_bound(step.theta.dtype)
        worst = int(gaps.argmax())
        if not gaps[worst] <= bound:
            slot = self._worst_slot(step, found, scale, whole, names[worst])
            raise SplitIdentityError(
                f"the shares to be stored are other examples': got a gap of {gaps[worst]:.3g} of their size, expected at "
                f"most {bound:.1g}, at parameter {names[worst]!r}, slot {slot} of the batch, step {step.number}. Record "
                f'with capture="replay". The step was refused.'
            )
        return float(gaps[worst])

    def _worst_slot(self, step: Step, found: Found, scale: float, whole: float, name: str) -> int:
        """Whose stored share of a parameter is furthest from the gradient of its loss."""
        stored = sum(factors.rows(factor) for factor in found[name])
        with random_state(step.before):
            truth = torch.stack(
                [row[name].flatten() for row in self._shares.vector.rows(step.theta, step.batch, [name])]
            )
        return int((scale * stored - whole * truth).norm(dim=1).argmax())

    def _gross(self, step: Step) -> float:
        """sum_i |g_i|, times the reduction: no larger than what the optimizer's gradient may have cancelled from."""
        norms = [float(rows.double().norm(dim=1).sum()) for rows in self._share_rows(step)]
        return sum(norms) / (len(step.batch[0]) if self._scale.kind != "sum" else 1)

    def _share_rows(self, step: Step) -> Iterator[Tensor]:
        """The gradients of the examples in slices (b, P); where a slice would draw other numbers, or have other losses, all
        at once."""
        size = len(step.batch[0])
        at_once = size if self._random.stochastic or self._shares.coupled else self._shares.rows_at_once()
        for lo in range(0, size, at_once):
            with random_state(step.before):
                yield self._shares.rows(step.theta, tuple(b[lo : lo + at_once] for b in step.batch))

    def _arrays(self, found: dict[str, list[Factor]], scale: float, batch: tuple[Any, ...], number: int) -> Arrays:
        if self.kind == "gradients":
            rows = np.zeros((len(batch[0]), self._layout.size), dtype=_array(self._parameters[0]).dtype)
            for name, part in self._layout.slices():
                for factor in found[name]:
                    rows[:, part] += _array(factors.rows(factor))
            rows *= scale
            return {"gradients": rows}
        if number == 0:
            self.described = describe(found)
        assert self.described is not None
        inputs = {b.untyped_storage().data_ptr() for b in batch}
        tensors = to_tensors(found, self.described)
        shapes = {name: tuple(t.shape[1:]) for name, t in tensors.items()}
        self._shapes = self._shapes or shapes
        for name, shape in shapes.items():
            if shape != self._shapes[name]:
                raise BatchError(
                    f"the factors of an example have another shape than at the first step: got {shape}, expected "
                    f"{self._shapes[name]}, at {name!r}, step {number}. Pad batches to one length, or record with "
                    f'capture="replay" or "gradients". The step was refused.'
                )
        # the caller may fill the batch's tensors again before they are written
        return {n: _array(t.clone() if t.untyped_storage().data_ptr() in inputs else t) for n, t in tensors.items()}


def _array(t: Tensor) -> np.ndarray:
    return t.detach().cpu().numpy()
