"""Steps of several passes, and batches that are trees: `recorder.batch`, `recorder.step()`."""

from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import Gpt, covered, crossed
from torch import Tensor, nn
from training import assert_same_arrays
from zarr.storage import MemoryStore

import attrib
from attrib import errors
from attrib.batch import Batch
from attrib.inputs import batch_of, inputs_of
from attrib.store.facts import check_facts

CAPTURES = ("replay", "factors", "gradients")


class Net(nn.Module):
    """With dropout where asked."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.drop, self.second = nn.Linear(4, 9), nn.Dropout(rate), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(torch.tanh(self.first(x))))


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5)


def examples(size: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64).to(dtype)
    return torch.arange(size) + 100 * seed, x, torch.randint(0, 3, (size,), generator=generator)


Reduce = Callable[[Tensor, list[int]], Tensor]

REDUCTIONS: dict[str, Reduce] = {
    "mean of means": lambda losses, sizes: losses.mean() / len(sizes),
    "mean over all": lambda losses, sizes: losses.sum() / sum(sizes),
    "sum": lambda losses, sizes: losses.sum(),
    "weights of their own": lambda losses, sizes: losses.sum() * (0.03 + 0.01 * len(losses) ** 2),
    "one factor beside": lambda losses, sizes: losses.mean() / len(sizes) * 0.37,
}
SIZES = ([5, 5, 5], [5, 3, 6], [4, 4], [2])  # of the passes of a step, in turn


def accumulate(
    store: Any,
    reduce: Reduce,
    rate: float,
    steps: int = 9,
    clip: bool = False,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    **options: Any,
) -> nn.Module:
    """A loop over micro-batches."""
    model = Net(rate).double()
    with attrib.record(optimizer(model), model, cross_entropy, store, check_every=3, **options) as recorder:
        torch.manual_seed(3 + recorder.steps)
        for step in range(recorder.steps, steps):
            torch.manual_seed(50 + step)
            sizes = SIZES[step % len(SIZES)]
            recorder.zero_grad()
            for n, size in enumerate(sizes):
                index, x, y = examples(size, 10 * step + n)
                recorder.batch(index, x, y)
                reduce(cross_entropy(model, x, y), sizes).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            recorder.step()
    return model


def explain(store: Any, model: nn.Module, loss: Any = cross_entropy, **options: Any) -> attrib.Result:
    _, x, y = examples(3, 999)
    eval_ = attrib.measure.log_prob(x, y)
    model.eval()
    return attrib.attribute(attrib.open_run(store), model, eval_, loss=loss, progress=False, **options)


@pytest.mark.parametrize(("reduction", "capture", "rate"), covered(REDUCTIONS, CAPTURES, (0.0, 0.25)))
def test_accumulated_gradients_are_complete_whatever_the_passes_are(reduction: str, capture: str, rate: float) -> None:
    store = MemoryStore()
    model = accumulate(store, REDUCTIONS[reduction], rate, capture=capture, clip=reduction == "sum")
    ledger = explain(store, model).check(1e-10)
    assert max(ledger.identities[name] for name in ("batch", "split", "limit")) < 1e-7


@pytest.mark.parametrize("capture", CAPTURES)
def test_each_example_has_the_share_of_its_own_pass(capture: str) -> None:
    store = MemoryStore()
    reduce = REDUCTIONS["weights of their own"]
    model = accumulate(
        store, reduce, 0.0, steps=2, capture=capture, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.5)
    )
    run = attrib.open_run(store)
    rows = []
    for n, size in enumerate(SIZES[1]):
        batch = examples(size, 10 + n)[1:]
        theta = run.vector(1).numpy()
        rows.append(oracles.single_gradients(Net().double(), theta, cross_entropy, batch) * (0.03 + 0.01 * size**2))
    shares = np.concatenate(rows)
    np.testing.assert_allclose(shares.sum(0), run.reader.read("gradient", 1), atol=1e-14)
    # of one step of SGD, seen by what is linear in the parameters, U is -lr times the coefficients
    coefficients = torch.randn(2, shares.shape[1], dtype=torch.float64)
    result = attrib.attribute(
        run, model, lambda m: linear(m, coefficients), loss=cross_entropy, steps=slice(1, 2), progress=False
    )
    found = result.by("example").sel(example=run.index(1).tolist()).values
    np.testing.assert_allclose(found, -0.5 * coefficients.numpy() @ shares.T, atol=1e-13)


def linear(model: nn.Module, coefficients: Tensor) -> Tensor:
    """(Q, P) -> (Q,)"""
    return coefficients @ torch.cat([p.flatten() for p in model.parameters()])


@pytest.mark.parametrize("states_every", [1, 4])
def test_an_accumulated_run_is_replayed_bit_for_bit(states_every: int, tmp_path: Path) -> None:
    model = accumulate(tmp_path / "run", REDUCTIONS["mean over all"], 0.25, states_every=states_every, block=4)
    run = attrib.open_run(tmp_path / "run")
    again = attrib.replay(
        run, 2, model=model, loss=cross_entropy, store=tmp_path / "again", progress=False, states_every=states_every
    )
    for step in range(2, run.steps + 1):
        assert torch.equal(run.vector(step), again.vector(step - 2)), step
    lighter = attrib.intervention.Reweight({100 * 20: 0.5})  # of the first pass of step 2
    changed = attrib.replay(
        run, 2, lighter, model=model, loss=cross_entropy, store=tmp_path / "changed", progress=False
    )
    assert not torch.equal(changed.vector(1), again.vector(1))
    np.testing.assert_array_equal(changed.batches(0)[0][-1], [0.5, 1, 1, 1])
    dropped = attrib.replay(
        run,
        2,
        attrib.intervention.Drop([100 * 20]),
        model=model,
        loss=cross_entropy,
        store=tmp_path / "dropped",
        progress=False,
    )
    assert [len(batch[0]) for batch in dropped.batches(0)] == [3, 4]


@pytest.mark.parametrize("capture", crossed(CAPTURES, fast=[("replay",)]))
def test_an_accumulated_run_that_ended_early_goes_on_bit_for_bit(capture: str, tmp_path: Path) -> None:
    reduce = REDUCTIONS["mean of means"]
    accumulate(tmp_path / "whole", reduce, 0.25, steps=9, capture=capture)
    with pytest.raises(KeyboardInterrupt), attrib_stopped_after(tmp_path / "run", reduce, 5, capture):
        pass
    accumulate(tmp_path / "run", reduce, 0.25, steps=9, capture=capture, resume=True)
    assert_same_arrays(*(attrib.open_run(tmp_path / name) for name in ("whole", "run")), numbering=False)


class attrib_stopped_after:
    def __init__(self, store: Any, reduce: Reduce, steps: int, capture: str) -> None:
        self.run = lambda: accumulate(store, self._stopping(reduce, steps), 0.25, steps=9, capture=capture)

    def _stopping(self, reduce: Reduce, steps: int) -> Reduce:
        passes, last = [0], sum(len(SIZES[s % len(SIZES)]) for s in range(steps))

        def stopping(losses: Tensor, sizes: list[int]) -> Tensor:
            passes[0] += 1
            if passes[0] > last:
                raise KeyboardInterrupt
            return reduce(losses, sizes)

        return stopping

    def __enter__(self) -> None:
        self.run()

    def __exit__(self, *_: Any) -> None:
        pass


# trees


def of_a_dict(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    losses = F.cross_entropy(model(batch["x"]), batch["labels"], batch["class_weights"], reduction="none")
    if batch["extra"]["mask"] is not None:
        losses = losses * batch["extra"]["mask"]
    return losses * batch["beta"] ** batch["power"] + batch["extra"]["shift"][0].sum()


def dicts(step: int, size: int = 5) -> tuple[Tensor, dict[str, Any]]:
    index, x, y = examples(size, step)
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    extra = {"mask": torch.rand(size, generator=torch.Generator().manual_seed(step)).double() if step % 2 else None}
    extra["shift"] = [torch.tensor(0.25, dtype=torch.float64), "text", ()]
    batch = {
        "x": x,
        "labels": y,
        "class_weights": attrib.shared(weights),
        "beta": 0.9**step,
        "power": 2,
        "extra": extra,
    }
    return index, batch


def told(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "class_weights": batch["class_weights"].tensor}


# 3 is the number of classes: the shared weights are as long as the batch
@pytest.mark.parametrize(("capture", "size"), crossed(CAPTURES, [3, 5]))
def test_a_batch_is_any_tree(capture: str, size: int, tmp_path: Path) -> None:
    model = Net().double()
    steps = 5
    with attrib.record(adamw(model), model, of_a_dict, tmp_path / "run", capture, check_every=2) as recorder:
        for step in range(steps):
            index, batch = dicts(step, size)
            recorder.zero_grad()
            recorder.batch(index, UserDict(batch))
            of_a_dict(model, told(batch)).mean().backward()
            recorder.step()
    run = attrib.open_run(tmp_path / "run")
    explain(tmp_path / "run", model, of_a_dict).check(1e-10)
    assert attrib.verify(run, progress=False, model=model, loss=of_a_dict).failure is None
    for step in range(steps):
        ((got,),), wanted = run.batches(step), told(dicts(step, size)[1])
        assert list(got) == list(wanted)
        assert (got["beta"], got["power"], type(got["power"])) == (wanted["beta"], 2, int)
        assert got["extra"]["shift"][1:] == ["text", ()]
        for name in ("x", "labels", "class_weights"):
            assert torch.equal(got[name], wanted[name])
        mask = wanted["extra"]["mask"]
        assert got["extra"]["mask"] is None if mask is None else torch.equal(got["extra"]["mask"], mask)
    again = attrib.replay(run, 1, model=model, loss=of_a_dict, store=tmp_path / "again", progress=False)
    assert torch.equal(again.vector(again.steps), run.vector(run.steps))


def test_what_is_shared_is_stored_once(tmp_path: Path) -> None:
    model = Net().double()
    with attrib.record(adamw(model), model, of_a_dict, tmp_path / "run") as recorder:
        for step in (0, 2, 4, 2):
            index, batch = dicts(step)
            recorder.zero_grad()
            of_a_dict(model, told(batch)).mean().backward()
            recorder.step(index, batch)
    reader = attrib.open_run(tmp_path / "run").reader
    assert reader.header["shared"] == [3]  # one row for each value of beta
    assert reader.header["rows"] == [15]


def test_a_tree_comes_back_from_its_arrays() -> None:
    args = ({"a": [torch.zeros(2, 3, dtype=torch.bfloat16), (1, 2.5, True)], "b": None}, "text", torch.ones(7))
    batch = Batch.of(args, 2)
    assert batch.rows == (True, False, False, False, False)
    held = inputs_of(batch)
    again = batch_of(held.form, held.rows, held.shared, 2)
    assert again.kind == batch.kind
    assert [type(n) for n in again.numbers] == [int, float, bool]
    assert all(map(torch.equal, again.tensors, batch.tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batches_of_few_bits_are_stored_bit_for_bit(dtype: torch.dtype) -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model, x.double(), y)

    model, store = Net().double(), MemoryStore()
    with attrib.record(adamw(model), model, loss, store) as recorder:
        for step in range(3):
            index, x, y = examples(5, step, dtype)
            recorder.zero_grad()
            loss(model, x, y).mean().backward()
            recorder.step(index, x, y)
    run = attrib.open_run(store)
    assert torch.equal(run.batch(1)[0], examples(5, 1, dtype)[1])
    explain(store, model, loss).check(1e-10)


# random numbers


def noisy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Noise before the model is called."""
    return cross_entropy(model, x + 0.1 * torch.randn_like(x), y)


