"""attribute(): one sweep backwards through a run that writes a measurement as a sum of contributions.

    for s = T-1 ... 0:
        Gbar_s                       path gradient: <Gbar_s, Delta_s> = m(theta_{s+1}) - m(theta_s)
        U_s, carry                   the update pulled back: sensitivity of m(theta_T) to the gradient of step s
        <U_s, g_{s,i}>               contribution of example i at step s, per group
        decay, timeline              what weight decay did; what the step's update did
    what is left of the carry, times the momentum before the first step: inherited

State: vectors (Q, P) in float64. Nothing has the size of examples x parameters.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .errors import LossError, MeasurementError
from .functional import random_state, training_modes
from .gradients import Shares
from .kernels import factors
from .kernels.contraction import contract_rows
from .layout import group_tensors
from .marginals import choose
from .optim import Parts, decay_rates, pullback
from .path import Path, PathGradient, Query, Secant
from .result import Result
from .run import Block, Run, check_model
from .sink import Sink, Terms

log = logging.getLogger("attrib")


def attribute(
    run: Run,
    model: nn.Module,
    measurement: Any,
    *,
    loss: Callable[..., Tensor] | None = None,
    path: Path | None = None,
    steps: slice | None = None,
    keep: Sequence[str] | Sequence[Sequence[str]] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    cube: Any = None,
) -> Result:
    """Write m(theta_b) - m(theta_a) as a sum over training examples, steps and parameter groups.

    This is accounting of what happened on the realised path, not a counterfactual: a contribution does not say what
    would have happened without the example.

    Args:
        run: from `attrib.open_run`.
        model: of the recorded architecture. Used in its mode for the measurement, in the recorded mode for the loss, on
            its device; given back as it was.
        measurement: `model -> (Q,)`, or one of `attrib.measure`.
        loss: as given to `attrib.record`; needed where the run was captured by "replay".
        path: `Secant()` (default), `GaussLegendre(nodes)` or `Midpoint(nodes)`.
        steps: a window slice(a, b), complete by itself; None for the whole run.
        keep: axes to keep contributions along, one set or several, of "step", "example", "group"; None keeps all
            marginals that fit in memory.
        groups: {name: [parameter names or patterns]}; None makes each parameter tensor a group.
        dtype: compute type. None: float64 for the measurement, the recorded type for the training gradients. Sums are
            accumulated in float64 in any case.
        progress: show a bar on work longer than two seconds.
        cube: path or zarr Store to write all contributions to, (query, step, slot, group).

    Returns:
        A `Result`; `print(result.check())` verifies that it is complete and shows the ledger.

    Raises:
        ModelMismatchError, MeasurementError, UntraceableModelError, LossError, StoreError, KeptAxesError, ValueError.
    """
    _check_arguments(run, path, steps)
    check_model(run, model)
    start, stop = _window(run, steps)
    device = next(model.parameters()).device
    query = _query(run, model, measurement, dtype, run.vector(stop).to(device))
    source = _shares_source(run, model, loss, dtype or run.dtype, device)
    labels, member = group_tensors(run.layout.names, groups)
    sizes = {"step": stop - start, "example": len(run.examples), "group": len(labels)}
    sink = Sink(
        run, query.count, start, labels, member, sizes, choose(keep, query.count, sizes), cube, dtype or run.dtype
    )
    carry = torch.zeros(query.count, run.layout.size, dtype=torch.float64, device=device)
    integrate = (path or Secant()).bind(query)
    with tqdm(total=stop - start, desc="attribute", unit="step", delay=2, disable=not progress) as bar:
        for block in run.blocks(start, stop):
            carry = _sweep(run, block, integrate, query.steps_at_once(), source, carry, sink, bar)
    sink.close(_tensors(run, carry * block.momentum.to(device)))
    return Result(sink.dataset(_facts(run, measurement, path or Secant(), start, stop, dtype)))


Contract = Callable[[Block, int, Tensor, Tensor], Tensor]  # (block, n-th step, theta (P,), U (Q, P)) -> (Q, B, K)


def _sweep(
    run: Run,
    block: Block,
    integrate: Callable[..., PathGradient],
    at_once: int,
    contract: Contract,
    carry: Tensor,
    sink: Sink,
    bar: Any,
) -> Tensor:
    """One block, backwards, several steps at a time: returns the carry before its first step."""
    for stop in range(len(block.steps), 0, -at_once):
        start = max(0, stop - at_once)
        theta = block.theta[start : stop + 1].to(carry.device)
        path = integrate(theta[:-1], theta[1:])
        gradients = path.gradient.double()
        sensitivity = torch.empty_like(gradients)
        contributions: list[np.ndarray] = []
        for n in reversed(range(start, stop)):
            parts = _to(block.updates[n][0], carry.device)
            sensitivity[n - start], carry = pullback(parts, carry, gradients[n - start])
            found = contract(block, n, theta[n - start], sensitivity[n - start])
            contributions.insert(0, found.cpu().numpy())
            bar.update()
        terms = _terms(run, block, slice(start, stop), theta, path, gradients, sensitivity)
        sink.add(block.start + start, block.index[start:stop], Terms(contributions, *terms))
    return carry


def _terms(
    run: Run, block: Block, steps: slice, theta: Tensor, path: PathGradient, gradients: Tensor, sensitivity: Tensor
) -> Iterator[np.ndarray]:
    """The sums of `Terms` over each tensor, from Gbar and U of n steps, (n, Q, P) each; a tensor at a time."""
    recorded = block.gradient[steps].to(theta.device)
    replayed = torch.stack([delta for _, delta in block.updates[steps]]).to(theta.device)
    by_path, by_step = [], []
    leverage = torch.zeros_like(path.start, dtype=torch.float64)
    for _, part in run.layout.slices():
        states = theta[:, part].double()
        here = gradients[..., part]
        vectors = torch.stack([states[1:] - states[:-1], replayed[:, part].double(), states[:-1]], 2)
        by_path.append(here @ vectors)
        by_step.append(sensitivity[..., part] @ torch.stack([recorded[:, part].double(), states[:-1]], 2))
        leverage += (here.abs() @ states[:-1].abs().unsqueeze(2)).squeeze(2)
    moved, real, along_theta = torch.stack(by_path, 2).cpu().numpy().transpose(3, 0, 1, 2)
    gradient, coupled = torch.stack(by_step, 2).cpu().numpy().transpose(3, 0, 1, 2)
    rates = np.stack([decay_rates(parts, len(run.layout.names)) for parts, _ in block.updates[steps]])
    decay = rates[:, None, 0] * coupled - rates[:, None, 1] * along_theta
    yield from (decay, moved, real, gradient)
    yield from (t.double().cpu().numpy() for t in (path.start, path.end, leverage))


def _to(parts: Parts, device: torch.device) -> Parts:
    if device.type == "cpu":
        return parts
    return [p._replace(coefficients=type(p.coefficients)(*(v.to(device) if isinstance(v, Tensor) else v for v in
            p.coefficients))) for p in parts]  # fmt: skip


def _tensors(run: Run, values: Tensor) -> np.ndarray:
    """(Q, P) -> (Q, K): summed over each parameter tensor."""
    sizes = np.diff(run.layout.bounds).tolist()
    return torch.stack([part.sum(-1) for part in values.split(sizes, -1)], -1).cpu().numpy()


# where the shares come from


def _query(run: Run, model: nn.Module, measurement: Any, dtype: torch.dtype | None, theta: Tensor) -> Query:
    """In float64 unless asked otherwise; in the run's type where a callable's own tensors leave no choice."""
    try:
        return Query(model, measurement, run.layout, dtype or torch.float64, theta)
    except MeasurementError as error:
        if dtype is not None or run.dtype == torch.float64:
            raise
        try:
            found = Query(model, measurement, run.layout, run.dtype, theta)
        except MeasurementError:
            raise error from None
        log.info("the measurement is computed in %s, the type of its own tensors", run.dtype)
        return found


def _check_arguments(run: Any, path: Any, steps: Any) -> None:
    for name, value, kind, hint in (
        ("run", run, Run, "Open it with attrib.open_run(path)."),
        ("steps", steps, slice | None, "Pass slice(a, b), or None for the whole run."),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} is not what it should be: got {value!r}. {hint}")
    if path is not None and (isinstance(path, type) or not hasattr(path, "bind")):
        raise TypeError(f"path is not a path: got {path!r}, expected an object such as attrib.Secant().")


def _shares_source(
    run: Run, model: nn.Module, loss: Callable[..., Tensor] | None, dtype: torch.dtype, device: torch.device
) -> Contract:
    if run.capture == "gradients":

        def stored(block: Block, n: int, theta: Tensor, sensitivity: Tensor) -> Tensor:
            rows = run.shares(block.steps[n])
            return torch.from_numpy(contract_rows(sensitivity.cpu().numpy(), rows, run.layout.bounds))

        return stored
    if run.capture == "factors":

        def factored(block: Block, n: int, theta: Tensor, sensitivity: Tensor) -> Tensor:
            named = run.layout.unflatten(sensitivity.to(run.dtype))
            found = run.factors(block.steps[n])
            empty = torch.zeros(len(sensitivity), len(block.index[n]), dtype=torch.float64)
            parts = [sum((factors.contract(f, named[k]) for f in found[k]), empty) for k in run.layout.names]
            return torch.stack(parts, 2) * float(block.scale[n])

        return factored
    if loss is None:
        raise LossError(
            "a loss is needed: got loss=None, expected the loss given to attrib.record, since this run was captured by "
            '"replay". Pass loss=, or record with capture="gradients".'
        )
    with training_modes(model, run.header["training"]):
        shares = Shares(loss, model, run.layout, dtype)

    def replayed(block: Block, n: int, theta: Tensor, sensitivity: Tensor) -> Tensor:
        batch = tuple(b.to(device) for b in run.inputs(int(block.kind[n]), block.rows[n]))
        shares.active = block.active[n]
        with training_modes(model, run.header["training"]), random_state(block.random[n]):
            _, contracted = shares.contract(theta.to(dtype), batch, sensitivity)
        return contracted * float(block.scale[n])

    return replayed


def _window(run: Run, steps: slice | None) -> tuple[int, int]:
    window = steps if steps is not None else slice(None)
    start, stop, stride = window.indices(run.steps)
    inside = all(v is None or -run.steps <= v <= run.steps for v in (window.start, window.stop))
    if stride != 1 or stop <= start or not inside:
        raise ValueError(
            f"the window is not a range of recorded steps: got {window}, expected slice(a, b) with 0 <= a < b <= "
            f"{run.steps} and stride 1."
        )
    return start, stop


def _facts(run: Run, measurement: Any, path: Path, start: int, stop: int, dtype: torch.dtype | None) -> dict[str, Any]:
    h = run.header
    return {
        "run": str(run.reader.target),
        "window": [start, stop],
        "measurement": getattr(measurement, "name", getattr(measurement, "__name__", type(measurement).__name__)),
        "units": getattr(measurement, "units", ""),
        "path": repr(path),
        "dtype": str(dtype or run.dtype).removeprefix("torch."),
        **{key: h[key] for key in ("model", "optimizer", "capture", "versions", "recorded")},
        "parameters": run.layout.size,
        "meaning": "accounting of the realised training path; not a counterfactual",
    }
