"""The generators' state is theirs at every moment, though what has not moved is not asked for again."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from attrib.generators import generators, random_state, set_generators

DRAWS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand(1).item(),
    "python": random.random,
    "python, the second of a pair": lambda: random.gauss(0, 1),
    "numpy": np.random.rand,
    "numpy, the second of a pair": np.random.randn,
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_state_is_another_after_every_draw_and_gives_the_same_numbers_again(name: str) -> None:
    draw = DRAWS[name]
    with random_state(generators()):
        states, drawn = [], []
        for _ in range(5):
            states.append(generators())
            assert torch.equal(states[-1], generators())
            drawn.append(draw())
        assert not any(torch.equal(a, b) for a, b in itertools.pairwise(states))
        for n in (3, 0, 4, 1, 2):
            set_generators(states[n])
            assert torch.equal(generators(), states[n])
            assert draw() == drawn[n]


def test_a_state_put_back_with_a_number_waiting_is_read_whole() -> None:
    with random_state(generators()):
        np.random.seed(3)  # noqa: NPY002
        np.random.randn()  # noqa: NPY002 - the second of the pair waits
        waiting, numpys = generators(), np.random.get_state()  # noqa: NPY002
        np.random.randn()  # noqa: NPY002 - which moves no word of the generator
        taken = generators()
        assert not torch.equal(waiting, taken)
        set_generators(waiting)
        assert torch.equal(generators(), waiting)
        set_generators(taken)
        generators()
        np.random.set_state(numpys)  # noqa: NPY002 - by somebody else: the one case that a glance misses
        assert torch.equal(generators(whole=True), waiting)
