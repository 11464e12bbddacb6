"""Backwards through the steps of a pair of runs, the sensitivities being carried on from each step to the one before."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from .causes import Causes, Done
from .optim import Carried
from .tally import Tally, total


def backwards(
    causes: Causes,
    last: Tensor,
    examples: np.ndarray,
    taken: Callable[[int, Done, tuple[np.ndarray, np.ndarray]], Tally],
    heard: Callable[[], Any],
) -> tuple[Tally, Carried]:
    """The tallies of all steps, summed, and the sensitivities to what the pair begins with.

    Args:
        last: (Q, P) float64, the sensitivities to the last parameters. examples: (E,), what the tallies call theirs.
        taken: of a step its number, what was found there, and the norms of the sensitivities to the parameters before and
            after it, (Q,) each, what is kept. heard: called when a step is done.
    """
    pair = causes.pair
    carried = Carried.of(pair.base.run.rules, last)

    def tallies() -> Iterator[Tally]:
        nonlocal carried
        for number in reversed(range(pair.steps)):
            after = carried
            done, carried = causes.step(number, after)
            yield taken(number, done, (carried.norms, after.norms))
            heard()

    whole = total(tallies(), range(pair.steps), examples)
    assert whole is not None
    return whole, carried
