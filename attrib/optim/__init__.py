"""Optimizers as update rules, one per parameter tensor: RULES has the rule of each type of optimizer that can be replayed.

A new optimizer is one file with one `Rule` and one row in `known`.
"""

from .adjoint import Back, Carried, check_adjoints, pulled_back, pushed_forward
from .frozen import FROZEN
from .known import RULES, kind_at, place_of, rules_in, rules_of
from .refused import check_group_options
from .replay import Replay, Segments, carried, decay_rates, entrywise_decay, explained, pullback, step_bounds
from .rerun import Rerun, resume, set_options, torch_states
from .rule import MOMENTUM, End, Rule, describe_options
from .rules import Rules, read_hyper, read_state
from .together import Together, members, together

__all__ = [
    "FROZEN",
    "MOMENTUM",
    "RULES",
    "Back",
    "Carried",
    "End",
    "Replay",
    "Rerun",
    "Rule",
    "Rules",
    "Segments",
    "Together",
    "carried",
    "check_adjoints",
    "check_group_options",
    "decay_rates",
    "describe_options",
    "entrywise_decay",
    "explained",
    "kind_at",
    "members",
    "place_of",
    "pullback",
    "pulled_back",
    "pushed_forward",
    "read_hyper",
    "read_state",
    "resume",
    "rules_in",
    "rules_of",
    "set_options",
    "step_bounds",
    "together",
    "torch_states",
]