@pytest.mark.parametrize("between", [False, True], ids=["at once", "numbers drawn in between"])
def test_noise_that_a_loss_draws_before_the_model_is_drawn_again(between: bool) -> None:
    """Announced, the loss starts from the state then; else, or where the loop drew others in between, from the model's."""
    loss = cross_entropy if between else noisy
    model, store = Net(0.3).double(), MemoryStore()
    with attrib.record(adamw(model), model, loss, store, check_every=2) as recorder:
        for step in range(5):
            index, x, y = examples(6, step)
            recorder.zero_grad()
            recorder.batch(index, x, y)
            if between:
                torch.rand(3)
            loss(model, x, y).mean().backward()
            recorder.step()
    explain(store, model, loss).check(1e-10)


# loops as they are


def test_a_closure_runs_the_pass() -> None:
    model, store = Net().double(), MemoryStore()
    recorder = attrib.record(adamw(model), model, cross_entropy, store)
    for step in range(3):
        index, x, y = examples(5, step)

        def closure(index: Tensor = index, x: Tensor = x, y: Tensor = y) -> Tensor:
            recorder.zero_grad()
            recorder.batch(index, x, y)
            loss = cross_entropy(model, x, y).mean()
            loss.backward()
            return loss

        with torch.no_grad():
            value = recorder.step(closure) if step % 2 else recorder.step(closure=closure)
        assert value.requires_grad
    recorder.close()
    assert attrib.open_run(store).steps == 3
    explain(store, model).check(1e-10)


