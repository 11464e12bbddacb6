"""influence(): what would change if an example weighed a little more or less.

    d m(theta_T) / d w_i = sum_s <V_s, c_i g_i>          w_i in front of loss i, c_i what the loop reduces it with

V_s, the sensitivity to the gradient of step s, is carried backwards through the optimizer and the curvature of every batch:
`causes`, of a run and itself. (Maclaurin, Duvenaud, Adams 2015; Hara, Nitanda, Maehara 2019, for SGD.) Of a run that was
trained again with all weights at w, the derivative is that at w.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from .account import Account, share_bound
from .asked import Asked, Grouping, described
from .causes import Causes
from .counterfactual import lds, random_subsets, retrain_subsets
from .curvature import KINDS
from .derivatives import Sweep
from .errors import ReplayError
from .functional import differentiable, uncompiled
from .intervention import Penalty, Reweight, replay
from .matching import check_model
from .pair import alone
from .result import Influence
from .result.influence import CHAOTIC
from .run import Run
from .side import Unrecorded, weighted

log = logging.getLogger("attrib")
IDENTITIES = ("split", "tangent")
LDS = {"lds": "lds", "lds_low": "low", "lds_high": "high"}  # what it is called in the result
LEFT_OUT = 0.05  # of the examples, in each retraining


@differentiable
def influence(
    run: Run,
    model: nn.Module,
    measurement: Any,
    *,
    loss: Callable[..., Tensor],
    curvature: str = "exact",
    weights: float | None = None,
    retrainings: int = 0,
    clip: float | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    backward: Callable[[Tensor, nn.Module], Any] | None = None,
    store: Any = None,
    keep: Sequence[str] | Sequence[Sequence[str]] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    memory: int | None = None,
    identities: Sequence[str] = IDENTITIES,
    executor: Executor | None = None,
) -> Influence:
    """Differentiate the final measurement by the weight of each example's loss, at every step, through every group.

    A derivative (Maclaurin, Duvenaud, Adams 2015; Hara, Nitanda, Maehara 2019), for a counterfactual: `attrib.attribute`
    says what happened, `attrib.difference` why two runs differ.

    Args:
        run: from `attrib.open_run`, of SGD, Adam or AdamW; of a replay that gave losses weights, the derivative at these.
        model: of the recorded architecture; given back as it was.
        measurement: `model -> (Q,)`, or one of `attrib.measure`.
        loss: as given to `attrib.record`.
        curvature: of the loss, "exact"; or "gauss-newton", of what it makes of the model's outputs alone: stabler where
            training is chaotic, and then no longer the derivative.
        weights: of all losses, that it is taken at: the run is trained again with it, in `store`, or a place that is removed
            behind. 1 - f is near trainings without a part f, where what divides the losses stays (`mean="fixed"`).
        retrainings: so many times the run is trained again without random examples, 5 % or a part 1 - weights, and the
            result says how well that was foretold (`attrib.lds`).
        clip: the max_norm that gradients were clipped to, math.inf for none; None: as the record tells, where it does.
        penalty: as given to `attrib.record`, where the run has one.
        backward: of a loop that did more than the mean or the sum, to train it again: see `attrib.replay`.
        keep, groups, dtype, progress, memory, executor: see `attrib.attribute`; a worker does some of the queries.
        identities: "split", at a few steps each influence against the derivative of its own loss; "tangent", over the last
            steps the sensitivities against a tangent that is carried forwards.

    Returns:
        An `Influence`, in the measurement's units per unit of weight.

    Raises:
        ReplayError: an optimizer whose derivative was not derived, or a loop that did what is not known.
        ModelMismatchError, MeasurementError, LossError, StoreError, StoreExistsError, KeptAxesError, ValueError.
        WorkerError: a worker died; its `result` has the queries before.

    Example:
        >>> print(attrib.influence(run, model, measurement, loss=loss).check())
        tangent against sensitivity: ...
        the sensitivity to the parameters grew to 1.6... times that at the end
    """
    asked = Asked(keep, groups, dtype, progress, memory, executor)
    loop = Loop(run, uncompiled(model), loss, Unrecorded(clip, penalty), backward)
    return _influence(Derived(loop, measurement, curvature, weights, identities), asked, store, retrainings)


def _influence(derived: "Derived", asked: Asked, store: Any, retrainings: int) -> Influence:
    derived.check(store, retrainings)
    with derived.at_weights(store, asked.progress) as there:
        result = derived.found(there, asked)
    result = derived.tried(result, retrainings, asked) if retrainings else result
    if float(result.growth.max()) >= CHAOTIC:
        log.warning("%s", result.said)
    return result


class Loop(NamedTuple):
    """A run, and what its record does not hold of its loop."""

    run: Run
    model: nn.Module
    loss: Callable[..., Tensor]
    unrecorded: Unrecorded
    backward: Callable[[Tensor, nn.Module], Any] | None


@dataclass(frozen=True)
class Derived:
    """Which derivative it is."""

    loop: Loop
    measurement: Any
    curvature: str
    weights: float | None
    identities: Sequence[str]

    def check(self, store: Any, retrainings: Any) -> None:
        """Raise ValueError, ReplayError or ModelMismatchError where options are not what they should be."""
        if isinstance(self.identities, str) or not set(self.identities) <= set(IDENTITIES):
            raise ValueError(
                f"identities are none: got {self.identities!r}, expected some of {IDENTITIES}, such as ('split',)."
            )
        if self.curvature not in KINDS:
            raise ValueError(
                f"unknown curvature: got {self.curvature!r}, expected one of {', '.join(map(repr, KINDS))}."
            )
        for name, value, hint in (
            ("weights", self.weights, "0.8"),
            ("clip", self.loop.unrecorded.clip, "the max_norm of clip_grad_norm_, or math.inf"),
        ):
            if value is not None and not (isinstance(value, Real) and float(value) > 0):
                raise ValueError(f"{name} is no number above 0: got {value!r}, expected one, such as {hint}.")
        if self.weights is None and store is not None:
            raise ValueError(
                f"there is nothing to be stored: got store={store!r} without weights. Leave it out, or pass weights=."
            )
        if self.weights is not None and (not math.isfinite(self.weights) or weighted(self.loop.run)):
            raise ReplayError(
                f"the run cannot be trained again so: got weights={self.weights}"
                f"{' of a replay that gave losses weights' if weighted(self.loop.run) else ''}, expected a finite number "
                f"and a run without, at {self.loop.run.reader.target}. Leave weights= out, or ask of the run that it was "
                f"replayed from."
            )
        if not isinstance(retrainings, int) or retrainings < 0 or 0 < retrainings < 3:
            raise ValueError(f"retrainings are none: got {retrainings!r}, expected 0, or 3 or more.")
        check_model(self.loop.run, self.loop.model)

    @contextmanager
    def at_weights(self, store: Any, progress: bool) -> Iterator[Run]:
        """The run at the weights that were asked for; one that was trained for it is removed behind, but for a `store`."""
        run, model, loss, unrecorded, backward = self.loop
        if self.weights is None:
            yield run
            return
        changes = [Reweight(dict.fromkeys(run.examples.tolist(), float(self.weights)))]
        added = [] if unrecorded.penalty is None else [Penalty(unrecorded.penalty)]
        with nullcontext() if store is not None else TemporaryDirectory(prefix="attrib-") as folder:
            place = Path(str(folder)) / "run.zarr" if store is None else store
            yield replay(
                run,
                0,
                [*changes, *added],
                model=model,
                loss=loss,
                store=place,
                backward=backward,
                progress=progress,
            )

    def found(self, there: Run, asked: Asked) -> Influence:
        """there: the run at its weights."""
        _, model, loss, unrecorded, _ = self.loop
        grouping = asked.grouping(there)
        if not asked.by_group:  # then nothing has to be known of single tensors
            grouping = Grouping(("all",), np.ones((len(there.groups), 1)))
        pair = alone(there, model, loss, grouping.member, unrecorded)
        question = asked.question(pair, model, self.measurement, grouping)
        account = Account(*grouping, question.kept, False, share_bound(there.compute, there.compute))
        checked = ("split" in self.identities, "tangent" in self.identities)
        uniform = 1.0 if self.weights is None else float(self.weights)
        causes = Causes(pair.within(question.slices), curvature=self.curvature, checked=asked.by_group)
        sweep = Sweep(causes, question, account, *checked, uniform)
        facts = self._facts()

        def labelled(dataset: xr.Dataset) -> Influence:
            return Influence(dataset.assign_coords(example=there.examples).assign_attrs(facts))

        return asked.answered(question, "influence", there.steps, sweep, labelled)

    def _facts(self) -> dict[str, Any]:
        run, units = self.loop.run, getattr(self.measurement, "units", "")
        return {
            **described(run, self.measurement),
            "units": f"{units} per unit of weight" if units else "",
            "bound": share_bound(run.compute, run.compute),
            "curvature": self.curvature,
            **({} if self.weights is None else {"weights": float(self.weights)}),
            "meaning": "derivatives of the final measurement by the weight of each example's loss; they do not add up",
        }

    def tried(self, result: Influence, count: int, asked: Asked) -> Influence:
        """The result, with how well it foretells so many retrainings."""
        run, model, loss, unrecorded, backward = self.loop
        fixed, part = self.weights is not None, LEFT_OUT
        if self.weights is not None and self.weights < 1:
            part = 1 - float(self.weights)
        subsets = random_subsets(run, part, count)
        outcomes = retrain_subsets(
            run,
            subsets,
            self.measurement,
            model=model,
            loss=loss,
            weight=0.0 if fixed else None,
            executor=asked.executor,
            backward=backward,
            penalty=unrecorded.penalty,
            dtype=asked.dtype,
            progress=asked.progress,
        )
        score = lds(-result.without("fixed" if fixed else "remaining"), subsets, outcomes)
        each = {name: ("query", score[old].values) for name, old in LDS.items()}
        means = [float(score[name]) for name in ("mean", "mean_low", "mean_high")]
        return Influence(result.dataset.assign(each).assign_attrs(foretold=[count, part, *means]))
