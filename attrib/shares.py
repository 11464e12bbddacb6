"""The shares of a step's examples, times directions: recomputed, or from the store as they are or as factors; and the truth
that they are held against.

Made of a run, a model and a loss, which is what a worker is sent: it makes its own."""

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import gradients
from .batch import Batch
from .checks import REDUCTIONS, SHARES, Reduction, Totals, fit_scale, split_bound, split_gaps, weights_of
from .constants import is_low, wide
from .curvature import Curvature
from .errors import LossError
from .functional import training_modes
from .generators import random_state
from .gradients import random_weights
from .kernels.contraction import contract_rows
from .run import Run
from .steps import RecordedStep

log = logging.getLogger("attrib")


class Contributions(NamedTuple):
    """values (Q, B, K) float64; scales: the factors in them between an example's gradient and its share, of each pass, None
    where the store has the shares themselves; loss: the mean loss of the step, where it was computed."""

    values: np.ndarray
    scales: np.ndarray | None
    loss: float | None = None


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
        self._model, self._dtype, self._member = model, dtype, member
        self._precision = run.precision if is_low(run.precision) else dtype
        self._device = next(model.parameters()).device
        self._groups = member.argmax(1).tolist()
        self._contract = {"gradients": self._stored, "factors": self._factored, "replay": self._replayed}[run.capture]
        self._said = False
        self._gradients: gradients.Gradients | None = None
        self._slices, self._curvatures = slices, dict[str, Curvature]()
        if loss is not None:
            with training_modes(model, run.header["training"]):
                kind = gradients.DEFINITIONS[definition or run.definition]
                self._gradients = kind(loss, model, run.layout, dtype, slices, run.autocast)

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

    def hvp(self, step: RecordedStep, sensitivity: Tensor, curvature: str = "exact") -> Tensor:
        """H U (Q, P): the Hessian of the step's reduced loss, sum_i scale_i loss_i, times U (Q, P), in float64. curvature:
        of that loss, or "gauss-newton": of what it makes of the model's outputs alone."""
        if self._gradients is None:
            raise LossError("a loss is needed: got loss=None, expected the loss given to attrib.record. Pass loss=.")
        theta, scales = self._theta(step), self._known(step)
        product = torch.zeros_like(sensitivity, dtype=torch.float64)
        for n, scale in enumerate(scales):
            with self._pass(step, n) as (shares, batch, factor):
                there = self._curvature(curvature).at(step.active, factor, self._buffers(step))
                weights = torch.full((batch.size,), scale / factor, dtype=torch.float64)
                product += there.products(theta, batch, weights, sensitivity, shares.coupled).hessian
        return product

    def _curvature(self, kind: str) -> Curvature:
        """Of the loss; what is learnt of its batches is kept."""
        if kind not in self._curvatures:
            assert self._gradients is not None
            self._curvatures[kind] = Curvature(self._gradients.function, self._slices, kind)
        return self._curvatures[kind]

    def split(
        self, step: RecordedStep, sensitivity: Tensor, found: Contributions, seen: np.ndarray | float
    ) -> Split | None:
        """The fourth identity: sum_i v_i c_i = <d (v . losses) / d theta, U> for random v, for every query and group, by one
        backward pass that knows nothing of sites. Where nothing is left to learn, of the rounding of the measurement `seen`
        (Q,). Without a loss, None."""
        if self._gradients is None:
            return None
        mine = found.values @ self._member
        weights = random_weights(mine.shape[1], step.number, self._theta(step), self._gradients.coarse)
        combined, truth, flow = (np.zeros((len(mine), mine.shape[2])) for _ in range(3))
        for n, recorded in enumerate(step.passes):
            here = weights[recorded.slots]
            sums = np.einsum("b,qbg->qg", here.double().cpu().numpy(), mine[:, recorded.slots])
            direct, size = self._weighted(step, n, here, sensitivity)
            if found.scales is not None:
                scale = float(found.scales[n])
            else:  # stored shares have theirs in them: of so many numbers one is fitted
                fit = fit_scale(torch.from_numpy(sums), torch.from_numpy(direct)) if direct.size > 1 else None
                scale = fit or float(self._known(step, fresh=True)[n])
            combined, truth, flow = combined + sums, truth + direct * scale, flow + size * abs(scale)
        off = np.abs(combined - truth)
        bound = split_bound(self._precision)
        gaps = split_gaps(
            off, np.sqrt(np.square(mine).sum(1)), self._precision, bound * (64 * flow + np.reshape(seen, (-1, 1)))
        )
        q, g = np.unravel_index(int(gaps.argmax()), gaps.shape)
        if gaps[q, g] <= bound:
            return Split(float(gaps[q, g]))
        scales = np.ones(len(step.passes)) if found.scales is None else found.scales
        along = self._along(step, sensitivity[q], int(g), scales)
        slot = int(np.abs(along - mine[q, :, g]).argmax())
        return Split(float(gaps[q, g]), self.run.ids.of(step.ids[slot : slot + 1]).tolist()[0], int(g), bound)

    def _weighted(
        self, step: RecordedStep, n: int, weights: Tensor, sensitivity: Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """<d (v . losses) / d theta, U> of the n-th pass, (Q, G), and what these products cancelled from. Where losses
        depend on each other, that is gradients of the size that they have in the mean of all parameters, at least: that of a
        bias before batch norm is nothing but what is left of such, which Adam then divides by as little."""
        with self._pass(step, n) as (shares, batch, factor):
            pulled = shares.gradient(self._theta(step), batch, weights)[1].double() / factor
        parts = [(sensitivity[:, part], pulled[part].to(sensitivity)) for _, part in self.run.layout.slices()]
        usual = float(pulled.norm()) / max(1, len(pulled)) ** 0.5 if shares.coupled else 0.0
        direct = torch.stack([u @ g for u, g in parts], 1)
        size = torch.stack([u.abs() @ g.abs().clamp(min=usual) for u, g in parts], 1)
        return direct.cpu().numpy() @ self._member, size.cpu().numpy() @ self._member

    def _along(self, step: RecordedStep, sensitivity: Tensor, group: int, scales: np.ndarray) -> np.ndarray:
        """(B,): the truth example by example, along one query's U over one group."""
        named = self.run.layout.unflatten(sensitivity[None].to(wide(self._dtype)))
        names = [name for name, g in zip(self.run.layout.names, self._groups, strict=True) if g == group]
        found = []
        for n, scale in enumerate(scales.tolist()):
            with self._pass(step, n) as (shares, batch, factor):
                along = shares.vector.along(self._theta(step), batch, named, [names])[1][0, :, 0]
            found.append(along.cpu().numpy() * (scale / factor))
        return np.concatenate(found)

    # by capture

    def _stored(self, step: RecordedStep, sensitivity: Tensor, gradient: np.ndarray) -> Contributions:
        rows = self.run.shares(step.number)
        return Contributions(contract_rows(sensitivity.cpu().numpy(), rows, self.run.layout.bounds), None)

    def _factored(self, step: RecordedStep, sensitivity: Tensor, gradient: np.ndarray) -> Contributions:
        named = self.run.layout.unflatten(sensitivity.to(self.run.compute))
        found = self.run.factors(step.number)
        empty = torch.zeros(len(sensitivity), len(step.ids), dtype=torch.float64)
        parts = [sum((f.contract(named[k]) for f in found[k]), empty) for k in self.run.layout.names]
        rows = torch.stack(parts, 2).cpu().numpy()
        rows *= np.repeat([p.factor_scale for p in step.passes], [p.size for p in step.passes])[:, None]
        return Contributions(rows, None)

    def _replayed(self, step: RecordedStep, sensitivity: Tensor, gradient: np.ndarray) -> Contributions:
        passes, losses = [], []
        for n in range(len(step.passes)):
            with self._pass(step, n) as (shares, batch, factor):
                each, products = shares.contract(self._theta(step), batch, sensitivity, self._groups)
            passes.append(products.cpu().numpy())
            passes[-1] /= factor  # in place: of many queries it is large
            losses.append(each.double() / factor)
        found = passes[0] if len(passes) == 1 else np.concatenate(passes, 1)
        scales = self._scales(step, found, gradient)
        found *= np.repeat(scales, [p.size for p in step.passes])[:, None]
        return Contributions(found, scales, float(torch.cat(losses).mean()))

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

    # the common factors of a step

    def _scales(self, step: RecordedStep, found: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """The recorded ones where the shares then sum to p.grad, as far as U sees it; else what takes them there. What was
        recorded of steps that were not checked was assumed."""
        recorded = np.array([p.scale for p in step.passes])
        if self.run.declares_remainder and not np.isnan(recorded).any():
            return recorded  # p.grad is not their sum
        sums = [found[:, p.slots].sum(1) for p in step.passes]
        seen = [s @ self._member for s in sums]
        wanted = gradient @ self._member
        sizes = [np.abs(found[:, p.slots]).sum((1, 2))[:, None] for p in step.passes]

        def fits(scales: np.ndarray | None) -> bool:
            if scales is None or np.isnan(scales).any():
                return False
            each = scales.tolist()
            total = sum(scale * s for scale, s in zip(each, seen, strict=True))
            size = sum(abs(scale) * s for scale, s in zip(each, sizes, strict=True))
            # to few bits p.grad is rounded once where it is summed, by half of eps
            eps = float(torch.finfo(self._precision).eps)
            bound = eps if is_low(self._precision) else split_bound(self._dtype)
            return bool((np.abs(total - wanted) <= bound * size).all())

        if fits(recorded):
            return recorded
        fitted = self._seen(seen, wanted) if len(seen) == 1 else None
        if not fits(fitted):
            fitted = self._refitted(step)
        if fitted is not None and (np.isnan(recorded).any() or fits(fitted)):
            if not np.isnan(recorded).any() and not self._said:
                self._said = True
                log.info("the scales of step %d are %s, not %s as was assumed", step.number, fitted, recorded)
            return fitted
        return np.where(np.isnan(recorded), 1.0, recorded)

    def _seen(self, seen: list[np.ndarray], wanted: np.ndarray) -> np.ndarray | None:
        """From the contributions of a single pass."""
        scale = fit_scale(torch.from_numpy(wanted), torch.from_numpy(seen[0])) if wanted.size > 1 else None
        return None if scale is None else np.array([scale])

    def _refitted(self, step: RecordedStep) -> np.ndarray | None:
        """From p.grad and the sums of the gradients, over all parameters."""

        def each() -> Iterator[Tensor]:
            for n in range(len(step.passes)):
                with self._pass(step, n) as (shares, batch, factor):
                    yield shares.total(self._theta(step), batch)[1] / factor

        totals = Totals.of([p.size for p in step.passes], each)
        return self._reduction.refit(step.examples.to(totals.summed), totals)

    def _known(self, step: RecordedStep, fresh: bool = False) -> np.ndarray:
        """The recorded scales, or those that are fitted. fresh: fitted in any case."""
        recorded = np.array([p.scale for p in step.passes])
        fitted = self._refitted(step) if fresh or np.isnan(recorded).any() else recorded
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