@pytest.mark.parametrize("cleared", ["recorder", "model", "zeros"])
def test_a_step_that_a_scaler_skips_is_none(cleared: str) -> None:
    model, store = Net(), MemoryStore()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    recorder = attrib.record(torch.optim.AdamW(model.parameters()), model, cross_entropy, store, check_every=2)
    made = 0
    for step in range(6):
        index, x, y = examples(5, step, torch.float32)
        {"recorder": recorder.zero_grad, "model": model.zero_grad, "zeros": lambda: model.zero_grad(False)}[cleared]()
        recorder.batch(index, x, y)
        loss = cross_entropy(model, x, y).mean()
        scaler.scale(loss * (torch.inf if step in (2, 3) else 1.0)).backward()
        scaler.unscale_(recorder)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(recorder)
        scaler.update()
        made += step not in (2, 3)
        assert recorder.steps == made
    recorder.close()
    run = attrib.open_run(store)
    assert [run.index(s)[0] for s in range(4)] == [0, 100, 400, 500]
    x, y = examples(3, 999, torch.float32)[1:]
    attrib.attribute(run, model, attrib.measure.log_prob(x, y), loss=cross_entropy, progress=False).check(1e-5)


def bench(rate: float = 0.0) -> tuple[nn.Module, attrib.Recorder]:
    model = Net(rate).double()
    recorder = attrib.record(adamw(model), model, cross_entropy, MemoryStore())
    for step in range(3):
        index, x, y = examples(5, step)
        recorder.zero_grad()
        recorder.batch(index, x, y)
        cross_entropy(model, x, y).mean().backward()
        recorder.step()
    recorder.zero_grad()
    return model, recorder


