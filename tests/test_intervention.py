"""A changed replay is what a plain loop with the same change does, and its record is complete."""

import ast
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cases import MODELS, OPTIMIZERS, crossed, few_first
from torch import Tensor, nn
from training import Trained, flat, train
from zarr.storage import MemoryStore

import attrib
from attrib import errors
from attrib.cli import main
from attrib.intervention import (
    Drop,
    Freeze,
    Intervention,
    Options,
    Penalty,
    Permute,
    Redraw,
    Reweight,
    Suppress,
    Transplant,
    Window,
    weighted,
)
from attrib.intervention.state import STATES

START, STEPS = 2, 6
KINDS = ("sgd momentum", "adamw", "adam amsgrad")


def pull(model: nn.Module) -> Tensor:
    return model.hidden.weight.square().sum() + model.output.bias.abs().sum()


def push(model: nn.Module) -> Tensor:
    return 0.25 * (model.output.weight.square().sum() + model.output.bias.square().sum())


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


class Hand(NamedTuple):
    """The change by hand, in a plain loop."""

    begin: Callable[[nn.Module, torch.optim.Optimizer], None] = lambda model, optimizer: None
    batch: Callable[[int, list[Tensor]], list[Tensor]] = lambda step, batch: batch
    losses: Callable[[int, nn.Module, Tensor, Tensor], Tensor] = lambda step, model, index, losses: losses.mean()
    step: Callable[[int, nn.Module, torch.optim.Optimizer], None] = lambda step, model, optimizer: None


def by_hand(trained: Trained, kind: str, hand: Hand) -> list[np.ndarray]:
    """States START .. STEPS of a plain loop that repeats the run and makes the change."""
    torch.manual_seed(0)
    model = trained.case.build().to(trained.run.dtype)
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    states = []
    for step, (index, x, y) in enumerate(trained.batches):
        if step == START:
            hand.begin(model, optimizer)
            states.append(flat(model))
        batch = [index, x, y] if step < START else hand.batch(step, [index, x, y])
        optimizer.zero_grad()
        losses = trained.case.loss(model, *batch[1:])
        (losses.mean() if step < START else hand.losses(step, model, batch[0], losses)).backward()
        if step >= START:
            hand.step(step, model, optimizer)
        optimizer.step()
        if step >= START:
            states.append(flat(model))
    return states


