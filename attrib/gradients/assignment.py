"""How the sites of one kind of batch split over its examples: read off some of them, and proven.

Each of a few examples is replaced in turn to see what changes (`batchwise`), which also tells whether the losses depend on
each other. What contraction gives is then compared with the gradients of single losses, and on the whole batch with one
backward pass for random weights of the examples: v . (<U, g_i>)_i = <d (v . loss) / d theta, U>, for every parameter by
itself. What fails goes by the derivative along U (`along`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch
from ..constants import is_low, resolution, rounding, wide
from ..functional import Functional
from ..generators import generators, random_state
from .along import random_weights
from .batchwise import Batchwise, find
from .sites import Site, SiteTracer
from .terms import contract, jvp_flow, names_of, terms_at

PROBED = 7  # examples that an assignment is made on, or that are replaced


@dataclass(frozen=True)
class Probe:
    """The gradient of one example's loss, at every site and for every parameter."""

    example: int
    deltas: tuple[Tensor | None, ...]
    gradients: dict[str, Tensor | None]


@dataclass(frozen=True)
class Assignment:
    """How the sites of one kind of batch split.

    readings: of each site which rows are whose. whole: parameter -> why its shares go by the derivative along U. calls:
    what the sites are. volatile: sites whose reading has to be checked in every batch. coupled: whether the losses depend on
    each other.
    """

    readings: list[Batchwise | None]
    whole: dict[str, str]
    calls: tuple[Any, ...]
    volatile: tuple[int, ...] = ()
    coupled: bool = False


@dataclass(frozen=True)
class Trace:
    """One traced forward pass. bytes: of what the calls on data returned, all examples together. start: the state of the
    generators before it. mixed: whether rows of the data met others, so that in another batch losses may depend on each
    other. precision: what the pass rounds to on its way. examples: of the batch, where there is not a loss of each. read:
    the values of the data that Python read, None for what cannot be compared."""

    parameters: dict[str, Tensor]
    sites: list[Site]
    unsplit: set[str]
    losses: Tensor
    bytes: int = 0
    start: Tensor | None = None
    mixed: bool = False
    precision: torch.dtype = torch.float32
    examples: int | None = None
    read: tuple[str | None, ...] = ()

    @property
    def size(self) -> int:
        """Examples of the batch."""
        return len(self.losses) if self.examples is None else self.examples

    @property
    def coarse(self) -> bool:
        """Whether that is less than single precision."""
        return is_low(self.precision)


Follow = Callable[[Batch], Trace]  # a batch -> its forward pass, with the values at the sites


def followed(
    loss: Functional, parameters: dict[str, Tensor], batch: Batch, values: bool = False, checked: bool = True
) -> Trace:
    """One forward pass, the model holding these very `parameters`. checked: whether it is seen to that it writes nothing."""
    start = generators() if checked else None
    batch = Batch.of(batch).map(Tensor.detach)
    moving = {n: p for n, p in parameters.items() if p.requires_grad}
    with torch.enable_grad(), SiteTracer(moving, batch.data, values) as tracer:
        losses = loss.run(*batch.args)
    if checked:
        loss.check_constants()
    found = moving, tracer.sites, tracer.unsplit, losses, tracer.bytes, start, tracer.mixed, loss.precision, batch.size
    return Trace(*found, read=tuple(tracer.read))


def few(batch: Batch) -> Batch:
    """The first examples of a batch."""
    return batch.take(slice(0, PROBED))


def kind_of(trace: Trace) -> tuple[Any, ...]:
    """What an assignment may depend on."""
    size = trace.size
    return (*(_kind(s, size) for s in trace.sites), *sorted(trace.unsplit), size == 1)


def calls_of(trace: Trace) -> tuple[Any, ...]:
    """Of each site the function and the parameters."""
    return tuple((site.call.function, *sorted(names_of(site))) for site in trace.sites)


