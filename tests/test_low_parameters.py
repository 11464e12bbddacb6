"""Parameters in bfloat16 or float16: recorded with their optimizer's own arithmetic, bit for bit, and accounted for.

U = 2^-8 is the most that one rounding to bfloat16 changes a number by, relative to it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from cases import FEW as EACH_RULE
from cases import MODELS, OPTIMIZERS, crossed, few_first
from test_along import layout_of
from torch import Tensor, nn
from training import Trained, assert_same_arrays, flat, train
from zarr.storage import MemoryStore

import attrib
from attrib.checks import step_identity
from attrib.checks.intake import CAPTURES
from attrib.constants import to_array, to_tensor
from attrib.errors import StepIdentityError
from attrib.gradients import ExampleGradients
from attrib.verify import verify

U = 2.0**-8
STEPS = 6
# what is left of sums that are right: the coefficients of six updates, each made of some ten operations in float32
ROUNDING = STEPS * 16 * 2.0**-24
BF16, F16 = torch.bfloat16, torch.float16
FEW = ("adamw", "sgd nesterov decay", "muon + sgd + adafactor", "rmsprop groups")
BOUNDED = [
    name for name in OPTIMIZERS if name.startswith(("sgd", "adam")) and not name.startswith(("sgd fused", "adamax"))
]
FIRST = ("adamw amsgrad", "sgd nesterov decay", "adam fused")


def low(store: Any, optimizer: str = "adamw", model: str = "mlp", capture: str = "replay", **options: Any) -> Trained:
    return train(store, OPTIMIZERS[optimizer], model, capture, **{"dtype": BF16, "check_every": 1, **options})


def check_complete(trained: Trained, **options: Any) -> attrib.Result:
    result = trained.attribute(**options)
    # shares and p.grad differ by a rounding of each entry where autograd sums it
    result.check(U)
    assert float(abs(result.dataset["residual"] / result.dataset["gross"]).max()) <= ROUNDING
    return result


@pytest.mark.parametrize(
    ("optimizer", "model", "capture"),
    few_first(OPTIMIZERS, ("mlp", "gpt"), CAPTURES, few=FEW[:2]),
)
def test_a_run_in_bfloat16_is_accounted_for(optimizer: str, model: str, capture: str) -> None:
    if optimizer == "sgd fused":
        pytest.skip("torch's own is wrong, see below")
    trained = low(MemoryStore(), optimizer, model, capture)
    assert trained.run.unmodelled
    # the pass is the loop's own, and its sums are
    assert np.nanmax(trained.run.log("batch_identity")) <= 2.0**-23
    if capture != "replay" and model == "mlp":
        # rounded where autograd sums each use of a weight. (Layer norm of the gpt keeps mean and scale in the type of its
        # weights, of which gradients are sums that cancel: as far off as those do, within the bound of the library)
        assert np.nanmax(trained.run.log("split_identity")) <= 2 * U
    result = check_complete(trained)
    sizes = abs(result.update_remainder)
    assert float(sizes.sum()) > 0
    assert "update remainder" in str(result.ledger())
    assert verify(trained.run, False, trained.model, trained.case.loss).failure is None
    last = dict(trained.model.named_parameters())
    assert all(torch.equal(p, last[name]) for name, p in trained.run.parameters(STEPS).items())


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_every_share_is_the_gradient_of_its_own_loss(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = MODELS[name]
    model, batch = case.build().to(dtype), case.data(12)
    batch = tuple(t.to(dtype) if t.is_floating_point() else t for t in batch)
    layout, theta = layout_of(model)
    shares = ExampleGradients(case.loss, model, layout, dtype).at(frozenset(layout.names), 1 / 12)
    rows = shares.rows(theta.float(), batch)
    products = shares.contract(theta.float(), batch, rows)[1].sum(-1)
    assert rows.dtype == torch.float32
    assert not torch.equal(rows, rows.to(dtype).float())  # the parts of a sum that training rounds once
    losses = case.loss(model, *batch) * (1 / 12)
    unit = torch.finfo(dtype).eps / 2
    for i, loss in enumerate(losses):
        model.zero_grad()
        loss.backward(retain_graph=True)
        one = layout.flatten(p.grad for p in model.parameters()).float()
        # each entry is rounded once where it is summed, where a weight is used twice once for each use and where they meet;
        # numbers below the smallest normal by half of the smallest
        kind = torch.finfo(dtype)
        few = 3 * (unit * float(one.norm()) + kind.smallest_normal * kind.eps * layout.size**0.5)
        assert float((rows[i] - one).norm()) <= few
        assert float((products[:, i] - rows @ rows[i]).abs().max()) <= 1e-5 * float(rows.norm(dim=1).max()) ** 2 + few


# a measurement that is linear: its gradient is the same at every step


def summed(model: nn.Module) -> Tensor:
    return torch.stack([torch.stack([p.sum() for p in model.parameters()]).sum()])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_row_holds_what_rounding_did_to_parameters_and_momentum(momentum: float) -> None:
    lr, buffers = 0.125, []

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made = torch.optim.SGD(parameters, lr=lr, momentum=momentum)

        def hold(optimizer: Any, args: Any, kwargs: Any) -> None:
            if momentum:
                buffers.append([made.state[p]["momentum_buffer"].clone() for p in parameters])

        made.register_step_post_hook(hold)
        return made

    trained = train(MemoryStore(), optimizer, dtype=BF16)
    result = trained.attribute(summed)
    thetas = [torch.from_numpy(t) for t in trained.thetas]
    gradients = trained.run.reader.tensor("gradient", slice(0, STEPS)).double()
    before = torch.zeros_like(gradients[0])
    for step in range(STEPS):
        linear = momentum * before + gradients[step]
        row = float((thetas[step + 1] - thetas[step] + lr * linear).sum())
        if momentum:
            before = torch.cat([b.flatten() for b in buffers[step]]).double()
            later = sum(lr * momentum**k for k in range(1, STEPS - step))
            row -= later * float((before - linear).sum())
        got = float(result.update_remainder[0, step].sum())
        assert got == pytest.approx(row, abs=ROUNDING * float(abs(gradients[step]).sum()))
        assert row != 0


def test_the_update_remainder_and_the_shares_are_all_of_the_change() -> None:
    result = check_complete(low(MemoryStore()))
    terms = result.ledger().terms
    whole = sum(terms[name] for name in ("examples", "decay", "inherited", "remainder", "update_remainder"))
    change = terms["final"] - terms["initial"]
    assert float(abs(whole - change).max()) <= ROUNDING * float(result.dataset["gross"].max())
    without = abs(whole - terms["update_remainder"] - change)
    assert float(without.max()) > 1e-3 * float(abs(change).max())  # it is large beside an update


# bits


# every optimizer's bits are those of its rule run again, see test_optim: here one of each rule; eps is 0 in float16
KEY_FRAMES = [(name, BF16) for name in dict.fromkeys([*FEW, *EACH_RULE])] + [("sgd", F16), ("sgd groups", F16)]


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [pytest.param(*row, marks=[] if row[0] in FEW[1:3] else pytest.mark.slow) for row in KEY_FRAMES],
)
def test_states_between_key_frames_are_made_again_bit_for_bit(optimizer: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"steps": 11, "dtype": dtype, "check_every": 50}
    few, whole = (low(MemoryStore(), optimizer, states_every=every, **options) for every in (8, 1))
    assert few.run.reader.array("theta").shape[0] == 3
    for step, theta in enumerate(whole.thetas):
        assert torch.equal(few.run.vector(step), whole.run.vector(step))
        few.run.load(few.model, step)
        np.testing.assert_array_equal(flat(few.model), theta)
    if optimizer not in FEW:
        return  # blocks are made of the states
    mine, other = few.attribute(), whole.attribute()
    for name in mine.dataset.data_vars:
        np.testing.assert_array_equal(mine.dataset[name], other.dataset[name], err_msg=str(name))


@pytest.mark.parametrize("optimizer", FEW)
def test_an_untouched_replay_is_the_run_bit_for_bit(optimizer: str) -> None:
    trained = low(MemoryStore(), optimizer, steps=9)
    for start in (0, 3, 8):
        again = attrib.replay(trained.run, start, model=trained.model, loss=trained.case.loss, store=MemoryStore())
        for step in range(start, 10):
            assert torch.equal(again.vector(step - start), trained.run.vector(step)), step


class Interrupted(Exception):
    """The machine is gone."""


def loop(store: Any, kind: Callable[[list[nn.Parameter]], Any], capture: str, stop_at: int = 9, **options: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)).to(BF16)
    x, y, loss = torch.randn(24, 4).to(BF16), torch.randint(0, 3, (24,)), MODELS["mlp"].loss
    with attrib.record(kind(list(model.parameters())), model, loss, store, capture, block=4, **options) as recorder:
        for n in range(recorder.steps, 9):
            if n == stop_at:
                raise Interrupted
            at = torch.arange(n, n + 7)
            recorder.zero_grad()
            loss(model, x[at], y[at]).mean().backward()
            recorder.step(at, x[at], y[at])


@pytest.mark.parametrize(("optimizer", "capture"), few_first(FEW, CAPTURES, few=FEW[:2]))
def test_a_run_that_ended_early_is_gone_on_with_bit_for_bit(optimizer: str, capture: str, tmp_path: Path) -> None:
    loop(tmp_path / "whole", OPTIMIZERS[optimizer], capture)
    whole = attrib.open_run(tmp_path / "whole")
    for stop in (3, 6):
        store = tmp_path / f"cut {stop}"
        with pytest.raises(Interrupted):
            loop(store, OPTIMIZERS[optimizer], capture, stop)
        loop(store, OPTIMIZERS[optimizer], capture, resume=True)
        assert_same_arrays(attrib.open_run(store), whole, numbering=False)


def test_what_numpy_lacks_is_stored_as_integers_that_any_reader_of_zarr_has(tmp_path: Path) -> None:
    trained = low(tmp_path / "run", "adam amsgrad", capture="factors")
    group = zarr.open_group(tmp_path / "run", mode="r")
    assert group.attrs["attrib"]["dtype"] == "bfloat16"
    for name in ("theta", "gradient", "state/momentum", "state/exp_avg_sq", "state/max_exp_avg_sq"):
        assert group[name].dtype == np.int16, name
    last = torch.from_numpy(group["theta"][STEPS]).view(torch.bfloat16)
    assert torch.equal(last, torch.cat([p.detach().flatten() for p in trained.model.parameters()]))
    floats = {group[name].dtype for name in trained.run.reader.names() if name.startswith("factors/")} - {
        np.dtype(np.int64)
    }
    assert floats == {np.dtype(np.float32)}  # of the shares, which nobody rounds


def test_integers_and_back_are_the_bits() -> None:
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    array = to_array(bits.view(BF16))
    assert array.dtype == np.int16
    assert torch.equal(to_tensor(array, "bfloat16").view(torch.int16), bits)


# the step identity


@pytest.mark.parametrize("optimizer", crossed(BOUNDED, fast=[(name,) for name in FIRST]))
def test_each_entry_of_an_update_is_the_rules_to_the_roundings_of_torch(optimizer: str) -> None:
    trained, worst = low(MemoryStore(), optimizer, steps=12), 0.0
    for block in trained.run.blocks(0, 12):
        for n in range(len(block)):
            _, within = block.bounds(n)
            assert within is not None
            off = (block.theta[n + 1] - block.theta[n] - block.updates[n][1]).abs()
            assert bool((off <= within).all())
            worst = max(worst, float((off / within).max()))
    assert worst > 0.05  # and no wider than it has to be: one rounding of several at their worst


def test_an_update_that_is_not_the_rules_is_refused() -> None:
    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made = torch.optim.Adam(parameters, lr=0.05)

        def twice(optimizer: Any, args: Any, kwargs: Any) -> None:
            for p in parameters:
                p.grad.neg_()

        made.register_step_pre_hook(twice)
        return made

    with pytest.raises(StepIdentityError, match="the replayed update is not the optimizer's"):
        train(MemoryStore(), optimizer, dtype=BF16)


def test_one_entry_beyond_its_bound_is_named() -> None:
    trained = low(MemoryStore())
    (block,) = trained.run.blocks(0, 1)
    _, within = block.bounds(0)
    assert within is not None
    update, (theta, end), layout = block.updates[0][1], block.theta, trained.run.layout
    step_identity(layout, theta, end, update, 0, None, within)
    update = update.clone()
    update[-1] += 2 * within[-1]
    with pytest.raises(StepIdentityError, match=f"at parameter '{layout.names[-1]}'"):
        step_identity(layout, theta, end, update, 0, None, within)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_kernel_of_torch_that_moves_nothing_is_refused(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.ones(64, dtype=dtype))
    p.grad = torch.ones_like(p)
    torch.optim.SGD([p], lr=0.1, fused=True).step()
    if bool((p < 1).all()):
        pytest.skip("this torch has it right")
    with pytest.raises(StepIdentityError, match="Pass fused=False"):
        low(MemoryStore(), "sgd fused", dtype=dtype)


# float16


@pytest.mark.parametrize(("optimizer", "capture"), crossed(["sgd momentum", "adam fused", "adadelta"], CAPTURES))
def test_a_run_in_float16_is_accounted_for(optimizer: str, capture: str) -> None:
    trained = low(MemoryStore(), optimizer, capture=capture, dtype=F16)
    assert (trained.run.dtype, trained.run.precision) == (F16, F16)
    result = trained.attribute()
    result.check(torch.finfo(F16).eps / 2)
    assert float(abs(result.dataset["residual"] / result.dataset["gross"]).max()) <= ROUNDING


def test_an_eps_that_float16_rounds_to_zero_is_named_and_a_larger_one_works() -> None:
    with pytest.raises(StepIdentityError, match="an eps below 3e-8 is 0"):
        low(MemoryStore(), "adam", dtype=F16)
    train(MemoryStore(), lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-4), dtype=F16).attribute().check(2.0**-11)


# loops as they are


def test_passes_of_a_step_clipping_and_a_penalty_go_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = MODELS["mlp"]
    model, (x, y) = case.build().to(BF16), case.data(24)

    def penalty(model: nn.Module) -> Tensor:
        return 0.01 * torch.stack([p.square().sum() for p in model.parameters()]).sum()

    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    with attrib.record(
        inner, model, case.loss, tmp_path / "run", "factors", penalty=penalty, check_every=1
    ) as recorder:
        for _ in range(STEPS):
            recorder.zero_grad()
            for size in (7, 4):
                at = torch.randperm(24)[:size]
                recorder.batch(at, x[at], y[at])
                (case.loss(model, x[at], y[at]).mean() / 2).backward()
            penalty(model).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            recorder.step()
    run = attrib.open_run(tmp_path / "run")
    result = attrib.attribute(run, model, attrib.measure.log_prob(x[:2], y[:2]), loss=case.loss, progress=False)
    # p.grad is rounded where each pass and the penalty are added, and where it is clipped
    result.check(4 * U)
    assert float(abs(result.dataset["residual"] / result.dataset["gross"]).max()) <= ROUNDING
    assert verify(run, False, model, case.loss).failure is None


def test_a_run_in_bfloat16_may_be_attributed_in_double_precision() -> None:
    trained = low(MemoryStore())
    found, want = (trained.attribute(dtype=dtype) for dtype in (torch.float64, None))
    # every call rounds what it returns, either way: embedding, two layers, one between them and the loss, there and back
    bound = 6 * 10**0.5 * U
    found.check(bound)
    scale = float(np.abs(want.by("step", "example")).max())
    np.testing.assert_allclose(found.by("step", "example"), want.by("step", "example"), atol=bound * scale)


def test_the_rule_read_off_the_update_goes_with_parameters_in_bfloat16() -> None:
    class Own(torch.optim.SGD):
        """Of no rule."""

    trained = train(MemoryStore(), lambda p: Own(p, lr=0.1, momentum=0.9), dtype=BF16, rule="frozen")
    check_complete(trained)


def test_the_measurement_of_an_average_of_parameters_in_bfloat16_is_accounted_for() -> None:
    trained = low(MemoryStore(), "sgd momentum")
    average = attrib.measure.averaged(trained.measurement(), attrib.measure.Ema(0.5))
    check_complete(trained, measurement=average)


def test_parameters_of_two_types_are_refused_and_the_advice_is_true() -> None:
    model = nn.Sequential(nn.Linear(4, 5).to(BF16), nn.Linear(5, 3))
    with pytest.raises(
        ValueError, match=r"must share one type: got torch.float32, expected .*bfloat16.*, at '1.weight'"
    ):
        attrib.record(torch.optim.SGD(model.parameters(), lr=0.1), model, MODELS["mlp"].loss, MemoryStore())
    model.to(torch.float32)
    attrib.record(torch.optim.SGD(model.parameters(), lr=0.1), model, MODELS["mlp"].loss, MemoryStore()).close()
