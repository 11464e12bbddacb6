"""Update rules against torch's own steps, in both precisions."""

import numpy as np
import pytest
import torch
from cases import OPTIMIZERS
from torch import nn

from attrib.layout import Layout
from attrib.optim import RULES, Replay, decay_rates, pullback, read_hyper, read_state, rule_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replayed_updates_are_torchs(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(n, dtype=dtype)) for n in (50, 1, 30)]
    optimizer = OPTIMIZERS[name](parameters)
    rule = rule_of(optimizer)
    mine = [p for group in optimizer.param_groups for p in group["params"]]
    layout = Layout(tuple("abc"), tuple((p.numel(),) for p in mine))
    replay = Replay(rule, layout, read_state(rule, optimizer, mine))
    eps = torch.finfo(dtype).eps
    for _ in range(6):
        for p in mine:
            p.grad = torch.randn_like(p)
        theta = layout.flatten(mine)
        gradient = layout.flatten(p.grad for p in mine)
        hyper = read_hyper(rule, optimizer)
        optimizer.step()
        _, delta = replay.step(hyper, gradient, theta)
        after = layout.flatten(mine)
        # the parameters are rounded to eps |theta|; the update itself passes through some ten roundings
        allowed = eps * after.abs() + 16 * eps * delta.abs() + eps * theta.abs()
        assert ((after - theta - delta).abs() <= allowed).all()


@pytest.mark.parametrize("fused", [False, True])
def test_decay_in_float32_is_frozen_as_torch_rounds_it(fused: bool) -> None:
    """torch multiplies by float32(1 - lr * decay) = 0.99000001, the fused kernel subtracts float32(0.01): a bias of 1e-6 of
    the decay, the same at every step, unless it is followed."""
    p = nn.Parameter(torch.ones(64))
    optimizer = torch.optim.AdamW([p], lr=0.01, weight_decay=1.0, fused=fused)
    rule = RULES[torch.optim.AdamW]
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
    rule = rule_of(optimizer)
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


NOT_STORED = {"params", "capturable", "differentiable"}  # how torch computes a step, but not what


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_numbers_of_a_step_give_its_options_and_its_state_again(name: str) -> None:
    parameters = [nn.Parameter(torch.randn(3)) for _ in range(4)]
    optimizer = OPTIMIZERS[name](parameters)
    rule = rule_of(optimizer)
    for _ in range(3):
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = optimizer.state.get(p, {})
                hyper = dict(zip(rule.hyper, rule.read(group, state), strict=True))
                options = rule.options(hyper)
                assert set(group) - NOT_STORED == set(options)
                assert {**group, **options} == group
                assert all(isinstance(options[k], bool) == isinstance(group[k], bool) for k in options)
                resumed = rule.resume(hyper, {k: state.get(k, torch.zeros(3)) for k in rule.state})
                torch.testing.assert_close(resumed, dict(state), rtol=0, atol=0)
        for p in parameters:
            p.grad = torch.randn(3)
        optimizer.step()


def test_the_numbers_of_a_step_have_the_names_and_the_order_of_runs_already_recorded() -> None:
    assert {rule.name: " ".join(rule.hyper) for rule in RULES.values()} == {
        "SGD": "lr momentum dampening weight_decay nesterov maximize foreach fused age",
        "Adam": "lr beta1 beta2 eps weight_decay amsgrad maximize decoupled foreach fused age",
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_pulled_back_piece_by_piece_and_nothing_given_is_changed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """<Gbar, Delta> + <carry, z'> = <U, gradient> + <carry', z> + decay, over pieces of a few queries and entries."""
    monkeypatch.setattr("attrib.optim.replay.CACHED", 8)
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (20, 1, 5)]
    optimizer = OPTIMIZERS[name](parameters)
    mine = [p for group in optimizer.param_groups for p in group["params"]]
    rule, layout = rule_of(optimizer), Layout(tuple("abc"), tuple((p.numel(),) for p in mine))
    replay = Replay(rule, layout, read_state(rule, optimizer, mine))
    for _ in range(3):  # the last with a momentum that is not zero
        for p in mine:
            p.grad = torch.randn_like(p)
        theta, gradient = layout.flatten(mine), layout.flatten(p.grad for p in mine)
        before = replay.state[rule.momentum]
        parts, delta = replay.step(read_hyper(rule, optimizer), gradient, theta)
        optimizer.step()
    carry, path = torch.randn(2, 5, layout.size, dtype=torch.float64)
    given = carry.clone(), path.clone()
    sensitivity, earlier = pullback(parts, carry, path)
    assert torch.equal(carry, given[0])
    assert torch.equal(path, given[1])
    coupled, decoupled = torch.from_numpy(decay_rates(parts, 3).repeat(np.diff(layout.bounds), axis=1))
    decay = sensitivity @ (coupled * theta) - path @ (decoupled * theta)
    moved = path @ delta + carry @ replay.state[rule.momentum]
    # sums of some hundred float64 terms of size one
    torch.testing.assert_close(sensitivity @ gradient + earlier @ before + decay, moved, rtol=0, atol=1e-13)