def good(model: nn.Module, recorder: attrib.Recorder) -> None:
    """The step can be made after all."""
    recorder.zero_grad()
    index, x, y = examples(5, 7)
    recorder.batch(index, x, y)
    cross_entropy(model, x, y).mean().backward()
    recorder.step()
    assert recorder.steps == 4


def test_a_batch_that_was_not_announced_is_missed() -> None:
    model, recorder = bench()
    first, second = examples(5, 3), examples(5, 4)
    cross_entropy(model, *first[1:]).mean().backward()
    with pytest.raises(errors.BatchError, match="was not announced: got a backward pass before the first"):
        recorder.batch(*second)
    recorder.zero_grad()
    recorder.batch(*first)
    cross_entropy(model, *first[1:]).mean().backward()
    cross_entropy(model, *second[1:]).mean().backward()
    with pytest.raises(
        errors.BatchError, match=r"an announcement is missing: got 2 forward passes .* after batch 1 of 1"
    ):
        recorder.step()
    good(model, recorder)


def test_a_batch_that_was_announced_twice_is_found() -> None:
    model, recorder = bench()
    first = examples(5, 3)
    recorder.batch(*first)
    recorder.batch(*first)
    cross_entropy(model, *first[1:]).mean().backward()
    with pytest.raises(errors.BatchError, match=r"announced, and no pass of it was made: got 0 .* after batch 1 of 2"):
        recorder.step()
    good(model, recorder)


