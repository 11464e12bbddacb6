"""The shares of a step's examples, times directions: recomputed, or from the store as they are or as factors; and the truth
that they are held against."""

import itertools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .batch import Batch
from .checks import fit_scale, split_bound, split_gaps
from .constants import is_low, wide
from .gradients import Directions, Term, random_weights
from .kernels.contraction import contract_rows
from .layout import grouped
from .recomputed import Recomputed
from .steps import RecordedStep

log = logging.getLogger("attrib")

MOVES, ROUNDED = 4, 16  # times that rounding is looked at, and how much more than was seen there may be of it


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


def _alike(steps: Sequence[RecordedStep]) -> list[list[int]]:
    """The positions of those steps of one pass without random numbers that may be taken together."""
    found: dict[Any, list[int]] = {}
    for n, step in enumerate(steps):
        if len(step.passes) == 1 and step.passes[0].random is None:
            (only,) = step.passes
            found.setdefault((only.kind, only.shared, only.size, step.active), []).append(n)
    return list(found.values())


class Shares(Recomputed):
    """The contributions of a step's examples, by the run's capture; see `Recomputed`."""

    _said = False

    def contract(self, steps: Sequence[RecordedStep], sensitivity: Tensor, gradient: np.ndarray) -> list[Contributions]:
        """Of each step, from U (n, Q, P), and <U, gradient> (n, Q, K) of the recorded gradient of the examples."""
        by_capture = {"gradients": self._stored, "factors": self._factored, "replay": self._replayed}
        single = by_capture[self.run.capture]
        known = self._together(steps, sensitivity, gradient) if self.run.capture == "replay" else {}
        for n in reversed(
            range(len(steps))
        ):  # what is learnt of the model is learnt late in training, as at its start an
            if n not in known:  # adapter is zero, and tells nothing
                known[n] = single(steps[n], sensitivity[n], gradient[n])
        return [known[n] for n in range(len(steps))]

    def split(
        self, step: RecordedStep, sensitivity: Tensor, found: Contributions, seen: np.ndarray | float
    ) -> Split | None:
        """The fourth identity: sum_i v_i c_i = <d (v . losses) / d theta, U> for random v, for every query and group, by one
        backward pass that knows nothing of sites. Where nothing is left to learn, of the rounding of the measurement `seen`
        (Q,). Without a loss, None."""
        if self._gradients is None:
            return None
        mine = grouped(found.values, self._member)
        weights = random_weights(mine.shape[1], step.number, self._theta(step), self._gradients.coarse)
        combined, truth, flow = (np.zeros((len(mine), mine.shape[2])) for _ in range(3))
        used = []
        for n, recorded in enumerate(step.passes):
            here = weights[recorded.slots]
            sums = np.einsum("b,qbg->qg", here.double().cpu().numpy(), mine[:, recorded.slots])
            direct, size = self._weighted(step, n, here, sensitivity)
            if found.scales is not None:
                scale = float(found.scales[n])
            else:  # stored shares have theirs in them: of so many numbers one is fitted, a few of which may be rounding
                fits = (sums / np.where(direct == 0, np.nan, direct)) if direct.size > 1 else np.full(1, np.nan)
                fit = float(np.nanmedian(fits)) if not np.isnan(fits).all() else 0.0
                scale = fit or float(self._known(step, fresh=True)[n])
            combined, truth, flow = combined + sums, truth + direct * scale, flow + size * abs(scale)
            used.append(abs(scale))
        off, sizes, bound = np.abs(combined - truth), np.sqrt(np.square(mine).sum(1)), split_bound(self._precision)
        least = bound * (64 * flow + np.reshape(seen, (-1, 1)))
        gaps = split_gaps(off, sizes, self._precision, least)
        if not gaps.max() <= bound:  # a gradient may be rounding alone, as that of a bias before batch norm
            several = (self._rounding(step, n, weights[p.slots], sensitivity) for n, p in enumerate(step.passes))
            rounding = sum(scale * each for scale, each in zip(used, several, strict=True))
            gaps = split_gaps(off, sizes, self._precision, least + ROUNDED * rounding / bound)
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
        """<d (v . losses) / d theta, U> of the n-th pass, (Q, G), and what these products cancelled from."""
        pulled = self._pulled(step, n, weights).to(sensitivity)
        parts = [(sensitivity[:, part], pulled[part]) for _, part in self.run.layout.slices()]
        direct = torch.stack([u @ g for u, g in parts], 1)
        size = torch.stack([u.abs() @ g.abs() for u, g in parts], 1)
        return direct.cpu().numpy() @ self._member, size.cpu().numpy() @ self._member

    def _rounding(self, step: RecordedStep, n: int, weights: Tensor, sensitivity: Tensor) -> np.ndarray:
        """What rounding may make of that, (Q, G); an entry changes as it does itself, or as those of its tensor do in the
        mean."""
        change = self.rounding(step, n, weights)[1].to(sensitivity)
        each = [(sensitivity[:, part].abs(), change[part]) for _, part in self.run.layout.slices()]
        return torch.stack([u @ c.clamp(min=float(c.mean())).sqrt() for u, c in each], 1).cpu().numpy() @ self._member

    def rounding(self, step: RecordedStep, n: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        """d (v . losses) / d theta of the n-th pass, and the mean square of what it changes by where parameters are moved to
        a neighbour of theirs, up or down: (P,) float64 each. A gradient that cancels changes as what it cancelled from is
        rounded. What changes by more than rounding (a loss that draws numbers of its own) has none of it: zeros."""
        plain, eps = self._pulled(step, n, weights), torch.finfo(self._precision).eps
        signs = (random_weights(len(plain), k, self._theta(step)).sign() for k in range(MOVES))
        changes = torch.stack([self._pulled(step, n, weights, 1 + eps * sign) - plain for sign in signs])
        small = float(changes.norm(dim=1).max()) <= split_bound(self._precision) * float(plain.norm())
        return plain, changes.square().mean(0) * small

    def _pulled(self, step: RecordedStep, n: int, weights: Tensor, moved: Tensor | float = 1.0) -> Tensor:
        """d (v . losses) / d theta of the n-th pass, (P,) float64. moved (P,): times the parameters."""
        with self._pass(step, n) as (shares, batch, factor):
            return shares.gradient(self._theta(step) * moved, batch, weights)[1].double() / factor

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
        directions = Directions(self.run.layout.unflatten(sensitivity), named, len(step.ids))
        found = self.run.factors(step.number)
        empty = torch.zeros(len(sensitivity), len(step.ids), dtype=torch.float64)
        parts = [sum((directions.contract(Term(k, f, None)) for f in found[k]), empty) for k in self.run.layout.names]
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

    # several steps at once

    def _together(
        self, steps: Sequence[RecordedStep], sensitivity: Tensor, gradient: np.ndarray
    ) -> dict[int, Contributions]:
        """Of the steps that can be taken together, by position: of one pass each and of one kind, and without random
        numbers."""
        found: dict[int, Contributions] = {}
        for alike in _alike(steps):
            step = steps[alike[-1]]
            with self._pass(step, 0) as (shares, batch, factor):
                count = shares.steps_at_once(self._theta(step), batch, sensitivity.shape[1], len(alike))
                for stop in range(len(alike), 0, -count) if count > 1 else ():
                    at = max(0, stop - count)  # some may be gone through again: all are of one size
                    some = alike[at : at + count]
                    several = [steps[n] for n in some]
                    here = slice(some[0], some[-1] + 1) if some[-1] - some[0] == count - 1 else some  # or a copy
                    together = shares.contract_steps(self._thetas(several), self._batches(several), sensitivity[here])
                    if together is None:
                        break
                    found |= zip(some, self._scaled(several, *together, gradient[some], factor), strict=True)
        return found

    def _thetas(self, steps: Sequence[RecordedStep]) -> Tensor:
        return torch.stack([self._theta(step) for step in steps])

    def _batches(self, steps: Sequence[RecordedStep]) -> list[Batch]:
        """Of each step, or one where it is the same for all."""
        passes = [step.passes[0] for step in steps]
        passes = passes[:1] if all(p.same_inputs(passes[0]) for p in passes[1:]) else passes
        return [self.run.inputs(p).map(lambda t: t.to(self._device)) for p in passes]

    def _scaled(
        self, steps: Sequence[RecordedStep], losses: Tensor, products: Tensor, gradient: np.ndarray, factor: float
    ) -> list[Contributions]:
        found, mean = products.cpu().numpy(), (losses.double() / factor).mean(1).tolist()
        found /= factor
        recorded = np.array([step.passes[0].scale for step in steps])
        sums, sizes = found.sum(2), np.abs(found).sum((2, 3))
        fits = self._fits(recorded[:, None, None] * (sums @ self._member), gradient, np.abs(recorded)[:, None] * sizes)
        whole = [
            recorded[n : n + 1] if fits[n] else self._scales(step, found[n], gradient[n])
            for n, step in enumerate(steps)
        ]
        found *= np.concatenate(whole)[:, None, None, None]
        return [Contributions(*each) for each in zip(found, whole, mean, strict=True)]

    def _fits(self, sums: np.ndarray, gradient: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """(...): whether shares (..., Q, G) sum to p.grad, as far as U sees it, (..., Q, K); sizes (..., Q)."""
        # to few bits p.grad is rounded once where it is summed, by half of eps
        eps = float(torch.finfo(self._precision).eps)
        bound = eps if is_low(self._precision) else split_bound(self._precision)
        off = np.abs(sums - gradient @ self._member)
        fits: np.ndarray = (off <= bound * sizes[..., None]).all((-2, -1))
        return fits

    # the common factors of a step

    def _scales(self, step: RecordedStep, found: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """The recorded ones where the shares then sum to p.grad, as far as U sees it; else what takes them there. What was
        recorded of steps that were not checked was assumed."""
        recorded = np.array([p.scale for p in step.passes])
        if self.run.declares_remainder and not np.isnan(recorded).any():
            return recorded  # p.grad is not their sum
        sums = [found[:, p.slots].sum(1) for p in step.passes]
        seen = [s @ self._member for s in sums]
        sizes = [_size(found[:, p.slots]) for p in step.passes]

        def fits(scales: np.ndarray | None) -> bool:
            if scales is None or np.isnan(scales).any():
                return False
            each = scales.tolist()
            total = sum(scale * s for scale, s in zip(each, seen, strict=True))
            size = sum(abs(scale) * s for scale, s in zip(each, sizes, strict=True))
            return bool(self._fits(np.asarray(total), gradient, np.asarray(size)))

        if fits(recorded):
            return recorded
        fitted = self._seen(seen, gradient @ self._member) if len(seen) == 1 else None
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


def _size(values: np.ndarray) -> np.ndarray:
    """(Q, B, K) -> (Q,): of all that there is, without as much again beside it."""
    return sum((np.abs(values[..., k]).sum(1) for k in range(values.shape[2])), np.zeros(len(values)))
