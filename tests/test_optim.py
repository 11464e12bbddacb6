"""Update rules against torch's own steps, in both precisions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    ADADELTA,
    ADAFACTOR,
    ADAGRAD,
    ADAM,
    ADAMAX,
    ADAMW,
    ASGD,
    MUON,
    NADAM,
    OPTIMIZERS,
    RADAM,
    RMSPROP,
    RPROP,
    SGD,
    covering,
    crossed,
)
from torch import nn

from attrib.errors import UnsupportedOptimizerError
from attrib.layout import Layout
from attrib.optim import (
    MOMENTUM,
    Replay,
    Rerun,
    check_group_options,
    decay_rates,
    entrywise_decay,
    pullback,
    read_hyper,
    read_state,
    rules_of,
    together,
    torch_states,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replayed_updates_are_torchs_and_run_again_they_are_its_bits(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((5, 10), (), (10, 3), (2, 4, 4))]
    optimizer = together(OPTIMIZERS[name](parameters))
    rule = rules_of(optimizer)
    mine = [p for group in optimizer.param_groups for p in group["params"]]
    layout = Layout(tuple("abcd"), tuple(tuple(p.shape) for p in mine))
    state = read_state(rule, optimizer, mine)
    replay, rerun, eps = Replay(rule, layout, state), None, torch.finfo(dtype).eps
    for _ in range(6):
        for p in mine:
            p.grad = torch.randn_like(p)
        theta = layout.flatten(mine)
        gradient = layout.flatten(p.grad for p in mine)
        hyper = read_hyper(rule, optimizer)
        rerun = rerun or Rerun(rule, layout, theta, state, hyper)
        optimizer.step()
        _, delta = replay.step(hyper, gradient, theta)
        after = layout.flatten(mine)
        # the parameters are rounded to eps |theta|; the update itself passes through some ten roundings
        allowed = eps * after.abs() + 16 * eps * delta.abs() + eps * theta.abs()
        assert ((after - theta - delta).abs() <= allowed).all()
        assert torch.equal(rerun.step(hyper, gradient), after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "sgd fused"])  # torch's own is wrong there
def test_updates_of_few_bits_are_torchs_bits_when_run_again(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((5, 10), (), (10, 3), (2, 4, 4))]
    optimizer = together(OPTIMIZERS[name](parameters))
    rule = rules_of(optimizer)
    mine = [p for group in optimizer.param_groups for p in group["params"]]
    layout = Layout(tuple("abcd"), tuple(tuple(p.shape) for p in mine))
    rerun = Rerun(rule, layout, layout.flatten(mine), read_state(rule, optimizer, mine), read_hyper(rule, optimizer))
    for _ in range(6):
        for p in mine:
            p.grad = torch.randn_like(p)
        gradient, hyper = layout.flatten(p.grad for p in mine), read_hyper(rule, optimizer)
        optimizer.step()
        # an eps that float16 rounds to zero may leave no number
        np.testing.assert_array_equal(rerun.step(hyper, gradient).float(), layout.flatten(mine).float())


@pytest.mark.parametrize("fused", [False, True])
def test_decay_in_float32_is_frozen_as_torch_rounds_it(fused: bool) -> None:
    """torch multiplies by float32(1 - lr * decay) = 0.99000001, the fused kernel subtracts float32(0.01): a bias of 1e-6 of
    the decay, the same at every step, unless it is followed."""
    p = nn.Parameter(torch.ones(64))
    optimizer = torch.optim.AdamW([p], lr=0.01, weight_decay=1.0, fused=fused)
    rule = rules_of(optimizer)
    layout = Layout(("p",), ((64,),))
    replay = Replay(rule, layout, read_state(rule, optimizer, [p]))
    p.grad = torch.zeros_like(p)
    hyper = read_hyper(rule, optimizer)
    theta = p.detach().clone()
    optimizer.step()
    _, delta = replay.step(hyper, p.grad, theta)
    real = p.detach().double() - theta.double()
    # one rounding of the product near 1: half of 2^-24; without following torch's the mean gap is 9.5e-9 unfused
    gap = float((delta.double() - real).abs().max())
    assert gap <= (1e-9 if not fused else 2**-24)


def test_a_skipped_parameter_keeps_its_state_and_its_age() -> None:
    p, q = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = torch.optim.AdamW([p, q], lr=0.1)
    rule = rules_of(optimizer)
    layout = Layout(("p", "q"), ((2,), (2,)))
    replay = Replay(rule, layout, read_state(rule, optimizer, [p, q]))
    for step in range(4):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q) if step % 2 else None
        theta = layout.flatten([p, q])
        hyper = read_hyper(rule, optimizer)
        gradient = layout.flatten([p.grad, q.grad if q.grad is not None else torch.zeros_like(q)])
        optimizer.step()
        _, delta = replay.step(hyper, gradient, theta)
        np.testing.assert_allclose(layout.flatten([p, q]) - theta, delta, rtol=1e-12, atol=1e-15)
    for key, value in read_state(rule, optimizer, [p, q]).items():
        if key != "max_exp_avg_sq":
            np.testing.assert_allclose(replay.state[key], value, rtol=1e-12)


# options that torch computes scalars with, made by a function of their values
TYPED: dict[str, Callable[[Any], tuple[type, dict[str, Any]]]] = {
    "sgd": lambda t: (SGD, {"lr": t(0.0123)}),
    "sgd momentum dampening decay": lambda t: (
        SGD,
        {"lr": t(0.0123), "momentum": t(0.9), "dampening": t(0.2), "weight_decay": t(0.3)},
    ),
    "sgd nesterov maximize": lambda t: (
        SGD,
        {"lr": t(0.0123), "momentum": t(0.9), "nesterov": True, "maximize": True, "weight_decay": 0.3},
    ),
    "adam": lambda t: (ADAM, {"lr": t(0.0123)}),
    "adam betas decay": lambda t: (ADAM, {"lr": 0.0123, "betas": (t(0.1), t(0.8)), "weight_decay": t(0.3)}),
    "adam amsgrad maximize": lambda t: (
        ADAM,
        {"lr": t(0.0123), "betas": (t(0.9), t(0.98)), "amsgrad": True, "maximize": True, "weight_decay": 0.3},
    ),
    "adamw": lambda t: (ADAMW, {"lr": t(0.0123), "weight_decay": 0.3}),
    "adamw betas amsgrad": lambda t: (ADAMW, {"lr": t(0.0123), "betas": (t(0.1), t(0.8)), "amsgrad": True}),
    "adamw decay maximize": lambda t: (ADAMW, {"lr": 0.0123, "weight_decay": t(0.3), "maximize": True}),
    "rmsprop": lambda t: (RMSPROP, {"lr": t(0.0123), "momentum": 0.9, "centered": True, "weight_decay": 0.3}),
    "adagrad": lambda t: (ADAGRAD, {"lr": t(0.0123), "lr_decay": 0.1}),
    "adadelta": lambda t: (ADADELTA, {"lr": t(0.123), "weight_decay": 0.3}),
    "adamax": lambda t: (ADAMAX, {"lr": t(0.0123)}),
    "nadam": lambda t: (NADAM, {"lr": t(0.0123), "weight_decay": 0.3, "decoupled_weight_decay": True}),
    "radam": lambda t: (RADAM, {"lr": t(0.0123), "weight_decay": 0.3, "decoupled_weight_decay": True}),
    "asgd": lambda t: (ASGD, {"lr": t(0.0123), "lambd": 0.1}),
    "rprop": lambda t: (RPROP, {"lr": t(0.0123)}),
    "adafactor": lambda t: (ADAFACTOR, {"lr": t(0.0123), "weight_decay": 0.3}),
    "muon": lambda t: (MUON, {"lr": t(0.0123), "weight_decay": 0.3}),
}
IMPLEMENTATIONS = ("", "foreach", "fused")
TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


WAYS = (TYPED, IMPLEMENTATIONS, TYPES, (torch.float64, torch.float32))


@pytest.mark.parametrize(("name", "how", "typed", "dtype"), crossed(*WAYS, fast=covering(*WAYS, whole=2)))
def test_options_that_are_tensors_are_replayed_and_run_again(
    name: str, how: str, typed: torch.dtype, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    kind, options = TYPED[name](lambda value: torch.tensor(value, dtype=typed))
    shapes = ((7, 7), (3, 5), (6, 5)) if kind is MUON else ((50,), (), (5, 6))
    parameters = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    if how in ("foreach", "fused") and how not in kind([parameters[0]], lr=0.1).defaults:
        return  # torch has no such implementation
    if how == "foreach" and "betas" in kind([parameters[0]], lr=0.1).defaults:  # where torch takes numbers alone
        options |= {"lr": float(options["lr"]), "betas": tuple(map(float, options.get("betas", (0.9, 0.99))))}
    optimizer = kind(parameters, **options, **({how: True} if how else {}))
    rule = rules_of(optimizer)
    layout = Layout(tuple("abc"), tuple(tuple(p.shape) for p in parameters))
    state = read_state(rule, optimizer, parameters)
    replay, rerun, eps = Replay(rule, layout, state), None, torch.finfo(dtype).eps
    for _ in range(6):
        for p in parameters:
            p.grad = torch.randn_like(p)
        theta, gradient = layout.flatten(parameters), layout.flatten(p.grad for p in parameters)
        hyper = read_hyper(rule, optimizer)
        rerun = rerun or Rerun(rule, layout, theta, state, hyper)
        optimizer.step()
        _, delta = replay.step(hyper, gradient, theta)
        after = layout.flatten(parameters)
        # some ten roundings of the update, and that of the parameters: a scalar in the wrong type is off by 6e-8 or more
        allowed = 16 * eps * float(delta.norm()) + 2 * eps * float(theta.norm())
        assert float((after - theta - delta).norm()) <= allowed
        assert torch.equal(rerun.step(hyper, gradient), after)


REFUSED: dict[str, tuple[type, dict[str, Any], str]] = {
    "no single number": (
        SGD,
        {"lr": torch.tensor([0.1, 0.2])},
        r"float32 and shape \(2,\).*tensor of one element.*'lr'",
    ),
    "a whole number": (SGD, {"lr": torch.tensor(1)}, r"torch.int64.*'lr' of param group 0, step 3\. Pass a number"),
    "foreach": (ADAMW, {"lr": torch.tensor(0.1), "foreach": True}, r"beside foreach=True.*'lr'.*foreach=None"),
    "foreach betas": (ADAM, {"betas": (torch.tensor(0.9), torch.tensor(0.9)), "foreach": True}, "'betas'"),
    "numpy": (ADAMW, {"lr": np.float32(0.1)}, r"got np.float32\(0.1\).*for float64 parameters.*float\(lr\)"),
    "a device": (ADAMW, {"lr": torch.tensor(0.1, device="meta")}, "on meta.*on the CPU, for float64 parameters"),
    "capturable": (ADAMW, {"capturable": True}, "got True, expected False for float64 parameters, at 'capturable'"),
    "capturable on the CPU": (NADAM, {"capturable": True}, "False for parameters on the CPU.*Pass capturable=False"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_cannot_be_replayed_are_refused_by_name(case: str) -> None:
    kind, options, match = REFUSED[case]
    optimizer = kind([nn.Parameter(torch.ones(2, dtype=torch.float64))], lr=0.1)
    check_group_options(optimizer)
    optimizer.param_groups[0].update(options)  # as a scheduler does: torch's constructor refuses some itself
    with pytest.raises(UnsupportedOptimizerError, match=match):
        check_group_options(optimizer, ", step 3")


@pytest.mark.parametrize("case", ["numpy", "a device", "capturable"])
def test_scalars_that_are_rounded_elsewhere_are_taken_where_that_is_not_seen(case: str) -> None:
    kind, options, _ = REFUSED[case]
    single = kind([nn.Parameter(torch.ones(2))], lr=0.1)
    fused = kind([nn.Parameter(torch.ones(2, dtype=torch.float64))], lr=0.1, fused=True)
    for optimizer in (single, fused):
        optimizer.param_groups[0].update(options)
        check_group_options(optimizer)


NOT_STORED = {"params", "capturable", "differentiable"}  # how torch computes a step, but not what


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_numbers_of_a_step_give_its_options_and_its_state_again(name: str) -> None:
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((3, 2), (3,), (2, 3), (3, 2, 2))]
    optimizer = together(OPTIMIZERS[name](parameters))
    rules = rules_of(optimizer)
    mine = [p for group in optimizer.param_groups for p in group["params"]]
    groups = [group for group in optimizer.param_groups for _ in group["params"]]
    layout = Layout(tuple("abcd"), tuple(tuple(p.shape) for p in mine))
    for _ in range(3):
        hyper, state = read_hyper(rules, optimizer), read_state(rules, optimizer, mine)
        for rule, row, group in zip(rules, rules.named(hyper), groups, strict=True):
            options = rule.options(row)
            assert set(group) - NOT_STORED == set(options)
            assert {**group, **options} == group
            assert all(isinstance(options[k], bool) == isinstance(group[k], bool) for k in options)
        for p, resumed in zip(mine, torch_states(rules, layout, state, hyper), strict=True):
            torch.testing.assert_close(resumed, dict(optimizer.state.get(p, {})), rtol=0, atol=0)
        for p in mine:
            p.grad = torch.randn_like(p)
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_pulled_back_piece_by_piece_and_nothing_given_is_changed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """<Gbar, Delta> + <carry, z'> = <U, gradient> + <carry', z> + decay, over pieces of a few queries and entries."""
    monkeypatch.setattr("attrib.optim.replay.CACHED", 8)
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((4, 5), (), (7, 3), (3,))]
    optimizer = together(OPTIMIZERS[name](parameters))
    mine = [p for group in optimizer.param_groups for p in group["params"]]
    rule, layout = rules_of(optimizer), Layout(tuple("abcd"), tuple(tuple(p.shape) for p in mine))
    replay = Replay(rule, layout, read_state(rule, optimizer, mine))
    for _ in range(3):  # the last with a momentum that is not zero
        for p in mine:
            p.grad = torch.randn_like(p)
        theta, gradient = layout.flatten(mine), layout.flatten(p.grad for p in mine)
        before = replay.state[MOMENTUM]
        parts, delta = replay.step(read_hyper(rule, optimizer), gradient, theta)
        optimizer.step()
    carry, path = torch.randn(2, 5, layout.size, dtype=torch.float64)
    given = carry.clone(), path.clone()
    sensitivity, earlier = pullback(parts, carry, path)
    assert torch.equal(carry, given[0])
    assert torch.equal(path, given[1])
    for mine, want in zip(pullback(parts, carry, given[1], over=True), (sensitivity, earlier), strict=True):
        assert torch.equal(mine, want)
    assert torch.equal(given[1], sensitivity)  # in its place
    coupled, decoupled = torch.from_numpy(decay_rates(parts, 4).repeat(np.diff(layout.bounds), axis=1))
    decay = sensitivity @ (coupled * theta) - path @ (decoupled * theta)
    entrywise = entrywise_decay(parts, layout, sensitivity, theta)
    decay = decay if entrywise is None else decay + entrywise.sum(1)
    moved = path @ delta + carry @ replay.state[MOMENTUM]
    # sums of some hundred float64 terms of size one
    torch.testing.assert_close(sensitivity @ gradient + earlier @ before + decay, moved, rtol=0, atol=1e-13)