def test_a_step_has_its_batch_announced_or_with_it() -> None:
    model, recorder = bench()
    first = examples(5, 3)
    cross_entropy(model, *first[1:]).mean().backward()
    with pytest.raises(errors.BatchError, match=r"got step\(\) and no batch announced"):
        recorder.step()
    recorder.zero_grad()
    recorder.batch(*first)
    cross_entropy(model, *first[1:]).mean().backward()
    with pytest.raises(errors.BatchError, match="there twice: got 1 announced and one with the step"):
        recorder.step(*first)
    recorder.step()
    recorder.zero_grad()


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (({1: torch.zeros(5)},), r"a key 1 of type int.*at argument 0 after"),
        (({"a": [np.zeros(5)]},), r"got ndarray.*at argument 0\['a'\]\[0\] after"),
        ((torch.zeros(4, 2),), r"got 5 ids and 4 rows.*attrib.shared"),
        (({"a": torch.tensor(1.0)}, 3), "the batch has no rows"),
        ((torch.zeros(5), 2**70), r"the integer 1180591620717411303424.*at argument 1"),
    ],
)
def test_a_batch_that_is_none_is_refused_when_it_is_announced(args: tuple[Any, ...], match: str) -> None:
    model, recorder = bench()
    with pytest.raises(errors.BatchError, match=match):
        recorder.batch(torch.arange(5), *args)
    good(model, recorder)


def test_a_shared_tensor_may_have_any_length() -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor, table: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y, table[:3], reduction="none")

    model, store = Net().double(), MemoryStore()
    with attrib.record(adamw(model), model, loss, store) as recorder:
        for step in range(3):
            index, x, y = examples(7, step)
            table = torch.ones(7, dtype=torch.float64) + step
            recorder.zero_grad()
            loss(model, x, y, table).mean().backward()
            recorder.step(index, x, y, attrib.shared(table))
    explain(store, model, loss).check(1e-10)
    assert attrib.open_run(store).reader.header["shared"] == [3]


def test_a_header_with_a_form_that_is_none_is_refused() -> None:
    header = attrib.open_run(_stored()).header
    check_facts(header, "here")
    leaves = header["forms"][0]["leaves"]
    for form in (
        {"leaves": leaves, "tree": ["leaf", 0]},
        {"leaves": [["rows", "no_type", []]] * 2, "tree": ["tuple", []]},
        3,
    ):
        with pytest.raises(errors.StoreError, match="got forms"):
            check_facts({**header, "forms": [form]}, "here")
    with pytest.raises(errors.StoreError, match="forms that do not fit"):
        check_facts({**header, "rows": []}, "here")


def _stored() -> Any:
    store = MemoryStore()
    accumulate(store, REDUCTIONS["sum"], 0.0, steps=2)
    return store


# what must not pass unseen


@pytest.mark.parametrize("check_every", [1, 100])
@pytest.mark.parametrize("remainder", ["refuse", "account"])
def test_a_batch_that_is_announced_and_skipped_is_left_out(check_every: int, remainder: str) -> None:
    """Its loss was not finite, or memory ran out."""
    model, store = Net(0.2).double(), MemoryStore()
    options = {"check_every": check_every, "remainder": remainder}
    with attrib.record(adamw(model), model, cross_entropy, store, **options) as recorder:
        for step in range(6):
            index, x, y = examples(5, step)
            recorder.zero_grad()
            recorder.batch(index, x, y)
            loss = cross_entropy(model, x, y).mean()
            if step == 3:
                continue
            loss.backward()
            recorder.step()
    run = attrib.open_run(store)
    assert [run.index(step)[0] for step in range(run.steps)] == [0, 100, 200, 400, 500]
    assert not set(run.examples) & set(range(300, 305))
    explain(store, model).check(1e-10)


@pytest.mark.parametrize("order", ["zeroed after the announcement", "zeroed before"])
def test_a_step_that_is_never_made_is_none(order: str) -> None:
    model, store = Net().double(), MemoryStore()
    with attrib.record(adamw(model), model, cross_entropy, store) as recorder:
        for step in range(5):
            index, x, y = examples(5, step)
            if order == "zeroed before":
                recorder.zero_grad()
            recorder.batch(index, x, y)
            loss = cross_entropy(model, x, y).mean()
            if order != "zeroed before":
                recorder.zero_grad()
            loss.backward()
            if step != 2:
                recorder.step()
    run = attrib.open_run(store)
    assert [run.index(step)[0] for step in range(run.steps)] == [0, 100, 300, 400]
    explain(store, model).check(1e-10)


