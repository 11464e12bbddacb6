"""A measurement as a pure function of the flat parameter vector, and what every path makes of it."""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import MeasurementError
from ..functional import Functional, mapped, ordinary
from ..layout import Layout
from ..measure import OfAverage
from ..program import Programs, kind_of
from .statistics import Statistics

log = logging.getLogger("attrib")

GRADIENT_BYTES = 32 << 20  # gradients (q, P) of the queries run side by side
STEPS_BYTES = 8 << 20  # gradients (n, Q, P) of the steps run side by side
NO_BUFFERS = Layout((), ())
TRACED_BYTES = 32 << 20  # gradients (Q, P) of one step


_said: set[str] = set()


def warn_once(message: str, *args: Any) -> None:
    """To the log, the first time that it is said."""
    if message not in _said:
        _said.add(message)
        log.warning(message, *args)


class PathGradient(NamedTuple):
    """gradient (Q, P) with <gradient, theta1 - theta0> = end - start; the measurement at both ends, (Q,).

    For several steps at once each has a leading dimension of steps.
    """

    gradient: Tensor
    start: Tensor
    end: Tensor


class Path(Protocol):
    """One way of writing a change of the measurement through the update."""

    def bind(self, measured: "Measured") -> Callable[[Tensor, Tensor], PathGradient]:
        """Prepare for one query; the returned function takes theta0, theta1, (P,) each or (n, P) for n steps at once. What
        it returns belongs to the caller, who may write over it."""


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two gradients (..., P) are the same but for rounding: some of torch's rules are not, mapped over rows."""
    return bool((a - b).norm() <= torch.finfo(a.dtype).eps ** 0.5 * b.norm())


def _again(made_of: tuple[Any, ...], chosen: slice | None, values: Tensor) -> "Measured":
    """Where it was sent to. A measurement that is another there would be accounted for in full, and nothing would show."""
    whole = Measured(*made_of)
    here, bound = whole.first, torch.finfo(whole.dtype).eps ** 0.5
    if here.shape != values.shape or not bool(((here - values).abs() <= bound * (1 + values.abs().max())).all()):
        raise MeasurementError(
            f"the measurement is another one on a worker: got {here.tolist()[:3]}, expected {values.tolist()[:3]} as in the "
            f"calling process, at the last state. Does it read a variable that is set while the program runs? Give it what "
            f"it needs as arguments, such as functools.partial(measurement, target=3)."
        )
    return whole if chosen is None else whole.part(chosen)


