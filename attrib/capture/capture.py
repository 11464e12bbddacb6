"""The journey of a step through its capture."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ..autocast import Autocast, switched_off
from ..batch import Batch
from ..checks import check_forwards, split_bound
from ..errors import BatchIdentityError
from ..functional import uncompiled
from ..generators import generators, random_state
from ..gradients import DEFINITIONS, Gradients
from ..layout import Layout
from .identities import Fit, PassTrial, Trial, check_split, check_sum, fitted, of_the_loop
from .listen import Heard, Listeners
from .penalty import penalty_gradients
from .records import Arrays, Captured, CaptureOptions, Factors, Step
from .rounded import check_autocast, settled_autocast
from .stored import factor_arrays, gradient_arrays, joined

log = logging.getLogger("attrib")

CHECK_FIRST = 2


class Capture:
    """One record of a step in, one of what it leaves to be stored out. listeners: to the user's own passes."""

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
        accounts = options.remainder == "account"
        self.listeners = Listeners(model, layout.names, parameters, options.kind != "replay", accounts)
        log.info(
            "recording %s: batch identity on the first %d steps, then every %d",
            *(options.kind, CHECK_FIRST, options.check_every),
        )

    def clear(self) -> None:
        """Forget the user's passes: their gradients are gone, or the step is recorded."""
        self.listeners.clear()

    def remove(self) -> None:
        """Take off all hooks."""
        self.listeners.remove()

    def prime(
        self, theta: Tensor, passes: Sequence[tuple[frozenset[str], Batch]], autocast: Autocast | None = None
    ) -> None:
        """Learn from steps of before, active parameters and batch of each, which rows are whose: as the run had, when a
        batch of that size came first. theta (P,): the parameters now. autocast: what the loss is computed under."""
        self._shares = self._under(autocast)
        if self._stores:
            with self.listeners.deaf(), torch.enable_grad(), switched_off(), random_state(generators()):
                for active, batch in passes:
                    self._shares.at(active).factors(theta, batch)

    def take(self, step: Step) -> Captured:
        """The identities, where they are due, and what is stored.

        Raises:
            BatchIdentityError, SplitIdentityError, BatchError, LossError, ChangedOutsideError: nothing has changed, and the
                step may be taken again.
        """
        heard = self.listeners.heard(step.sizes[0], len(step.passes)).beside(step.elsewhere)
        due = step.number < CHECK_FIRST or step.number % self._options.check_every == 0
        runs = due or self._stores or self._options.penalty is not None or heard.norms is not None  # the model, or may
        with ExitStack() as stack:
            if runs:
                for context in (self.listeners.deaf(), torch.enable_grad(), switched_off()):
                    stack.enter_context(context)
            step = self._settled(step, heard)
            trial = self._trial(step, heard, self._shares)
            watched = self._watched(trial)
            fits = due or (self._stores and watched is None) or _unknown(trial)
            trial, fit = _fitted(trial) if fits else (trial, _assumed(trial))
            self._note(trial, fit)
            if not self._stores:
                return _captured(trial, fit, {})
            return self._stored(trial, fit, watched, due)

    @property
    def _stores(self) -> bool:
        """Whether shares are stored at all."""
        return self._options.kind != "replay"

    def _stored(self, trial: Trial, fit: Fit, watched: Factors | None, due: bool) -> Captured:
        if watched is not None:  # the reduction is in the gradients that came back, clipping is not
            factors, scales = [watched], np.array([trial.heard.clip])
        else:
            factors, scales = [], fit.scales / [each.factor for each in trial.passes]
            for each in trial.passes:
                with random_state(each.start):
                    factors.append(each.shares.factors(trial.step.theta, each.batch))
        log = fit.log
        if due:
            assert fit.shares is not None
            check_sum(trial, factors, scales, fit.shares)
            log = {**log, "split_identity": check_split(trial, factors, scales, fit.scales)}
        settled, arrays = fit.settled, []
        for each, found, scale in zip(trial.passes, factors, scales.tolist(), strict=True):
            if self._options.kind == "gradients":
                arrays.append(gradient_arrays(self._layout, found, scale, each.batch))
            else:
                here, settled = factor_arrays(found, each.batch, settled, trial.step.number)
                arrays.append(here)
        return _captured(trial, Fit(fit.scales, log, settled), joined(arrays), scales)

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

    def _under(self, autocast: Autocast | None) -> Gradients:
        dtype = self._parameters[0].dtype
        return DEFINITIONS[self._options.shares](self._loss, self._model, self._layout, dtype, autocast=autocast)

    def _settled(self, step: Step, heard: Heard) -> Step:
        """The step as it was heard, under the autocast of the first."""
        settled = step.settled
        if step.number and heard.before is not None and heard.behind is not None:
            settled.draws.settled(step.number, heard.before, heard.behind)
        batches = [announced.batch for announced in step.passes]
        forwards = check_forwards(heard.forwards, batches, settled.forwards, step.number)
        if forwards != settled.forwards:
            step = replace(step, settled=replace(settled, forwards=forwards))
        if step.number:
            check_autocast(step, heard)
            return step
        self._shares, autocast = settled_autocast(self._under, lambda shares: self._trial(step, heard, shares), heard)
        return replace(step, settled=replace(step.settled, autocast=autocast))

    def _trial(self, step: Step, heard: Heard, shares: Gradients) -> Trial:
        passes = []
        for announced in step.passes:
            factor = 1 / announced.batch.size / len(step.passes) if shares.coarse else 1.0
            start = heard.start if announced.random is None else announced.random
            passes.append(PassTrial(announced.batch, start, shares, step.active, step.buffers, factor))
        trial = Trial(step, heard, tuple(passes), step.gradient, None)
        trial = late(trial) or trial if step.settled.late else trial
        penalty = self._options.penalty
        if penalty is None:
            return trial
        gradients = penalty_gradients(penalty, self._model, self._parameters)
        clipped = self._layout.flatten(gradients).to(step.gradient) * heard.clip  # as p.grad was
        return replace(trial, examples=step.gradient - clipped, penalty=clipped)

    def _watched(self, trial: Trial) -> Factors | None:
        """Of the user's own pass; None where it does not say it all."""
        if trial.heard.sites is None or not trial.step.passes[0].steady:  # the sites hold the caller's tensors
            return None
        (each,) = trial.passes
        with random_state(each.start):
            return each.shares.watched(trial.step.theta, each.batch, *trial.heard.sites)


