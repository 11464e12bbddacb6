"""The user's training loop as a recorder sees it, and what the header of a run says of it."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from .capture import CaptureOptions, Settled, Step
from .checks import Guard, check_options, same_bits, step_identity
from .constants import to_tensor, wide
from .layout import Layout
from .optim import MOMENTUM, Replay, Rerun, Rules, step_bounds
from .store import FORMAT, StepRecord


@dataclass(frozen=True)
class RecordOptions:
    """The options of `attrib.record`."""

    capture: CaptureOptions
    overwrite: bool
    resume: bool
    block: int | None
    states_every: int
    constants: str
    rule: str | None = None

    def check(self) -> None:
        """Raise ValueError where one is none."""
        capture = self.capture
        words = capture.kind, self.constants, capture.remainder, capture.shares
        every = capture.check_every
        check_options(*words, check_every=every, block=self.block, states_every=self.states_every)


@dataclass(frozen=True)
class Loop:
    """What is trained, and by what. parameters: those of the optimizer, in order; guard: of all that must not change."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    rules: Rules
    layout: Layout
    parameters: Sequence[Tensor]
    guard: Guard


def check_unmodelled(rules: Rules, options: RecordOptions) -> None:
    """Raise ValueError at an option that cannot go with rule="frozen"."""
    if not rules.read_off:
        return
    for name, refused in (("states_every=", options.states_every > 1), ("resume=", options.resume)):
        if refused:
            raise ValueError(
                f'the optimizer cannot be run again: got {name} with rule="frozen", expected none, since the state of '
                f"{rules} is not recorded, only what it did. Leave it out."
            )


def header_of(loop: Loop, options: RecordOptions) -> dict[str, Any]:
    """That of a run that begins."""
    digests = loop.guard.digests
    return {
        "kind": "run",
        "id": uuid.uuid4().hex,
        "format": FORMAT,
        "layout": {"names": list(loop.layout.names), "shapes": [list(s) for s in loop.layout.shapes]},
        "dtype": str(loop.parameters[0].dtype).removeprefix("torch."),
        **loop.rules.described(),
        "capture": options.capture.kind,
        "check_every": options.capture.check_every,
        "remainder": options.capture.remainder,
        "shares": options.capture.shares,
        "asked": {
            "block": options.block,
            "states_every": options.states_every,
            "penalty": options.capture.penalty is not None,
            "constants": options.constants,
        },
        "constants": list(digests) if options.constants == "values" else [],
        "digests": {name: [c.dtype, list(c.shape), c.digest] for name, c in digests.items()},
        "model": type(loop.model).__name__,
        "seed": torch.initial_seed(),
        "versions": {"attrib": version("attrib"), "torch": torch.__version__},
        "recorded": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "training": [],
        "factors": None,
        "buffers": [],
        "settled": settled_facts(Settled()),
    }


def settled_facts(settled: Settled) -> dict[str, Any]:
    """What stands in the header of what the steps so far have shown."""
    draws, reduction, autocast = settled.draws, settled.reduction, settled.autocast
    return {
        "reduction": [list(reduction.kinds), reduction.common],
        "stochastic": draws.stochastic,
        "beyond": draws.beyond,
        "forwards": settled.forwards,
        "late": settled.late,
        "autocast": None if autocast is None else autocast.facts(),
        "coupled": settled.coupled,
    }


def replayed_step(rules: Rules, layout: Layout, step: Step, record: StepRecord, after: Tensor, again: bool) -> float:
    """How well the rules reproduce a step that holds the state before it, and ended with `after` (P,): the step identity.
    again: whether torch's optimizer, run again, has to end with the same bits.

    Raises:
        StepIdentityError: beyond rounding.
    """
    assert record.state is not None
    name = str(after.dtype).removeprefix("torch.")
    known = {key: to_tensor(value, name) for key, value in record.state.items()}
    state = {key: value.to(wide(after.dtype)) for key, value in known.items()}
    theta, gradient, end = step.theta.cpu(), step.gradient.cpu(), after.to(step.theta.dtype)
    segments, delta = Replay(rules, layout, state).step(record.hyper, gradient, theta, end)
    if again:
        rerun = Rerun(rules, layout, theta.to(after.dtype), known, record.hyper)
        same_bits(layout, after, rerun.step(record.hyper, gradient.to(after.dtype)), step.number)
    bounds = step_bounds(rules, segments, delta, state[MOMENTUM], gradient, torch.stack([theta, end]))
    return step_identity(layout, theta, end, delta, step.number, *bounds)
