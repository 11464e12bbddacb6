"""What p.grad holds beyond the shares is a row of the ledger, and nothing else is."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import ADAMW, MODELS, OPTIMIZERS, SGD, Mlp, classify, covered, crossed, pairs
from test_constants import Bench
from torch import Tensor, nn
from training import rewritten, train
from zarr.storage import MemoryStore

import attrib
from attrib.checks.intake import CAPTURES
from attrib.errors import BatchIdentityError, CompletenessError, LossError

STEPS, BATCH = 5, 6
Change = Callable[[nn.Module], None]


def value_clipping(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 0.02)


def noise(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad += 0.01 * torch.randn_like(p)


def a_scaled_subset(model: nn.Module) -> None:
    for p in list(model.parameters())[::2]:
        p.grad *= 0.3


def clipping_by_norm_and_noise(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    noise(model)


CHANGES = {f.__name__: f for f in (value_clipping, noise, a_scaled_subset, clipping_by_norm_and_noise)}


def flat(model: nn.Module) -> np.ndarray:
    return np.concatenate([p.grad.reshape(-1).double().numpy().copy() for p in model.parameters()])


def plain_gradients(model: nn.Module, x: Tensor, y: Tensor, reduction: Callable[[Tensor], Tensor]) -> np.ndarray:
    """(P,): of the loss alone, past all hooks on parameters."""
    copies = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}

    class Called:
        def __call__(self, x: Tensor) -> Tensor:
            return torch.func.functional_call(model, copies, (x,))

    reduction(classify(Called(), x, y)).backward()
    return np.concatenate([p.grad.reshape(-1).numpy() for p in copies.values()])


class Recorded:
    """A run, and what was done by hand at each of its steps, (T, P) in the order of the run."""

    def __init__(
        self,
        change: Change = lambda model: None,
        capture: str = "replay",
        optimizer: Callable[..., Any] = lambda p: ADAMW(p, lr=0.01, weight_decay=0.1),
        reduction: Callable[[Tensor], Tensor] = torch.mean,
        hook: Change | None = None,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = Mlp().double()
        x, y = pairs(18)
        store = options.pop("store", None) or MemoryStore()
        options = {"remainder": "account", "block": 2, **options}
        recorder = attrib.record(optimizer(self.model.parameters()), self.model, classify, store, capture, **options)
        if hook is not None:
            hook(self.model)
        done = []
        with recorder:
            for step in range(STEPS):
                index = torch.arange(BATCH - step % 2) + 3 * step
                recorder.zero_grad()
                reduction(classify(self.model, x[index], y[index])).backward()
                change(self.model)
                done.append(flat(self.model) - plain_gradients(self.model, x[index], y[index], reduction))
                recorder.step(index, x[index], y[index])
        self.done, self.run, self.x, self.y = np.array(done), attrib.open_run(store), x, y

    def attribute(self, **options: Any) -> attrib.Result:
        options = {"loss": classify, "progress": False, **options}
        measurement = attrib.measure.log_prob(self.x[:3], self.y[:3])
        return attrib.attribute(self.run, self.model, measurement, **options)

    def by_hand(self, sensitivities: list[np.ndarray]) -> np.ndarray:
        """<U, rho> (Q, T, K) from U (Q, P) of each step."""
        bounds = self.run.layout.bounds
        products = np.stack([u * rho for u, rho in zip(sensitivities, self.done, strict=True)], 1)
        return np.add.reduceat(products, bounds[:-1], 2)


def sensitivities(monkeypatch: pytest.MonkeyPatch, attribute: Callable[[], attrib.Result]) -> tuple[Any, list[Any]]:
    """The result, and U (Q, P) of every step in order."""
    found: dict[int, np.ndarray] = {}
    before = attrib.shares.Shares.contract

    def contract(self: Any, steps: Any, sensitivity: Tensor, gradient: np.ndarray) -> Any:
        found.update((step.number, u.numpy().copy()) for step, u in zip(steps, sensitivity, strict=True))
        return before(self, steps, sensitivity, gradient)

    monkeypatch.setattr(attrib.shares.Shares, "contract", contract)
    result = attribute()
    return result, [found[step] for step in sorted(found)]


def reversal(model: nn.Module) -> None:
    """Which a factor of -1 would explain as well, were one fitted."""
    for p in model.parameters():
        p.grad.neg_()


@pytest.mark.parametrize(("change", "capture"), crossed([*CHANGES.values(), reversal], CAPTURES))
def test_the_remainder_is_what_was_done_by_hand(change: Change, capture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(change, capture)
    result, traced = sensitivities(monkeypatch, recorded.attribute)
    expected = recorded.by_hand(traced)
    # sums of the same products in another order; what was done is a difference of gradients, each rounded
    np.testing.assert_allclose(result.remainder.values, expected, rtol=0, atol=1e-12 * np.abs(expected).sum())
    assert np.abs(expected).sum() > 1e-3 * np.abs(result.by()).sum()  # something was done
    ledger = result.check(1e-10)
    np.testing.assert_allclose(ledger.terms["remainder"], expected.sum((1, 2)), rtol=1e-9)


def masked(model: nn.Module) -> None:
    weight = model.hidden.weight
    weight.register_hook(lambda g: g * (torch.arange(g.numel()).view_as(g) % 3 > 0))


OPTIMIZED = ("sgd nesterov decay", "adam amsgrad", "adamw")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # as without a remainder, see test_completeness


@pytest.mark.parametrize(
    ("model", "capture", "dtype", "optimizer"), covered(MODELS, CAPTURES, TOLERANCE, OPTIMIZED), ids=str
)
def test_terms_add_up_with_hooks_that_clip_every_other_tensor(
    model: str, capture: str, dtype: torch.dtype, optimizer: str
) -> None:
    def hooked(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        for p in parameters[::2]:
            p.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        return OPTIMIZERS[optimizer](parameters)

    trained = train(MemoryStore(), hooked, model, capture, dtype, remainder="account")
    result = trained.attribute()
    ledger = result.check(TOLERANCE[dtype])
    assert ledger.identities["split"] <= {torch.float64: 1e-10, torch.float32: 1e-3}[dtype]
    clipped = np.abs(result.remainder).sum(("query", "step"))
    hooks = [name for name, _ in list(trained.model.named_parameters())[::2]]
    assert float(clipped.sel(group=hooks).sum()) > 100 * TOLERANCE[dtype] * float(result.dataset["gross"].sum())
    assert float(clipped.drop_sel(group=hooks).sum()) <= TOLERANCE[dtype] * float(result.dataset["gross"].sum())


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


@pytest.mark.parametrize(("reduction", "capture"), crossed([torch.mean, torch.sum], CAPTURES))
def test_a_hook_that_masks_one_tensor_leaves_the_others_without_remainder(capture: str, reduction: Any) -> None:
    recorded = Recorded(capture=capture, reduction=reduction, hook=masked)
    result = recorded.attribute()
    result.check(1e-10)
    by_group = np.abs(result.remainder).sum(("query", "step"))
    assert float(by_group.sel(group="hidden.weight")) > 1e-3 * float(np.abs(result.by()).sum())
    kinds = {torch.mean: ["mean", "pooled"], torch.sum: ["sum"]}[reduction]
    assert recorded.run.header["settled"]["reduction"] == [kinds, False]
    others = by_group.drop_sel(group="hidden.weight")
    assert float(others.max()) <= 1e-13 * float(result.dataset["gross"].sum())  # rounding of sums of that size


@pytest.mark.parametrize("capture", CAPTURES)
def test_clipping_by_the_common_norm_leaves_no_remainder(capture: str) -> None:
    result = Recorded(clip, capture).attribute()
    result.check(1e-10)
    assert float(np.abs(result.remainder).max()) <= 1e-13 * float(result.dataset["gross"].max())


def test_what_a_hook_masked_is_clipped_with_the_rest() -> None:
    """By hand: of the masked gradient, which is what was clipped, the plain one times the same factor is taken."""
    recorded = Recorded(clip, hook=masked)
    result = recorded.attribute()
    result.check(1e-10)
    others = np.abs(result.remainder).sum(("query", "step")).drop_sel(group="hidden.weight")
    assert float(others.max()) <= 1e-13 * float(result.dataset["gross"].sum())


def test_gradients_of_a_scaled_loss_that_are_unscaled_leave_no_remainder() -> None:
    """As a GradScaler does: backward leaves 1024 times the mean's gradient, which is neither the mean's nor the sum's."""

    def unscale(model: nn.Module) -> None:
        for p in model.parameters():
            p.grad /= 1024

    result = Recorded(unscale, reduction=lambda losses: 1024 * losses.mean()).attribute()
    result.check(1e-10)
    # the factor is read off norms, each rounded
    assert float(np.abs(result.remainder).max()) <= 1e-12 * float(result.dataset["gross"].max())


