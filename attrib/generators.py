"""The state of the generators that a loss may draw from, packed into bytes: torch's, Python's and numpy's global ones."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TORCH_BYTES = len(torch.get_rng_state())
_NOT_OURS = "", np.zeros(624, np.uint32), -1, 0, 0.0  # another kind of numpy generator is left alone


def generators() -> Tensor:
    """The state of torch's generator, then of Python's and numpy's: (n,) uint8."""
    _, words, gauss = random.getstate()
    numpys: Any = np.random.get_state()  # noqa: NPY002 - what users' models draw from
    _, keys, position, has_gauss, cached = numpys if numpys[0] == "MT19937" else _NOT_OURS
    parts = [
        np.array(words, np.uint32),
        np.array([np.nan if gauss is None else gauss]),
        np.asarray(keys, np.uint32),
        np.array([position, has_gauss], np.int32),
        np.array([cached], np.float64),
    ]
    packed = np.concatenate([part.view(np.uint8) for part in parts])
    return torch.cat([torch.get_rng_state(), torch.from_numpy(packed)])


def set_generators(state: Tensor) -> None:
    """Put the generators to what `generators` gave."""
    torch.set_rng_state(state[:_TORCH_BYTES].clone())
    packed = state[_TORCH_BYTES:].numpy()
    if not len(packed):
        return
    cuts = np.cumsum([4 * 625, 8, 4 * 624, 8])
    words, gauss, keys, places, cached = np.split(packed, cuts)
    kept = float(gauss.view(np.float64)[0])
    random.setstate((3, tuple(words.view(np.uint32).tolist()), None if np.isnan(kept) else kept))
    position, has_gauss = places.view(np.int32).tolist()
    if position >= 0:
        kind = "MT19937", keys.view(np.uint32), position, has_gauss, float(cached.view(np.float64)[0])
        np.random.set_state(kind)  # noqa: NPY002


@contextmanager
def random_state(state: Tensor | None) -> Iterator[None]:
    """Run with the generators at `state`, and put them back afterwards; None leaves them alone."""
    if state is None:
        yield
        return
    before = generators()
    set_generators(state)
    try:
        yield
    finally:
        set_generators(before)
