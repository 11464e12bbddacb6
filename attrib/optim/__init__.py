"""Optimizers as update rules: RULES maps the exact type of a torch optimizer to the rule that replays it.

A new optimizer is one file with one `Rule` and one row here.
"""

import torch

from ..errors import UnsupportedOptimizerError
from .adam import ADAM
from .refused import check_group_options
from .replay import Replay, Segments, decay_rates, pullback, read_hyper, read_state
from .rerun import Rerun, resume, set_options, torch_states
from .rule import Rule, describe_options
from .sgd import SGD

__all__ = [
    "KIND_NAMES",
    "RULES",
    "RULE_NAMES",
    "Replay",
    "Rerun",
    "Rule",
    "Segments",
    "check_group_options",
    "decay_rates",
    "describe_options",
    "kind_by_name",
    "pullback",
    "read_hyper",
    "read_state",
    "resume",
    "rule_by_name",
    "rule_of",
    "set_options",
    "torch_states",
]

RULES: dict[type, Rule] = {torch.optim.SGD: SGD, torch.optim.Adam: ADAM, torch.optim.AdamW: ADAM}


RULE_NAMES = frozenset(rule.name for rule in RULES.values())
KIND_NAMES = frozenset(kind.__name__ for kind in RULES)


def rule_of(optimizer: torch.optim.Optimizer) -> Rule:
    """The rule of an optimizer's exact type.

    Raises:
        UnsupportedOptimizerError: for any other type, subclasses included: they may compute something else.
    """
    rule = RULES.get(type(optimizer))
    if rule is None:
        supported = ", ".join(f"torch.optim.{kind.__name__}" for kind in RULES)
        raise UnsupportedOptimizerError(
            f"no update rule for this optimizer: got {type(optimizer).__module__}.{type(optimizer).__qualname__}, "
            f"expected exactly one of {supported}. Use one of these, or add a rule in attrib/optim."
        )
    return rule


def rule_by_name(name: str) -> Rule:
    """The rule of a run that was recorded with it."""
    return next(rule for rule in RULES.values() if rule.name == name)


def kind_by_name(name: str) -> type[torch.optim.Optimizer]:
    """The optimizer's type that a run was recorded with."""
    return next(kind for kind in RULES if kind.__name__ == name)