@pytest.mark.parametrize("change", [value_clipping, noise])
def test_of_a_single_tensor_the_change_of_its_norm_is_no_clipping(change: Change) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False).double()
    x, y = torch.randn(6, 4).double(), torch.randint(0, 3, (6,))
    store = MemoryStore()
    with attrib.record(SGD(model.parameters(), lr=0.1), model, classify, store, remainder="account") as recorder:
        for _ in range(4):
            recorder.zero_grad()
            classify(model, x, y).mean().backward()
            change(model)
            recorder.step(torch.arange(6), x, y)
    run = attrib.open_run(store)
    assert [run.passes(step)[0].scale for step in range(4)] == [1 / 6] * 4


def test_a_penalty_and_a_remainder_stand_apart() -> None:
    def penalty(model: nn.Module) -> Tensor:
        return 2.0 * sum(p.square().sum() for p in model.parameters())

    torch.manual_seed(0)
    model, (x, y) = Mlp().double(), pairs(12)
    done, store = [], MemoryStore()
    options = {"remainder": "account", "penalty": penalty}
    with attrib.record(SGD(model.parameters(), lr=0.1), model, classify, store, **options) as recorder:
        for _ in range(3):
            recorder.zero_grad()
            (classify(model, x, y).mean() + penalty(model)).backward()
            before = flat(model)
            noise(model)
            done.append(flat(model) - before)
            recorder.step(torch.arange(12), x, y)
    run = attrib.open_run(store)
    measurement = attrib.measure.log_prob(x[:2], y[:2])
    result = attrib.attribute(run, model, measurement, loss=classify, progress=False)
    result.check(1e-10)
    recorded = run.log("remainder")[:2] * [np.linalg.norm(run.reader.read("gradient", s)) for s in range(2)]
    np.testing.assert_allclose(recorded, np.linalg.norm(done[:2], axis=1), rtol=1e-10)


