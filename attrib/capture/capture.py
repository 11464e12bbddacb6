"""The journey of a step through its capture."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..autocast import Autocast, switched_off
from ..checks import split_bound
from ..functional import uncompiled
from ..generators import generators, random_state
from ..gradients import ExampleGradients
from ..layout import Layout
from .identities import Fit, Trial, check_split, check_sum, fitted, of_the_loop
from .listen import Heard, Listeners
from .penalty import penalty_gradients
from .records import Arrays, Captured, CaptureOptions, Factors, Settled, Step
from .rounded import check_autocast, settled_autocast
from .stored import factor_arrays, gradient_arrays

log = logging.getLogger("attrib")

CHECK_FIRST = 2

Batch = tuple[Tensor, ...]


class Capture:
    """One record of a step in, one of what it leaves to be stored out."""

    def __init__(
        self,
        loss: Callable[..., Tensor],
        model: nn.Module,
        layout: Layout,
        parameters: Sequence[Tensor],
        options: CaptureOptions,
    ) -> None:
        self._model, self._layout, self._parameters, self._options = uncompiled(model), layout, parameters, options
        self._loss, self._noted = loss, False
        self._shares = self._under(None)
        self._listeners = Listeners(model, layout.names, parameters, options.kind != "replay")
        log.info(
            "recording %s: batch identity on the first %d steps, then every %d",
            *(options.kind, CHECK_FIRST, options.check_every),
        )

    def clear(self) -> None:
        """Forget the user's passes: their gradients are gone, or the step is recorded."""
        self._listeners.clear()

    def remove(self) -> None:
        """Take off all hooks."""
        self._listeners.remove()

    def prime(
        self, theta: Tensor, passes: Sequence[tuple[frozenset[str], Batch]], autocast: Autocast | None = None
    ) -> None:
        """Learn from steps of before, active parameters and batch of each, which rows are whose: as the run had, when a
        batch of that size came first. theta (P,): the parameters now. autocast: what the loss is computed under."""
        self._shares = self._under(autocast)
        if self._stores:
            with self._listeners.deaf(), torch.enable_grad(), switched_off(), random_state(generators()):
                for active, batch in passes:
                    self._shares.at(active).factors(theta, batch)

    def take(self, step: Step) -> Captured:
        """The identities, where they are due, and what is stored.

        Raises:
            BatchIdentityError, SplitIdentityError, BatchError, LossError, ChangedOutsideError: nothing has changed, and the
                step may be taken again.
        """
        heard = self._listeners.heard(len(step.batch[0]))
        with self._listeners.deaf(), torch.enable_grad(), switched_off():
            step = self._settled(step, heard)
            trial = self._trial(step, heard, self._shares)
            factors = self._watched(trial)
            due = step.number < CHECK_FIRST or step.number % self._options.check_every == 0
            fits = due or (self._stores and factors is None)
            trial = of_the_loop(trial) if fits and trial.shares.coarse else trial
            fit = fitted(trial) if fits else _assumed(trial)
            self._note(trial, fit)
            if not self._stores:
                return _captured(trial, fit, {})
            # the reduction is in the gradients that came back, clipping is not
            scale = fit.scale / trial.factor if factors is None else trial.heard.clip
            if factors is None:
                with random_state(trial.heard.start):
                    factors = trial.shares.factors(step.theta, step.batch)
            log = fit.log
            if due:
                check_sum(trial, factors, scale)
                log = {**log, "split_identity": check_split(trial, factors, scale, fit.scale)}
            arrays, settled = self._arrays(trial, factors, scale, fit.settled)
            return _captured(trial, Fit(scale, log, settled), arrays)

    @property
    def _stores(self) -> bool:
        """Whether shares are stored at all."""
        return self._options.kind != "replay"

    def _note(self, trial: Trial, fit: Fit) -> None:
        """Once, where the shares sum to p.grad as far as a coarse pass lets see, and no further."""
        gap = fit.log.get("batch_identity", 0.0)
        if gap > split_bound(trial.step.theta.dtype) and trial.shares.coarse and not self._noted:
            self._noted = True
            log.warning(
                "the shares miss p.grad by %.2g of it at step %d: that may be rounding in %s, or a small penalty that was "
                "not declared",
                *(gap, trial.step.number, trial.shares.precision),
            )

    def _under(self, autocast: Autocast | None) -> ExampleGradients:
        dtype = self._parameters[0].dtype
        return ExampleGradients(self._loss, self._model, self._layout, dtype, autocast=autocast)

    def _settled(self, step: Step, heard: Heard) -> Step:
        """The step under the autocast of the first."""
        if step.number:
            check_autocast(step, heard)
            return step
        self._shares, autocast = settled_autocast(self._under, lambda shares: self._trial(step, heard, shares), heard)
        return replace(step, settled=replace(step.settled, autocast=autocast))

    def _trial(self, step: Step, heard: Heard, shares: ExampleGradients) -> Trial:
        if step.number and heard.before is not None and heard.behind is not None:
            step.settled.draws.settled(step.number, heard.before, heard.behind)
        factor = 1 / len(step.batch[0]) if shares.coarse else 1.0
        shares, penalty = shares.at(step.active, factor), self._options.penalty
        if penalty is None:
            return Trial(step, heard, shares, step.gradient, None, factor)
        gradients = penalty_gradients(penalty, self._model, self._parameters)
        clipped = self._layout.flatten(gradients) * heard.clip  # as p.grad was
        return Trial(step, heard, shares, step.gradient - clipped, clipped, factor)

    def _watched(self, trial: Trial) -> Factors | None:
        """Of the user's own pass; None where it does not say it all."""
        if trial.heard.sites is None:
            return None
        with random_state(trial.heard.start):
            return trial.shares.watched(trial.step.theta, trial.step.batch, *trial.heard.sites)

    def _arrays(self, trial: Trial, factors: Factors, scale: float, settled: Settled) -> tuple[Arrays, Settled]:
        if self._options.kind == "gradients":
            return gradient_arrays(self._layout, factors, scale, trial.step), settled
        return factor_arrays(factors, trial.step, settled)


def _assumed(trial: Trial) -> Fit:
    """Of a step that is not checked."""
    settled = trial.step.settled
    return Fit(settled.reduction.expected(trial.size, trial.heard.clip), {}, settled)


def _captured(trial: Trial, fit: Fit, arrays: Arrays) -> Captured:
    random = fit.settled.draws.stored(trial.heard.before)
    return Captured(
        scale=fit.scale,
        shares=arrays,
        penalty=trial.penalty,
        random=None if random is None else random.numpy(),
        log=fit.log,
        settled=fit.settled,
    )