def test_a_pass_that_nothing_is_learnt_from_is_no_announcement_missed() -> None:
    """A validation without no_grad, between the announcement and the step."""
    model, store = Net(0.2).double(), MemoryStore()
    with attrib.record(adamw(model), model, cross_entropy, store, check_every=2) as recorder:
        for step in range(5):
            index, x, y = examples(5, step)
            recorder.zero_grad()
            recorder.batch(index, x, y)
            cross_entropy(model, x, y).mean().backward()
            if step in (2, 3):
                model(x)
            recorder.step()
    explain(store, model).check(1e-10)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("change", ["clipped by value", "noise"])
def test_a_scaled_loss_is_told_from_what_is_done_to_gradients(passes: int, change: str) -> None:
    model, store = Net(), MemoryStore()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attrib.record(optimizer, model, cross_entropy, store, remainder="account", check_every=3) as recorder:
        for step in range(7):
            recorder.zero_grad()
            for n in range(passes):
                index, x, y = examples(5, 10 * step + n, torch.float32)
                recorder.batch(index, x, y)
                scaler.scale(cross_entropy(model, x, y).mean() / passes).backward()
            scaler.unscale_(recorder)
            if change == "noise":
                for p in model.parameters():
                    p.grad += 0.05 * torch.randn_like(p.grad)
            else:
                nn.utils.clip_grad_value_(model.parameters(), 0.02)
            scaler.step(recorder)
            scaler.update()
    run = attrib.open_run(store)
    for step in range(run.steps):
        np.testing.assert_allclose(run.scales(step), 1 / 5 / passes, rtol=1e-5)


@pytest.mark.parametrize("size", [5, 8])  # a sum over 8 is a mean times 2^3
@pytest.mark.parametrize("reduction", [torch.mean, torch.sum])
def test_clipping_by_value_is_no_unscaling(size: int, reduction: Any) -> None:
    model, store = Net().double(), MemoryStore()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attrib.record(optimizer, model, cross_entropy, store, remainder="account") as recorder:
        for step in range(3):
            index, x, y = examples(size, step)
            recorder.zero_grad()
            reduction(cross_entropy(model, x, y)).backward()
            nn.utils.clip_grad_value_(model.parameters(), 0.01)
            recorder.step(index, x, y)
    run = attrib.open_run(store)
    for step in range(3):
        np.testing.assert_allclose(run.scales(step), 1.0 if reduction is torch.sum else 1 / size, rtol=1e-12)


def test_a_factor_that_may_be_weight_or_scale_is_refused() -> None:
    """Eight times the mean, cut to less than a third: by clipping, or by what took the eight off again."""
    model, (index, x, y) = Net().double(), examples(5, 0)
    recorder = attrib.record(adamw(model), model, cross_entropy, MemoryStore(), remainder="account")

    def take(factor: float) -> None:
        recorder.zero_grad()
        (factor * cross_entropy(model, x, y).mean()).backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.01)
        recorder.step(index, x, y)

    with pytest.raises(errors.BatchIdentityError, match=r"got 2\^3.*Weight the loss by another number"):
        take(8.0)
    take(8.1)
    assert recorder.steps == 1


def test_one_factor_beside_is_read_off_whatever_is_added_to_gradients() -> None:
    model, store = Net().double(), MemoryStore()
    with attrib.record(adamw(model), model, cross_entropy, store, remainder="account") as recorder:
        for step in range(3):
            recorder.zero_grad()
            for n in range(4):
                index, x, y = examples(5, 10 * step + n)
                recorder.batch(index, x, y)
                (0.37 * cross_entropy(model, x, y).mean() / 4).backward()
            for p in model.parameters():
                p.grad += torch.randn_like(p.grad)
            recorder.step()
    run = attrib.open_run(store)
    for step in range(3):
        np.testing.assert_allclose(run.scales(step), 0.37 / 20, rtol=1e-9)


