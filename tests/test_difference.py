"""Differences of two runs: complete, antisymmetric, right by hand; what cannot be compared is refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import MODELS, OPTIMIZERS, Gpt, ModelCase, covering, language
from test_adjoint import DERIVED
from torch import Tensor, nn
from training import Trained, train

import attrib
from attrib.causes import VIA
from attrib.errors import BatchIdentityError, CompletenessError, ReplayError
from attrib.intervention import Drop, Freeze, Options, Penalty, Reweight, Transplant


class Dropping(Gpt):
    """With dropout."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.tokens(x) + self.positions[: x.shape[1]], 0.2, self.training)
        return F.linear(F.dropout(self.norm(self.block(h)), 0.2, self.training), self.tokens.weight)


class Normed(nn.Module):
    """With batch norm in train mode: losses of a batch depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(2, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.norm(self.first(x.to(self.last.weight)))))


CASES = {
    "mlp": MODELS["mlp"],
    "cnn": MODELS["cnn"],
    "gpt dropout": ModelCase(Dropping, MODELS["gpt"].data, language),
    "batch norm": ModelCase(Normed, MODELS["mlp"].data, MODELS["mlp"].loss),
}

Change = Callable[[Trained, attrib.Run], list[Any]]
HALVED = Options({"lr": lambda step, recorded: recorded / 2}, slice(1, 3))
CHANGES: dict[str, Change] = {
    "drop": lambda t, other: [Drop(t.run.examples[:1].tolist())],
    "double": lambda t, other: [Reweight(dict.fromkeys(t.run.examples[:5].tolist(), 2.0))],
    "options": lambda t, other: [HALVED],
    "start": lambda t, other: [Transplant(t.run.groups[0], other, 2)],
    "penalty": lambda t, other: [
        Penalty(lambda m: next(m.parameters()).square().sum(), 0.1),
        Freeze(t.run.groups[-1:]),
    ],
    "all": lambda t, other: [
        Transplant(t.run.groups[0], other, 2),
        Drop(t.run.examples[:1].tolist()),
        Reweight({t.run.examples[5]: 2.0}),
        HALVED,
    ],
}


FEW = ("sgd nesterov decay", "adamw amsgrad")
ROWS = [  # every model, then every optimizer
    *covering(CASES, FEW),
    *(pytest.param(model, name, marks=pytest.mark.slow) for name, model in covering(DERIVED, CASES)),
]


def evaluated(folder: Path, optimizer: str, model: str = "mlp", name: str = "run", **options: Any) -> Trained:
    """Trained, and put into eval mode."""
    found = train(folder / name, OPTIMIZERS[optimizer], CASES[model], **{"steps": 5, **options})
    found.model.eval()
    return found


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., Trained]:
    return partial(evaluated, tmp_path)


def replayed(t: Trained, changes: list[Any], store: Path, start: int = 0, **options: Any) -> attrib.Run:
    return attrib.replay(t.run, start, changes, model=t.model, loss=t.case.loss, store=store, progress=False, **options)


def between(t: Trained, base: attrib.Run, changed: attrib.Run, **options: Any) -> attrib.Difference:
    options = {"loss": t.case.loss, "progress": False, **options}
    return attrib.difference(base, changed, t.model, t.measurement(), **options)


@pytest.mark.parametrize(("model", "optimizer"), ROWS)
def test_all_that_separates_two_runs_is_accounted_for(
    trained: Callable[..., Trained], tmp_path: Path, model: str, optimizer: str
) -> None:
    t, other = trained(optimizer, model), trained(optimizer, model, "other", steps=3)
    for name in CHANGES if model == "mlp" and optimizer in FEW else ("all",):
        change = CHANGES[name]
        changed = replayed(t, change(t, other.run), tmp_path / name)
        for via in VIA if optimizer in FEW else VIA[:1]:
            found = between(t, t.run, changed, via=via)
            found.check(1e-10)  # float64: rounding of some thousand terms, which are at most 1e3 of what they sum to
            assert found.dataset.sizes["step"] == 5


@pytest.mark.parametrize("via", ["cause", "reaction"])
@pytest.mark.parametrize("optimizer", ["sgd nesterov decay", "adam amsgrad"])
def test_runs_exchanged_all_terms_change_sign(
    trained: Callable[..., Trained], tmp_path: Path, optimizer: str, via: str
) -> None:
    t, other = trained(optimizer), trained(optimizer, name="other", steps=3)
    changed = replayed(t, CHANGES["all"](t, other.run), tmp_path / "changed")
    one, back = between(t, t.run, changed, via=via), between(t, changed, t.run, via=via)
    size = float(one.dataset["gross"].max())
    for name, values in one.dataset.data_vars.items():
        if name not in ("initial", "final", "residual", "gross", "growth"):
            np.testing.assert_allclose(values, -back.dataset[name], rtol=0, atol=1e-12 * size, err_msg=str(name))


@pytest.mark.parametrize("model", ["mlp", "cnn", "gpt dropout"])
def test_in_single_precision_what_is_left_is_small(trained: Callable[..., Trained], tmp_path: Path, model: str) -> None:
    t = trained("adamw", model, dtype=torch.float32)
    changed = replayed(t, CHANGES["double"](t, t.run), tmp_path / "changed")
    found = between(t, t.run, changed)
    # eps 1e-7 of the gross, a few times what it sums to, through few steps
    assert float((abs(found.residual) / abs(found.change)).max()) < 1e-3


def test_two_steps_of_descent_are_those_by_hand(tmp_path: Path) -> None:
    """y = w x, loss (w x - t)^2 / 2, one example dropped in the first of two steps; m = w. By hand:

    w1 = w0 - lr mean (w0 x - t) x, w2 likewise; the sensitivity to w1 is 1 - lr mean x^2, since the loss is quadratic.
    """
    x, target, lr = torch.tensor([[1.0], [2.0], [-1.0]]).double(), torch.tensor([0.5, 1.0, 2.0]).double(), 0.1
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.3)

    def loss(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        return (model(x)[:, 0] - t) ** 2 / 2

    recorder = attrib.record(torch.optim.SGD(model.parameters(), lr=lr), model, loss, tmp_path / "run")
    for _ in range(2):
        recorder.zero_grad()
        loss(model, x, target).mean().backward()
        recorder.step(torch.arange(3), x, target)
    recorder.close()
    run = attrib.open_run(tmp_path / "run")
    changed = attrib.replay(
        run, 0, Drop([2], slice(0, 1)), model=model, loss=loss, store=tmp_path / "c", progress=False
    )
    found = attrib.difference(
        run, changed, model, lambda m: m.weight.flatten(), loss=loss, keep=("step", "example"), progress=False
    )
    g = (0.3 * x[:, 0] - target) * x[:, 0]  # of each loss, in both runs, at the first step
    later = 1 - lr * float((x**2).mean())
    np.testing.assert_allclose(
        found.by("step", "example").values[0], [[0, 0, lr * g[2] / 3 * later], [0, 0, 0]], atol=1e-15
    )
    weighs_more = -lr * float(g[0] + g[1]) * (1 / 2 - 1 / 3) * later
    np.testing.assert_allclose(found.dataset["reduction"].sum("group").values[0], [weighs_more, 0], atol=1e-15)
    reaction = attrib.difference(
        run,
        changed,
        model,
        lambda m: m.weight.flatten(),
        loss=loss,
        via="reaction",
        keep=("step", "example"),
        progress=False,
    )
    moved = float(changed.vector(1) - run.vector(1))
    by_hand = [[-lr * g[0] / 6, -lr * g[1] / 6, lr * g[2] / 3], (-lr / 3 * x[:, 0] ** 2 * moved).tolist()]
    np.testing.assert_allclose(reaction.by("step", "example").values[0], by_hand, atol=1e-15)


def test_a_replay_from_the_middle_is_compared_over_the_steps_that_both_have(
    trained: Callable[..., Trained], tmp_path: Path
) -> None:
    t = trained("adamw")
    changed = replayed(t, [Drop(t.run.examples[:2].tolist())], tmp_path / "c", start=2, until=4)
    found = between(t, t.run, changed)
    found.check(1e-10)
    assert (found.dataset.sizes["step"], found.dataset.attrs["first"]) == (2, [2, 0])
    run = attrib.open_run(tmp_path / "run")
    run.load(t.model, 4)
    np.testing.assert_allclose(found.base, t.measurement()(t.model).detach(), rtol=1e-12)


def test_a_run_and_itself_differ_by_nothing(trained: Callable[..., Trained]) -> None:
    t = trained("adamw")
    found = between(t, t.run, t.run)
    found.check(0.0)
    assert float(found.dataset["gross"].max()) == 0.0


def test_accumulated_and_clipped_steps_are_differentiated_through(tmp_path: Path) -> None:
    case, batches = MODELS["mlp"], 2
    torch.manual_seed(0)
    model, (x, y) = case.build().double(), case.data(12)
    recorder = attrib.record(torch.optim.AdamW(model.parameters(), lr=0.01), model, case.loss, tmp_path / "run")
    for _ in range(5):
        recorder.zero_grad()
        for index in torch.randperm(12)[:9].split([5, 4]):
            recorder.batch(index, x[index], y[index])
            (case.loss(model, x[index], y[index]).mean() / batches).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        recorder.step()
    recorder.close()
    run = attrib.open_run(tmp_path / "run")

    def backward(losses: Tensor, model: nn.Module) -> None:
        (losses.mean() / batches).backward()

    changed = attrib.replay(
        run,
        0,
        [Reweight({3: 0.0, 4: 2.0})],
        model=model,
        loss=case.loss,
        store=tmp_path / "c",
        progress=False,
        backward=backward,
    )
    found = attrib.difference(
        run, changed, model, attrib.measure.log_prob(x[:2], y[:2]), loss=case.loss, progress=False
    )
    found.check(1e-10)


def test_it_is_saved_and_opened_as_what_it_is(trained: Callable[..., Trained], tmp_path: Path) -> None:
    t = trained("sgd momentum")
    found = between(t, t.run, replayed(t, CHANGES["drop"](t, t.run), tmp_path / "c"))
    found.save(tmp_path / "difference.zarr")
    again = attrib.open_result(tmp_path / "difference.zarr")
    assert isinstance(again, attrib.Difference)
    assert str(again.check()) == str(found.check())
    assert "via cause" in str(again.ledger())


def test_another_loss_and_terms_that_do_not_add_up_are_errors(trained: Callable[..., Trained], tmp_path: Path) -> None:
    t = trained("sgd momentum")
    changed = replayed(t, CHANGES["drop"](t, t.run), tmp_path / "c")

    def other(model: nn.Module, *batch: Tensor) -> Tensor:
        return t.case.loss(model, *batch) ** 2

    for via in ("cause", "reaction"):  # by the first, they add up all the same
        with pytest.raises(BatchIdentityError, match="do not sum to the recorded one: got a gap of"):
            between(t, t.run, changed, loss=other, via=via).check()
    found = between(t, t.run, changed)
    found.dataset["residual"][0] += 1e-3
    with pytest.raises(CompletenessError, match="the terms do not add up: got a residual of"):
        found.check()


def test_what_cannot_be_compared_is_refused_by_its_first_step(trained: Callable[..., Trained], tmp_path: Path) -> None:
    t = trained("sgd momentum")
    shifted = trained("sgd momentum", name="shifted", called=lambda index: index + 100)
    with pytest.raises(ReplayError, match=r"not trained on the same batches: got 0 common .* at step 4 of the base"):
        between(t, t.run, shifted.run)
    with pytest.raises(ReplayError, match="got another optimizer, AdamW, expected that of the base, SGD"):
        between(t, t.run, trained("adamw", name="adamw").run)
    frozen = trained("rmsprop", name="rmsprop")
    with pytest.raises(ReplayError, match="was not derived: got RMSprop"):
        between(frozen, frozen.run, frozen.run)
    with pytest.raises(ValueError, match="via is none: got 'causes', expected one of 'cause', 'reaction'"):
        between(t, t.run, t.run, via="causes")


def test_other_inputs_under_the_same_id_are_refused(trained: Callable[..., Trained], tmp_path: Path) -> None:
    t = trained("sgd momentum")
    torch.manual_seed(0)
    model = t.case.build().double()
    recorder = attrib.record(OPTIMIZERS["sgd momentum"](list(model.parameters())), model, t.case.loss, tmp_path / "o")
    for index, x, y in t.batches:
        recorder.zero_grad()
        t.case.loss(model, (x + 1) % 7, y).mean().backward()
        recorder.step(index, (x + 1) % 7, y)
    recorder.close()
    with pytest.raises(ReplayError, match="not trained on the same inputs: got other ones for example"):
        between(t, t.run, attrib.open_run(tmp_path / "o"))


def test_the_model_comes_back_as_it_was(trained: Callable[..., Trained], tmp_path: Path) -> None:
    t = trained("adamw", "batch norm")
    changed = replayed(t, CHANGES["double"](t, t.run), tmp_path / "c")
    before = {name: value.clone() for name, value in t.model.state_dict().items()}
    random, modes = torch.get_rng_state(), [m.training for m in t.model.modules()]
    between(t, t.run, changed)
    assert all(torch.equal(value, before[name]) for name, value in t.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in t.model.modules()] == modes


def test_ids_that_are_strings_name_the_same_examples(trained: Callable[..., Trained], tmp_path: Path) -> None:
    """In the changed run they come in another order, since the first of them is dropped."""
    found = []
    for name, called in (("numbers", lambda i: i), ("strings", lambda i: [f"doc-{n}" for n in i.tolist()])):
        t = trained("adamw", name=name, called=called)
        changed = replayed(t, [Drop(t.run.index(0)[:1].tolist())], tmp_path / f"{name} changed")
        by = between(t, t.run, changed, via="reaction").by("example")
        found.append({str(e).removeprefix("doc-"): by.sel(example=e).values for e in by["example"].values.tolist()})
    numbers, strings = found
    assert numbers.keys() == strings.keys()
    for example, values in numbers.items():
        np.testing.assert_allclose(strings[example], values, rtol=1e-12, atol=1e-15)


def test_what_weighs_nothing_in_both_runs_is_no_example_of_the_difference(
    trained: Callable[..., Trained], tmp_path: Path
) -> None:
    t = trained("sgd momentum")
    one, other = t.run.examples[:2].tolist()
    base = replayed(t, [Reweight({one: 0.0})], tmp_path / "base")
    changed = replayed(t, [Reweight({one: 0.0, other: 2.0})], tmp_path / "changed")
    found = between(t, base, changed)
    found.check(1e-10)
    assert float(abs(found.by("example").sel(example=one)).max()) == 0.0