def set_to(names: list[str], values: dict[str, Tensor], forget: bool) -> Callable[..., None]:
    def begin(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for name in names:
            with torch.no_grad():
                named(model)[name].copy_(values[name])
            if forget:
                optimizer.state.pop(named(model)[name], None)

    return begin


def drop(step: int, batch: list[Tensor]) -> list[Tensor]:
    keep = ~torch.isin(batch[0], torch.tensor([0, 1, 2, 3]))
    return [b[keep] for b in batch] if 3 <= step < 5 else batch


def reweigh(step: int, model: nn.Module, index: Tensor, losses: Tensor) -> Tensor:
    weights = torch.where(index == 5, 3.0, torch.where(index == 1, -0.5, 1.0)).to(losses.dtype)
    return (weights * losses).mean()


def freeze(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if step >= 4:
        named(model)["embedding.weight"].grad = None


def double(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group.setdefault("first", group["lr"])
        group["lr"] = group["first"] * (2 if 3 <= step < 5 else 1)


@dataclass(frozen=True)
class Halve(Intervention):
    """A kind of one's own: half the losses of even examples."""

    def loss(self, step: int, losses: Tensor, ids: np.ndarray) -> Tensor:
        return torch.where(torch.from_numpy(ids) % 2 == 0, losses / 2, losses)


@dataclass(frozen=True)
class Flood(Window):
    """Another, which is not linear: no loss falls below a level."""

    level: float
    steps: slice | None = None

    def loss(self, step: int, losses: Tensor, ids: np.ndarray) -> Tensor:
        return (losses - self.level).abs() if self.active(step) else losses


@dataclass(frozen=True)
class Spread(Intervention):
    """Another, in which the losses of a batch depend on each other: those far from the mean count more."""

    def loss(self, step: int, losses: Tensor, ids: np.ndarray) -> Tensor:
        return losses + (losses - losses.mean()).square()


@dataclass(frozen=True)
class Jolt(Window):
    """Another: noise in the gradient, other numbers at every step."""

    seed: int
    steps: slice | None = None

    def penalty(self, step: int, model: nn.Module) -> Tensor | None:
        drawn = noise(self.seed + step, model)
        return sum((p * n).sum() for p, n in zip(model.parameters(), drawn, strict=True)) if self.active(step) else None


def noise(seed: int, model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]


def jolt(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p, n in zip(model.parameters(), noise(7 + step, model), strict=True):
        p.grad += n if 3 <= step < 5 else 0


def halve(step: int, model: nn.Module, index: Tensor, losses: Tensor) -> Tensor:
    return (losses * (1 - 0.5 * (index % 2 == 0).double())).mean()


def flood(step: int, model: nn.Module, index: Tensor, losses: Tensor) -> Tensor:
    return ((losses - 1.9).abs() if step >= 3 else losses).mean()


def spread(step: int, model: nn.Module, index: Tensor, losses: Tensor) -> Tensor:
    return losses.mean() + losses.var(correction=0)


def changes(trained: Trained) -> dict[str, tuple[Any, Hand]]:
    """Each intervention, and the same by hand."""
    last = trained.run.parameters(STEPS)
    ones = {name: torch.full_like(value, 0.25) for name, value in last.items()}
    hidden, output = ["hidden.weight", "hidden.bias"], ["output.weight", "output.bias"]
    return {
        "transplant, kept": (Transplant("hidden.*", trained.run, STEPS, "kept"), Hand(set_to(hidden, last, False))),
        "transplant, reset": (Transplant("hidden.*", trained.run, STEPS), Hand(set_to(hidden, last, True))),
        "redraw": (Redraw("output.*", lambda t: t.fill_(0.25)), Hand(set_to(output, ones, True))),
        "redraw, kept": (Redraw(output, lambda t: t.fill_(0.25), 0, "kept"), Hand(set_to(output, ones, False))),
        "freeze": (Freeze("embedding.weight", slice(4, None)), Hand(step=freeze)),
        "drop": (Drop([0, 1, 2, 3], slice(3, 5)), Hand(batch=drop)),
        "reweight": (Reweight({5: 3.0, 1: -0.5}), Hand(losses=reweigh)),
        "options": (Options({"lr": lambda step, lr: 2 * lr}, slice(3, 5)), Hand(step=double)),
        "penalty": (
            Penalty(pull, 0.1, slice(3, None)),
            Hand(losses=lambda step, model, index, losses: losses.mean() + (0.1 * pull(model) if step >= 3 else 0)),
        ),
        "suppress": (
            Suppress("output.*", 0.5, slice(3, 5)),
            Hand(losses=lambda step, model, index, losses: losses.mean() + (push(model) if 3 <= step < 5 else 0)),
        ),
        "halve": (Halve(), Hand(losses=halve)),
        "flood": (Flood(1.9, slice(3, None)), Hand(losses=flood)),
        "spread": (Spread(), Hand(losses=spread)),
        "jolt": (Jolt(7, slice(3, 5)), Hand(step=jolt)),
    }


NAMES = (
    *("transplant, kept", "transplant, reset", "redraw", "redraw, kept"),
    *("freeze", "drop", "reweight", "options", "penalty", "suppress"),
    *("halve", "flood", "spread", "jolt"),  # kinds that the replay does not know
)


@pytest.mark.parametrize(("name", "kind"), crossed(NAMES, KINDS))
def test_changed_replay_is_the_plain_loop_with_the_change_and_complete(name: str, kind: str, tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS[kind], steps=STEPS)
    change, hand = changes(trained)[name]
    arguments = {"model": trained.model, "loss": trained.case.loss}
    again = attrib.replay(trained.run, START, change, store=tmp_path / "again", progress=False, **arguments)
    expected = by_hand(trained, kind, hand)
    # the same operations in the same order, but for a penalty's gradient, which is added before instead of after, and the
    # parameter groups, which torch's loops over tensors do not see: a few eps a step
    for step, state in enumerate(expected):
        np.testing.assert_allclose(again.vector(step), state, rtol=1e-12, atol=1e-13)
    assert not np.allclose(expected[-1], trained.thetas[-1], atol=1e-4)  # it did something
    loss = trained.case.loss if change.loss is None else weighted(trained.case.loss)
    result = attrib.attribute(again, trained.model, trained.measurement(), loss=loss, progress=False)
    ledger = result.check(1e-12)  # rounding of float64 over six steps
    assert max(gap for name, gap in ledger.identities.items() if name != "limit") < 1e-10
    assert attrib.verify(again, progress=False).failure is None
    if name in ("penalty", "jolt"):
        assert float(abs(result.decay.sel(step=slice(1, None))).max()) > 1e-4
    (described,) = again.header["replay"]["interventions"]
    assert described["kind"] == type(change).__name__
    json.dumps(described)


# residual over the largest term: ten times what was measured over all optimizers, some eps of float64 and float32
BOUNDS = {torch.float64: 2e-15, torch.float32: 1e-6}


# fast are those of every layout of the optimizer's state, of which alone a transplant knows, in either type in turn
@pytest.mark.parametrize(("kind", "dtype"), few_first(OPTIMIZERS, BOUNDS, few=KINDS))
def test_transplanted_runs_are_as_complete_as_any(kind: str, dtype: torch.dtype) -> None:
    trained = train(MemoryStore(), OPTIMIZERS[kind], dtype=dtype, steps=STEPS)
    graft = Transplant("hidden.*", trained.run, STEPS, "taken")
    again = attrib.replay(trained.run, 1, graft, model=trained.model, loss=trained.case.loss, store=MemoryStore())
    result = attrib.attribute(again, trained.model, trained.measurement(), loss=trained.case.loss, progress=False)
    terms = result.ledger().terms
    largest = np.abs(np.stack([terms[n].values for n in ("initial", "examples", "decay", "inherited", "final")])).max(0)
    # a sign is linear by 1 / |g|, of which entries down to sqrt(eps) of their tensor are known to sqrt(eps)
    bound = max(BOUNDS[dtype], torch.finfo(dtype).eps ** 0.75) if again.unmodelled else BOUNDS[dtype]
    assert (np.abs(result.residual.values) / largest).max() < bound


@pytest.mark.parametrize("kind", crossed(KINDS, fast=[("adam amsgrad",)]))
def test_optimizer_state_is_kept_reset_or_taken_along(kind: str, tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS[kind], steps=STEPS, block=2)
    for state in STATES:
        change = Transplant("hidden.*", trained.run, STEPS, state)
        store = tmp_path / state
        again = attrib.replay(trained.run, START, change, model=trained.model, loss=trained.case.loss, store=store)
        momentum = next(again.blocks(0, 1)).momentum
        for name, part in again.layout.slices():
            moved = name.startswith("hidden.")
            own = next(trained.run.blocks(START, START + 1)).momentum[part]
            other = trained.run.optimizer(trained.model, STEPS).state[named(trained.model)[name]]
            taken = other[trained.run.rules[0].momentum].reshape(-1)
            if moved and state == "reset":
                assert not momentum[part].any()
            else:
                torch.testing.assert_close(momentum[part], taken if moved and state == "taken" else own, rtol=0, atol=0)
        ages = again.reader.read("hyper", 0)[:, again.rules[0].hyper.index("age")]
        moved_age = {"kept": START, "reset": 0, "taken": STEPS}[state]
        expected = [moved_age if n.startswith("hidden.") else START for n in again.groups]
        np.testing.assert_array_equal(ages, np.minimum(expected, 1) if "sgd" in kind else expected)


@pytest.mark.parametrize("state", STATES)
def test_part_of_the_entries_can_be_transplanted(state: str, tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], steps=STEPS, block=2)
    change = Transplant("*", trained.run, STEPS, state, share=0.25)
    again = attrib.replay(
        trained.run, START, change, model=trained.model, loss=trained.case.loss, store=tmp_path / "again"
    )
    came = again.vector(0) == trained.run.vector(STEPS)
    stayed = again.vector(0) == trained.run.vector(START)
    assert bool((came ^ stayed).all())
    for _, part in again.layout.slices():
        assert int(came[part].sum()) == round(0.25 * len(came[part]))
    momentum, own = next(again.blocks(0, 1)).momentum, next(trained.run.blocks(START, START + 1)).momentum
    assert torch.equal(momentum[stayed], own[stayed])
    if state == "reset":
        assert not momentum[came].any()
    elif state == "kept":
        assert torch.equal(momentum[came], own[came])
    else:
        assert not torch.isin(momentum[came & (momentum != 0)], own).any()


def test_penalty_on_the_square_of_the_weights_is_coupled_weight_decay(tmp_path: Path) -> None:
    """SGD adds weight_decay * theta to the gradient: the gradient of weight_decay / 2 |theta|^2."""

    def half_square(model: nn.Module) -> Tensor:
        return sum(p.square().sum() for p in model.parameters()) / 2

    def plain(p: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(p, lr=0.1, momentum=0.9)

    decayed = train(tmp_path / "run", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.2))
    expected, trained = decayed.attribute().dataset, train(tmp_path / "plain", plain)
    arguments = {"model": trained.model, "loss": trained.case.loss}
    for capture in ("replay", "gradients", "factors"):
        penalty = Penalty(half_square, 0.2)
        again = attrib.replay(trained.run, 0, penalty, store=tmp_path / capture, capture=capture, **arguments)
        np.testing.assert_allclose(again.vector(6), decayed.run.vector(6), rtol=1e-12, atol=1e-13)
        found = trained._replace(run=again).attribute().dataset
        for name in ("decay", "timeline"):
            np.testing.assert_allclose(found[name].values, expected[name].values, rtol=1e-9, atol=1e-12)


def test_permuting_both_sides_of_a_layer_changes_nothing_but_the_order(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], steps=STEPS)
    arguments = {"model": trained.model, "loss": trained.case.loss}
    both = {"hidden.weight": 0, "hidden.bias": 0, "output.weight": 1}
    again = attrib.replay(trained.run, START, Permute(both, seed=3), store=tmp_path / "both", **arguments)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    last = trained.run.parameters(STEPS)
    last["hidden.weight"], last["hidden.bias"] = last["hidden.weight"][order], last["hidden.bias"][order]
    last["output.weight"] = last["output.weight"][:, order]
    # sums over neurons in another order: rounding, over four steps
    np.testing.assert_allclose(again.vector(STEPS - START), again.layout.flatten(last.values()), rtol=1e-9, atol=1e-12)
    one = attrib.replay(trained.run, START, Permute({"hidden.weight": 0}), store=tmp_path / "one", **arguments)
    assert not np.allclose(one.vector(STEPS - START), again.vector(STEPS - START), atol=1e-3)


def test_modules_draw_their_own_parameters_anew(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["sgd"])
    state = torch.get_rng_state()
    states = [
        next(attrib.retrain(trained.run, 3, Redraw("hidden.*", seed=s), model=trained.model, loss=trained.case.loss))[1]
        for s in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = (flat(m) for m in states)
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)
    kept = named(states[0])["output.weight"].detach()
    assert torch.equal(kept, trained.run.parameters(3)["output.weight"])
    bound = 12**-0.5  # torch's own init of a linear layer of 12 inputs
    drawn = named(states[0])["hidden.weight"].detach()
    assert bound / 2 < float(drawn.abs().max()) <= bound


@pytest.mark.parametrize(("kind", "states_every"), crossed(KINDS, [1, 2]))
def test_replay_goes_on_beyond_the_record(kind: str, states_every: int, tmp_path: Path) -> None:
    whole = {"batch": 12, "examples": 12, "states_every": states_every, "block": 2}
    short, long = tmp_path / "short", tmp_path / "long"
    torch.manual_seed(1)
    run = _full(short, kind, 4, whole)[0]
    model, reference = _full(long, kind, 9, whole)[1:]
    loss = MODELS["mlp"].loss
    for start in (1, 4):
        again = attrib.replay(run, start, model=model, loss=loss, store=tmp_path / f"again{start}", until=9)
        for step in range(start, 10):
            np.testing.assert_array_equal(again.vector(step - start), reference[step], str((start, step)))
    seen = [flat(m) for _, m in attrib.retrain(run, 3, model=model, loss=loss, until=9)]
    np.testing.assert_array_equal(np.stack(seen), np.stack(reference[3:]))


def _full(store: Path, kind: str, steps: int, whole: dict[str, Any]) -> tuple[attrib.Run, nn.Module, list[np.ndarray]]:
    """Full batches in one order."""
    torch.manual_seed(0)
    case = MODELS["mlp"]
    model = case.build()
    x, y = case.data(12)
    states = [flat(model)]
    with attrib.record(
        OPTIMIZERS[kind](list(model.parameters())), model, case.loss, store,
        **{k: v for k, v in whole.items() if k in ("block", "states_every")},
    ) as recorder:  # fmt: skip
        for _ in range(steps):
            recorder.zero_grad()
            case.loss(model, x, y).mean().backward()
            recorder.step(torch.arange(12), x, y)
            states.append(flat(model))
    return attrib.open_run(store), model, states


def test_batches_beyond_the_record_are_asked_for(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["sgd momentum"])
    arguments = {"model": trained.model, "loss": trained.case.loss, "until": 8}
    with pytest.raises(errors.ReplayError, match="Pass batches="):
        attrib.replay(trained.run, 3, store=tmp_path / "again", **arguments)
    assert not (tmp_path / "again").exists()
    x, y = trained.data
    again = attrib.replay(
        trained.run,
        3,
        store=tmp_path / "again",
        batches=lambda step: (torch.arange(step), x[:step], y[:step]),
        **arguments,
    )
    assert [len(again.index(step)) for step in range(5)] == [4, 5, 4, 6, 7]


WRONG = {
    "unknown group": (lambda r: Transplant("hiden.weight", r, 3), "Did you mean hidden.weight"),
    "no such state": (lambda r: Transplant("hidden.*", r, 99), "got step 99"),
    "state": (lambda r: Transplant("hidden.*", r, 3, "moved"), "got 'moved'"),
    "share": (lambda r: Transplant("hidden.*", r, 3, share=0.0), "expected 0 < share"),
    "redraw taken": (lambda r: Redraw("hidden.*", state="taken"), "kept, reset"),
    "freeze all": (lambda r: Freeze("*"), "nothing would train"),
    "freeze unknown": (lambda r: Freeze("embeding.weight"), "Did you mean embedding.weight"),
    "window": (lambda r: Freeze("hidden.*", slice(0, 2)), "overlaps the steps 2 to 6"),
    "stride": (lambda r: Freeze("hidden.*", slice(2, 6, 2)), "overlaps the steps"),
    "examples": (lambda r: Drop([3, 777]), r"got \[777\]"),
    "no examples": (lambda r: Drop([]), "none at all"),
    "weights": (lambda r: Reweight({888: 1.0}), r"got \[888\]"),
    "not finite": (lambda r: Reweight({1: float("nan")}), "not finite"),
    "option": (lambda r: Options({"learning_rate": 1.0}), "expected one of lr"),
    "option without state": (lambda r: Options({"amsgrad": True}), "no such option to change"),
    "no number": (lambda r: Options({"lr": "high"}), "no number"),
    "no option": (lambda r: Options({}), "no option is named"),
    "nothing": (lambda r: Transplant([], r, 3), "nothing is named"),
    "pattern": (lambda r: Permute({"hidden.*": 0}), "not a pattern"),
    "empty batch": (lambda r: Drop(set(range(12)), slice(4, 5)), "at step 4"),
    "axis": (lambda r: Permute({"hidden.weight": 2}), "no such axis"),
    "lengths": (lambda r: Permute({"hidden.weight": 0, "output.weight": 0}), "differ in length"),
    "suppress unknown": (lambda r: Suppress("hiden.weight", 1.0), "Did you mean hidden.weight"),
    "suppress by nothing": (lambda r: Suppress("hidden.*", 0.0), "above 0"),
    "no intervention": (lambda r: "freeze", "no intervention"),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("intervention") / "run", OPTIMIZERS["adamw"])


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_and_nothing_written(name: str, recorded: Trained, tmp_path: Path) -> None:
    make, message = WRONG[name]
    with pytest.raises(errors.ReplayError, match=message):
        attrib.replay(
            recorded.run,
            START,
            [make(recorded.run)],
            model=recorded.model,
            loss=recorded.case.loss,
            store=tmp_path / "again",
        )
    assert not (tmp_path / "again").exists()


def test_runs_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"])
    arguments = {"model": trained.model, "loss": trained.case.loss, "store": tmp_path / "again"}
    other = train(tmp_path / "cnn", OPTIMIZERS["adamw"], model="cnn")
    with pytest.raises(errors.ReplayError, match="do not fit"):
        attrib.replay(trained.run, 2, Transplant("output.*", other.run, 1), **arguments)
    single = train(tmp_path / "single", OPTIMIZERS["adamw"], dtype=torch.float32)
    with pytest.raises(errors.ReplayError, match="differ in type"):
        attrib.replay(trained.run, 2, Transplant("output.*", single.run, 1), **arguments)
    sgd = train(tmp_path / "sgd", OPTIMIZERS["sgd"])
    with pytest.raises(errors.ReplayError, match='Choose state="reset"'):
        attrib.replay(trained.run, 2, Transplant("output.*", sgd.run, 1, "taken"), **arguments)
    assert not (tmp_path / "again").exists()
    assert attrib.replay(trained.run, 2, Transplant("output.*", sgd.run, 1), **arguments).steps == 4


def test_all_frozen_by_parts_is_said(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"])
    parts = [Freeze(["embedding.*", "hidden.*"]), Freeze("output.*")]
    with pytest.raises(errors.ReplayError, match="all parameters frozen"):
        list(attrib.retrain(trained.run, 2, parts, model=trained.model, loss=trained.case.loss))


def test_frozen_parameters_are_recorded_for_replay_only(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], steps=STEPS)
    arguments = {"model": trained.model, "loss": trained.case.loss, "store": tmp_path / "again"}
    with pytest.raises(errors.ReplayError, match="capture='factors'"):
        attrib.replay(trained.run, START, Freeze("hidden.*"), capture="factors", **arguments)
    assert not (tmp_path / "again").exists()


def test_penalty_may_outweigh_the_examples(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], dtype=torch.float32)
    arguments = {"model": trained.model, "loss": trained.case.loss}
    heavy = Penalty(pull, 1e6)  # the examples' part is what is left of a difference
    again = attrib.replay(trained.run, 2, heavy, store=tmp_path / "again", check_every=1, **arguments)
    assert again.steps == 4


def test_penalty_is_clipped_with_the_rest(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["sgd momentum"], clip=0.1)

    def clipped(losses: Tensor, model: nn.Module) -> None:
        losses.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    again = attrib.replay(
        *(trained.run, 2, Penalty(pull)), model=trained.model, loss=trained.case.loss, store=tmp_path / "again",
        backward=clipped, check_every=1,
    )  # fmt: skip
    block = next(again.blocks(0, 4))
    np.testing.assert_allclose(block.gradient.norm(dim=1), 0.1, rtol=1e-5)  # torch divides by the norm + 1e-6
    assert float(np.nanmax(again.log("batch_identity"))) < 1e-10
    result = attrib.attribute(again, trained.model, trained.measurement(), loss=trained.case.loss, progress=False)
    assert max(gap for name, gap in result.check(1e-12).identities.items() if name != "limit") < 1e-10


def test_weights_of_several_are_one_tensor_the_product(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"])
    first, second = Reweight({i: 0.1 + 0.3 * i for i in range(8)}), Reweight({i: 0.7 - 0.2 * i for i in range(8)})
    flooded = Flood(1.9, slice(5, None))
    again = attrib.replay(
        *(trained.run, START, [first, flooded, second]), model=trained.model, loss=trained.case.loss,
        store=tmp_path / "again",
    )  # fmt: skip
    for step in range(STEPS - START):
        *inputs, weights = again.batch(step)
        plain = trained.run.batch(START + step)
        assert [torch.equal(a, b) for a, b in zip(inputs, plain, strict=True)] == [True, True]
        with torch.no_grad():
            again.load(model := trained.case.build().double(), step)
            losses = trained.case.loss(model, *plain)
        ids = again.index(step).tolist()
        one, two = (torch.tensor([c.weights.get(i, 1.0) for i in ids], dtype=torch.float64) for c in (first, second))
        sign = torch.sign(one * losses - 1.9) if START + step >= 5 else 1.0
        assert torch.equal(weights, one * two * sign)
    result = attrib.attribute(
        again, trained.model, trained.measurement(), loss=weighted(trained.case.loss), progress=False
    )
    result.check(1e-12)  # rounding of float64 over four steps


def test_changed_losses_are_one_per_example(tmp_path: Path) -> None:
    class Mean(Intervention):
        def loss(self, step: int, losses: Tensor, ids: np.ndarray) -> Tensor:
            return losses.mean()

    trained = train(tmp_path / "run", OPTIMIZERS["sgd"])
    with pytest.raises(errors.ReplayError, match="not one per example"):
        list(attrib.retrain(trained.run, 2, Mean(), model=trained.model, loss=trained.case.loss))


def test_the_replay_knows_no_kind_of_intervention() -> None:
    kinds = {n for n in attrib.intervention.__all__ if isinstance(getattr(attrib.intervention, n), type)}
    assert len(kinds) == 11
    folder = Path(attrib.intervention.__file__).parent
    for file in ("course.py", "prepare.py", "replay.py", "schedule.py"):
        nodes = list(ast.walk(ast.parse((folder / file).read_text())))
        names = {n.id for n in nodes if isinstance(n, ast.Name)} | {
            n.attr for n in nodes if isinstance(n, ast.Attribute)
        }
        assert not names & (kinds - {"Intervention"}), file


def test_hooks_of_interventions_of_ones_own_are_called(tmp_path: Path) -> None:
    class Pull(Intervention):
        def penalty(self, step: int, model: nn.Module) -> Tensor:
            return 0.1 * pull(model)

    trained = train(tmp_path / "run", OPTIMIZERS["sgd momentum"])
    ends = [
        flat(list(attrib.retrain(trained.run, 2, change, model=trained.model, loss=trained.case.loss))[-1][1])
        for change in (Pull(), Penalty(pull, 0.1))
    ]
    np.testing.assert_array_equal(*ends)


def test_only_the_places_of_other_runs_are_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["sgd"])
    other = train(tmp_path / "other", OPTIMIZERS["sgd"])
    monkeypatch.chdir(tmp_path)
    arguments = {"model": trained.model, "loss": trained.case.loss, "overwrite": True}
    for store in ("./run", "other", tmp_path / "other/../run"):
        with pytest.raises(errors.ReplayError, match="into itself"):
            attrib.replay(trained.run, 2, Transplant("hidden.*", other.run, 3), store=store, **arguments)
    assert attrib.open_run("run").steps == attrib.open_run("other").steps == 6


def test_numbers_and_arrays_of_numpy_do_as_well(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["sgd"])
    x, y = trained.data
    again = attrib.replay(
        *(trained.run, np.int64(2), [Freeze("hidden.*", slice(np.int64(3), np.int64(5))), Drop(np.array([1]))]),
        model=trained.model, loss=trained.case.loss, store=tmp_path / "again", until=np.int64(7),
        batches=lambda step: (np.arange(4), x[:4].numpy(), y[:4].numpy()),
    )  # fmt: skip
    assert again.steps == 5
    assert again.header["replay"]["interventions"][0]["steps"] == [3, 5]
    np.testing.assert_array_equal(again.index(4), [0, 2, 3])


class Deeper(nn.Module):
    """The small MLP with one more layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.more = MODELS["mlp"].build(), nn.Linear(7, 7)
        self.embedding, self.hidden, self.output = self.inner.embedding, self.inner.hidden, self.inner.output
        del self.inner

    def forward(self, x: Tensor) -> Tensor:
        return self.more(self.output(torch.relu(self.hidden(self.embedding(x).flatten(1)))))


def test_donors_may_have_more_than_is_taken(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"])
    torch.manual_seed(3)
    deeper, (index, x, y) = Deeper().double(), trained.batches[0]
    optimizer = OPTIMIZERS["adamw"](list(deeper.parameters()))
    with attrib.record(optimizer, deeper, trained.case.loss, tmp_path / "deeper") as recorder:
        for _ in range(3):
            recorder.zero_grad()
            trained.case.loss(deeper, x, y).mean().backward()
            recorder.step(index, x, y)
    graft = Transplant("hidden.*", attrib.open_run(tmp_path / "deeper"), 3, "taken")
    arguments = {"model": trained.model, "loss": trained.case.loss}
    again = attrib.replay(trained.run, 2, graft, store=tmp_path / "again", **arguments)
    momentum = again.layout.unflatten(next(again.blocks(0, 1)).momentum)
    for name in ("hidden.weight", "hidden.bias"):
        assert torch.equal(again.parameters(0)[name], named(deeper)[name])
        assert torch.equal(momentum[name], optimizer.state[named(deeper)[name]]["exp_avg"])


def test_accumulators_that_the_optimizer_needs_must_be_there(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"])
    amsgrad = train(tmp_path / "amsgrad", OPTIMIZERS["adamw amsgrad"])
    graft = Transplant("hidden.*", amsgrad.run, 3, "taken")
    with pytest.raises(errors.ReplayError, match="amsgrad"):
        list(attrib.retrain(trained.run, 2, graft, model=trained.model, loss=trained.case.loss))


@pytest.mark.parametrize("function", [pull, lambda m: m.output.bias, lambda m: pull(m) * float("nan")])
def test_penalty_of_ones_own_loop_is_declared(function: Callable[[nn.Module], Tensor], tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["sgd momentum"])
    again = attrib.replay(
        trained.run, 0, Penalty(pull, 0.1), model=trained.model, loss=trained.case.loss, store=tmp_path / "again"
    )
    torch.manual_seed(0)
    model, loss = trained.case.build().double(), trained.case.loss
    optimizer = OPTIMIZERS["sgd momentum"](list(model.parameters()))
    with attrib.record(optimizer, model, loss, tmp_path / "own", penalty=lambda m: 0.1 * function(m)) as recorder:
        for index, x, y in trained.batches:
            recorder.zero_grad()
            (loss(model, x, y).mean() + 0.1 * pull(model)).backward()
            if function is not pull:
                with pytest.raises(errors.LossError, match="penalty is not a number"):
                    recorder.step(index, x, y)
                return
            recorder.step(index, x, y)
    # the penalty's gradient is added after the examples' instead of before: rounding, over six steps
    np.testing.assert_allclose(attrib.open_run(tmp_path / "own").vector(6), again.vector(6), rtol=1e-12, atol=1e-13)


def test_penalty_that_is_no_number_is_refused(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"])
    with pytest.raises(errors.ReplayError, match="penalty is not a number"):
        attrib.replay(
            trained.run, 2, Penalty(lambda m: m.output.bias), model=trained.model, loss=trained.case.loss,
            store=tmp_path / "again",
        )  # fmt: skip
    assert not (tmp_path / "again").exists()


def test_penalty_that_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["sgd"])
    arguments = {"model": trained.model, "loss": trained.case.loss}
    changed = attrib.replay(trained.run, 2, Penalty(pull), store=tmp_path / "changed", **arguments)
    again = attrib.replay(changed, 1, Penalty(pull), store=tmp_path / "again", **arguments)
    assert torch.equal(again.vector(3), changed.vector(4))
    assert "without a Penalty" not in caplog.text
    attrib.replay(changed, 1, store=tmp_path / "without", **arguments)
    assert "without a Penalty" in caplog.text


def test_replay_is_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"])
    run, setup = str(tmp_path / "run"), f"{Path(__file__).parent}/setups.py:plain"
    out = str(tmp_path / "again")
    changes = ["--transplant", f"hidden.*={run}@6", "--freeze", "embedding.*,output.bias@3:5", "--drop", "0,2:4@4:"]
    changes += [
        "--reweight",
        "5=2",
        "--suppress",
        "hidden.bias=0.3@2:4",
        "--option",
        "betas=0.8,0.9",
        "--redraw",
        "output.weight",
        "--state",
        "kept",
    ]
    changes += ["--intervene", f"{Path(__file__).parent}/setups.py:changes"]
    assert main(["replay", run, "--setup", setup, "--start", "2", "-o", out, "--json", *changes]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["store"], facts["run"], facts["steps"], facts["start"]) == (out, run, 4, 2)
    kinds = [change["kind"] for change in facts["interventions"]]
    assert f"replay          of {run} from step 2: Redraw, Transplant, Freeze" in str(attrib.open_run(out))
    assert kinds == ["Redraw", "Transplant", "Freeze", "Drop", "Reweight", "Suppress", "Options", "Penalty"]
    expected = attrib.replay(
        trained.run, 2,
        [Redraw("output.weight", state="kept"), Transplant("hidden.*", trained.run, 6, "kept"),
         Freeze(["embedding.*", "output.bias"], slice(3, 5)), Drop([0, 2, 3], slice(4, None)), Reweight({5: 2.0}),
         Suppress("hidden.bias", 0.3, slice(2, 4)), Options({"betas": (0.8, 0.9)}), Penalty(pull, 0.01)],
        model=trained.model, loss=trained.case.loss, store=tmp_path / "expected",
    )  # fmt: skip
    assert torch.equal(attrib.open_run(out).vector(4), expected.vector(4))
    assert main(["replay", run, "--setup", setup, "-o", out]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["replay", run, "--setup", setup, "-o", str(tmp_path / "b"), "--freeze", "hiden.weight"]) == 1
    assert "Did you mean hidden.weight" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert main(["replay", run, "--setup", setup, "-o", str(tmp_path / "b")]) == 0
    assert "saved to" in capsys.readouterr().out
    assert torch.equal(attrib.open_run(tmp_path / "b").vector(6), trained.run.vector(6))
    assert main(["replay", run, "--setup", setup, "-o", str(tmp_path / "c"), "--drop", "a"]) == 1
    assert "not a list of numbers: got 'a'" in capsys.readouterr().err
    for bad in (
        ["--transplant", "x"],
        ["--drop", "3@5"],
        ["--option", "lr"],
        ["--reweight", "3"],
        ["--suppress", "x"],
        ["--start", "-1"],
    ):
        with pytest.raises(SystemExit):
            main(["replay", run, "--setup", setup, *bad])
