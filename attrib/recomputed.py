"""The losses of a recorded step's examples once more, the world being as it was then: their gradients, these times
directions, their curvature.

Made of a run, a model and a loss, which is what a worker is sent: it makes its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from . import gradients
from .batch import Batch
from .checks import REDUCTIONS, SHARES, Reduction, Totals, weights_of
from .constants import is_low, precision, wide
from .curvature import Curvature
from .errors import LossError
from .functional import training_modes
from .generators import random_state
from .run import Run
from .steps import RecordedStep


class Curved(NamedTuple):
    """hessian: H U (Q, P); along: <U, g_i> (Q, B), of each loss by itself, whatever its factor; None where there are no such
    losses, or a whole pass of them weighs nothing. Both float64."""

    hessian: Tensor
    along: np.ndarray | None


class Recomputed:
    """Of a run, as far as there is a loss.

    Args:
        slices: bytes of a slice of the passes over the examples.
        member: (K, G), which tensors make a group.
        definition: what a share is, "example" or "rows"; None for what it is in the run.

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
        definition: str | None = None,
    ) -> None:
        if loss is None and run.capture == "replay":
            raise LossError(
                "a loss is needed: got loss=None, expected the loss given to attrib.record, since this run was captured by "
                '"replay". Pass loss=, or record with capture="gradients".'
            )
        _check_definition(run, definition)
        self.run, self._made_of = run, (run, model, loss, dtype, slices, member, definition)
        self.definition = definition or run.definition
        self._model, self._dtype, self._member = model, dtype, member
        self._device = next(model.parameters()).device
        self._groups = member.argmax(1).tolist()
        self._gradients: gradients.Gradients | None = None
        self._slices, self._curvatures = slices, dict[str, Curvature]()
        if loss is not None:
            with training_modes(model, run.header["training"]):
                kind = gradients.DEFINITIONS[self.definition]
                self._gradients = kind(loss, model, run.layout, dtype, slices, run.autocast)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_of

    def within(self, slices: int) -> Self:
        """The same by passes over slices of so many bytes."""
        run, model, loss, dtype, _, member, definition = self._made_of
        return type(self)(run, model, loss, dtype, slices, member, definition)

    @property
    def model(self) -> nn.Module:
        return self._model

    @property
    def has_loss(self) -> bool:
        """Whether there is a truth to hold the shares against."""
        return self._gradients is not None

    @property
    def _precision(self) -> torch.dtype:
        """What shares are rounded to on their way, when they were stored, or p.grad was made, or now."""
        recorded = self.run.precision
        then = [recorded] if is_low(recorded) or self.run.capture != "replay" else []
        return precision([*then, self._gradients.precision] if self._gradients is not None else then, self._dtype)

    @property
    def coupled(self) -> bool:
        """Whether a batch was met whose losses depend on each other."""
        return self._gradients is not None and self._gradients.coupled

    @property
    def couples(self) -> bool:
        """Whether losses of a batch may depend on each other, as far as was seen here or when the run was recorded."""
        return self.coupled or bool(self.run.header["settled"]["coupled"])

    def curved(
        self,
        step: RecordedStep,
        sensitivity: Tensor,
        weights: np.ndarray | None = None,
        curvature: str = "exact",
        checked: bool = True,
    ) -> Curved:
        """H U, U (Q, P): H the Hessian of sum_i w_i loss_i over the step's examples, by all parameters, those that stood
        still among them; with it comes <U, g_i>.
        weights: w (B,); None for the factors of their losses in it. curvature: "exact", or "gauss-newton": of what the loss
        makes of the model's outputs alone. checked: whether <U, g_i> are held against the gradient of their losses here."""
        weights = self.weights(step) if weights is None else weights
        product, every = torch.zeros_like(sensitivity, dtype=torch.float64), frozenset(self.run.layout.names)
        along: list[np.ndarray] = []
        for n, recorded in enumerate(step.passes):
            here = weights[recorded.slots]
            if here.any():
                with self._pass(step, n) as (_, batch, factor):
                    there = self._curvature(curvature).at(every, factor, self._buffers(step))
                    scaled = torch.from_numpy(here / factor)
                    found = there.products(self._theta(step), batch, scaled, sensitivity, self.couples, checked)
                product += found.hessian
                if found.along.shape[1] == recorded.size:
                    along.append(found.along.cpu().numpy() / factor)
        return Curved(product, np.concatenate(along, 1) if len(along) == len(step.passes) else None)

    def _curvature(self, kind: str) -> Curvature:
        """Of the loss; what is learnt of its batches is kept."""
        if kind not in self._curvatures:
            assert self._gradients is not None
            self._curvatures[kind] = Curvature(self._gradients.function, self._slices, kind)
        return self._curvatures[kind]

    def weights(self, step: RecordedStep, beside: np.ndarray | None = None) -> np.ndarray:
        """(B,): the factor of each example's loss in what the step trained on, but for those that the losses had before
        they were reduced, `beside` (B,)."""
        if self._gradients is None:
            raise LossError("a loss is needed: got loss=None, expected the loss given to attrib.record. Pass loss=.")
        return np.repeat(self._known(step, beside=beside), [p.size for p in step.passes])

    def gradient(self, step: RecordedStep, weights: np.ndarray) -> Tensor:
        """sum_i w_i g_i (P,) float64, of the step's examples; weights: w (B,)."""
        theta = self._theta(step)
        total = torch.zeros(len(theta), dtype=torch.float64)
        for n, recorded in enumerate(step.passes):
            with self._pass(step, n) as (shares, batch, factor):
                scaled = torch.from_numpy(weights[recorded.slots] / factor).to(theta)
                total += shares.gradient(theta, batch, scaled)[1].double().cpu()
        return total

    def products(self, step: RecordedStep, sensitivity: Tensor, chosen: np.ndarray | None = None) -> np.ndarray:
        """<U, g_i> (Q, B, K) float64, g_i the share of loss i by itself, whatever its factor. chosen: (B,), which examples;
        others' are 0. Losses that depend on each other have to be asked for together."""
        found = np.zeros((len(sensitivity), len(step.ids), len(self.run.layout.names)))
        for n, recorded in enumerate(step.passes):
            slots = np.arange(recorded.slots.start, recorded.slots.stop)
            if chosen is not None:
                slots = slots[chosen[slots]]
            if len(slots):
                with self._pass(step, n) as (shares, batch, factor):
                    if len(slots) < batch.size:
                        batch = batch.take(torch.from_numpy(slots - recorded.slots.start))
                    products = shares.contract(self._theta(step), batch, sensitivity, self._groups)[1]
                found[:, slots] = products.cpu().numpy() / factor
        return found

    @contextmanager
    def _pass(self, step: RecordedStep, n: int) -> Iterator[tuple[gradients.Gradients, Batch, float]]:
        """The gradients of the parameters that moved, and the batch of the n-th pass of a step, the world being as it was
        then; and of which multiple of the loss they are: the loop's own where a pass rounds to few bits, as there."""
        assert self._gradients is not None
        recorded, factor = step.passes[n], self._factors(step)[n]
        batch = self.run.inputs(recorded).map(lambda t: t.to(self._device))
        with training_modes(self._model, self.run.header["training"]), random_state(recorded.random):
            yield self._gradients.at(step.active, factor, self._buffers(step)), batch, factor
        torch.clear_autocast_cache()  # within a caller's autocast every rounded weight would be kept

    def _buffers(self, step: RecordedStep) -> dict[str, Tensor]:
        return {name: t.to(self._device) for name, t in self.run.buffers(step.number).items()}

    def _factors(self, step: RecordedStep) -> list[float]:
        count = len(step.passes)
        if self._gradients is None or not self._gradients.coarse:
            return [1.0] * count
        recorded, sizes = np.array([p.scale for p in step.passes]), [p.size for p in step.passes]
        known: list[float] = weights_of((self._reduction.kinds or REDUCTIONS)[0], sizes).tolist()
        if (self._reduction.kinds and not self._reduction.common) or np.isnan(recorded).any():
            return known
        return recorded.tolist()

    @cached_property
    def _reduction(self) -> Reduction:
        kinds, common = self.run.header["settled"]["reduction"]
        return Reduction(tuple(kinds), common)

    def _refitted(self, step: RecordedStep, beside: np.ndarray | None = None) -> np.ndarray | None:
        """From p.grad and the sums of the gradients, over all parameters."""

        def each() -> Iterator[Tensor]:
            for n in range(len(step.passes)):
                with self._pass(step, n) as (shares, batch, factor):
                    theta = self._theta(step)
                    if beside is None:
                        yield shares.total(theta, batch)[1] / factor
                    else:
                        weights = torch.from_numpy(beside[step.passes[n].slots] / factor).to(theta)
                        yield shares.gradient(theta, batch, weights)[1]

        totals = Totals.of([p.size for p in step.passes], each)
        return self._reduction.refit(step.examples.to(totals.summed), totals)

    def _known(self, step: RecordedStep, fresh: bool = False, beside: np.ndarray | None = None) -> np.ndarray:
        """The recorded scales, or those that are fitted. fresh: fitted in any case."""
        recorded = np.array([p.scale for p in step.passes])
        fitted = self._refitted(step, beside) if fresh or np.isnan(recorded).any() else recorded
        return np.ones(len(recorded)) if fitted is None else fitted

    def _theta(self, step: RecordedStep) -> Tensor:
        return step.theta.to(self._device, wide(self._dtype))


def _check_definition(run: Run, definition: str | None) -> None:
    """Raise ValueError where shares cannot be so defined."""
    if definition not in (None, *SHARES):
        raise ValueError(f"unknown shares: got {definition!r}, expected one of {', '.join(map(repr, SHARES))}.")
    if definition not in (None, run.definition) and run.capture != "replay":
        raise ValueError(
            f"the shares are stored as they were defined: got shares={definition!r}, expected {run.definition!r}, of a run "
            f'captured by {run.capture!r}. Leave it out, or record with capture="replay".'
        )