@pytest.mark.parametrize("size", [1, 3])
def test_batches_of_one_teach_no_reduction_and_the_next_batch_does(size: int) -> None:
    torch.manual_seed(0)
    model, (x, y) = Mlp().double(), pairs(12)
    store = MemoryStore()
    with attrib.record(SGD(model.parameters(), lr=0.1), model, classify, store, remainder="account") as recorder:
        for step in range(6):
            index = torch.arange(1 if step < 3 else size) + step
            recorder.zero_grad()
            classify(model, x[index], y[index]).sum().backward()
            value_clipping(model)
            recorder.step(index, x[index], y[index])
    run = attrib.open_run(store)
    assert [run.passes(step)[0].scale for step in range(6)] == [1.0] * 6
    measurement = attrib.measure.log_prob(x[:2], y[:2])
    attrib.attribute(run, model, measurement, loss=classify, progress=False).check(1e-10)


# refused, and seen


@pytest.mark.parametrize("change", CHANGES)
def test_undeclared_it_is_refused_with_what_would_declare_it(change: str) -> None:
    with pytest.raises(BatchIdentityError, match='remainder="account"'):
        Recorded(CHANGES[change], remainder="refuse")


def test_an_undeclared_hook_is_refused() -> None:
    with pytest.raises(BatchIdentityError, match=r"'hidden.weight'.*remainder=\"account\""):
        Recorded(hook=masked, remainder="refuse")


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown remainder: got 'ignore', expected one of 'refuse', 'account'"):
        Recorded(remainder="ignore")


def half(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * classify(model, x, y)


def smoothed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none", label_smoothing=0.1)


@pytest.mark.parametrize("wrong", [half, smoothed])
def test_a_wrong_loss_does_not_hide_in_the_remainder(wrong: Any, caplog: pytest.LogCaptureFixture) -> None:
    result = Recorded(value_clipping).attribute(loss=wrong)
    assert any(message.startswith("the losses are not those that were recorded") for message in caplog.messages)
    with pytest.raises(LossError, match="the losses are not those that were recorded: got a mean of"):
        result.check()


def test_a_wrong_loss_does_not_hide_in_what_few_bits_round() -> None:
    bench = Bench()
    run = bench.train(MemoryStore())
    right = bench.attribute(run)
    ledger = right.check(1e-6)
    assert ledger.identities["batch"] <= 1e-6  # as of the trained parts, see test_constants
    assert 0 < np.abs(right.remainder).sum() <= 1e-5 * right.dataset["gross"].sum()

    def other(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), (y + 1) % 3, reduction="none")

    options = {"loss": other, "progress": False}
    wrong = attrib.attribute(run, bench.model, bench.measurement, **options)
    with pytest.raises(LossError, match="the losses are not those that were recorded"):
        wrong.check()
    del wrong.dataset.attrs["loss_failure"]  # were its mean the same by chance
    with pytest.raises(BatchIdentityError, match="the shares miss the recorded gradient by more than rounding"):
        wrong.check()


