"""Clipping by norm, as far as a record tells: by which factor it made the gradient of each step shorter.

    G_s = c_s R_s,   c_s = min(1, C / (|R_s| + 1e-6)),   |G_s| = C - 1e-6 c_s where c_s < 1

The record has G and the factors that take the sum of the examples' gradients to it: c times the reduction, times what
else the loop multiplies a loss with. Where that is one number, steps whose gradient is shorter than that of others
were not clipped; where batches have weights of their own, c cannot be told from these, and C has to be said.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor, finfo

from .checks import weights_of
from .errors import ReplayError
from .kernels.clipping import EPS
from .run import Run
from .steps import Blocks, RecordedStep

CLIPPED = 1e-5  # how much less than 1 a factor is that clips
THRESHOLD = 1e-3  # how far, relatively, the norms that clipping leaves may be apart
ROUNDINGS = 100  # of a norm
LEAST = 1e-3  # a factor that is read off a norm, or the rounding of it


@dataclass(frozen=True)
class Clipping:
    """Of a run. scales: the factors of a step's losses (B,), fitted where they were not recorded. said: C, as the caller
    knows it, inf for none; None where it is to be found."""

    run: Run
    blocks: Blocks
    scales: Callable[[RecordedStep], np.ndarray]
    said: float | None

    def factor(self, step: RecordedStep, scales: np.ndarray, gradient: Tensor) -> float:
        """c of a step, 1 where it was not clipped. scales: (B,).

        Raises:
            ReplayError: another factor changes from step to step, or the run was not clipped so.
        """
        if self.said == math.inf:
            return 1.0
        norm = float(gradient.double().norm())
        whole = len(step.active) == len(self.run.groups)  # what stood still was clipped with the others
        if self.said is not None and norm > self.said * (1 + THRESHOLD):
            raise ReplayError(
                f"the run was not clipped so: got clip={self.said:.6g}, and a gradient of norm {norm:.6g} at step "
                f"{step.number}, expected none above it, at {self.run.reader.target}. Pass the max_norm that "
                f"clip_grad_norm_ was given, or math.inf where nothing was clipped."
            )
        if self._usual is None:
            return 1.0 if self.said is None else self._of_norm(norm, self.said)
        clip = factor_of(self._kind, [p.size for p in step.passes], scales) / self._usual
        if abs(clip - 1) < THRESHOLD and clip > 1 - CLIPPED:
            return 1.0
        if clip > 1 or (whole and abs(norm + clip * EPS - self._threshold) > THRESHOLD * self._threshold):
            raise ReplayError(
                f"the gradients are multiplied by a factor that changes, and is not that of clipping by norm: got "
                f"{clip:.4g} at step {step.number}, which leaves a norm of {norm:.4g}"
                f"{'' if clip > 1 else f', expected {self._threshold:.4g} as at other steps that were clipped'}. Its "
                f"derivative is not known: clip with torch.nn.utils.clip_grad_norm_ over all parameters, or let weights of "
                f"the losses do what the factor does; pass clip=math.inf where it does not depend on the gradients."
            )
        return clip

    @property
    def ambiguity(self) -> str | None:
        """Why clipping cannot be told from other factors; None where it can."""
        if self.said is not None or self._usual is not None:
            return None
        if self._kind is None:
            return "batches of a step that have weights of their own"
        return "gradients with a factor beside the reduction, and of one norm throughout"

    @cached_property
    def _kind(self) -> str | None:
        """Of the reduction; None where passes have weights of their own."""
        return next(iter(self.run.header["settled"]["reduction"][0]), None)

    @cached_property
    def _usual(self) -> float | None:
        """The factor that gradients have beside the reduction where they are not clipped; None where nothing says."""
        if self._kind is None:
            return None
        if not self.run.header["settled"]["reduction"][1]:
            return 1.0
        whole = np.flatnonzero(self._moved == self._moved.max())
        norms = np.array([float(self._gradient(step).norm()) for step in whole.tolist()])
        least = int(norms.argmin())
        if norms[least] >= (1 - THRESHOLD) * norms.max():
            return None
        (step,) = self.blocks.at(range(int(whole[least]), int(whole[least]) + 1))
        return factor_of(self._kind, [p.size for p in step.passes], self.scales(step))

    @cached_property
    def _moved(self) -> np.ndarray:
        """(T,): of each step the tensors that moved."""
        moved: np.ndarray = self.run.reader.read("hyper", slice(0, self.run.steps))[..., -1].sum(1)
        return moved

    @cached_property
    def _threshold(self) -> float:
        """The norm that clipping leaves, as it was said, or at the first step that was clipped and moved most of the
        tensors."""
        if self.said is not None:
            return self.said
        assert self._usual is not None
        passes = self.run.reader.passes(slice(0, self.run.steps))
        found = {}
        for number in range(self.run.steps):
            each = list(passes.of_step(number))
            sizes = [p.slots.stop - p.slots.start for p in each]
            factor = factor_of(self._kind, sizes, np.repeat([p.scale for p in each], sizes)) / self._usual
            if factor <= 1 - CLIPPED:
                found[number] = factor
        if not found:  # none of those whose factors were recorded
            return float("nan")
        number = max(found, key=lambda n: (self._moved[n], -n))
        return float(self._gradient(number).norm()) + found[number] * EPS

    def _gradient(self, number: int) -> Tensor:
        return self.blocks.at(range(number, number + 1)).gradient[0].double()

    def _of_norm(self, norm: float, threshold: float) -> float:
        """c from what the norm is short of the threshold. Rounding makes any number of it in single precision; but what
        clipping does to a derivative hardly depends on c, given G."""
        short = threshold - norm
        if short > EPS + ROUNDINGS * finfo(self.run.compute).eps * threshold:
            return 1.0
        return min(max(short / EPS, LEAST), 1 - LEAST)


def factor_of(kind: str | None, sizes: list[int], scales: np.ndarray) -> float:
    """What the examples' gradients were multiplied with beside the reduction. scales: (B,)."""
    return 1.0 if kind is None else float((scales / np.repeat(weights_of(kind, sizes), sizes)).mean())
