"""How the sites of one kind of batch split over its examples: read off a few of them, and checked.

Each example is replaced in turn to see what changes (`batchwise`), and what contraction gives is compared with the gradients
of single losses. A parameter that fails goes through `vmap` of the whole loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..functional import random_state
from .batchwise import Batchwise, find
from .sites import Site
from .terms import contract, names_of, terms_at

PLAN_BATCH = 7  # examples that a plan is made on


@dataclass(frozen=True)
class Plan:
    """How the sites of one kind of batch split: a reading per site, the parameters that go through vmap, and the calls
    that the sites are."""

    readings: list[Batchwise | None]
    whole: tuple[str, ...]
    calls: tuple[Any, ...]


@dataclass(frozen=True)
class Trace:
    """One traced forward pass. bytes: of what the calls on data returned, all examples together."""

    parameters: dict[str, Tensor]
    sites: list[Site]
    unsplit: set[str]
    losses: Tensor
    bytes: int = 0


@dataclass(frozen=True)
class Probe:
    """The gradient of one example's loss, at every site and for every parameter."""

    example: int
    deltas: tuple[Tensor | None, ...]
    gradients: dict[str, Tensor | None]


Follow = Callable[[tuple[Any, ...]], Trace]  # a batch -> its forward pass, with the values at the sites


def few(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """The examples that a plan is made on."""
    return tuple(a[:PLAN_BATCH] if isinstance(a, Tensor) else a for a in batch)


def kind_of(trace: Trace) -> tuple[Any, ...]:
    """What a plan may depend on."""
    size = len(trace.losses)
    return (*(_kind(s, size) for s in trace.sites), *sorted(trace.unsplit), size == 1)


def calls_of(trace: Trace) -> tuple[Any, ...]:
    """Of each site the function and the parameters."""
    return tuple((site.call.function, *sorted(names_of(site))) for site in trace.sites)


def make_plan(follow: Follow, batch: tuple[Any, ...]) -> tuple[Plan, list[Probe]]:
    """A plan from a few examples, one backward pass for each of three, and what those gave."""
    start = torch.get_rng_state()
    trace = follow(batch)
    size, count = len(trace.losses), len(trace.sites)
    readings = _readings(follow, batch, trace, start)
    wanted = [*(s.edge for s in trace.sites), *trace.parameters.values()]
    probes = []
    for i in sorted({0, size // 2, size - 1}):
        found = torch.autograd.grad(trace.losses[i], wanted, retain_graph=True, allow_unused=True)
        probes.append(Probe(i, found[:count], dict(zip(trace.parameters, found[count:], strict=True))))
    whole = set(trace.unsplit)
    for name in trace.parameters:
        if name not in whole and not _splits(name, trace.sites, readings, probes, size):
            whole.add(name)
    return Plan(readings, tuple(sorted(whole)), calls_of(trace)), probes


def _kind(site: Site, size: int) -> tuple[Any, ...]:
    """Its call, its parameters, its shape but for the size of the batch."""
    shape = tuple((n // size, True) if n % size == 0 else (n, False) for n in site.shape)
    return (site.call.function, *sorted(names_of(site)), shape)


def _readings(follow: Follow, batch: tuple[Any, ...], trace: Trace, start: Tensor) -> list[Batchwise | None]:
    """Replace each example in turn by its neighbour, the random numbers being the same, and see what changes."""
    size = len(trace.losses)
    if size == 1:
        return [Batchwise(0) if site.shape else None for site in trace.sites]
    changes: list[list[tuple[int, Tensor]]] = [[] for _ in trace.sites]
    for i in range(size):
        order = torch.arange(size)
        order[i] = (i + 1) % size
        other = tuple(a[order.to(a.device)] if isinstance(a, Tensor) else a for a in batch)
        with random_state(start):
            replaced = follow(other)
        for change, before, after in zip(changes, trace.sites, replaced.sites, strict=False):
            assert before.value is not None
            assert after.value is not None
            if before.shape == after.shape:
                change.append((i, (after.value != before.value)))
    return [find(site.shape, size, change) for site, change in zip(trace.sites, changes, strict=True)]


def _splits(name: str, sites: list[Site], readings: list[Batchwise | None], probes: list[Probe], size: int) -> bool:
    """Whether contracting the probes' deltas gives what their own gradients give."""
    mine = [(s, r, n) for n, (s, r) in enumerate(zip(sites, readings, strict=True)) if name in names_of(s)]
    if any(reading is None for _, reading, _ in mine):
        return False
    for probe in probes:
        gradient = probe.gradients[name]
        if gradient is None:
            continue
        direction = direction_like(gradient)
        got = torch.zeros(size, dtype=torch.float64, device=gradient.device)
        for site, reading, n in mine:
            delta = probe.deltas[n]
            try:
                if delta is not None and reading is not None:
                    along = {name: direction[None]}
                    got += sum(contract(t, along[name])[0] for t in terms_at(site, reading, delta, along, size))
            except (NotImplementedError, RuntimeError, IndexError):
                return False
        if not close(got[probe.example], direction * gradient):
            return False
    return True


def direction_like(like: Tensor) -> Tensor:
    """A fixed dense direction that no user's random generator is drawn for."""
    steps = torch.arange(1, like.numel() + 1, dtype=torch.float64, device=like.device)
    return torch.cos(steps * 1.7).to(like.dtype).reshape(like.shape)


def close(got: Tensor, products: Tensor) -> bool:
    """Against the sum of `products`, to sqrt(eps) of their absolute sum: a wrong split is wrong by order one."""
    scale = products.abs().sum().double()
    return bool((got - products.sum().double()).abs() <= torch.finfo(products.dtype).eps ** 0.5 * scale)
