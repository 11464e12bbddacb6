"""Several optimizers at once, parameters that move later, and optimizers that have no rule."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import ADAGRAD, ADAMW, MODELS, OPTIMIZERS, SGD, SORTS, few_first
from torch import nn
from training import flat, train
from zarr.storage import MemoryStore

import attrib
from attrib import errors
from attrib.optim import RULES, Together, members, place_of, together


def two() -> tuple[list[nn.Parameter], list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3)) for _ in range(3)]
    return parameters, [SGD(parameters[:1], lr=0.1, momentum=0.9), ADAGRAD(parameters[1:], lr=0.2)]


def test_several_optimizers_have_the_groups_and_states_of_each() -> None:
    parameters, optimizers = two()
    both = together(optimizers)
    assert isinstance(both, Together)
    assert members(both) == tuple(optimizers)
    assert [group["params"] for group in both.param_groups] == [parameters[:1], parameters[1:]]
    assert both.param_groups[1] is optimizers[1].param_groups[0]
    assert both.state.get(parameters[0]) is None
    assert not optimizers[0].state  # asking made none
    for p in parameters:
        p.grad = torch.ones_like(p)
    both.step()
    assert both.state[parameters[0]] is optimizers[0].state[parameters[0]]
    assert set(both.state) == set(parameters)
    assert len(both.state) == 3
    both.zero_grad()
    assert all(p.grad is None for p in parameters)
    assert together(optimizers[:1]) is together(optimizers[0]) is optimizers[0]


def test_the_state_of_several_optimizers_is_the_list_of_theirs() -> None:
    parameters, optimizers = two()
    for p in parameters:
        p.grad = torch.ones_like(p)
    both = together(optimizers)
    both.step()
    saved = both.state_dict()
    assert [set(one) for one in saved] == [{"state", "param_groups"}] * 2
    others, again = two()
    together(again).load_state_dict(saved)
    for p, q in zip(parameters, others, strict=True):
        torch.testing.assert_close(dict(together(again).state[q]), dict(both.state[p]), rtol=0, atol=0)
    with pytest.raises(ValueError, match="got dict, expected a list of 2 state dicts"):
        both.load_state_dict(saved[0])
    with pytest.raises(errors.AttribError, match="Register it at that optimizer"):
        both.register_state_dict_pre_hook(lambda *_: None)
    with pytest.raises(errors.AttribError, match="Add it to the optimizer that is to move it"):
        both.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_several_optimizers_step_in_their_order_and_evaluate_a_closure_once() -> None:
    parameters, optimizers = two()
    heard: list[Any] = []
    for number, optimizer in enumerate(optimizers):
        optimizer.register_step_post_hook(lambda *_, number=number: heard.append(number))

    def closure() -> float:
        heard.append("closure")
        for p in parameters:
            p.grad = torch.ones_like(p)
        return 3.0

    assert together(optimizers).step(closure) == 3.0
    assert heard == ["closure", 0, 1]


WRONG: dict[str, tuple[Callable[[list[Any], list[Any]], list[Any]], str]] = {
    "none": (lambda p, o: [], "got an empty list, expected one or several"),
    "a shared parameter": (
        lambda p, o: [o[0], ADAMW(p)],
        r"of shape \(3,\) in number 0 \(SGD\) and number 1 \(AdamW\).*Take it out of the other",
    ),
    "the same one twice": (lambda p, o: [o[0], o[0]], "two optimizers move the same parameter"),
    "something else": (lambda p, o: [o[0], p[1]], "got Parameter, expected one of torch's, at number 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_optimizers_that_cannot_be_together_are_refused(case: str, tmp_path: Path) -> None:
    build, match = WRONG[case]
    with pytest.raises(ValueError, match=match):
        attrib.record(build(*two()), nn.Linear(1, 1), MODELS["mlp"].loss, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_of_several_optimizers_says_which_moves_what(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["muon + adamw"], steps=5)
    run = trained.run
    matrices = [name for name, p in trained.model.named_parameters() if p.dim() == 2]
    assert [name for name, rule in zip(run.groups, run.rules, strict=True) if rule.name == "Muon"] == matrices
    assert run.header["optimizer"] == "Muon + AdamW"
    assert "Muon + AdamW, Muon lr 0.02" in str(run)
    assert run.options["AdamW lr"] == [0.01, 0.01]
    assert trained.attribute().dataset.attrs["optimizer"] == "Muon + AdamW"
    hyper, widths = run.reader.read("hyper", 3), [len(rule.hyper) for rule in run.rules]
    assert hyper.shape == (len(run.groups), 1 + max(widths))
    for row, width in zip(hyper, widths, strict=True):
        assert row[-1] == 1
        assert not row[width:-1].any()
    assert not run.unmodelled


def test_schedulers_stay_with_their_optimizers_and_every_state_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = MODELS["mlp"]
    model = case.build().double()
    x, y = case.data(12)
    optimizers = OPTIMIZERS["nadam + adagrad"](list(model.parameters()))
    assert isinstance(optimizers, list)
    schedules = [
        torch.optim.lr_scheduler.ExponentialLR(o, gamma) for o, gamma in zip(optimizers, (0.9, 0.5), strict=True)
    ]
    with attrib.record(optimizers, model, case.loss, tmp_path / "run", block=3) as recorder:
        for _ in range(7):
            recorder.zero_grad()
            case.loss(model, x, y).mean().backward()
            recorder.step(torch.arange(12), x, y)
            for schedule in schedules:
                schedule.step()
    run = attrib.open_run(tmp_path / "run")
    assert run.options["Adagrad lr"] == pytest.approx([0.1 * 0.5**6, 0.1])
    own = dict(model.named_parameters())
    again = run.optimizer(model, 7)
    assert isinstance(again, Together)
    real = together(optimizers)
    for name in run.groups:
        torch.testing.assert_close(dict(again.state[own[name]]), dict(real.state[own[name]]), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "dtype"), few_first(OPTIMIZERS, [torch.float64], few=SORTS))
def test_parameters_that_begin_to_move_later_are_kept_still_by_requires_grad(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """As the recorder advises, whichever the optimizer: they and their state stay, their age begins with their step."""
    torch.manual_seed(0)
    case = MODELS["mlp"]
    model = case.build().to(dtype)
    x, y = case.data(12)
    still = [model.hidden.weight, model.output.bias]
    for p in still:
        p.requires_grad_(False)
    before = [p.clone() for p in still]
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    if (
        name == "sgd fused"
    ):  # torch's kernel takes no group in which some have begun to move: they have one of their own
        rest = [p for p in model.parameters() if all(p is not q for q in still)]
        optimizer = SGD([{"params": rest}, {"params": still}], lr=0.1, momentum=0.9, fused=True)
    recorder = attrib.record(optimizer, model, case.loss, tmp_path / "run", block=4)
    states = [flat(model)]
    for step in range(7):
        recorder.zero_grad()
        case.loss(model, x, y).mean().backward()
        recorder.step(torch.arange(12), x, y)
        states.append(flat(model))
        if step == 2:
            assert all(map(torch.equal, before, still))
            for p in still:
                p.requires_grad_(True)
    recorder.close()
    assert not any(map(torch.equal, before, still))
    run = attrib.open_run(tmp_path / "run")
    attrib.attribute(run, model, attrib.measure.log_prob(x[:2], y[:2]), loss=case.loss, progress=False).check(1e-10)
    assert attrib.verify(run, progress=False).failure is None
    again = run.optimizer({n: p.clone() for n, p in run.parameters(5).items()}, 5)
    for p in (p for group in again.param_groups for p in group["params"]):
        p.grad = torch.zeros_like(p)
    again.step()  # from a state that is whole


# optimizers without a rule


class Own(torch.optim.Optimizer):
    """A momentum of which attrib knows nothing, and a decay."""

    def __init__(self, parameters: Any, lr: float, momentum: float = 0.0, decay: float = 0.0) -> None:
        super().__init__(parameters, dict(lr=lr, momentum=momentum, decay=decay))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                p.mul_(1 - group["decay"]).add_(buffer, alpha=-group["lr"])


class Subclass(torch.optim.AdamW):
    pass


@pytest.mark.parametrize("kind", [Own, Subclass])
def test_an_optimizer_without_a_rule_is_refused_and_told_what_there_is(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(
        errors.UnsupportedOptimizerError, match=rf"got .*{kind.__name__}, expected exactly.*rule=\"frozen\""
    ):
        train(tmp_path / "run", lambda p: kind(p, lr=0.1))
    assert not (tmp_path / "run").exists()
    assert train(tmp_path / "run", lambda p: kind(p, lr=0.1), rule="frozen").run.unmodelled


NEVER = {
    "lbfgs": (lambda p: torch.optim.LBFGS(p), "evaluates the loss several times a step.*such as torch.optim.SGD"),
    "sparse": (lambda p: torch.optim.SparseAdam(p), "sparse gradients alone.*sparse=False and use torch.optim.Adam"),
}


@pytest.mark.parametrize("rule", [None, "frozen"])
@pytest.mark.parametrize("case", NEVER)
def test_optimizers_that_cannot_be_recorded_are_refused_with_their_reason(case: str, rule: str | None) -> None:
    build, match = NEVER[case]
    with pytest.raises(errors.UnsupportedOptimizerError, match=match):
        train(MemoryStore(), build, rule=rule)


def test_what_a_frozen_optimizer_did_by_its_gradient_is_complete(tmp_path: Path) -> None:
    """Plain gradient descent by another name: the contributions are those of its rule."""
    frozen = train(MemoryStore(), lambda p: Own(p, lr=0.1), rule="frozen")
    known = train(MemoryStore(), lambda p: SGD(p, lr=0.1))
    assert all(map(np.array_equal, frozen.thetas, known.thetas))
    got, expected = (t.attribute().by("step", "example", "group").values for t in (frozen, known))
    # an entry of the gradient is known to sqrt(eps) at worst, and the sum of its shares to eps
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-8 * np.abs(expected).max())


def test_what_the_gradient_of_a_step_does_not_explain_is_measured(tmp_path: Path) -> None:
    """Decay of parameters that have no gradient: embeddings that no example looked up."""
    trained = train(MemoryStore(), lambda p: Own(p, lr=0.1, decay=0.01), rule="frozen", batch=3, block=1, check_every=1)
    run = trained.run
    for step in range(run.steps):
        theta, after = run.vector(step), run.vector(step + 1)
        gradient = torch.from_numpy(run.reader.read("gradient", step))
        missed = (after - theta)[gradient == 0]
        assert len(missed)
        size = float(missed.norm() / (after - theta).norm())
        assert run.log("step_identity")[step] == pytest.approx(size, rel=1e-6)
    assert attrib.verify(run, progress=False).failure is None


REFUSED: dict[str, tuple[Callable[[Any, Path], Any], type[Exception], str]] = {
    "few states": (
        lambda t, path: train(path, lambda p: Own(p, lr=0.1), rule="frozen", states_every=4),
        ValueError,
        "states_every=",
    ),
    "resume": (
        lambda t, path: train(path, lambda p: Own(p, lr=0.1), rule="frozen", resume=True),
        ValueError,
        "resume=",
    ),
    "replay": (
        lambda t, path: attrib.replay(t.run, 1, model=t.model, loss=t.case.loss, store=path),
        errors.ReplayError,
        "whose state is not recorded, only what it did.*Train again with the loop itself",
    ),
    "optimizer": (lambda t, path: t.run.optimizer(t.model, 1), errors.ReplayError, "only what it did.*run.load"),
    "another word": (lambda t, path: train(path, lambda p: Own(p, lr=0.1), rule="thawed"), ValueError, "got 'thawed'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_frozen_optimizer_gives_up_is_refused(case: str, tmp_path: Path) -> None:
    ask, kind, match = REFUSED[case]
    trained = train(MemoryStore(), lambda p: Own(p, lr=0.1), rule="frozen")
    with pytest.raises(kind, match=match):
        ask(trained, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_rule_stands_for_its_exact_type() -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    assert place_of(SGD(parameters, lr=0.1)) == "torch.optim.SGD"
    assert place_of(Subclass(parameters)) is None
    imitation = type("SGD", (SGD,), {"__module__": "torch.optim"})
    assert place_of(imitation(parameters, lr=0.1)) is None
    assert {name.rpartition(".")[2] for name in RULES} >= set(torch.optim.__all__) & {"Muon", "Adafactor", "Rprop"}


@pytest.mark.skipif("lion" not in OPTIMIZERS, reason="lion-pytorch is not installed")
def test_an_option_of_lion_that_is_not_in_its_groups_is_refused_with_what_is_the_same(tmp_path: Path) -> None:
    from lion_pytorch import Lion

    def decoupled(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return Lion(parameters, lr=0.01, weight_decay=0.3, decoupled_weight_decay=True)

    with pytest.raises(errors.UnsupportedOptimizerError, match="Pass weight_decay=weight_decay / lr"):
        train(MemoryStore(), decoupled)
    advised = train(MemoryStore(), lambda p: Lion(p, lr=0.01, weight_decay=0.3 / 0.01), steps=1).thetas[-1]
    torch.manual_seed(0)
    model = MODELS["mlp"].build().double()
    x, y = MODELS["mlp"].data(12)
    optimizer, index = decoupled(list(model.parameters())), torch.randperm(12)[:5]
    MODELS["mlp"].loss(model, x[index], y[index]).mean().backward()
    optimizer.step()
    np.testing.assert_array_equal(flat(model), advised)


@pytest.mark.parametrize("name", ["rprop", "adagrad", "adafactor"])
def test_what_a_rule_leaves_out_is_the_sign_of_rounding_and_nothing_else_is_passed_over(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bias of the keys has no gradient but rounding; an update that is not the rule's is an error as ever."""
    trained = train(tmp_path / "run", OPTIMIZERS[name], "gpt", dtype=torch.float32, check_every=1, block=1)
    run = trained.run
    assert run.unmodelled
    keys = slice(8, 16)  # of q, k and v, eight each
    for block in run.blocks(0, run.steps):
        ((_, update),) = block.updates
        real = run.layout.unflatten(block.theta[1] - block.theta[0])
        left = {n: (r - u).abs() for (n, r), u in zip(real.items(), run.layout.unflatten(update).values(), strict=True)}
        within = left["block.qkv.bias"].clone()
        assert within[keys].max() > 0
        within[keys] = 0
        others = torch.cat([within, *(v.flatten() for n, v in left.items() if n != "block.qkv.bias")])
        # beyond float32 rounding of the parameters, of size 2 at most. An entry is below 3.4e-4 of the root mean square by
        # chance once in 3700 times (of a normal), so one in six steps of these 600
        assert int((others > 1e-6).sum()) <= 3
    kind = type(OPTIMIZERS[name](list(trained.model.parameters())))
    real_step = kind.step

    def otherwise(self: Any, closure: Any = None) -> None:
        before = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        real_step(self, closure)
        with torch.no_grad():
            for p, q in zip((p for group in self.param_groups for p in group["params"]), before, strict=True):
                p.add_(p - q, alpha=0.01)

    monkeypatch.setattr(kind, "step", otherwise)
    with pytest.raises(errors.StepIdentityError, match="the replayed update is not the optimizer's"):
        train(MemoryStore(), OPTIMIZERS[name], "gpt", dtype=torch.float32)
