"""Where the shares of a step come from when a run is read: recomputed, or from the store as they are or as factors; and the
truth that they are held against."""

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .checks import fit_scale, split_bound, split_gaps
from .errors import LossError
from .functional import training_modes
from .generators import random_state
from .gradients import Shares, random_weights
from .kernels import factors
from .kernels.contraction import contract_rows
from .run import Block, Run

log = logging.getLogger("attrib")


class Contributions(NamedTuple):
    """values (Q, B, K) float64; scale: the common factor in them between an example's gradient and its share, None where the
    store has the shares themselves."""

    values: np.ndarray
    scale: float | None


class Split(NamedTuple):
    """How far a step's contributions are from those of their own examples; where it fails, the slot and the group furthest
    off."""

    gap: float
    slot: int | None = None
    group: int | None = None


def drawn(steps: range) -> frozenset[int]:
    """A few steps to look at: one in each of as many equal parts, two in a hundred, four at most."""
    count = min(len(steps), max(2, min(4, len(steps) // 50)))
    cuts = np.linspace(steps.start, steps.stop, count + 1).astype(int)
    random = np.random.default_rng(len(steps))
    return frozenset(int(random.integers(a, b)) for a, b in itertools.pairwise(cuts))


class Source:
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
        device: torch.device,
        slices: int,
        member: np.ndarray,
    ) -> None:
        if loss is None and run.capture == "replay":
            raise LossError(
                "a loss is needed: got loss=None, expected the loss given to attrib.record, since this run was captured by "
                '"replay". Pass loss=, or record with capture="gradients".'
            )
        self.run, self._model, self._dtype, self._device, self._member = run, model, dtype, device, member
        self._groups = member.argmax(1).tolist()
        self._contract = {"gradients": self._stored, "factors": self._factored, "replay": self._replayed}[run.capture]
        self._said = False
        self._shares: Shares | None = None
        if loss is not None:
            with training_modes(model, run.header["training"]):
                self._shares = Shares(loss, model, run.layout, dtype, slices)

    @property
    def coupled(self) -> bool:
        """Whether a batch was met whose losses depend on each other."""
        return self._shares is not None and self._shares.coupled

    def contract(self, block: Block, n: int, theta: Tensor, sensitivity: Tensor, gradient: np.ndarray) -> Contributions:
        """The n-th step of a block, from theta (P,), U (Q, P), and <U, gradient> (Q, K) of the recorded gradient."""
        return self._contract(block, n, theta, sensitivity, gradient)

    def split(
        self, block: Block, n: int, theta: Tensor, sensitivity: Tensor, found: Contributions, seen: np.ndarray
    ) -> Split | None:
        """The fourth identity: sum_i v_i c_i = <d (v . losses) / d theta, U> for random v, for every query and group, by one
        backward pass that knows nothing of sites. Where nothing is left to learn, of the rounding of the measurement `seen`
        (Q,). Without a loss, None."""
        if self._shares is None:
            return None
        theta = theta.to(self._dtype)
        mine = found.values @ self._member
        weights = random_weights(mine.shape[1], block.steps[n], theta)
        with self._step(block, n) as batch:
            pulled = self._shares.gradient(theta, batch, weights)[1].double()
        parts = [sensitivity[:, part] @ pulled[part].to(sensitivity) for _, part in self.run.layout.slices()]
        truth = torch.stack(parts, 1).cpu().numpy() @ self._member
        combined = np.einsum("b,qbg->qg", weights.double().cpu().numpy(), mine)
        scale = found.scale
        if scale is None:  # stored shares have theirs in them: of so many numbers one is fitted
            scale = fit_scale(torch.from_numpy(combined), torch.from_numpy(truth)) if truth.size > 1 else None
            scale = scale or self._fitted(block, n, theta) or 1.0
        truth, pulled = truth * scale, pulled * scale
        off = np.abs(combined - truth)
        flows = [
            sensitivity[:, part].abs() @ pulled[part].abs().to(sensitivity) for _, part in self.run.layout.slices()
        ]
        flow = torch.stack(flows, 1).cpu().numpy() @ self._member  # what the products cancelled from
        bound = split_bound(self._dtype)
        gaps = split_gaps(off, np.sqrt(np.square(mine).sum(1)), self._dtype, bound * (64 * flow + seen[:, None]))
        q, g = np.unravel_index(int(gaps.argmax()), gaps.shape)
        if gaps[q, g] <= bound:
            return Split(float(gaps[q, g]))
        along = self._along(block, n, theta, sensitivity[q], int(g)) * scale
        return Split(float(gaps[q, g]), int(np.abs(along - mine[q, :, g]).argmax()), int(g))

    def _along(self, block: Block, n: int, theta: Tensor, sensitivity: Tensor, group: int) -> np.ndarray:
        """(B,): the truth example by example, along one query's U over one group."""
        assert self._shares is not None
        named = self.run.layout.unflatten(sensitivity[None].to(self._dtype))
        names = [name for name, g in zip(self.run.layout.names, self._groups, strict=True) if g == group]
        with self._step(block, n) as batch:
            return self._shares.vector.along(theta, batch, named, [names])[1][0, :, 0].cpu().numpy()

    # by capture

    def _stored(self, block: Block, n: int, theta: Tensor, sensitivity: Tensor, gradient: np.ndarray) -> Contributions:
        rows = self.run.shares(block.steps[n])
        return Contributions(contract_rows(sensitivity.cpu().numpy(), rows, self.run.layout.bounds), None)

    def _factored(
        self, block: Block, n: int, theta: Tensor, sensitivity: Tensor, gradient: np.ndarray
    ) -> Contributions:
        named = self.run.layout.unflatten(sensitivity.to(self.run.dtype))
        found = self.run.factors(block.steps[n])
        empty = torch.zeros(len(sensitivity), len(block.index[n]), dtype=torch.float64)
        parts = [sum((factors.contract(f, named[k]) for f in found[k]), empty) for k in self.run.layout.names]
        return Contributions((torch.stack(parts, 2) * float(block.scale[n])).cpu().numpy(), None)

    def _replayed(
        self, block: Block, n: int, theta: Tensor, sensitivity: Tensor, gradient: np.ndarray
    ) -> Contributions:
        assert self._shares is not None
        theta = theta.to(self._dtype)
        with self._step(block, n) as batch:
            found = self._shares.contract(theta, batch, sensitivity, self._groups)[1].cpu().numpy()
        scale = self._scale(block, n, theta, found, gradient)
        found *= scale
        return Contributions(found, scale)

    @contextmanager
    def _step(self, block: Block, n: int) -> Iterator[tuple[Tensor, ...]]:
        """The batch of a step, the world being as it was then."""
        assert self._shares is not None
        batch = tuple(b.to(self._device) for b in self.run.inputs(int(block.kind[n]), block.rows[n]))
        self._shares = self._shares.at(block.active[n])
        with training_modes(self._model, self.run.header["training"]), random_state(block.random[n]):
            yield batch

    # the common factor of a step

    def _scale(self, block: Block, n: int, theta: Tensor, found: np.ndarray, gradient: np.ndarray) -> float:
        """The recorded one where the shares then sum to p.grad, as far as U sees it; else what takes them there. What was
        recorded of steps that were not checked was assumed."""
        recorded = float(block.scale[n])
        sums, wanted = found.sum(1) @ self._member, gradient @ self._member
        size = np.abs(found).sum((1, 2))[:, None]

        def fits(scale: float | None) -> bool:
            bound = split_bound(self._dtype) * abs(scale or 0.0) * size
            return scale is not None and bool((np.abs(scale * sums - wanted) <= bound).all())

        if fits(recorded):
            return recorded
        fitted = fit_scale(torch.from_numpy(wanted), torch.from_numpy(sums)) if sums.size > 1 else None
        if not fits(fitted):
            fitted = self._fitted(block, n, theta)
        if fitted is not None and (np.isnan(recorded) or fits(fitted)):
            if not np.isnan(recorded) and not self._said:
                self._said = True
                log.info("the scale of step %d is %.6g, not %.6g as was assumed", block.steps[n], fitted, recorded)
            return fitted
        return 1.0 if np.isnan(recorded) else recorded

    def _fitted(self, block: Block, n: int, theta: Tensor) -> float | None:
        """From p.grad and the sum of the gradients, over all parameters."""
        assert self._shares is not None
        with self._step(block, n) as batch:
            total = self._shares.total(theta, batch)[1]
        return fit_scale(block.examples[n].to(total), total)