class Measured:
    """A measurement of a model, `values(theta) -> (Q,)`.

    Args:
        model: used in the mode it is in; never written to.
        measurement: `model -> (Q,)`; if it has `rows` and `batch`, its queries are run side by side.
        layout: the parameters that move.
        dtype: compute type.
        example: a parameter vector (P,), to learn Q with; `first` (Q,) are the values there, of all queries.
        buffers: those that move as well, and are a function's arguments like the parameters; they stand behind them in all
            vectors, (P + E,). held: values of those that move and are no floating-point numbers.

    Raises:
        MeasurementError: not a finite tensor of shape (Q,), or different when asked twice.
    """

    def __init__(
        self,
        model: nn.Module,
        measurement: Any,
        layout: Layout,
        dtype: torch.dtype,
        example: Tensor,
        buffers: Layout = NO_BUFFERS,
        held: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.parameters, self.buffers = layout, buffers
        self.layout = layout = layout.followed(buffers)
        self.dtype, self.example = dtype, example
        self._made_of = model, measurement, self.parameters, dtype, example, buffers, dict(held)

        def function(values: Callable[..., Tensor]) -> Functional:
            return Functional(model, values, layout, dtype, double=True).holding(held)

        if isinstance(measurement, OfAverage):
            raise MeasurementError(
                "a measurement of an average is of a whole run: got one where states of a model are measured, expected that "
                "of a model. Pass its .measurement; attrib.attribute and attrib.moves take it as it is."
            )
        rows, batch = getattr(measurement, "rows", None), getattr(measurement, "batch", ())
        self.batch: tuple[Tensor, ...] = ()
        if rows is not None and batch:
            self._function = function(rows)
            self.batch = self._function.cast(tuple(ordinary(b.to(example.device)) for b in batch))
        else:
            self._function = function(lambda m: measurement(m))
        self._chosen: slice | None = None
        self.first = self._first_values(example)
        self.count = len(self.first)
        if self.batch and self.count > 1 and not self._by_rows(example):
            log.info("the rows of the measurement depend on each other: its queries are taken together")
            self.batch, self._function = (), function(lambda m: measurement(m))

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self._made_of, self._chosen, self.first)

    def _by_rows(self, theta: Tensor) -> bool:
        """Whether a query has the same value by itself."""
        with torch.no_grad():
            named, last = self.named(theta), tuple(b[-1:] for b in self.batch)
            try:
                alone = self.of_parameters(named, *last)[0]
            except Exception as error:  # statistics of a single row, say
                log.debug("a query by itself has no value: %s", error)
                return False
            together = self.of_parameters(named, *self.batch)
        bound = torch.finfo(self.dtype).eps ** 0.5
        return bool((alone - together[-1]).abs() <= bound * (1 + together.abs().max()))

    def values(self, theta: Tensor) -> Tensor:
        """(P,) -> (Q,)."""
        with torch.no_grad():
            return self.of_parameters(self.named(theta), *self.batch)

    @property
    def at_example(self) -> Tensor:
        """(count,): the values of these queries at the example."""
        return self.first if self._chosen is None else self.first[self._chosen]

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        return self.layout.unflatten(theta.detach().to(self.dtype))

    def of_parameters(self, parameters: dict[str, Tensor], *batch: Tensor) -> Tensor:
        """Parameters by name and a batch of rows -> (Q,). Attention by plain mathematics: it can be traced and mapped; and
        so are norms by running statistics that move: they can be differentiated by these."""
        statistics = Statistics() if self.buffers.names else nullcontext()
        with sdpa_kernel(SDPBackend.MATH), statistics:
            values = self._function(parameters, *batch)
        return values if self.batch or self._chosen is None else values[self._chosen]

    def bound(self, parameters: dict[str, Tensor]) -> AbstractContextManager[Any]:
        """Within it the model holds these parameters: for backward passes that run parts of it again."""
        return self._function.bound(parameters)

    def check_held(self, others: Mapping[str, Tensor]) -> None:
        """Raise MeasurementError where it has other values with these in the place of the buffers that are `held`."""
        with torch.no_grad():
            values = self.of_parameters({**self.named(self.example), **others}, *self.batch)
        if not torch.equal(values, self.values(self.example)):
            raise MeasurementError(
                f"the measurement depends on a buffer that moves and is no floating-point number: got other values with it "
                f"as it was before, expected the same, at one of {', '.join(others)}. Its change cannot be written as a "
                f"sum: keep it as a floating-point buffer, or take a measurement that does not read it."
            )

    def gradient(self, theta: Tensor, weights: Tensor) -> Tensor:
        """(P,), (Q,) -> (P,): the gradient of the queries' sum with these weights, by one backward pass of torch's; zeros
        where the measurement keeps none."""
        with torch.enable_grad():
            leaf = theta.detach().to(self.dtype).requires_grad_()
            named = self.layout.unflatten(leaf)
            with self.bound(named):
                total = (self.of_parameters(named, *self.batch) * weights).sum()
                found = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
        return torch.zeros_like(leaf) if found is None else found

    def parts(self, at_once: int) -> "list[Measured]":
        """The same queries, so many to a part."""
        return [self.part(slice(lo, min(lo + at_once, self.count))) for lo in range(0, self.count, at_once)]

    def __copy__(self) -> "Measured":
        """As it is: to be made again, as where it is sent to, would be to measure again."""
        found = object.__new__(type(self))
        vars(found).update(vars(self))
        return found

    def part(self, chosen: slice) -> "Measured":
        """Some of the queries, of all of them."""
        found = copy(self)
        found.batch, found._chosen = tuple(b[chosen] for b in self.batch), chosen
        found.count = chosen.stop - chosen.start
        return found

    def at_once(self) -> int:
        """Queries whose gradients fit the budget."""
        return max(1, GRADIENT_BYTES // (self.dtype.itemsize * max(1, self.layout.size)))

    def steps_at_once(self) -> int:
        """Steps whose path gradients are computed side by side: it saves overhead, which matters for small models only."""
        return max(1, STEPS_BYTES // (self.dtype.itemsize * max(1, self.layout.size * self.count)))

    def over_steps(self, single: Callable[[Tensor, Tensor], PathGradient]) -> Callable[[Tensor, Tensor], PathGradient]:
        """`single` takes theta0, theta1 (P,); the result takes (n, P) as well."""

        side_by_side: list[bool] = []  # whether steps map: seen at the first that come together

        def either(theta0: Tensor, theta1: Tensor) -> PathGradient:
            if theta0.dim() == 1:
                return single(theta0, theta1)
            if len(theta0) == 1 or not all(side_by_side):
                steps = [single(a, b) for a, b in zip(theta0, theta1, strict=True)]
                return PathGradient(*(torch.stack(parts) for parts in zip(*steps, strict=True)))
            over = mapped(single, 0, self.steps_at_once())
            if side_by_side:
                return over(theta0, theta1)
            try:
                found = over(theta0, theta1)
                side_by_side.append(alike(found.gradient[-1], single(theta0[-1], theta1[-1]).gradient))
            except RuntimeError as error:
                log.debug("steps do not map: %s", error)
                side_by_side.append(False)
            return found if all(side_by_side) else either(theta0, theta1)

        if self.dtype.itemsize * self.layout.size * self.count > TRACED_BYTES:
            return either  # a trace holds every intermediate result for a while; here its gain would be small
        programs = Programs()

        def traced(theta0: Tensor, theta1: Tensor) -> PathGradient:
            ends = [theta0, theta1]
            return programs(kind_of(ends), lambda given: either(*given), ends)

        return traced

    def _first_values(self, theta: Tensor) -> Tensor:
        try:
            values = self.values(theta)
        except (RuntimeError, IndexError, TypeError) as error:
            raise MeasurementError(
                f"the measurement fails in {self.dtype}: got {str(error).splitlines()[0]}. If it holds tensors of another "
                f"type, pass that as dtype=, or convert them: x.to(next(model.parameters()).dtype)."
            ) from error
        if not isinstance(values, Tensor) or values.dim() != 1:
            got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise MeasurementError(
                f"the measurement is not one number per query: got {got}, expected a tensor of shape (Q,). "
                f"Return model outputs stacked along one dimension."
            )
        if self.batch and len(values) != len(self.batch[0]):
            raise MeasurementError(
                f"the measurement does not fit its batch: got {len(values)} values, expected {len(self.batch[0])}."
            )
        if not torch.isfinite(values).all():
            raise MeasurementError(f"the measurement is not finite: got {values.tolist()}, expected finite numbers.")
        if not torch.equal(values, self.values(theta)):
            raise MeasurementError(
                "the measurement is random: got two different values at the same parameters, expected one. "
                "Put the model into eval mode (dropout)."
            )
        return values
