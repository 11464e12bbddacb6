"""Steps of optimizers pulled back at two ends and at one, against torch's own steps."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from attrib.kernels import clipping
from cases import OPTIMIZERS
from torch import Tensor, nn

from attrib.errors import ReplayError
from attrib.layout import Layout
from attrib.optim import (
    Carried,
    End,
    Rules,
    check_adjoints,
    pulled_back,
    pushed_forward,
    read_hyper,
    read_state,
    rules_of,
    together,
)

SHAPES = ((5, 4), (3,), (), (2, 3, 2))


def rules(name: str) -> Rules:
    return rules_of(together(OPTIMIZERS[name]([nn.Parameter(torch.zeros(shape)) for shape in SHAPES])))


DERIVED = [name for name in OPTIMIZERS if all(rule.adjoint for rule in rules(name))]
OTHERS = [name for name in OPTIMIZERS if name not in DERIVED]


class Stepped(NamedTuple):
    """hyper, end: before a step. theta, state: after it, as torch makes it."""

    rules: Rules
    layout: Layout
    hyper: np.ndarray
    end: End
    theta: Tensor
    state: dict[str, Tensor]


def stepped(name: str, seed: int, steps: int = 3, still: int | None = None, **options: float) -> Stepped:
    """A step after some others, with random gradients. still: the number of a tensor that it leaves alone."""
    torch.manual_seed(seed)
    optimizer = together(OPTIMIZERS[name]([nn.Parameter(torch.randn(shape).double()) for shape in SHAPES]))
    mine = [p for group in optimizer.param_groups for p in group["params"]]
    layout = Layout(tuple("abcd"), tuple(tuple(p.shape) for p in mine))
    rules = rules_of(optimizer)
    for step in range(steps + 1):
        for p in mine:
            p.grad = torch.randn_like(p)
        gradient = layout.flatten([p.grad for p in mine if p.grad is not None])
        if step == steps:
            if still is not None:
                mine[still].grad = None
            for group in optimizer.param_groups:
                group.update({key: value for key, value in options.items() if key in group})
            theta, state = layout.flatten([p.detach() for p in mine]), read_state(rules, optimizer, mine)
            hyper, end = (
                read_hyper(rules, optimizer),
                End({k: t.clone() for k, t in state.items()}, gradient, theta.clone()),
            )
        optimizer.step()
    after = {k: t.clone() for k, t in read_state(rules, optimizer, mine).items()}
    return Stepped(rules, layout, hyper, end, layout.flatten([p.detach() for p in mine]), after)


def sensitivities(rules: Rules, size: int) -> Carried:
    torch.manual_seed(9)
    return Carried(torch.randn(2, size).double(), {name: torch.randn(2, size).double() for name in rules.state})


def along(carried: Carried, theta: Tensor, state: dict[str, Tensor]) -> Tensor:
    """<sensitivities, changes>, (Q,)."""
    return carried.theta @ theta + sum(carried.state[name] @ change for name, change in state.items())


CHANGES = {"alike": {}, "other options": {"lr": 0.03, "weight_decay": 0.2, "eps": 1e-3}, "one still": {"still": 1}}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", DERIVED)
def test_what_separates_two_steps_is_what_separates_what_they_were_made_of(name: str, change: str) -> None:
    a, b = stepped(name, 1), stepped(name, 2, **CHANGES[change])
    after = sensitivities(a.rules, a.layout.size)
    want = along(after, b.theta - a.theta, {k: b.state[k] - a.state[k] for k in a.state})
    back = pulled_back(a.rules, a.layout, (a.hyper, b.hyper), (a.end, b.end), after)
    found = along(back.before, b.end.theta - a.end.theta, {k: b.end.state[k] - a.end.state[k] for k in a.state})
    found = found + back.gradient @ (b.end.gradient - a.end.gradient)
    found = found if back.options is None else found + back.options.sum(1)
    # sums of some 50 products of numbers of order one, and quotients by denominators that may be 100 times less
    torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-11)
    assert (back.options is None) == (change == "alike")


@pytest.mark.parametrize("name", DERIVED)
def test_exchanged_ends_are_pulled_back_alike(name: str) -> None:
    a, b = stepped(name, 1), stepped(name, 2, lr=0.03)
    after = sensitivities(a.rules, a.layout.size)
    one = pulled_back(a.rules, a.layout, (a.hyper, b.hyper), (a.end, b.end), after)
    other = pulled_back(a.rules, a.layout, (b.hyper, a.hyper), (b.end, a.end), after)
    torch.testing.assert_close(one.gradient, other.gradient, rtol=1e-13, atol=1e-14)
    assert one.options is not None
    assert other.options is not None
    torch.testing.assert_close(one.options, -other.options, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
@pytest.mark.parametrize("name", DERIVED)
def test_where_the_ends_meet_it_is_the_derivative_of_the_step(name: str, first: bool) -> None:
    """Against a tangent by forward mode through the rule, which is held against torch's step in test_optim."""
    a = stepped(name, 1, steps=0 if first else 3)
    after, size = sensitivities(a.rules, a.layout.size), a.layout.size
    torch.manual_seed(5)
    state = {name: torch.zeros(size).double() if first else torch.randn(size).double() for name in a.rules.state}
    tangent = End(state, torch.randn(size).double(), torch.randn(size).double())
    theta, state = pushed_forward(a.rules, a.layout, a.hyper, a.end, tangent)
    back = pulled_back(a.rules, a.layout, (a.hyper, a.hyper), (a.end, a.end), after)
    found = along(back.before, tangent.theta, tangent.state) + back.gradient @ tangent.gradient
    torch.testing.assert_close(found, along(after, theta, state), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", OTHERS)
def test_an_optimizer_without_an_adjoint_is_refused_by_name(name: str) -> None:
    with pytest.raises(ReplayError, match=r"was not derived: got [A-Z]"):
        check_adjoints(rules(name))


@pytest.mark.parametrize("norms", [(3.0, 4.0), (3.0, 0.5), (0.5, 0.2), (3.0, 3.0)])
def test_clipping_is_pulled_back_exactly_and_by_its_derivative(norms: tuple[float, float]) -> None:
    torch.manual_seed(0)
    a, b = (n * r / r.norm() for n, r in zip(norms, torch.randn(2, 7).double(), strict=True))
    factors = tuple(min(1.0, 1.0 / (float(r.norm()) + 1e-6)) for r in (a, b))
    v = torch.randn(3, 7).double()
    back = clipping.pulled_back(v, (a, b), (factors[0], factors[1]))
    torch.testing.assert_close(back @ (b - a), v @ (factors[1] * b - factors[0] * a), rtol=1e-12, atol=1e-13)
    t = torch.randn(7).double()

    def clipped(r: Tensor) -> Tensor:
        p = nn.Parameter(torch.zeros(7).double())
        p.grad = r.clone()
        nn.utils.clip_grad_norm_([p], 1.0)
        return p.grad

    pushed = clipping.pushed_forward(t, a, factors[0])
    e = 1e-6
    # central differences: error of order e^2, rounding eps / e
    torch.testing.assert_close(pushed, (clipped(a + e * t) - clipped(a - e * t)) / (2 * e), rtol=1e-8, atol=1e-8)
    equal = clipping.pulled_back(v, (a, a), (factors[0], factors[0]))
    torch.testing.assert_close(equal @ t, v @ pushed, rtol=1e-12, atol=1e-13)
