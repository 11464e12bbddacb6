"""Go on with a run that ended early: model, optimizer and generators put to its last step, bit for bit.

What stands in the store are the states that steps started from and, once a block, the optimizer's accumulators. So the block
that the run ended in is run again by the user's own optimizer from its beginning, on the recorded gradients; every state on
the way is held against the one that was stored.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .autocast import from_facts
from .batch import Batch
from .capture import Settled
from .checks import Draws, Reduction
from .errors import ModelMismatchError, ResumeError, StoreError
from .generators import set_generators
from .loop import Loop, RecordOptions, header_of
from .optim import read_hyper, rule_by_name, torch_states
from .store import Reader, Reopened, lease, reopen, stands
from .trajectory import Trajectory

log = logging.getLogger("attrib")

SAME = {  # of the header: what must not differ -> how it is called
    "optimizer": "the optimizer",
    "dtype": "the parameters' type",
    "capture": "capture=",
    "check_every": "check_every=",
    "remainder": "remainder=",
    "asked": "block=, states_every= or penalty=",
}


@dataclass(frozen=True)
class Resumed:
    """A run to go on with. settled, inspected: what its steps have shown of the loop, and the last whose update was looked
    at. after: the parameters (P,). passes: active parameters and batch of the first step with a batch of each size. ids:
    int64, or object for strings."""

    reopened: Reopened
    settled: Settled
    inspected: int
    after: Tensor
    passes: list[tuple[frozenset[str], Batch]]
    ids: np.dtype[Any]


def resume(target: Any, loop: Loop, options: RecordOptions) -> Resumed | None:
    """Put a loop to where the run in a store ended. None where none is there, or one without a committed step.

    Raises:
        ResumeError: the run is complete, or was recorded with other options. ModelMismatchError: of another model.
        StoreExistsError: it is being written. StoreError: it is no run, or damaged. Nothing was changed.
    """
    held = lease(target)
    try:
        reader = Reader(target) if stands(target) else None
        if reader is None or not reader.header["written_steps"]:
            if held is not None:
                held.release()
            return None
        _check(reader, loop, header_of(loop, options))
        steps = int(reader.header["written_steps"])
        trajectory = Trajectory(reader, rule_by_name(reader.header["rule"]), loop.layout)
        reopened, settled, passes = reopen(reader, held), _settled(reader), _passes(reader, loop, steps)
        looked = np.flatnonzero(~np.isnan(reader.fact("step_identity", slice(0, steps))))
        after = _moved(trajectory, loop, steps)  # last: until now nothing was changed
    except BaseException:
        if held is not None:
            held.release()
        raise
    log.info("going on with the run at %s from step %d", reader.target, steps)
    set_generators(torch.from_numpy(reopened.generators.copy()))
    loop.guard.resumed(reader.header["training"], after, loop.optimizer)
    inspected = int(looked[-1]) if len(looked) else 0
    ids = np.dtype(object if "ids/span" in reader else np.int64)
    return Resumed(replace(reopened, after=after.cpu().numpy()), settled, inspected, after, passes, ids)


def _check(reader: Reader, loop: Loop, here: dict[str, Any]) -> None:
    """Raise ResumeError or ModelMismatchError where the loop is not the one that was recorded."""
    there = reader.header
    if there["complete"]:
        raise ResumeError(
            f"the run is complete: got one of {reader.steps} steps that was closed, expected one that ended early, at "
            f"{reader.target}. Record a new run from its last state (run.load), or replay it with attrib.replay."
        )
    if there["layout"] != here["layout"] or set(there["digests"]) != set(here["digests"]):
        raise ModelMismatchError(
            f"the model is not the one that was recorded: got {_different(there, here)}, at {reader.target}. Build model "
            f"and optimizer as they were."
        )
    for name, what in SAME.items():
        if there[name] != here[name]:
            raise ResumeError(
                f"the run was recorded otherwise: got {what} {here[name]}, expected {there[name]}, at {reader.target}. Go "
                f"on with the same options, or record a new run."
            )
    for name, value in here["digests"].items():
        if there["digests"][name] != value:
            raise ModelMismatchError(
                f"a buffer or frozen parameter is not the one that was recorded: got digest {value[2]}, expected "
                f"{there['digests'][name][2]}, at {name!r}. Give it the value it had: run.load(model, 0) puts it in."
            )
    _check_options(reader, loop)


def _different(there: dict[str, Any], here: dict[str, Any]) -> str:
    before, now = ({**_shapes(header["layout"]), **dict.fromkeys(header["digests"])} for header in (there, here))
    for name, shape in now.items():
        if name not in before or before[name] != shape:
            shown = "a buffer or frozen parameter" if shape is None else f"a parameter of shape {shape}"
            return f"{shown} {name!r}, expected {before.get(name) or 'none'}"
    missing = [name for name in before if name not in now]
    return f"no tensor {missing[0]!r}" if missing else "its tensors in another order"


def _shapes(layout: dict[str, Any]) -> dict[str, list[int]]:
    return dict(zip(layout["names"], layout["shapes"], strict=True))


def _check_options(reader: Reader, loop: Loop) -> None:
    """The optimizer's options but the learning rate, which schedules move, are those of the first step or of the last."""
    rule = rule_by_name(reader.header["rule"])
    numbers = [n for n, name in enumerate(rule.hyper) if name not in ("lr", "age")]
    here = read_hyper(rule, loop.optimizer)
    ends = [reader.read("hyper", step) for step in (0, int(reader.header["written_steps"]) - 1)]
    for n in numbers:
        if not any(np.array_equal(here[:, n], there[:, n]) for there in ends):
            tensor = int(np.flatnonzero(here[:, n] != ends[0][:, n])[0])
            raise ResumeError(
                f"the optimizer's options are not those of the run: got {rule.hyper[n]} {here[tensor, n]:g}, expected "
                f"{ends[0][tensor, n]:g}, at parameter {loop.layout.names[tensor]!r}. Build the optimizer as it was."
            )


