"""What an update rule is: its state, its hyper-parameters, and the coefficients that they freeze to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels.recurrence import Coefficients
from .numbers import TYPE, Numbers

MOMENTUM = "momentum"  # what the one accumulator that is linear in the gradients is called, whatever torch calls it

Hyper = Mapping[str, float]
Options = Mapping[
    str, Any
]  # of a param group: numbers, or tensors with which torch computes in their type; scalars of its state; and the age
State = dict[str, Tensor]
Shape = tuple[int, ...]
Accumulator = Callable[
    [Options, Shape], Shape | None
]  # options, shape of the parameter -> its own, None where torch has none


def realised(value: float | Tensor, dtype: torch.dtype) -> float:
    """A scalar as torch's kernels use it: rounded to the parameters' type.

    In float32, 1 - 0.01 is 0.99000001: over thousands of steps of weight decay the difference is no longer small.
    """
    return float(np.float32(float(value))) if dtype == torch.float32 else float(value)


def taken_off(product: Any, dtype: torch.dtype) -> float:
    """The share of theta that decay takes off where torch multiplies by what is left, 1 - product."""
    return 1 - realised(1 - product, dtype)


def coupled_gradient(o: Options, gradient: Tensor, theta: Tensor) -> tuple[float, float, Tensor]:
    """sign, the rate of decay in the gradient, and that with both: sign * (gradient + sign * weight_decay * theta)."""
    sign = -1.0 if o["maximize"] else 1.0
    decay = realised(o["weight_decay"], theta.dtype)
    g = -gradient if o["maximize"] else gradient
    return sign, sign * decay, torch.add(g, theta, alpha=decay) if decay else g


def decays(o: Options, gradient: Tensor, theta: Tensor) -> tuple[float, float, float, Tensor]:
    """The same, where an option takes the decay out of the gradient: sign, its rate in it, that beside it, the gradient."""
    if not o["decoupled_weight_decay"]:
        sign, coupled, g = coupled_gradient(o, gradient, theta)
        return sign, coupled, 0.0, g
    decoupled = taken_off(o["lr"] * o["weight_decay"], theta.dtype)
    return (-1.0, 0.0, decoupled, -gradient) if o["maximize"] else (1.0, 0.0, decoupled, gradient)


def linear(rule_freeze: Callable[[Options, State, Tensor, Tensor], tuple[Coefficients, State]]) -> Any:
    """The adjoint of a rule whose coefficients depend on the options alone."""

    def adjoint(o: Options, a: "End", b: "End", theta: Tensor, state: State) -> "Adjoint":
        return Adjoint(rule_freeze(o, *a)[0], torch.zeros_like(theta), {})

    return adjoint


def averaged(
    sign: float,
    averaging: Any,
    direct: Any,
    beta1: Any,
    dtype: torch.dtype,
    coupled: float = 0.0,
    decoupled: float = 0.0,
) -> Coefficients:
    """Of an update averaging * m + direct * g with m + (1 - beta1) (g - m) for the next m, as torch has it."""
    feed = realised(1 - beta1, dtype)
    keep = 1 - feed
    old, new = averaging * keep, (averaging * feed + direct) * sign
    return Coefficients(keep=keep, feed=feed * sign, apply_old=old, apply_new=new, coupled=coupled, decoupled=decoupled)


def known_entries(u: Tensor) -> Tensor:
    """Where |u| is not tiny beside its tensor, so that a coefficient may be divided by it.

    A gradient is a sum of shares of the size of its tensor's, so its entries are known to about eps of that size (the root
    mean square). One of sqrt(eps) of it is known to sqrt(eps) of itself, the bound of the step identity. A quotient by a
    smaller one is a quotient by rounding, and blows up the shares, which cancel in it.
    """
    size = float(u.norm()) / max(1, u.numel()) ** 0.5
    return u.abs() > torch.finfo(u.dtype).eps ** 0.5 * size


def inverse_size(u: Tensor) -> Tensor:
    """1 / |u|, with which sign(u) = u / |u| is linear; 0 where u is 0, or tiny: its sign is that of rounding."""
    return quotient_by(u.abs())


def quotient_by(denominator: Tensor) -> Tensor:
    """1 / denominator, 0 where that is tiny beside its tensor: the size of gradients that are zero but for rounding."""
    known = known_entries(denominator)
    return torch.where(known, 1.0 / torch.where(known, denominator, 1.0), 0.0)


def always(options: Options, shape: Shape) -> Shape | None:
    return shape


def where(option: str) -> Accumulator:
    """Torch has it where that option is set."""
    return lambda options, shape: shape if options[option] else None


def mean(values: list[Tensor]) -> Tensor:
    """Over one end or two."""
    return values[0] if len(values) == 1 else (values[0] + values[1]) / 2


class End(NamedTuple):
    """A step of one run: the accumulators before it by name, the gradient, the parameters before it; (P,) each."""

    state: State
    gradient: Tensor
    theta: Tensor


class Adjoint(NamedTuple):
    """Of a step at two ends. coefficients: of what is linear in the gradient. gradient (Q, P): what goes to the gradient
    beside that, through the accumulators that are not. state: the sensitivities to these before the step, (Q, P) each."""

    coefficients: Coefficients
    gradient: Tensor
    state: State


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An optimizer, as the linear recurrence that it is once its realised coefficients are frozen.

    name: stored with a run.
    momentum: key in torch's per-parameter state of the accumulator that is linear in the gradients; None: there is none.
    from_parameters: what is linear is that accumulator less the parameters.
    accumulators: keys of all of them, and of what shape each is; those that are not the momentum are frozen.
    clock: key in torch's per-parameter state of the number of steps; None: all that counts is whether there is a momentum.
    scalars: keys of other numbers in that state, of which the options are what they begin with.
    begins: the option that is the value of an accumulator before its first step; such a state is there from the start.
    numbers: the options of a param group that a step of one parameter tensor depends on. counts: those that the optimizer
        itself counts on.
    whole: it needs whole tensors, in their shape, one by one.
    freeze: (options, scalars and "age", state before the step, gradient, theta), vectors (P,) or a whole tensor ->
        (coefficients of the step, as of vectors, and the state after it; a momentum that it has not is the recurrence's).
        Scalars are computed from the options as torch does it.
    unmodelled: what the coefficients do not explain of an update is expected, and has a row of its own.
    read_off: the coefficients are had from the update that was made, so that it cannot be made again.
    roundings: how many times, at most, torch rounds a term of an update on its way into the parameters, by half of eps each;
        None where that bounds nothing: a sign, a difference of what it has rounded.
    adjoint: (options, scalars and "age", the step at one end and at the other, the sensitivity to the parameters after it
        (Q, P), those to the accumulators after it) -> `Adjoint`, exact for the difference of the ends, the derivative where
        they meet; `linear` where the coefficients are the same at all ends; None where it was not derived.
    """

    name: str
    freeze: Callable[[Options, State, Tensor, Tensor], tuple[Coefficients, State]]
    numbers: tuple[Numbers, ...]
    momentum: str | None = None
    from_parameters: bool = False
    accumulators: Mapping[str, Accumulator] = field(default_factory=dict)
    clock: str | None = None
    scalars: Mapping[str, tuple[Numbers, Callable[[Options], Any]]] = field(default_factory=dict)
    begins: str | None = None
    counts: tuple[str, ...] = ()
    whole: bool = False
    unmodelled: bool = False
    read_off: bool = False
    roundings: int | None = None
    adjoint: Callable[[Options, End, End, Tensor, State], Adjoint] | None = None

    @property
    def moments(self) -> tuple[str, ...]:
        """Keys of the accumulators that are stored as they are."""
        return tuple(key for key in self.accumulators if key != self.momentum or self.from_parameters)

    @property
    def state(self) -> tuple[str, ...]:
        """Names of what is stored of the state, vectors (P,)."""
        return (MOMENTUM, *self.moments)

    @property
    def hyper(self) -> tuple[str, ...]:
        """Names of the numbers of a step; "age" is the clock."""
        several = (*self.numbers, *(numbers for numbers, _ in self.scalars.values()))
        return (*(name for numbers in several for name in numbers.names), "age")

    def read(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float, ...]:
        """Param group, torch's state of one parameter -> values of `hyper` before the step."""
        return (*self.values(group), *self.counted(group, state))

    def values(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """Those of a param group, which all of its parameters share."""
        return tuple(value for numbers in self.numbers for value in numbers.of(group))

    def counted(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float, ...]:
        """Those of one parameter, from torch's state of it."""
        scalars = {key: state[key] if key in state else begin(group) for key, (_, begin) in self.scalars.items()}
        return (*(value for numbers, _ in self.scalars.values() for value in numbers.of(scalars)), self.age(state))

    def age(self, state: Mapping[str, Any]) -> float:
        if self.clock is not None:
            return float(state.get(self.clock, 0.0))
        return float(self.momentum is not None and state.get(self.momentum) is not None)

    def options(self, hyper: Hyper) -> dict[str, Any]:
        """The options of the param group that `hyper` was read from."""
        return {numbers.key: numbers.option(hyper) for numbers in self.numbers}

    def situation(self, hyper: Hyper) -> dict[str, Any]:
        """What a step depends on: the options, the scalars of the state, the age."""
        scalars = {key: numbers.option(hyper) for key, (numbers, _) in self.scalars.items()}
        return {**self.options(hyper), **scalars, "age": hyper["age"]}

    def untyped(self) -> "Rule":
        """The rule whose options are numbers, whatever they were, and those that the user sets."""
        plain = (
            replace(n, names=tuple(name for name in n.names if not name.endswith(TYPE)))
            for n in self.numbers
            if n.key not in self.counts
        )
        return replace(self, numbers=tuple(plain))

    def accumulator(self, name: str, state: Mapping[str, Any], p: Tensor, begin: float) -> Tensor:
        """One of `state`, of one parameter, as a vector of its size; what torch has not made yet is as it begins."""
        key = self.momentum if name == MOMENTUM else name
        value = None if key is None else state.get(key)
        if value is None:
            return torch.full_like(p, begin).view(-1)
        if name == MOMENTUM and self.from_parameters:
            value = value - p
        return packed(value.detach(), p.numel())

    def resume(self, hyper: Hyper, accumulators: State, shape: Shape) -> State:
        """Torch's state of one parameter of a shape before the step that `hyper` was read from; {} where it has none."""
        if not hyper["age"] and self.begins is None:
            return {}
        situation = self.situation(hyper)
        held: State = {} if self.clock is None else {self.clock: _clock(hyper["age"])}
        held |= {key: torch.as_tensor(situation[key]) for key in self.scalars}
        for key, accumulator in self.accumulators.items():
            its = accumulator(situation, shape)
            if its is not None:
                stored = accumulators[MOMENTUM if key == self.momentum and not self.from_parameters else key]
                held[key] = unpacked(stored, its).clone()
        return held


def _clock(age: float) -> Tensor:
    return torch.tensor(age, dtype=torch.get_default_dtype())


def packed(value: Tensor, size: int) -> Tensor:
    """An accumulator as the first entries of a vector of `size`, zeros behind them."""
    flat = value.reshape(-1)
    return flat if len(flat) == size else torch.cat([flat, flat.new_zeros(size - len(flat))])


def unpacked(vector: Tensor, shape: Shape) -> Tensor:
    """The inverse: a view."""
    return vector[: torch.Size(shape).numel()].view(shape)


def describe_options(options: dict[str, list[Any]]) -> str:
    """ ", lr 0.01, weight_decay 0 to 0.5": each option of an optimizer, and where it moved the range; flags only if set."""
    parts = []
    for name, (low, high) in options.items():
        if low != high:
            parts.append(f"{name} {_short(low)} to {_short(high)}")
        elif low is not False:
            parts.append(name if low is True else f"{name} {_short(low)}")
    return "".join(f", {part}" for part in parts)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)
