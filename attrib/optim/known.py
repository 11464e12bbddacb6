"""The optimizers that a rule replays: RULES, from where a type is imported to its rule.

A new optimizer is one file with one `Rule` and one row here. Those of packages that are not installed are left out.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from ..constants import is_low
from ..errors import StoreError, UnsupportedOptimizerError
from .adadelta import ADADELTA
from .adafactor import ADAFACTOR
from .adagrad import ADAGRAD
from .adam import ADAM
from .adamax import ADAMAX
from .asgd import ASGD
from .frozen import FROZEN
from .lion import LION
from .muon import MUON
from .nadam import NADAM
from .radam import RADAM
from .rmsprop import RMSPROP
from .rprop import RPROP
from .rule import Rule
from .rules import Moved, Rules, assigned
from .schedulefree import ADAMW_SCHEDULE_FREE, SGD_SCHEDULE_FREE
from .sgd import SGD
from .together import members

_TORCH = {
    "SGD": SGD,
    "Adam": ADAM,
    "AdamW": ADAM,
    "RMSprop": RMSPROP,
    "Adagrad": ADAGRAD,
    "Adadelta": ADADELTA,
    "Adamax": ADAMAX,
    "NAdam": NADAM,
    "RAdam": RADAM,
    "ASGD": ASGD,
    "Rprop": RPROP,
    "Adafactor": ADAFACTOR,
    "Muon": MUON,
}
_OTHERS = {
    "lion_pytorch.Lion": LION,
    "schedulefree.SGDScheduleFree": SGD_SCHEDULE_FREE,
    "schedulefree.AdamWScheduleFree": ADAMW_SCHEDULE_FREE,
}

RULES: dict[str, Rule] = {
    **{f"torch.optim.{name}": rule for name, rule in _TORCH.items() if hasattr(torch.optim, name)},
    **{place: rule for place, rule in _OTHERS.items() if find_spec(place.partition(".")[0]) is not None},
}


def kind_at(place: str) -> type[torch.optim.Optimizer]:
    """The type that is imported from a place."""
    module, _, name = place.rpartition(".")
    return getattr(importlib.import_module(module), name)


def place_of(optimizer: torch.optim.Optimizer) -> str | None:
    """The row of RULES of an optimizer's exact type; None for any other, subclasses included."""
    for place in RULES:
        module, _, name = place.rpartition(".")
        if getattr(sys.modules.get(module), name, None) is type(optimizer):  # that of an instance was imported
            return place
    return None


def rules_of(optimizer: torch.optim.Optimizer, rule: str | None = None) -> Rules:
    """The rules of an optimizer, or of several that are together. rule: that of a type that has none, "frozen" or None.

    Raises:
        UnsupportedOptimizerError: a type has no rule; subclasses included, since they may compute something else.
    """
    if rule not in (None, FROZEN.name):
        raise ValueError(f"unknown rule: got {rule!r}, expected {FROZEN.name!r} or None.")
    return assigned(members(optimizer), [_moved(member, rule) for member in members(optimizer)])


def rules_in(header: dict[str, Any], where: Any) -> Rules:
    """Those that a run was recorded with.

    Raises:
        StoreError: this attrib, or this machine, has not the rule.
    """
    dtype = getattr(torch, header["dtype"])
    movers = tuple(_known(entry, where) for entry in header["optimizers"])
    return Rules(movers, tuple(header["owners"]), dtype if is_low(dtype) else None)


_NEVER = {  # with no rule at all: why not, and what to do
    torch.optim.LBFGS: (
        "it evaluates the loss several times a step, at parameters between the recorded ones. Use one that steps by the "
        "gradient in p.grad, such as torch.optim.SGD"
    ),
    torch.optim.SparseAdam: (
        "it takes sparse gradients alone, of which the shares of the examples are none. Build the embedding with "
        "sparse=False and use torch.optim.Adam"
    ),
}


def _moved(optimizer: torch.optim.Optimizer, rule: str | None) -> Moved:
    place, kind = place_of(optimizer), type(optimizer)
    if place is not None:
        return Moved(place, RULES[place])
    place = f"{kind.__module__}.{kind.__qualname__}"
    for never, reason in _NEVER.items():
        if isinstance(optimizer, never):
            raise UnsupportedOptimizerError(f"this optimizer cannot be recorded: got {place}, but {reason}.")
    if place == "accelerate.optimizer.AcceleratedOptimizer":
        raise UnsupportedOptimizerError(
            f"the optimizer is prepared already: got {place}, expected the one in it. Prepare the recorder in its place: "
            f"model = accelerator.prepare(model), recorder = attrib.record(optimizer, model, loss, store), optimizer = "
            f"accelerator.prepare(recorder)."
        )
    if rule == FROZEN.name:
        return Moved(place, FROZEN)
    raise UnsupportedOptimizerError(
        f"no update rule for this optimizer: got {place}, expected exactly one of {', '.join(RULES)}. Use one of these, add "
        f'a rule in attrib/optim, or pass rule="frozen": what each step did is then counted for the gradient of that step '
        f"alone, the rest of the update is a row of its own, and there is no states_every, no resume and no replay."
    )


def _known(entry: dict[str, Any], where: Any) -> Moved:
    rules: Sequence[Rule] = [RULES[entry["type"]]] if entry["type"] in RULES else []
    for rule in (*rules, FROZEN):
        if rule.name == entry["rule"] and list(rule.hyper) == entry["hyper"]:
            return Moved(entry["type"], rule)
    raise StoreError(
        f"this attrib cannot read the run: got {entry['type']} by rule {entry['rule']}, expected one of {', '.join(RULES)}, "
        f"at {where}. Install the package that it is of, or update attrib."
    )