@pytest.mark.parametrize("passes", [5, 16])  # as many as the gradient has entries, and more
def test_weights_that_gradients_cannot_tell_apart_are_refused(passes: int) -> None:
    """As many batches as the gradient has entries sum to anything."""
    torch.manual_seed(0)
    model, store = nn.Linear(4, 1).double(), MemoryStore()

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (model(x)[:, 0] - y).square()

    for remainder, match in (
        ("refuse", "do not sum to p.grad"),
        ("account", "weights of the batches of a step cannot"),
    ):
        recorder = attrib.record(adamw(model), model, loss, store, remainder=remainder)
        recorder.zero_grad()
        for n in range(passes):
            index, x, y = examples(3, n)
            recorder.batch(index, x, y)
            (loss(model, x, y).sum() * (0.3 + 0.1 * n)).backward()
        with pytest.raises(errors.BatchIdentityError, match=match):
            recorder.step()


@pytest.mark.parametrize("capture", ["factors", "gradients"])
def test_a_buffer_that_is_filled_again_before_the_step_changes_no_share(capture: str) -> None:
    model, store, buffer = Net().double(), MemoryStore(), torch.zeros(5, 4, dtype=torch.float64)
    with attrib.record(adamw(model), model, cross_entropy, store, capture, check_every=100) as recorder:
        for step in range(5):
            index, x, y = examples(5, step)
            buffer.copy_(x)
            recorder.zero_grad()
            recorder.batch(index, buffer, y)
            cross_entropy(model, buffer, y).mean().backward()
            buffer.fill_(7.0)
            recorder.step()
    explain(store, model).check(1e-10)


def test_a_pass_that_is_not_heard_is_refused_where_numbers_are_drawn() -> None:
    model, store = Net(0.3).double(), MemoryStore()
    recorder = attrib.record(adamw(model), model, cross_entropy, store, check_every=100)
    for step in range(5):
        index, x, y = examples(5, step)
        recorder.zero_grad()
        if step != 3:
            cross_entropy(model, x, y).mean().backward()
            recorder.step(index, x, y)
            continue
        F.cross_entropy(model.forward(x), y).backward()
        with pytest.raises(errors.BatchIdentityError, match="got no forward pass of the model"):
            recorder.step(index, x, y)
    recorder.close()
    assert attrib.open_run(store).steps == 4


def test_penalties_and_dropped_batches_are_replayed_with_accumulation(tmp_path: Path) -> None:
    model = accumulate(tmp_path / "run", REDUCTIONS["mean over all"], 0.25)
    run = attrib.open_run(tmp_path / "run")

    def again(name: str, change: attrib.intervention.Intervention) -> attrib.Run:
        return attrib.replay(run, 0, change, model=model, loss=cross_entropy, store=tmp_path / name, progress=False)

    pulled = again("pulled", attrib.intervention.Penalty(lambda m: m.first.weight.square().sum(), 0.1))
    explain(tmp_path / "pulled", model).check(1e-10)
    assert pulled.reader.read("penalty").any()
    dropped = again("dropped", attrib.intervention.Drop(list(range(100, 103))))  # the second batch of step 0 in part
    assert [len(batch[0]) for batch in dropped.batches(0)] == [5, 2, 5]
    gone = again("gone", attrib.intervention.Drop(list(range(100, 105))))
    assert [len(batch[0]) for batch in gone.batches(0)] == [5, 5]


def test_a_flag_is_not_the_number_that_it_equals() -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor, flag: Any) -> Tensor:
        return cross_entropy(model, x, y) * (2 if flag is True else 1)

    model, store = Net().double(), MemoryStore()
    index, x, y = examples(5, 0)
    with attrib.record(adamw(model), model, loss, store, check_every=100) as recorder:
        for step in range(6):
            recorder.zero_grad()
            loss(model, x, y, (True, 1)[step % 2]).mean().backward()
            recorder.step(index, x, y, (True, 1)[step % 2])
    explain(store, model, loss).check(1e-10)
    run = attrib.open_run(store)
    assert [type(run.batch(step)[2]) for step in range(6)] == [bool, int] * 3


