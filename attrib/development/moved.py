"""Who moved what, step by step: the change that each update made, split over the examples that caused it.

`Result.by("step", "example")` stands on the step whose batch supplied the gradient; here contributions stand on the step
that moved the parameters. Without momentum these are the same. With it, the change in step s is a difference of two windows
that begin at the same state: what of m(theta_{s+1}) - m(theta_a) is not in m(theta_s) - m(theta_a), term by term.

With the losses of the training examples as the measurement it is the matrix of who changed whose loss.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..attribute import AttributeOptions, attributed, note_values
from ..functional import uncompiled
from ..result import Result
from ..run import Run

CHUNK_BYTES = 64 << 20  # contributions (Q, n, N) held at once


class Move(NamedTuple):
    """One step: what of the measurements' change each example caused, (Q, N), in the order of `run.examples`; what weight
    decay did, momentum from before the lead, and what gradients and updates held beyond the shares and what changes
    of buffers did, (Q,) each; and the change itself, which they sum to but for rounding."""

    step: int
    contributions: np.ndarray
    decay: np.ndarray
    inherited: np.ndarray
    remainder: np.ndarray
    change: np.ndarray


def moves(
    run: Run,
    model: nn.Module,
    measurement: Any,
    steps: range | slice | None = None,
    *,
    loss: Callable[..., Tensor] | None = None,
    lead: int = 0,
    dtype: torch.dtype | None = None,
) -> Iterator[Move]:
    """The changes that single steps made, over the examples that caused them.

    Args:
        run, model, measurement, loss, dtype: as for `attrib.attribute`.
        steps: which, in order; None for all.
        lead: steps before the first whose gradients are told apart, too; what momentum brings from before is `inherited`.
            Unused where there is no momentum and no average. With one of them the cost grows with the square of
            lead and steps.

    Yields:
        A `Move` per step, in the measurement's units.

    Raises:
        ValueError: steps outside the run, or a negative lead. What `attrib.attribute` raises.

    Example:
        >>> losses = attrib.measure.loss(x, y)  # of the training examples
        >>> for move in attrib.moves(run, model, losses, range(2), loss=loss):
        ...     print(move.step, move.contributions.shape)  # (whose loss, who changed it)
        0 (24, 24)
        1 (24, 24)
    """
    chosen = range(run.steps) if steps is None else steps
    if isinstance(chosen, slice):
        chosen = range(*chosen.indices(run.steps))
    if chosen.step != 1 or not 0 <= chosen.start < chosen.stop <= run.steps or lead < 0:
        raise ValueError(
            f"the steps are not in the run: got {chosen} and lead {lead}, expected a range within 0 to {run.steps} of "
            f"stride 1 and a lead of 0 or more, at moves."
        )

    model, asked = uncompiled(model), AttributeOptions(loss=loss, dtype=dtype, progress=False)
    asked.check(run, model)
    average = getattr(measurement, "average", None)
    note_values(run, model, chosen.stop, average)

    def window(first: int, stop: int, *keep: str) -> Result:
        return attributed(run, model, measurement, replace(asked, steps=slice(first, stop), keep=keep))

    return (
        _with_momentum(window, chosen, lead)
        if _remembers(run) or average is not None
        else _at_once(window, chosen, len(run.examples))
    )


def _remembers(run: Run) -> bool:
    """Whether the optimizer has momentum in any step."""
    named = ((name.rpartition(" ")[2], ends) for name, ends in run.options.items())  # of several, "AdamW betas"
    return any(np.ravel(value)[0] != 0 for name, ends in named if name in ("momentum", "betas") for value in ends)


def _at_once(window: Callable[..., Result], steps: range, examples: int) -> Iterator[Move]:
    """Many steps to a window: a step's contributions are those of its own gradients."""
    first, size = steps.start, 1
    while first < steps.stop:
        stop = min(first + size, steps.stop)
        found = window(first, stop, "step", "example")
        given = found.by("step", "example").values
        for n in range(stop - first):
            change = np.diff(found.curve.values[:, n : n + 2])[:, 0]
            rows = found.remainder, found.update_remainder, found.buffers
            rest = sum(row.values[:, n].sum(1) for row in rows)
            yield Move(first + n, given[:, n], found.decay.values[:, n].sum(1), np.zeros(len(given)), rest, change)
        first, size = stop, max(1, CHUNK_BYTES // (8 * len(given) * examples))


def _with_momentum(window: Callable[..., Result], steps: range, lead: int) -> Iterator[Move]:
    begin = max(0, steps.start - lead)
    before: tuple[np.ndarray, ...] | None = (
        _terms(window(begin, steps.start, "example")) if begin < steps.start else None
    )
    for step in steps:
        after = _terms(window(begin, step + 1, "example"))
        yield Move(step, *(a if b is None else a - b for a, b in zip(after, before or [None] * 5, strict=True)))
        before = after


def _terms(found: Result) -> tuple[np.ndarray, ...]:
    """Contributions (Q, N), decay, inherited, remainder and the change, (Q,) each, of a window."""
    decay, inherited = found.decay.sum(("step", "group")).values, found.inherited.sum("group").values
    updates = (found.update_remainder + found.buffers).sum(("update_step", "group"))
    rest = (found.remainder.sum(("step", "group")) + updates).values
    return found.by("example").values, decay, inherited, rest, (found.final - found.initial).values