def assigned(follow: Follow, batch: Batch, start: Tensor | None) -> tuple[Trace, Assignment]:
    """From some examples, one backward pass for each of three; `start`: the generators' state for every pass."""
    with random_state(start):
        trace = follow(batch)
    size, count = len(trace.losses), len(trace.sites)
    readings, coupled = _readings(follow, batch, trace, start)
    wanted: list[Any] = [*(s.edge for s in trace.sites), *trace.parameters.values()]
    probes = []
    for i in sorted({0, size // 2, size - 1}):
        found = torch.autograd.grad(trace.losses[i], wanted, retain_graph=True, allow_unused=True)
        probes.append(Probe(i, found[:count], dict(zip(trace.parameters, found[count:], strict=True))))
    whole = dict.fromkeys(trace.unsplit, "which rows are whose depends on the content of the batch")
    sites = sites_by_name(trace.sites)
    for name in trace.parameters:
        if name not in whole and (reason := _unsplit(name, sites.get(name, []), trace, readings, probes)):
            whole[name] = reason
    volatile = tuple(n for n, site in enumerate(trace.sites) if site.volatile or trace.mixed)
    return trace, Assignment(readings, whole, calls_of(trace), volatile, coupled)


def unproven(trace: Trace, assignment: Assignment) -> dict[str, str]:
    """On a whole batch: the parameters whose contraction, times random weights of the examples, is not that of the
    gradient of the losses so weighted."""
    size, names = len(trace.losses), [n for n in trace.parameters if n not in assignment.whole]
    if not names or not trace.losses.requires_grad:
        return {}
    weights = random_weights(size, size, trace.losses, trace.coarse)
    leaves, edges = [trace.parameters[n] for n in names], [s.edge for s in trace.sites]
    pulled = torch.autograd.grad((trace.losses * weights).sum(), leaves, retain_graph=True, allow_unused=True)
    deltas = torch.autograd.grad(trace.losses.sum(), edges, retain_graph=True, allow_unused=True) if edges else ()
    wrong, sites = {}, sites_by_name(trace.sites)
    for name, gradient in zip(names, pulled, strict=True):
        want = torch.zeros_like(trace.parameters[name]) if gradient is None else gradient
        found = contracted(name, sites.get(name, []), trace, assignment.readings, deltas, want)
        if found is None:
            wrong[name] = "its sites cannot be contracted"
        elif not found.within(abs(float(weights.double() @ found.products) - found.direct), float(weights.abs().max())):
            wrong[name] = "its rows do not agree with a backward pass of the batch"
    return wrong


def ownership(
    trace: Trace,
    assignment: Assignment,
    ones: dict[int, Tensor | None],
    weighted: dict[int, Tensor | None],
    weights: Tensor,
) -> dict[int, Tensor]:
    """Of each site how far off that is, relative to the largest."""
    size, found = len(trace.losses), {}
    for n, delta in weighted.items():
        reading, plain = assignment.readings[n], ones[n]
        if delta is None or plain is None or reading is None:
            continue
        rows, plain = reading.split(delta, size), reading.split(plain, size)
        expected = plain * weights.view(-1, *(1,) * (plain.dim() - 1))
        largest = expected.abs().amax()
        gap = (rows - expected).abs().amax() / torch.where(largest > 0, largest, torch.ones_like(largest))
        found[n] = gap
    return found


def _kind(site: Site, size: int) -> tuple[Any, ...]:
    """Its call, its parameters, its shape but for the size of the batch."""
    shape = tuple((n // size, True) if n % size == 0 else (n, False) for n in site.shape)
    return (site.call.function, *sorted(names_of(site)), shape, site.volatile)


def _readings(follow: Follow, batch: Batch, trace: Trace, start: Tensor | None) -> tuple[list[Batchwise | None], bool]:
    """Replace some examples in turn by their neighbours, the random numbers being the same, and see what changes; and
    whether the loss of another example does."""
    size = len(trace.losses)
    if size == 1:
        return [Batchwise(0) if site.shape else None for site in trace.sites], False
    changes: list[list[tuple[int, Tensor]]] = [[] for _ in trace.sites]
    coupled = False
    for i in torch.linspace(0, size - 1, min(size, PROBED)).long().tolist():
        order = torch.arange(size)
        order[i] = (i + 1) % size
        with random_state(start):
            replaced = follow(batch.take(order))
        moved = differs(replaced.losses.detach(), trace.losses.detach(), trace.precision)
        moved[i] = False
        coupled = coupled or bool(moved.any())
        for change, before, after in zip(changes, trace.sites, replaced.sites, strict=False):
            assert before.value is not None
            assert after.value is not None
            if before.shape == after.shape:
                change.append((i, differs(after.value, before.value, trace.precision)))
    return [find(site.shape, size, change) for site, change in zip(trace.sites, changes, strict=True)], coupled


def differs(a: Tensor, b: Tensor, precision: torch.dtype) -> Tensor:
    """Beyond what the same sums, made in another order, differ by: in few bits by the last of them. precision: what the
    passes that they come from round to."""
    if not a.is_floating_point():
        return a != b
    bound = torch.finfo(a.dtype).eps if is_low(a.dtype) else resolution(a.dtype, precision) ** 0.75
    both = torch.isfinite(a) & torch.isfinite(b)
    largest = float(torch.where(both, b.abs(), 0.0).max()) if b.numel() else 0.0
    return torch.where(both, (a - b).abs() > bound * largest, a != b)


def sites_by_name(sites: Sequence[Site]) -> dict[str, list[int]]:
    """Parameter -> the numbers of its sites."""
    found: dict[str, list[int]] = {}
    for n, site in enumerate(sites):
        for name in names_of(site):
            found.setdefault(name, []).append(n)
    return found


@dataclass(frozen=True)
class _Contracted:
    """products (B,): <U, g_i> of a parameter by its sites, along a fixed direction; direct: <U, gradient>.

    What differs is within rounding where it is less than `bound`, sqrt(eps) of the sum of what is summed: of the gradient's
    products, or where those cancel (a key's bias in attention has no gradient) of what flows through the sites. A wrong
    split is wrong by order one of that.

    To few bits (`coarse`) a gradient is rounded where it is summed, entry by entry, and the examples' parts are not. Each
    entry's rounding goes either way, so their sum is bounded by the 2-norm, of which a wrong split is wrong by order one;
    the 1-norm, of as many entries as a matrix has, would let everything pass.
    """

    products: Tensor
    direct: float
    bound: float
    flow: Callable[[], float]
    coarse: bool

    def within(self, gap: float, weight: float = 1.0) -> bool:
        """weight: the largest of an example, where they were weighted. The gradient holds it, what flows does not."""
        if self.coarse:
            return gap <= self.bound or gap <= self.bound + weight * self.flow()
        return gap <= weight * self.bound or gap <= weight * (self.bound + self.flow())


def _unsplit(
    name: str, mine: list[int], trace: Trace, readings: list[Batchwise | None], probes: list[Probe]
) -> str | None:
    """Why contracting the probes' deltas does not give what their own gradients give, a gradient at the own example and
    nothing at the others; None where it does."""
    if any(readings[n] is None for n in mine):
        return "which rows are whose cannot be read off"
    for probe in probes:
        gradient = probe.gradients[name]
        if gradient is None:
            continue
        found = contracted(name, mine, trace, readings, probe.deltas, gradient)
        if found is None:
            return "its sites cannot be contracted"
        off = found.products.clone()
        off[probe.example] -= found.direct
        if not found.within(float(off.abs().sum())):
            return "its rows do not agree with the gradient of a single loss"
    return None


def contracted(
    name: str,
    mine: list[int],
    trace: Trace,
    readings: Sequence[Batchwise | None],
    deltas: Sequence[Tensor | None],
    gradient: Tensor,
) -> _Contracted | None:
    gradient = gradient.to(wide(gradient.dtype))
    direction, size = direction_like(gradient), trace.size
    products = torch.zeros(size, dtype=torch.float64, device=gradient.device)
    reached = [(trace.sites[n], r, d) for n in mine if (r := readings[n]) is not None and (d := deltas[n]) is not None]
    along = {name: direction[None]}
    try:
        for site, reading, delta in reached:
            products += sum(contract(t, along[name])[0] for t in terms_at(site, reading, delta, along, size))
    except (NotImplementedError, RuntimeError, IndexError):
        return None
    each, kind = (direction * gradient).double(), torch.finfo(gradient.dtype)
    root = rounding(trace.precision) if trace.coarse else resolution(gradient.dtype, trace.precision) ** 0.5
    order = 2 if trace.coarse else 1

    def flow() -> float:
        return root * sum(jvp_flow(site, name, delta, direction, order) for site, _, delta in reached)

    # numbers below the smallest normal have few digits, or one
    bound = root * (float(torch.linalg.vector_norm(each, order)) + kind.smallest_normal)
    return _Contracted(products, float(each.sum()), bound, flow, trace.coarse)


def direction_like(like: Tensor) -> Tensor:
    """A fixed dense direction that no user's random generator is drawn for."""
    steps = torch.arange(1, like.numel() + 1, dtype=torch.float64, device=like.device)
    return torch.cos(steps * 1.7).to(like.dtype).reshape(like.shape)