def test_an_announcement_after_the_pass_is_named() -> None:
    model = Net(0.5).double()
    recorder = attrib.record(adamw(model), model, cross_entropy, MemoryStore())
    index, x, y = examples(5, 0)
    losses = cross_entropy(model, x, y)
    recorder.batch(index, x, y)
    losses.mean().backward()
    with pytest.raises(errors.BatchIdentityError, match="a forward pass came before its batch was announced"):
        recorder.step()


@pytest.mark.parametrize("dtype", crossed([torch.float64, torch.bfloat16], fast=[(torch.float64,)]))
def test_a_language_model_is_trained_as_trainers_do(dtype: torch.dtype) -> None:
    """Accumulation of 4 with dropout, a shorter last group, clipping, a schedule, dicts, and autocast."""
    low = dtype == torch.bfloat16

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = drop(model(batch["input_ids"][:, :-1]))
        return F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none").mean(1)

    torch.manual_seed(0)
    model, drop, store = Gpt().to(torch.float32 if low else dtype), nn.Dropout(0.1), MemoryStore()
    tokens = torch.randint(0, 9, (44, 6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=12)
    recorder = attrib.record(optimizer, model, loss, store, check_every=3)
    batches = list(torch.arange(44).split(4))  # 11 micro-batches: 2 groups of 4, one of 3
    for epoch in range(4):
        for first in range(0, len(batches), 4):
            group = batches[first : first + 4]
            recorder.zero_grad()
            for rows in group:
                recorder.batch(rows, {"input_ids": tokens[rows], "note": f"epoch {epoch % 2}"})
                with torch.autocast("cpu", torch.bfloat16, enabled=low):
                    reduced = loss(model, {"input_ids": tokens[rows]}).mean() / len(group)
                reduced.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            recorder.step()
            schedule.step()
    recorder.close()
    run = attrib.open_run(store)
    assert [len(run.passes(step)) for step in range(run.steps)] == [4, 4, 3] * 4
    result = attrib.attribute(
        run, model, lambda m: m(tokens[:3, :-1])[:, -1, 0], loss=loss, progress=False, keep=("step", "example")
    )
    if not low:
        result.check(1e-10)
        return
    u = 2.0**-8
    ledger = result.check(1e-5)  # what float32 leaves: that of bfloat16 is a row
    assert np.nanmax(run.log("batch_identity")) <= u / 2  # one rounding of p.grad, half a unit
    # a share is rounded by each of the at most 7 products that it passes, and so the sums: their squares add up
    gross = np.abs(result.by("step", "example").values).sum((1, 2))
    assert (np.abs(result.remainder.values).sum((1, 2)) <= 7**0.5 * u * gross).all()
    assert ledger.identities["split"] <= 7**0.5 * u
    # the split by autograd: one loss at a time under the same autocast, the same random numbers, at the last step
    step, coefficients = run.steps - 1, torch.randn(2, run.layout.size, dtype=torch.float64)
    last = attrib.attribute(
        run, model, lambda m: linear(m, coefficients), loss=loss, progress=False, steps=slice(step, step + 1)
    )
    (group, *_), rates = run.optimizer(model, run.steps).param_groups, []
    for state in run.optimizer(model, run.steps).state.values():
        beta1, beta2 = group["betas"]
        root = (state["exp_avg_sq"].double() / (1 - beta2**run.steps)).sqrt() + group["eps"]
        rates.append((group["lr"] * (1 - beta1) / (1 - beta1**run.steps) / root).flatten())
    rates = torch.cat(rates).numpy() * coefficients.numpy()
    shares = []
    run.load(model, step)
    for recorded, (batch,) in zip(run.passes(step), run.batches(step), strict=True):
        for i in range(recorded.size):
            torch.set_rng_state(recorded.random[: len(torch.get_rng_state())].clone())
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                losses = loss(model, batch)
            (losses[i] / 12).backward()  # as the loop does: another multiple is rounded otherwise
            assert recorded.scale < 1 / 12  # it is clipped
            shares.append(
                torch.cat([p.grad.flatten() for p in model.parameters()]).double().numpy() * recorded.scale * 12
            )
    want, size = -rates @ np.array(shares).T, np.linalg.norm(rates[:, None] * np.array(shares), axis=2)
    found = last.by("example").sel(example=run.index(step).tolist()).values
    assert (np.abs(found - want) <= 7**0.5 * u * size).all()
