"""Re-check a stored run: every chunk, the step identity of every step, the optimizer's state from block to block, and the
batch identity where the shares are stored."""

from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

from .checks import ShareBound, batch_identity, same_state, step_identity
from .errors import AttribError
from .kernels import factors
from .run import Run


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


def verify(run: Run, progress: bool = True) -> Verification:
    """Read everything and check it again; the first thing that is wrong ends the check and is named in `failure`.

    Without the model, the shares of a run captured by "replay" cannot be recomputed: `attrib.attribute` checks them at
    every step it visits, and the measurement identity with them.
    """
    found = Verification()
    try:
        _chunks(run, found)
        after: dict[str, torch.Tensor] | None = None
        with tqdm(total=run.steps, desc="verify", unit="step", delay=2, disable=not progress) as bar:
            for block in run.blocks(0, run.steps, backwards=False):
                if after is not None:
                    same_state(after, block.state, block.start)
                for n, step in enumerate(block.steps):
                    theta, end = block.theta[n], block.theta[n + 1]
                    found.note("step", step_identity(run.layout, theta, end, block.updates[n][1], step))
                    if run.capture != "replay":
                        gradient, penalty = block.examples[n], None if block.penalty is None else block.penalty[n]
                        within = ShareBound(gradient, lambda: 0.0, penalty)
                        found.note("batch", batch_identity(run.layout, gradient, _total(run, step), step, within))
                    bar.update()
                after = block.state_after
        if run.capture == "replay":
            for gap in run.log("batch_identity"):
                if not np.isnan(gap):
                    found.note("recorded batch", float(gap))
    except AttribError as error:
        found.failure = str(error)
    return found


def _total(run: Run, step: int) -> torch.Tensor:
    """The sum of the stored shares of a step, (P,)."""
    if run.capture == "gradients":
        return torch.from_numpy(run.shares(step).sum(0, dtype=np.float64)).to(run.dtype)
    total = torch.zeros(run.layout.size, dtype=run.dtype)
    found = run.factors(step)
    for name, part in run.layout.slices():
        for factor in found[name]:
            total[part] += factors.total(factor)
    return total * run.scale(step)


def _chunks(run: Run, found: Verification) -> None:
    """Every committed chunk of every array."""
    for name in run.reader.names():
        found.chunks += run.reader.touch(name)
