"""How the batches of a run are worked through: followed once of each kind, judged, cut into slices, assigned.

    form        whether a few examples by themselves are as in their batch, so that it can be cut; whether losses see each
                other
    assignment  of one kind of forward pass: which rows of which site are whose (`assignment`), proven on the batch at hand

What goes the slow way is said once, with the reason and the cost.
"""

import logging
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch
from ..constants import rounding
from ..errors import ChangedOutsideError, LossError
from ..functional import Functional
from ..generators import generators, random_state, set_generators
from ..losses import check_losses, first_line
from .along import LossVector
from .assignment import Assignment, Trace, assigned, calls_of, few, followed, kind_of, unproven

log = logging.getLogger("attrib")

ASSIGNMENTS = 24  # of other calls: where they are others each time, they are not followed any more
_COUPLED = "the losses of a batch depend on each other"
_OTHERS = "its calls are others from batch to batch"


@dataclass(frozen=True)
class Form:
    """How batches of one kind are worked through.

    bytes: of activations per example, 0 where the batch is not cut. few: whether a few of the examples, by themselves, have
    the losses that they have in the batch. reason: why nothing is read off the sites; None where it is.
    """

    bytes: float
    few: bool
    reason: str | None = None


class Forms:
    """assignments: by kind of forward pass.

    Args:
        loss, vector: the loss bound to the model, and as a vector.
        slices: bytes of what the calls of a forward pass return for the examples of a slice.
    """

    def __init__(self, loss: Functional, vector: LossVector, slices: int) -> None:
        self._loss, self.vector, self._slice_bytes = loss, vector, slices
        self.assignments: dict[Any, Assignment] = {}
        self._forms: dict[Any, Form] = {}
        self._cut: set[Any] = set()  # kinds of batches of which one was compared with its slices
        self._said: set[str] = set()

    def at(self, vector: LossVector, loss: Functional) -> "Forms":
        """The same of another `vector`; what is learnt of the batches is shared."""
        other = copy(self)
        other.vector, other._loss = vector, loss
        return other

    @property
    def coupled(self) -> bool:
        """Whether a batch was met whose losses depend on each other."""
        return any(assignment.coupled for assignment in self.assignments.values())

    def of(self, theta: Tensor, batch: Batch) -> Form:
        kind = self.vector.active, batch.size == 1, batch.kind
        if kind not in self._forms:
            with random_state(generators()):
                self._forms[kind] = self._judge(theta, batch)
            if reason := self._forms[kind].reason:
                self._say(len(self.vector.active), reason)
        if self._forms[kind].bytes and kind not in self._cut and len(list(self.slices(self._forms[kind], batch))) > 1:
            self._cut.add(kind)
            if not self._alike_in_slices(theta, batch, self._forms[kind]):
                log.info("the batch is not cut: its losses are others in slices of it")
                self._forms[kind] = replace(self._forms[kind], bytes=0.0, few=False)
        return self._forms[kind]

    def _alike_in_slices(self, theta: Tensor, batch: Batch, form: Form) -> bool:
        """Whether the losses of the first batch that is cut are those of the whole batch."""
        with random_state(generators()):
            try:
                found = torch.cat([self.vector.values(theta, part)[fresh:] for part, fresh in self.slices(form, batch)])
            except Exception as error:  # as in `_alike`
                log.debug("a slice of the batch has no losses: %s", first_line(error))
                return False
            whole = self.vector.values(theta, batch)
        bound = self._bound(whole)
        return torch.allclose(found, whole, rtol=bound, atol=bound * float(whole.abs().max()))

    def _judge(self, theta: Tensor, batch: Batch) -> Form:
        start = generators()
        losses = self.vector.values(theta, batch)
        drew = not torch.equal(start, generators())
        alike = not drew and self._alike(theta, few(batch), losses)
        set_generators(start)
        parameters = self.vector.parameters(theta)
        try:
            with self._loss.bound(parameters) as held:
                found = self.follow(held, few(batch) if alike else batch)
                form = Form(max(1.0, found.bytes / len(found.losses)) if alike else 0.0, alike)
                part, _ = next(iter(self.slices(form, batch)))
                set_generators(start)
                assignment = self.assignment(theta, self.follow(held, part), part, form)
        except (LossError, ChangedOutsideError):
            raise
        except Exception as error:  # whatever a model does that cannot be followed call by call
            return Form(0.0, False, f"its calls cannot be followed ({first_line(error)})")
        if assignment.coupled:
            return Form(0.0, False, _COUPLED)
        return form

    def _alike(self, theta: Tensor, part: Batch, losses: Tensor) -> bool:
        try:
            alone = self.vector.values(theta, part)
        except Exception as error:  # a loss that walks its batch in a way of its own
            log.debug("the batch is not cut: a few of its examples have no loss by themselves: %s", first_line(error))
            return False
        bound = self._bound(losses)
        return torch.allclose(alone, losses[: len(alone)], rtol=bound, atol=bound * float(losses.abs().max()))

    def _bound(self, losses: Tensor) -> float:
        """On how far losses of parts of a batch are from those of the whole, which sums in another order."""
        coarse = self._loss.coarse
        return rounding(self._loss.precision) if coarse else float(torch.finfo(losses.dtype).eps ** 0.75)

    def slices(self, form: Form, batch: Batch) -> Iterator[tuple[Batch, int]]:
        """The batch in slices of one size, so the last may begin with examples seen already: how many."""
        yield from batch.cut(int(self._slice_bytes // form.bytes) if form.bytes else batch.size)

    def assignment(self, theta: Tensor, trace: Trace, batch: Batch, form: Form) -> Assignment:
        """Of the trace's kind; the model is bound to the leaves of `trace`, which is of `batch`."""
        key = kind_of(trace)
        if key not in self.assignments:
            parameters = self.vector.parameters(theta)
            with self._loss.bound(parameters) as held:
                part = few(batch) if form.few else batch
                seen, assignment = assigned(lambda b: self.follow(held, b, values=True), part, trace.start)
            kinds = {known.calls for known in self.assignments.values()}
            same = (calls_of(seen), seen.unsplit) == (calls_of(trace), trace.unsplit)
            reason = _COUPLED if assignment.coupled else None if same and len(kinds) < ASSIGNMENTS else _OTHERS
            if reason is None:
                assignment = replace(assignment, whole=assignment.whole | unproven(trace, assignment))
            else:
                assignment = replace(
                    assignment, readings=[None] * len(trace.sites), whole=dict.fromkeys(trace.parameters, reason)
                )
            for reason in set(assignment.whole.values()):
                self._say(sum(r == reason for r in assignment.whole.values()), reason)
            self.assignments[key] = assignment
        return self.assignments[key]

    def _say(self, tensors: int, reason: str) -> None:
        """Once, what is slow and why."""
        if reason not in self._said:
            self._said.add(reason)
            log.warning(
                "the shares of %d of %d tensors are slow: %s. They are had by the derivative of the loss along each "
                "direction: about one pass over the batch per query and group; stored captures take one per example",
                *(tensors, len(self.vector.layout.names), reason),
            )

    def follow(self, parameters: dict[str, Tensor], batch: Batch, values: bool = False, checked: bool = True) -> Trace:
        """One forward pass, the model holding these very `parameters`."""
        trace = followed(self._loss, parameters, batch, values, checked)
        if checked:
            check_losses(trace.losses, Batch.of(batch))
        return trace

    def misread(self, gaps: dict[str, Tensor]) -> list[str]:
        """Parameters with a site whose rows are other examples' in this batch than in the one that they were assigned on."""
        wrong = [n for n, gap in gaps.items() if not float(gap) <= torch.finfo(gap.dtype).eps ** 0.5]
        if wrong:
            self._say(len(wrong), "which rows are whose depends on the content of the batch")
        return wrong