def test_a_wrong_loss_without_remainder_is_said_by_its_losses_too(caplog: pytest.LogCaptureFixture) -> None:
    result = Recorded(remainder="refuse").attribute(loss=smoothed)
    assert "loss_failure" in result.dataset.attrs
    with pytest.raises(CompletenessError, match="The batch identity is furthest off"):
        result.check()


def test_the_right_loss_in_single_precision_is_no_other() -> None:
    torch.manual_seed(0)
    model, (x, y) = Mlp(), pairs(12)
    store = MemoryStore()
    with attrib.record(ADAMW(model.parameters(), lr=0.05), model, classify, store, check_every=1) as recorder:
        for _ in range(60):  # to a loss that rounding is a good part of
            recorder.zero_grad()
            classify(model, x, y).mean().backward()
            recorder.step(torch.arange(12), x, y)
    run, measurement = attrib.open_run(store), attrib.measure.log_prob(x[:2], y[:2])
    for dtype in (None, torch.float64):
        result = attrib.attribute(run, model, measurement, loss=classify, dtype=dtype, progress=False)
        assert "loss_failure" not in result.dataset.attrs
    assert run.log("loss")[-1] < 1e-2 * run.log("loss")[0]


# wherever terms are listed


def test_parts_and_ledger_know_it(tmp_path: Any) -> None:
    recorded = Recorded(noise)
    result = recorded.attribute()
    result.save(tmp_path / "result")
    again = attrib.open_result(tmp_path / "result")
    for one in (result, again, again.select([1])):
        ledger = one.check(1e-10)
        table = ledger.to_pandas()
        assert list(table) == ["initial", "examples", "decay", "inherited", "remainder", "residual", "final"]
        np.testing.assert_allclose(table.drop(columns="final").sum(axis=1), table["final"], rtol=1e-12)
        assert "remainder" in str(ledger)
        assert "of |p.grad| at 2 checked steps" in str(ledger)
        assert np.isnan(ledger.identities["batch"])
    changed = result.dataset.copy(deep=True)
    changed["remainder"][0, 0, 0] += 0.1
    with pytest.raises(CompletenessError, match="two parts of the result do not agree"):
        attrib.Result(changed).check()
    none = Recorded(remainder="refuse").attribute()
    assert "remainder" not in none.dataset
    assert list(none.check().to_pandas()) == ["initial", "examples", "decay", "inherited", "residual", "final"]
    assert none.remainder.dims == result.remainder.dims
    assert float(np.abs(none.remainder).max()) == 0.0


def test_moves_add_up_with_it() -> None:
    for optimizer in (lambda p: SGD(p, lr=0.1), lambda p: ADAMW(p, lr=0.01)):
        recorded = Recorded(noise, optimizer=optimizer)
        measurement = attrib.measure.log_prob(recorded.x[:2], recorded.y[:2])
        for move in attrib.moves(recorded.run, recorded.model, measurement, loss=classify):
            terms = move.contributions.sum(1) + move.decay + move.inherited + move.remainder
            np.testing.assert_allclose(terms, move.change, rtol=1e-9, atol=1e-13)


def test_a_run_says_how_large_it_is() -> None:
    run = Recorded(noise, check_every=1).run
    sizes = run.log("remainder")
    norms = np.linalg.norm(run.reader.read("gradient", slice(0, STEPS)), axis=1)
    assert (sizes > 0.01).all()
    assert (sizes < 1 + 1 / norms).all()
    assert f"at most {sizes.max():.2e} of |p.grad|" in str(run)
    assert np.isnan(Recorded(remainder="refuse").run.log("remainder")).all()


