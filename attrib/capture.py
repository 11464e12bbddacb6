"""What the examples of a step contributed to its gradient: checked against p.grad, and kept as the run asks.

    replay      nothing is kept: states and inputs say it all
    gradients   the share of every example, (B, P)
    factors     the same in the form its layers give it (`kernels.factors`)

The last two are taken from the user's own backward pass where that can be followed (`gradients.Watch`).
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .checks import RandomWatch, Reduction, batch_identity, share_bound
from .errors import BatchError, BatchIdentityError, LossError
from .functional import random_state
from .gradients import Shares, Watch, describe, to_tensors
from .kernels import factors
from .kernels.factors import Factor
from .layout import Layout

log = logging.getLogger("attrib")

CHECK_FIRST = 2
Arrays = dict[str, np.ndarray]  # of a step, by name, (B, ...) each


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
        """The generator's state before the forward pass of the step, where the loss draws numbers."""
        before = self._random.before
        return before.numpy() if self._random.stochastic and before is not None else None

    def clear(self) -> None:
        """Forget the step: its gradients are gone, or it is recorded."""
        self._scale.clear()
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
            BatchIdentityError, CoupledExamplesError, LossError, ChangedOutsideError.
        """
        with self._quiet():
            size, clip = len(batch[0]), self._scale.clipping()
            if number:
                self._random.settle(number, self._random.drew)
            active = (n for n, p in zip(self._layout.names, self._parameters, strict=True) if p.grad is not None)
            self._shares.active = frozenset(active)
            before = self._random.before if self._random.before is not None else torch.get_rng_state()
            found = self._watched(theta, batch, before) if self._watch is not None else None
            due = number < CHECK_FIRST or number % self._check_every == 0
            if due or (found is None and not (self.kind == "replay" and self._scale.settled(size))):
                scale = self._check(theta, gradient, batch, number, facts, clip, before)
            else:
                scale = self._scale.expected(size, clip)
            if self.kind == "replay":
                return scale, {}
            if found is not None:  # the reduction is in the gradients that came back, clipping is not
                scale = clip
            else:
                with random_state(before):
                    found = self._shares.factors(theta, batch)
            if due:
                self._check_found(found, gradient, scale, number)
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

    def _watched(self, theta: Tensor, batch: tuple[Tensor, ...], before: Tensor) -> dict[str, list[Factor]] | None:
        assert self._watch is not None
        seen = self._watch.take(len(batch[0]))
        if seen is None:
            return None
        with random_state(before):
            return self._shares.watched(theta, batch, *seen)

    def _check(
        self,
        theta: Tensor,
        gradient: Tensor,
        batch: tuple[Tensor, ...],
        number: int,
        facts: dict[str, float],
        clip: float,
        before: Tensor,
    ) -> float:
        """Compute the shares' sum with the loss as it was given; fit the scale between it and p.grad."""
        with random_state(before):
            losses, total = self._shares.total(theta, batch)
            self._random.settle(number, not torch.equal(torch.get_rng_state(), before))
        if number == 0:  # so that what cannot be split is refused now, not when attributing
            with random_state(before):
                self._shares.check_split(theta, batch)
        facts["loss"] = float(losses.double().mean())
        within = share_bound(gradient, lambda: clip * self._gross(theta, batch, before), self._taken)
        scale = self._scale.fit(gradient, total, len(batch[0]), clip, within)
        try:
            facts["batch_identity"] = batch_identity(self._layout, gradient, scale * total, number, within)
        except BatchIdentityError as error:
            if not self._random.stochastic:
                raise
            hint = "If the step made several forward passes: the loss draws random numbers, so make one, through model(...)."
            raise BatchIdentityError(f"{error} {hint}") from None
        return scale

    def _check_found(self, found: dict[str, list[Factor]], gradient: Tensor, scale: float, number: int) -> None:
        """What is stored must sum to p.grad as well."""
        sums = gradient.new_zeros(self._layout.size)
        for name, part in self._layout.slices():
            for factor in found[name]:
                sums[part] += factors.total(factor)

        def gross() -> float:
            return scale * sum(float(factors.rows(f).double().norm(dim=1).sum()) for s in found.values() for f in s)

        batch_identity(self._layout, gradient, scale * sums, number, share_bound(gradient, gross, self._taken))

    def _gross(self, theta: Tensor, batch: tuple[Tensor, ...], before: Tensor) -> float:
        """sum_i |g_i|, unscaled by the reduction: no larger than what the optimizer's gradient may have cancelled from."""
        norms = [float(rows.double().norm(dim=1).sum()) for rows in self._share_rows(theta, batch, before)]
        return sum(norms) / (len(batch[0]) if self._scale.kind != "sum" else 1)

    def _share_rows(self, theta: Tensor, batch: tuple[Tensor, ...], before: Tensor) -> Iterator[Tensor]:
        """The gradients of the examples in slices (b, P); of a random loss all at once: a slice draws other numbers."""
        size = len(batch[0])
        at_once = size if self._random.stochastic else self._shares.rows_at_once()
        for lo in range(0, size, at_once):
            with random_state(before):
                yield self._shares.rows(theta, tuple(b[lo : lo + at_once] for b in batch))

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
