"""The shares of a step's examples, times directions: recomputed, or from the store as they are or as factors; and the truth
that they are held against.

Made of a run, a model and a loss, which is what a worker is sent: it makes its own."""

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import gradients
from .checks import fit_scale, split_bound, split_gaps
from .constants import is_low
from .errors import LossError
from .functional import training_modes
from .generators import random_state
from .gradients import random_weights
from .kernels.contraction import contract_rows
from .run import Run
from .steps import RecordedStep

log = logging.getLogger("attrib")


class Contributions(NamedTuple):
    """values (Q, B, K) float64; scale: the common factor in them between an example's gradient and its share, None where the
    store has the shares themselves."""

    values: np.ndarray
    scale: float | None


class Split(NamedTuple):
    """How far a step's contributions are from those of their own examples; where it fails, the id of the example and the
    group furthest off, and how far they may be."""

    gap: float
    example: int | str | None = None
    group: int | None = None
    bound: float = float("nan")


def drawn(steps: range) -> frozenset[int]:
    """A few steps to look at: one in each of as many equal parts, two in a hundred, four at most."""
    count = min(len(steps), max(2, min(4, len(steps) // 50)))
    cuts = np.linspace(steps.start, steps.stop, count + 1).astype(int)
    random = np.random.default_rng(len(steps))
    return frozenset(int(random.integers(a, b)) for a, b in itertools.pairwise(cuts))


class Shares:
    """The contributions of a step's examples, by the run's capture.

    Args:
        slices: bytes of a slice of the passes over the examples.
        member: (K, G), which tensors make a group.

    Raises:
        LossError: a loss is needed and missing.
    """

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        loss: Callable[..., Tensor] | None,
        dtype: torch.dtype,
        slices: int,
        member: np.ndarray,
    ) -> None:
        if loss is None and run.capture == "replay":
            raise LossError(
                "a loss is needed: got loss=None, expected the loss given to attrib.record, since this run was captured by "
                '"replay". Pass loss=, or record with capture="gradients".'
            )
        self.run, self._made_of = run, (run, model, loss, dtype, slices, member)
        self._model, self._dtype, self._member = model, dtype, member
        self._precision = run.precision if is_low(run.precision) else dtype
        self._device = next(model.parameters()).device
        self._groups = member.argmax(1).tolist()
        self._contract = {"gradients": self._stored, "factors": self._factored, "replay": self._replayed}[run.capture]
        self._said = False
        self._gradients: gradients.ExampleGradients | None = None
        if loss is not None:
            with training_modes(model, run.header["training"]):
                self._gradients = gradients.ExampleGradients(loss, model, run.layout, dtype, slices, run.autocast)

    def __reduce__(self) -> tuple[Any, ...]:
        return Shares, self._made_of

    @property
    def has_loss(self) -> bool:
        """Whether there is a truth to hold the shares against."""
        return self._gradients is not None

    @property
    def coupled(self) -> bool:
        """Whether a batch was met whose losses depend on each other."""
        return self._gradients is not None and self._gradients.coupled

    def contract(self, step: RecordedStep, sensitivity: Tensor, gradient: np.ndarray) -> Contributions:
        """From U (Q, P), and <U, gradient> (Q, K) of the recorded gradient of the examples."""
        return self._contract(step, sensitivity, gradient)

    def hvp(self, step: RecordedStep, sensitivity: Tensor) -> Tensor:
        """H U (Q, P): the Hessian of the step's reduced loss, sum_i scale loss_i, times U (Q, P), in float64."""
        if self._gradients is None:
            raise LossError("a loss is needed: got loss=None, expected the loss given to attrib.record. Pass loss=.")
        theta = self._theta(step)
        with self._step(step) as (shares, batch):
            product = shares.hvp(theta, batch, sensitivity) / self._factor(step)
        scale = self._fitted(step) if np.isnan(step.scale) else step.scale
        return product.double() * (1.0 if scale is None else scale)

    def split(
        self, step: RecordedStep, sensitivity: Tensor, found: Contributions, seen: np.ndarray | float
    ) -> Split | None:
        """The fourth identity: sum_i v_i c_i = <d (v . losses) / d theta, U> for random v, for every query and group, by one
        backward pass that knows nothing of sites. Where nothing is left to learn, of the rounding of the measurement `seen`
        (Q,). Without a loss, None."""
        if self._gradients is None:
            return None
        theta = self._theta(step)
        mine = found.values @ self._member
        weights = random_weights(mine.shape[1], step.number, theta, self._gradients.coarse)
        with self._step(step) as (shares, batch):
            pulled = shares.gradient(theta, batch, weights)[1].double() / self._factor(step)
        parts = [sensitivity[:, part] @ pulled[part].to(sensitivity) for _, part in self.run.layout.slices()]
        truth = torch.stack(parts, 1).cpu().numpy() @ self._member
        combined = np.einsum("b,qbg->qg", weights.double().cpu().numpy(), mine)
        scale = found.scale
        if scale is None:  # stored shares have theirs in them: of so many numbers one is fitted
            scale = fit_scale(torch.from_numpy(combined), torch.from_numpy(truth)) if truth.size > 1 else None
            scale = scale or self._fitted(step) or 1.0
        truth, pulled = truth * scale, pulled * scale
        off = np.abs(combined - truth)
        flows = [
            sensitivity[:, part].abs() @ pulled[part].abs().to(sensitivity) for _, part in self.run.layout.slices()
        ]
        flow = torch.stack(flows, 1).cpu().numpy() @ self._member  # what the products cancelled from
        bound = split_bound(self._precision)
        gaps = split_gaps(
            off, np.sqrt(np.square(mine).sum(1)), self._precision, bound * (64 * flow + np.reshape(seen, (-1, 1)))
        )
        q, g = np.unravel_index(int(gaps.argmax()), gaps.shape)
        if gaps[q, g] <= bound:
            return Split(float(gaps[q, g]))
        along = self._along(step, sensitivity[q], int(g)) * scale
        slot = int(np.abs(along - mine[q, :, g]).argmax())
        return Split(float(gaps[q, g]), self.run.ids.of(step.ids[slot : slot + 1]).tolist()[0], int(g), bound)

    def _along(self, step: RecordedStep, sensitivity: Tensor, group: int) -> np.ndarray:
        """(B,): the truth example by example, along one query's U over one group."""
        assert self._gradients is not None
        named = self.run.layout.unflatten(sensitivity[None].to(self._dtype))
        names = [name for name, g in zip(self.run.layout.names, self._groups, strict=True) if g == group]
        with self._step(step) as (shares, batch):
            found = shares.vector.along(self._theta(step), batch, named, [names])[1][0, :, 0]
        return found.cpu().numpy() / self._factor(step)

    # by capture

    def _stored(self, step: RecordedStep, sensitivity: Tensor, gradient: np.ndarray) -> Contributions:
        rows = self.run.shares(step.number)
        return Contributions(contract_rows(sensitivity.cpu().numpy(), rows, self.run.layout.bounds), None)

    def _factored(self, step: RecordedStep, sensitivity: Tensor, gradient: np.ndarray) -> Contributions:
        named = self.run.layout.unflatten(sensitivity.to(self.run.dtype))
        found = self.run.factors(step.number)
        empty = torch.zeros(len(sensitivity), len(step.ids), dtype=torch.float64)
        parts = [sum((f.contract(named[k]) for f in found[k]), empty) for k in self.run.layout.names]
        return Contributions((torch.stack(parts, 2) * step.scale).cpu().numpy(), None)

    def _replayed(self, step: RecordedStep, sensitivity: Tensor, gradient: np.ndarray) -> Contributions:
        assert self._gradients is not None
        with self._step(step) as (shares, batch):
            found = shares.contract(self._theta(step), batch, sensitivity, self._groups)[1].cpu().numpy()
        found /= self._factor(step)
        scale = self._scale(step, found, gradient)
        found *= scale
        return Contributions(found, scale)

    @contextmanager
    def _step(self, step: RecordedStep) -> Iterator[tuple[gradients.ExampleGradients, tuple[Tensor, ...]]]:
        """The gradients of the parameters that moved and the batch of a step, the world being as it was then."""
        assert self._gradients is not None
        batch = tuple(b.to(self._device) for b in self.run.inputs(step.kind, step.rows))
        with training_modes(self._model, self.run.header["training"]), random_state(step.random):
            yield self._gradients.at(step.active, self._factor(step)), batch
        torch.clear_autocast_cache()  # within a caller's autocast every rounded weight would be kept

    def _factor(self, step: RecordedStep) -> float:
        """Of the loss that is differentiated: the loop's own multiple where a pass rounds to few bits, as there."""
        if self._gradients is None or not self._gradients.coarse:
            return 1.0
        kind, size = self.run.header.get("reduction"), len(step.ids)
        if kind == "other" and not np.isnan(step.scale):
            return step.scale
        return 1.0 if kind == "sum" else 1 / size

    # the common factor of a step

    def _scale(self, step: RecordedStep, found: np.ndarray, gradient: np.ndarray) -> float:
        """The recorded one where the shares then sum to p.grad, as far as U sees it; else what takes them there. What was
        recorded of steps that were not checked was assumed."""
        recorded = step.scale
        sums, wanted = found.sum(1) @ self._member, gradient @ self._member
        size = np.abs(found).sum((1, 2))[:, None]

        def fits(scale: float | None) -> bool:
            # to few bits p.grad is rounded once where it is summed, by half of eps
            eps = float(torch.finfo(self._precision).eps)
            bound = (eps if is_low(self._precision) else split_bound(self._dtype)) * abs(scale or 0.0) * size
            return scale is not None and bool((np.abs(scale * sums - wanted) <= bound).all())

        if fits(recorded):
            return recorded
        fitted = fit_scale(torch.from_numpy(wanted), torch.from_numpy(sums)) if sums.size > 1 else None
        if not fits(fitted):
            fitted = self._fitted(step)
        if fitted is not None and (np.isnan(recorded) or fits(fitted)):
            if not np.isnan(recorded) and not self._said:
                self._said = True
                log.info("the scale of step %d is %.6g, not %.6g as was assumed", step.number, fitted, recorded)
            return fitted
        return 1.0 if np.isnan(recorded) else recorded

    def _fitted(self, step: RecordedStep) -> float | None:
        """From p.grad and the sum of the gradients, over all parameters."""
        assert self._gradients is not None
        with self._step(step) as (shares, batch):
            total = shares.total(self._theta(step), batch)[1] / self._factor(step)
        return fit_scale(step.examples.to(total), total)

    def _theta(self, step: RecordedStep) -> Tensor:
        return step.theta.to(self._device, self._dtype)