def test_a_run_goes_on_with_the_remainder_it_has(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, (x, y) = Mlp().double(), pairs(12)
    optimizer = SGD(model.parameters(), lr=0.1)

    def trained(steps: int, remainder: str) -> None:
        options = {"remainder": remainder, "resume": True, "block": 2}
        recorder = attrib.record(optimizer, model, classify, tmp_path / "run", **options)
        for _ in range(steps):
            recorder.zero_grad()
            classify(model, x, y).mean().backward()
            value_clipping(model)
            recorder.step(torch.arange(12), x, y)
        recorder.__exit__(None, KeyboardInterrupt(), None)

    trained(4, "account")
    with pytest.raises(attrib.errors.ResumeError, match="got remainder= refuse, expected account"):
        trained(1, "refuse")
    trained(3, "account")
    run = attrib.open_run(tmp_path / "run")
    assert run.steps == 7
    measurement = attrib.measure.log_prob(x[:2], y[:2])
    attrib.attribute(run, model, measurement, loss=classify, progress=False).check(1e-10)


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_run_with_a_remainder_is_verified(capture: str) -> None:
    recorded = Recorded(noise, capture, check_every=1)
    found = attrib.verify(recorded.run, progress=False, model=recorded.model, loss=classify)
    assert found.failure is None
    assert ("remainder" in found.identities) == (capture != "replay")
    assert "batch" not in found.identities


def test_shares_that_leave_another_remainder_than_was_recorded_are_not_verified(tmp_path: Any) -> None:
    Recorded(noise, "gradients", check_every=1, store=tmp_path / "run")
    with rewritten(tmp_path / "run", "gradients") as array:
        array[3] = 1.1 * array[3]
    found = attrib.verify(attrib.open_run(tmp_path / "run"), progress=False)
    assert found.failure is not None
    assert "leave another part of p.grad" in found.failure
    assert "at step 3" in found.failure


def test_a_replay_asks_what_the_loop_did() -> None:
    recorded = Recorded(value_clipping)
    with pytest.raises(attrib.errors.ReplayError, match="Pass backward="):
        attrib.replay(recorded.run, 0, model=recorded.model, loss=classify, store=MemoryStore())

    def backward(losses: Tensor, model: nn.Module) -> None:
        losses.mean().backward()
        value_clipping(model)

    options = {"model": recorded.model, "loss": classify, "backward": backward, "remainder": "account"}
    again = attrib.replay(recorded.run, 0, store=MemoryStore(), **options)
    assert torch.equal(again.vector(STEPS), recorded.run.vector(STEPS))


# updates that no rule explains


def test_what_no_rule_explains_of_an_update_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the optimizer had moved a little more than its rule says: by hand, along Gbar of that step."""
    recorded = Recorded(remainder="refuse")
    plain = recorded.attribute()
    monkeypatch.setattr(attrib.Run, "unmodelled", True, raising=False)
    extra = torch.zeros(recorded.run.layout.size, dtype=torch.float64)
    extra[3::7] = 1e-3
    updates = attrib.steps.Steps.updates.fget

    def without(steps: Any) -> Any:
        return [(segments, delta - extra) for segments, delta in updates(steps)]

    monkeypatch.setattr(attrib.steps.Steps, "updates", property(without))
    found: list[tuple[int, Tensor]] = []
    prepare = attrib.accounting.Accounting.prepare

    def noted(self: Any, steps: Any) -> Any:
        prepared = prepare(self, steps)
        found.append((steps.start, prepared.vectors.clone()))
        return prepared

    monkeypatch.setattr(attrib.accounting.Accounting, "prepare", noted)
    result = recorded.attribute()
    bars = torch.cat([vectors for _, vectors in sorted(found, key=lambda item: item[0])]).numpy()  # (T, Q, P)
    expected = np.add.reduceat(bars * extra.numpy(), recorded.run.layout.bounds[:-1], 2).swapaxes(0, 1)
    scale = float(np.abs(expected).sum())
    np.testing.assert_allclose(result.update_remainder, expected, rtol=0, atol=1e-11 * scale)
    assert "update_remainder" not in plain.dataset
    assert float(np.abs(plain.update_remainder).max()) == 0.0
    assert float(result.dataset["rounding"].max()) == 0.0
    # the contributions are as they were; what was moved is said twice now: by the examples and as what they do not explain
    ledger = result.ledger()
    np.testing.assert_allclose(ledger.terms["residual"], -expected.sum((1, 2)), rtol=1e-9)
    assert "update remainder" in str(ledger)
