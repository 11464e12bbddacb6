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
from .buffers import Buffers
from .capture import Settled
from .checks import Draws, Reduction
from .constants import to_array
from .errors import ModelMismatchError, ResumeError, StoreError
from .generators import set_generators
from .loop import Loop, RecordOptions, header_of
from .optim import Rule, members, read_hyper, torch_states
from .store import Reader, Reopened, lease, reopen, stands
from .trajectory import Trajectory

log = logging.getLogger("attrib")

SAME = {  # of the header: what must not differ -> how it is called
    "optimizer": "the optimizer",
    "optimizers": "the optimizers",
    "owners": "the optimizer of each parameter, by its number,",
    "dtype": "the parameters' type",
    "capture": "capture=",
    "check_every": "check_every=",
    "remainder": "remainder=",
    "shares": "shares=",
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
        trajectory = Trajectory(reader, loop.rules, loop.layout)
        reopened, settled, passes = reopen(reader, held), _settled(reader), _passes(reader, loop, steps)
        buffers = Buffers.of(reader).at(steps)
        looked = np.flatnonzero(~np.isnan(reader.fact("step_identity", slice(0, steps))))
        after = _moved(trajectory, loop, steps)  # last: until now nothing was changed
    except BaseException:
        if held is not None:
            held.release()
        raise
    log.info("going on with the run at %s from step %d", reader.target, steps)
    set_generators(torch.from_numpy(reopened.generators.copy()))
    loop.guard.resumed(reader.header["training"], after, loop.optimizer, buffers)
    inspected = int(looked[-1]) if len(looked) else 0
    ids = np.dtype(object if "ids/span" in reader else np.int64)
    return Resumed(replace(reopened, after=to_array(after)), settled, inspected, after, passes, ids)


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
        if there["digests"][name] != value and name not in there.get("buffers", ()):
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
    rules = loop.rules
    here = rules.named(read_hyper(rules, loop.optimizer))
    ends = [rules.named(reader.read("hyper", step)) for step in (0, int(reader.header["written_steps"]) - 1)]
    for tensor, rule in enumerate(rules):
        for name in (name for n in rule.numbers if n.key != "lr" and n.key not in rule.counts for name in n.names):
            if not any(here[tensor][name] == there[tensor][name] for there in ends):
                raise ResumeError(
                    f"the optimizer's options are not those of the run: got {name} {here[tensor][name]:g}, expected "
                    f"{ends[0][tensor][name]:g}, at parameter {loop.layout.names[tensor]!r}. Build the optimizer as it was."
                )


def _moved(trajectory: Trajectory, loop: Loop, steps: int) -> Tensor:
    """Put parameters and optimizer to the state after the last of so many steps, (P,); its options stay as they are.

    Raises:
        StoreError: the optimizer gives other bits than it did; parameters and optimizer are as they were.
    """
    optimizer, layout = loop.optimizer, loop.layout
    first = (steps - 1) // trajectory.block * trajectory.block
    before = layout.flatten(loop.parameters), [member.state_dict() for member in members(optimizer)]
    options = [dict(group) for group in optimizer.param_groups]
    try:
        start = trajectory.state(first), trajectory.accumulators(first)
        hyper = trajectory.reader.read("hyper", slice(first, steps))
        _put(loop, start[0])
        _load(loop, torch_states(loop.rules, layout, start[1], hyper[0]), before[1])
        with _unhooked(*members(optimizer)):
            theta = _rerun(trajectory, loop, range(first, steps), hyper)
        counted = [rule.counts for rule, _ in _groups(loop)]
    except BaseException:
        _put(loop, before[0])
        for member, state in zip(members(optimizer), before[1], strict=True):
            member.load_state_dict(state)
        counted = [()] * len(options)
        raise
    finally:
        for group, values, counts in zip(optimizer.param_groups, options, counted, strict=True):
            group.update({name: value for name, value in values.items() if name != "params" and name not in counts})
        for p in loop.parameters:
            p.grad = None
    return theta


def _load(loop: Loop, states: list[dict[str, Tensor]], before: list[dict[str, Any]]) -> None:
    """Torch's state of each parameter into the optimizers, whose state dicts those were; where torch casts scalars to the
    parameters' type, with which the next would be computed otherwise, they stay what they were."""
    at = 0
    for member, known in zip(members(loop.optimizer), before, strict=True):
        held = [p for group in member.param_groups for p in group["params"]]
        mine = states[at : at + len(held)]
        member.load_state_dict({**known, "state": {n: state for n, state in enumerate(mine) if state}})
        for p, state, rule in zip(held, mine, loop.rules[at : at + len(held)], strict=True):
            for key in rule.scalars if state else ():
                member.state[p][key] = state[key].to(member.state[p][key].device)
        at += len(held)


def _groups(loop: Loop) -> Iterator[tuple[Rule, int]]:
    """Of each param group the rule, and its first tensor."""
    at = 0
    for group in loop.optimizer.param_groups:
        yield loop.rules[min(at, len(loop.parameters) - 1)], at
        at += len(group["params"])


def _rerun(trajectory: Trajectory, loop: Loop, steps: range, hyper: np.ndarray) -> Tensor:
    reader, layout = trajectory.reader, loop.layout
    gradients = reader.tensor("gradient", slice(steps.start, steps.stop))
    for n, step in enumerate(steps):
        rows = loop.rules.named(hyper[n])
        for group, (rule, first) in zip(loop.optimizer.param_groups, _groups(loop), strict=True):
            group.update(rule.options(rows[first]) if group["params"] else {})
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
def _unhooked(*optimizers: torch.optim.Optimizer) -> Iterator[None]:
    """Steps within it are not the user's: what hangs on them is not called."""
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    hooks = [(optimizer, name, getattr(optimizer, name)) for optimizer in optimizers for name in names]
    for optimizer, name, _ in hooks:
        setattr(optimizer, name, OrderedDict())
    try:
        yield
    finally:
        for optimizer, name, value in hooks:
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
        coupled=bool(facts.get("coupled", False)),
    )
