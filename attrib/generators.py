"""The state of the generators that a loss may draw from, packed into bytes: torch's, Python's and numpy's global ones."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TORCH_BYTES = len(torch.get_rng_state())


def generators() -> Tensor:
    """The state of torch's generator, then of Python's and numpy's: (n,) uint8."""
    _, words, gauss = random.getstate()
    numpys: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - what users' models draw from
    ours = numpys["bit_generator"] == "MT19937"
    keys, position = numpys["state"].values() if ours else (np.zeros(624, np.uint32), -1)
    has_gauss, cached = (numpys["has_gauss"], numpys["gauss"]) if ours else (0, 0.0)  # of another kind: left alone
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


def drew_beyond_torch(before: Tensor, after: Tensor) -> bool:
    """Whether numbers were drawn from Python's or numpy's generator between two states."""
    return not torch.equal(before[_TORCH_BYTES:], after[_TORCH_BYTES:])


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