def late(trial: Trial) -> Trial | None:
    """The trial with random numbers drawn from the states before the first forward pass of each batch, where those are
    others than when they were announced."""
    firsts = trial.heard.firsts
    if not firsts or all(f is None or torch.equal(f, p.start) for f, p in zip(firsts, trial.passes, strict=True)):
        return None
    passes = (p if f is None else replace(p, start=f) for f, p in zip(firsts, trial.passes, strict=True))
    return replace(trial, passes=tuple(passes))


def _fitted(trial: Trial) -> tuple[Trial, Fit]:
    """Where the loop drew numbers between the announcement of a batch and the loss, those that the loss drew after them."""

    def fit(trial: Trial) -> tuple[Trial, Fit]:
        trial = of_the_loop(trial) if trial.shares.coarse else trial
        return trial, fitted(trial)

    try:
        return fit(trial)
    except BatchIdentityError:
        later = late(trial) if trial.step.number == 0 else None
        if later is None:
            raise
        try:
            later, found = fit(later)
        except BatchIdentityError:
            later = None
        if later is None:
            raise
        return later, found._replace(settled=replace(found.settled, late=True))


def _assumed(trial: Trial) -> Fit:
    """Of a step that is not checked."""
    settled = trial.step.settled
    return Fit(settled.reduction.expected(trial.step.sizes, trial.heard.clip), {}, settled)


def _unknown(trial: Trial) -> bool:
    """Whether the scales have to be had now: where p.grad may hold more than the shares they are not to be fitted to it
    later."""
    return trial.heard.norms is not None and bool(np.isnan(_assumed(trial).scales).any())


def _captured(trial: Trial, fit: Fit, arrays: Arrays, factor_scales: np.ndarray | None = None) -> Captured:
    settled, draws, heard = fit.settled, fit.settled.draws, trial.heard
    if draws.stochastic and not heard.passes and not heard.forwards:
        raise BatchIdentityError(
            f"the random numbers of the loss cannot be drawn again: got no forward pass of the model, expected one to be "
            f"heard as at the steps before, at step {trial.step.number}. Call the model itself, or announce the batch with "
            f"recorder.batch(index, *batch). The step was refused."
        )
    random = [draws.stored(each.start) for each in trial.passes]
    if not settled.coupled and trial.passes[0].run.coupled:
        settled = replace(settled, coupled=True)
    return Captured(
        scales=fit.scales,
        factor_scales=fit.scales if factor_scales is None else factor_scales,
        shares=arrays,
        penalty=trial.penalty,
        random=[None if state is None else state.numpy() for state in random],
        log=fit.log,
        settled=settled,
    )
