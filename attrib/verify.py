"""Re-check a stored run: every chunk, the step identity of every step, the optimizer's state from block to block, and the
batch identity where the shares are stored."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .autocast import without_autocast
from .budget import slice_bytes
from .checks import ShareBound, batch_identity, same_state, split_bound, step_identity
from .errors import AttribError, BatchIdentityError, SplitIdentityError
from .functional import uncompiled
from .gradients import random_weights
from .matching import check_model
from .run import Run
from .shares import Shares, drawn
from .steps import Steps


@dataclass
class Verification:
    """What was checked: name -> (steps checked, largest relative gap), and the first failure, if any."""

    identities: dict[str, tuple[int, float]] = field(default_factory=dict)
    chunks: int = 0
    failure: str | None = None

    def note(self, name: str, gap: float) -> None:
        count, largest = self.identities.get(name, (0, 0.0))
        self.identities[name] = (count + 1, max(largest, gap))

    def __str__(self) -> str:
        lines = [f"{self.chunks} chunks read, all checksums agree"]
        for name, (count, gap) in self.identities.items():
            lines.append(
                (name if name == "remainder" else f"{name} identity").ljust(24)
                + f"{count:6d} steps, largest gap {gap:.2e}"
            )
        lines.append("FAILED: " + self.failure if self.failure else "verified")
        return "\n".join(lines)


@without_autocast
def verify(
    run: Run, progress: bool = True, model: nn.Module | None = None, loss: Callable[..., Tensor] | None = None
) -> Verification:
    """Read everything and check it again; the first thing that is wrong ends the check and is named in `failure`.

    Without the model, the shares of a run captured by "replay" cannot be recomputed: `attrib.attribute` checks them at
    every step it visits, and the measurement identity with them. With `model` and `loss`, as they were recorded, the split
    is checked on a few steps: each share, along a random direction, against the derivative of its own example's loss.

    Returns:
        `failure`: what is wrong, also of a model that does not fit, in words, or None. `identities`: name -> (steps checked,
        largest relative gap). `chunks`: how many were read.

    Example:
        >>> found = attrib.verify(run, model=model, loss=loss)
        >>> found.failure is None, list(found.identities)
        (True, ['step', 'recorded batch', 'split'])
    """
    found = Verification()
    try:
        _chunks(run, found)
        after: dict[str, torch.Tensor] | None = None
        with tqdm(total=run.steps, desc="verify", unit="step", delay=2, disable=not progress) as bar:
            for block in run.blocks(0, run.steps, backwards=False):
                if after is not None:
                    same_state(after, block.state, block.start)
                for n, step in enumerate(block.range):
                    theta, end = block.theta[n], block.theta[n + 1]
                    update = block.updates[n][1]
                    found.note("step", step_identity(run.layout, theta, end, update, step, *block.bounds(n)))
                    if run.capture != "replay":
                        (_remainder if run.declares_remainder else _batch)(run, block, n, found)
                    bar.update()
                after = block.state_after
        for name in ("batch", "split"):
            gaps = run.log(f"{name}_identity")
            for gap in gaps[~np.isnan(gaps)] if name == "split" or run.capture == "replay" else ():
                found.note(f"recorded {name}", float(gap))
        if model is not None and loss is not None:
            _split(run, uncompiled(model), loss, found)
    except AttribError as error:
        found.failure = str(error)
    return found


def _batch(run: Run, block: Steps, n: int, found: Verification) -> None:
    """The stored shares of a step sum to p.grad."""
    gradient, penalty = block.examples[n], None if block.penalty is None else block.penalty[n]
    within, step = ShareBound(gradient, lambda: 0.0, penalty, run.precision), block.range[n]
    found.note("batch", batch_identity(run.layout, gradient, _total(run, step), step, within))


def _remainder(run: Run, block: Steps, n: int, found: Verification) -> None:
    """What they leave of p.grad is as large as it was when the step was recorded, where it was measured then.

    Raises:
        BatchIdentityError: naming the step.
    """
    step = block.range[n]
    recorded = float(run.log("remainder")[step])
    if np.isnan(recorded):
        return
    size = float(block.gradient[n].double().norm()) or 1.0
    gap = abs(float((block.examples[n] - _total(run, step)).double().norm()) / size - recorded)
    if not gap <= split_bound(run.precision):
        raise BatchIdentityError(
            f"the shares leave another part of p.grad than when they were recorded: got a difference of {gap:.3g} of "
            f"|p.grad|, expected at most {split_bound(run.precision):.1g}, at step {step}. Record the run again."
        )
    found.note("remainder", gap)


def _split(run: Run, model: nn.Module, loss: Callable[..., Tensor], found: Verification) -> None:
    """On a few steps, along a random direction.

    Raises:
        SplitIdentityError: naming the step, the example and the parameter.
    """
    check_model(run, model)
    itself = np.eye(len(run.groups))
    shares = Shares(run, model, loss, run.dtype, slice_bytes(run.layout.size, run.compute.itemsize), itself)
    for number in sorted(drawn(range(run.steps))):
        ((step,),) = run.blocks(number, number + 1)
        along = random_weights(run.layout.size, number, torch.zeros(0, dtype=torch.float64))[None]
        gradient = [(along[:, part] @ step.examples[part].double()).numpy() for _, part in run.layout.slices()]
        along = along.to(next(model.parameters()).device)
        split = shares.split(step, along, shares.contract([step], along[None], np.stack(gradient, 1)[None])[0], 0.0)
        assert split is not None
        found.note("split", split.gap)
        if split.group is not None:
            raise SplitIdentityError(
                f"shares are not those of their own examples: got a gap of {split.gap:.3g} of their size, at step {number}, "
                f"example {split.example!r}, parameter {run.groups[split.group]!r}. Are model and loss those "
                f"that were recorded?"
            )


def _total(run: Run, step: int) -> torch.Tensor:
    """The sum of the stored shares of a step, (P,)."""
    if run.capture == "gradients":
        return torch.from_numpy(run.shares(step).sum(0, dtype=np.float64)).to(run.compute)
    total = torch.zeros(run.layout.size, dtype=run.compute)
    found, scales = run.factors(step), torch.from_numpy(run.factor_scales(step)).to(run.compute)
    for name, part in run.layout.slices():
        for factor in found[name]:
            total[part] += factor.weighted(scales).total()
    return total


def _chunks(run: Run, found: Verification) -> None:
    """Every committed chunk of every array."""
    run.reader.check_documents()
    for name in run.reader.names():
        found.chunks += run.reader.touch(name)
