"""Re-check a stored run: every chunk, the step identity of every step, the optimizer's state from block to block, and the
batch identity where the shares are stored."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .budget import slice_bytes
from .checks import ShareBound, batch_identity, same_state, step_identity
from .errors import AttribError, SplitIdentityError
from .functional import uncompiled
from .gradients import random_weights
from .optim import explained
from .run import Run, check_model
from .shares import Shares, drawn


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
            lines.append(f"{name} identity".ljust(24) + f"{count:6d} steps, largest gap {gap:.2e}")
        lines.append("FAILED: " + self.failure if self.failure else "verified")
        return "\n".join(lines)


def verify(
    run: Run, progress: bool = True, model: nn.Module | None = None, loss: Callable[..., Tensor] | None = None
) -> Verification:
    """Read everything and check it again; the first thing that is wrong ends the check and is named in `failure`.

    Without the model, the shares of a run captured by "replay" cannot be recomputed: `attrib.attribute` checks them at
    every step it visits, and the measurement identity with them. With `model` and `loss`, as they were recorded, the split
    is checked on a few steps: each share, along a random direction, against the derivative of its own example's loss.
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
                    segments, update = block.updates[n]
                    known = explained(run.rules, segments, update)
                    found.note("step", step_identity(run.layout, theta, end, update, step, known))
                    if run.capture != "replay":
                        gradient, penalty = block.examples[n], None if block.penalty is None else block.penalty[n]
                        within = ShareBound(gradient, lambda: 0.0, penalty, run.precision)
                        found.note("batch", batch_identity(run.layout, gradient, _total(run, step), step, within))
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


def _split(run: Run, model: nn.Module, loss: Callable[..., Tensor], found: Verification) -> None:
    """On a few steps, along a random direction.

    Raises:
        SplitIdentityError: naming the step, the example and the parameter.
    """
    check_model(run, model)
    itself = np.eye(len(run.groups))
    shares = Shares(run, model, loss, run.dtype, slice_bytes(run.layout.size, run.dtype.itemsize), itself)
    for number in sorted(drawn(range(run.steps))):
        ((step,),) = run.blocks(number, number + 1)
        along = random_weights(run.layout.size, number, torch.zeros(0, dtype=torch.float64))[None]
        gradient = [(along[:, part] @ step.examples[part].double()).numpy() for _, part in run.layout.slices()]
        along = along.to(next(model.parameters()).device)
        split = shares.split(step, along, shares.contract(step, along, np.stack(gradient, 1)), 0.0)
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
        return torch.from_numpy(run.shares(step).sum(0, dtype=np.float64)).to(run.dtype)
    total = torch.zeros(run.layout.size, dtype=run.dtype)
    found = run.factors(step)
    for name, part in run.layout.slices():
        for factor in found[name]:
            total[part] += factor.total()
    return total * run.scale(step)


def _chunks(run: Run, found: Verification) -> None:
    """Every committed chunk of every array."""
    run.reader.check_documents()
    for name in run.reader.names():
        found.chunks += run.reader.touch(name)
