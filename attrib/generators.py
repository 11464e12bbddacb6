"""The state of the generators that a loss may draw from, packed into bytes: torch's, Python's and numpy's global ones."""

import ctypes
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_TORCH_BYTES = len(torch.get_rng_state())
_WORDS = 624  # of Python's and of numpy's generator


class _Known(NamedTuple):
    """Python's state as Python gives it; the memory of numpy's generator, where that is seen to be its state, and no second
    normal number waits in it; both states packed."""

    pythons: Any
    memory: bytes | None
    packed: Tensor


_last: _Known | None = None


def generators(whole: bool = False) -> Tensor:
    """The state of torch's generator, then of Python's and numpy's: (n,) uint8.

    Most loops draw from torch's alone, and numpy takes its time to give its state: what has not moved since it was asked for
    last is not asked for again, but for with `whole`. (It would be missed where somebody puts back a state with a second
    normal number waiting that was drawn since.)
    """
    global _last
    pythons, memory = random.getstate(), _memory()
    if whole or _last is None or memory is None or _last.memory != memory or _last.pythons != pythons:
        _last = _known(pythons, memory)
    return torch.cat([torch.get_rng_state(), _last.packed])


def _memory() -> bytes | None:
    """Of numpy's global generator; None where it is of another kind."""
    numpys: Any = np.random
    generator = numpys.get_bit_generator()  # what users' models draw from
    if type(generator) is not np.random.MT19937:
        return None
    return ctypes.string_at(generator.ctypes.state_address, 4 * _WORDS + 4)  # its words, and which is next


def _known(pythons: Any, memory: bytes | None) -> _Known:
    _, words, gauss = pythons
    numpys: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - what users' models draw from
    ours = numpys["bit_generator"] == "MT19937"
    keys, position = numpys["state"].values() if ours else (np.zeros(_WORDS, np.uint32), -1)
    has_gauss, cached = (numpys["has_gauss"], numpys["gauss"]) if ours else (0, 0.0)  # of another kind: left alone
    parts = [
        np.array(words, np.uint32),
        np.array([np.nan if gauss is None else gauss]),
        np.asarray(keys, np.uint32),
        np.array([position, has_gauss], np.int32),
        np.array([cached], np.float64),
    ]
    packed = np.concatenate([part.view(np.uint8) for part in parts])
    seen = memory is not None and memory == parts[2].tobytes() + parts[3][:1].tobytes() and not has_gauss
    return _Known(pythons, memory if seen else None, torch.from_numpy(packed))


def set_generators(state: Tensor) -> None:
    """Put the generators to what `generators` gave."""
    global _last
    _last = None  # see there
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