def _moved(trajectory: Trajectory, loop: Loop, steps: int) -> Tensor:
    """Put parameters and optimizer to the state after the last of so many steps, (P,); its options stay as they are.

    Raises:
        StoreError: the optimizer gives other bits than it did; parameters and optimizer are as they were.
    """
    optimizer, layout = loop.optimizer, loop.layout
    first = (steps - 1) // trajectory.block * trajectory.block
    before = layout.flatten(loop.parameters), optimizer.state_dict()
    options = [dict(group) for group in optimizer.param_groups]
    try:
        start = trajectory.state(first), trajectory.accumulators(first)
        hyper = trajectory.reader.read("hyper", slice(first, steps))
        _put(loop, start[0])
        states = torch_states(trajectory.rule, layout, start[1], hyper[0])
        optimizer.load_state_dict(
            {"state": {n: state for n, state in enumerate(states) if state}, "param_groups": before[1]["param_groups"]}
        )
        with _unhooked(optimizer):
            return _rerun(trajectory, loop, range(first, steps), hyper)
    except BaseException:
        _put(loop, before[0])
        optimizer.load_state_dict(before[1])
        raise
    finally:
        for group, values in zip(optimizer.param_groups, options, strict=True):
            group.update({name: value for name, value in values.items() if name != "params"})
        for p in loop.parameters:
            p.grad = None


def _rerun(trajectory: Trajectory, loop: Loop, steps: range, hyper: np.ndarray) -> Tensor:
    reader, rule, layout = trajectory.reader, trajectory.rule, loop.layout
    gradients = torch.from_numpy(reader.read("gradient", slice(steps.start, steps.stop)))
    numbers = {id(p): n for n, p in enumerate(loop.parameters)}
    for n, step in enumerate(steps):
        for group in loop.optimizer.param_groups:
            row = hyper[n][numbers[id(group["params"][0])]]
            group.update(rule.options(dict(zip(rule.hyper, row.tolist(), strict=False))))
        for p, (_, part), row in zip(loop.parameters, layout.slices(), hyper[n], strict=True):
            p.grad = gradients[n][part].view_as(p).clone().to(p.device) if row[-1] else None
        loop.optimizer.step()
        theta = layout.flatten(loop.parameters)
        stored = trajectory.stored(step + 1)
        if stored is not None and not torch.equal(theta.cpu(), stored):
            versions = reader.header["versions"]
            raise StoreError(
                f"the run cannot be gone on with here: the optimizer gives other bits than the stored state, at step {step} "
                f"of {reader.target}. The run was recorded with torch {versions['torch']}, this is torch "
                f"{torch.__version__}: go on with that version, on a machine of that kind."
            )
    return theta


def _passes(reader: Reader, loop: Loop, steps: int) -> list[tuple[frozenset[str], Batch]]:
    rows, passes = reader.read("row", slice(0, steps)), reader.passes(slice(0, steps))
    device = loop.parameters[0].device
    each = np.stack([passes.numbers("kind"), passes.numbers("size")]).reshape(2, -1)
    found = []
    for first in np.unique(each, axis=1, return_index=True)[1]:
        step, number = divmod(int(first), passes.values.shape[1])
        for p in list(passes.of_step(step))[number : number + 1]:  # none where the step had fewer
            on = reader.read("hyper", step)[:, -1]
            active = frozenset(name for name, moves in zip(loop.layout.names, on, strict=True) if moves)
            batch = reader.batch(p.kind, rows[step][p.slots], p.shared)
            found.append((active, batch.map(lambda t: t.to(device))))
    return found


def _put(loop: Loop, theta: Tensor) -> None:
    with torch.no_grad():
        for p, value in zip(loop.parameters, loop.layout.unflatten(theta).values(), strict=True):
            p.copy_(value)


@contextmanager
def _unhooked(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Steps within it are not the user's: what hangs on them is not called."""
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    hooks = {name: getattr(optimizer, name) for name in names}
    for name in names:
        setattr(optimizer, name, OrderedDict())
    try:
        yield
    finally:
        for name, value in hooks.items():
            setattr(optimizer, name, value)


def _settled(reader: Reader) -> Settled:
    facts, described = reader.header["settled"], reader.header.get("factors")
    names = [name for name in reader.names() if name.startswith("factors/")]
    return Settled(
        reduction=Reduction(tuple(facts["reduction"][0]), facts["reduction"][1]),
        draws=Draws(facts["stochastic"], facts["beyond"]),
        forwards=facts["forwards"],
        late=facts["late"],
        described=described,
        shapes={name: tuple(reader.array(name).shape[2:]) for name in names},
        autocast=from_facts(facts["autocast"]),
    )
