"""Mixed precision: every share is that of its own loss under the loop's autocast, to the roundings that torch itself makes.

U = 2^-8 is the most that one rounding to bfloat16 changes a number by, relative to it (8 significant bits, to the nearest).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import test_random_models as random_models
import torch
import torch.nn.functional as F
from cases import LAYERS, MODELS, covered, crossed
from hypothesis import given, settings
from hypothesis import strategies as st
from test_along import layout_of
from torch import Tensor, nn

import attrib
from attrib.autocast import Autocast, current, from_facts, under
from attrib.batch import Batch
from attrib.checks.intake import CAPTURES
from attrib.curvature import Curvature
from attrib.errors import BatchIdentityError, ChangedOutsideError
from attrib.functional import Functional
from attrib.gradients import ExampleGradients

U = 2.0**-8
BF16 = Autocast("cpu", torch.bfloat16)
AROUND = ("loss", "model", "inside")
Loss = Callable[..., Tensor]


def on(dtype: torch.dtype = torch.bfloat16) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype)


def entering(loss: Loss) -> Loss:
    """The same, entering autocast by itself."""

    def entered(model: nn.Module, *batch: Tensor) -> Tensor:
        with on():
            return loss(model, *batch)

    return entered


def as_trained(loss: Loss, around: str) -> tuple[Loss, Loss, Autocast | None]:
    """The loss as it is given to attrib, as the loop computes it, and what attrib is told of its autocast."""
    if around == "inside":
        return entering(loss), entering(loss), None
    autocast = replace(BF16, around=around)

    def computed(model: nn.Module, *batch: Tensor) -> Tensor:
        with under(autocast, model):
            return loss(model, *batch)

    return loss, computed, autocast


def each_parameter(layout: Any, directions: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Q, P), (B, P) -> <U, g_i> of each tensor, and the 2-norm of what it is the sum of; (Q, B, K) each."""
    parts = [part for _, part in layout.slices()]
    products = np.stack([directions[:, p] @ rows[:, p].T for p in parts], -1)
    return products, np.sqrt(np.stack([directions[:, p] ** 2 @ rows[:, p].T ** 2 for p in parts], -1))


def check_shares(model: nn.Module, loss: Loss, batch: tuple[Tensor, ...], around: str, uses: int = 1) -> None:
    """In every form, against one loss at a time. uses: of a weight, whose gradients are rounded one by one."""
    asked, computed, autocast = as_trained(loss, around)
    layout, theta = layout_of(model)
    size = len(batch[0])
    shares = ExampleGradients(asked, model, layout, torch.float32, autocast=autocast)
    shares.vector.values(theta, batch)
    shares = shares.at(shares.active, 1 / size)
    want = oracles.losses_one_by_one(model, theta.numpy(), lambda *a: computed(*a) / size, batch).astype(np.float64)
    directions = torch.randn(2, layout.size)
    parts, norms = each_parameter(layout, directions.double().numpy(), want)
    # autograd rounds every entry of a weight's gradient, by U of it at most, either way: of what is summed along a direction
    # that is U / sqrt(3) of the 2-norm, one standard deviation; the shares are not rounded there. Six of them
    bound = 6 / 3**0.5 * U * uses * norms + 1e-6 * norms.max()
    for _ in range(5):  # the last ones from a traced graph
        assert (np.abs(shares.contract(theta, batch, directions)[1].numpy() - parts) <= bound).all()
    # all entries together: the largest rounding of each is U
    off = np.linalg.norm(shares.rows(theta, batch).numpy() - want, axis=1)
    assert (off <= U * uses * np.linalg.norm(want, axis=1) + 1e-6 * np.abs(want).max()).all()
    losses, total = shares.total(theta, batch)
    torch.testing.assert_close(losses.float() * size, computed(model, *batch).detach().float(), rtol=2 * U, atol=0)
    assert float((total - shares.rows(theta, batch).sum(0)).norm()) <= U * uses * float(total.norm()) + 1e-6


@pytest.mark.parametrize(("name", "around"), crossed(MODELS, AROUND))
def test_every_share_of_a_model_under_autocast_is_that_of_its_loss(name: str, around: str) -> None:
    torch.manual_seed(0)
    case = MODELS[name]
    check_shares(case.build(), case.loss, case.data(12), around, uses=2 if name == "gpt" else 1)


@pytest.mark.parametrize(("name", "around"), crossed(LAYERS, AROUND))
def test_every_share_of_a_layer_under_autocast_is_that_of_its_loss(name: str, around: str) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[name]

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        y = model(x).flatten(1).float()
        return (y * torch.linspace(-1, 1, y.shape[1])).sin().sum(1)

    check_shares(build(), loss, (torch.randn(9, *shape),), around, uses=2)


class Chained(nn.Module):
    """A call without a closed form on what a linear layer has rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.weight = nn.Linear(6, 6), nn.Parameter(torch.randn(6, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bd,dhe->bhe", self.linear(x), self.weight).flatten(1)


@pytest.mark.parametrize("name", ["chained", *MODELS, *LAYERS])
def test_what_is_read_off_at_the_calls_still_is_under_autocast(name: str) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS.get(name, (Chained, (6,)))
    case = MODELS.get(name)
    model, batch = (build(), (torch.randn(9, *shape),)) if case is None else (case.build(), case.data(9))
    loss = case.loss if case else lambda m, x: m(x).flatten(1).float().sin().sum(1)
    layout, theta = layout_of(model)
    slow = []
    for autocast in (None, BF16):
        shares = ExampleGradients(loss, model, layout, torch.float32, autocast=autocast)
        shares.contract(theta, batch, theta[None])
        assert shares._forms.assignments
        slow.append([a.whole for a in shares._forms.assignments.values()])
    assert slow[0] == slow[1]


def test_losses_that_differ_by_little_alone_are_not_mapped_one_by_one() -> None:
    """Found at random: an example by itself is its own mean, and its gradient other by 6 %, which rounding might be."""
    torch.manual_seed(1)
    model = random_models.Random([random_models.residual, random_models.centred])
    layout, theta = layout_of(model)
    shares = ExampleGradients(random_models.loss, model, layout, torch.float32, autocast=BF16)
    _, computed, _ = as_trained(random_models.loss, "loss")
    torch.randn(2, layout.size)  # the batches that it was found with come after
    for size in (1, 2):
        batch = (torch.randn(size, random_models.LENGTH, random_models.WIDTH),)
        want = oracles.losses_one_by_one(model, theta.numpy(), computed, batch)
        off = np.abs(shares.rows(theta, batch).numpy() - want).max()
        assert off <= U * np.abs(want).max()  # rounded once


@pytest.mark.parametrize("around", AROUND)
def test_a_share_rounded_once_is_what_autograd_gives_bit_for_bit(around: str) -> None:
    """Where a weight is used once for an example: both are of the rounded inputs and output gradients."""
    torch.manual_seed(0)
    model, batch = MODELS["mlp"].build(), MODELS["mlp"].data(12)
    asked, computed, autocast = as_trained(MODELS["mlp"].loss, around)
    layout, theta = layout_of(model)
    rows = ExampleGradients(asked, model, layout, torch.float32, autocast=autocast).rows(theta, batch)
    want = torch.from_numpy(oracles.losses_one_by_one(model, theta.numpy(), computed, batch))
    for name, part in layout.slices():
        once = rows[:, part] if name == "embedding.weight" else rows[:, part].bfloat16().float()
        assert torch.equal(once, want[:, part]), name
        assert (name in ("hidden.weight", "output.weight")) == (not torch.equal(rows[:, part], want[:, part])), name


@pytest.mark.parametrize("around", AROUND)
def test_the_derivative_along_a_direction_is_that_of_the_loss_under_autocast(around: str) -> None:
    """All three ways. A tangent is rounded once more at every product that it passes, as many as the path is long."""
    torch.manual_seed(0)
    case = MODELS["gpt"]
    model, batch = case.build(), case.data(20)
    asked, computed, autocast = as_trained(case.loss, around)
    layout, theta = layout_of(model)
    vector = ExampleGradients(asked, model, layout, torch.float32, autocast=autocast).vector
    want = oracles.losses_one_by_one(model, theta.numpy(), computed, batch).astype(np.float64)
    directions = torch.randn(1, layout.size)
    parts, norms = each_parameter(layout, directions.double().numpy(), want)
    named = layout.unflatten(directions)
    for way in ("forward", "double", "single"):
        vector._ways = {vector._kind(Batch.of(batch)): way}
        found = vector.along(theta, batch, named, [list(layout.names)])[1][0, :, 0].numpy()
        # 7 products from the embedding to the logits, each rounding by U: their squares add up
        assert (np.abs(found - parts[0].sum(-1)) <= 6 * 7**0.5 * U * np.linalg.norm(norms[0], axis=-1)).all(), way


def chosen_rows(m: Any, h: Tensor, x: Tensor) -> Tensor:
    """As that of the random models, which asks for one type throughout."""
    (rows,) = torch.where(x[:, 0, 0] > 0)
    return h.index_add(0, rows, torch.tanh(m.linear(h[rows])).to(h.dtype))


# and of values in 8 bits many are equal: which of them a sort puts first, and gives the gradient to, is nobody's
LEFT_OUT = (random_models.chosen_rows, random_models.sorted_features)
STEPS = [*(step for step in random_models.STEPS if step not in LEFT_OUT), chosen_rows]


# bounds of rounding hold with all but certainty: the same examples every time
@settings(derandomize=True)
@given(
    steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=3),
    seed=st.integers(0, 10_000),
    around=st.sampled_from(AROUND),
)
def test_every_share_of_a_random_model_under_autocast_is_that_of_its_loss(
    steps: list[Any], sizes: list[int], seed: int, around: str
) -> None:
    torch.manual_seed(seed)
    model = random_models.Random(steps)
    layout, theta = layout_of(model)
    asked, computed, autocast = as_trained(random_models.loss, around)
    shares = ExampleGradients(asked, model, layout, torch.float32, autocast=autocast)
    directions = torch.randn(2, layout.size)
    for size in sizes:
        batch = (torch.randn(size, random_models.LENGTH, random_models.WIDTH),)
        want = oracles.losses_one_by_one(model, theta.numpy(), computed, batch).astype(np.float64)
        parts, norms = each_parameter(layout, directions.double().numpy(), want)
        # what goes along a direction is rounded at each of at most 4 products, what is read off at none. Where gradients
        # cancel between the up to 5 uses of a weight, rounding is of what they cancelled from: of the size of the largest
        bound = 6 * (4 + 5) ** 0.5 * U * (norms + norms.max())
        assert (np.abs(shares.contract(theta, batch, directions)[1].numpy() - parts) <= bound).all()
        off = np.abs(shares.rows(theta, batch).numpy() - want)
        assert off.max() <= 6 * 5**0.5 * U * np.abs(want).max() + 1e-6


# recorded


class Inside(nn.Module):
    """A model that enters autocast by itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with on():
            return self.model(x)


class Bench:
    """A loop under autocast: round the loss, round the model, or inside of either."""

    def __init__(self, name: str = "mlp", where: str = "loss", dtype: torch.dtype = torch.bfloat16) -> None:
        torch.manual_seed(0)
        self.case, self.where, self.dtype = MODELS[name], where, dtype
        self.x, self.y = self.case.data(24)
        self.model = Inside(self.case.build()) if where == "inside model" else self.case.build()
        self.loss = entering(self.case.loss) if where == "inside loss" else self.case.loss

    def losses(self, at: Tensor) -> Tensor:
        autocast = {"loss": Autocast("cpu", self.dtype), "model": Autocast("cpu", self.dtype, "model")}.get(self.where)
        with under(autocast, self.model):
            return self.loss(self.model, self.x[at], self.y[at])

    def train(
        self,
        store: Path,
        capture: str = "replay",
        scale: float = 1.0,
        each: Callable[[], AbstractContextManager[Any]] = nullcontext,
        **options: Any,
    ) -> attrib.Run:
        """scale: of the loss, taken off the gradients before the step. each: around every step of the recorder."""
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        options = {"check_every": 2, **options}
        with attrib.record(optimizer, self.model, self.loss, store, capture, **options) as recorder:
            for step in range(5):
                at = torch.randperm(24)[: 10 - step % 2]
                recorder.zero_grad()
                (self.losses(at).mean() * scale).backward()
                for p in self.model.parameters():
                    p.grad /= scale
                with each():
                    recorder.step(at, self.x[at], self.y[at])
        return attrib.open_run(store)

    def attribute(self, run: attrib.Run, **options: Any) -> attrib.Result:
        measurement = attrib.measure.loss(self.x[:3], self.y[:3], self.case.loss)
        return attrib.attribute(run, self.model, measurement, loss=self.loss, progress=False, **options)


WHERE = ("loss", "model", "inside loss", "inside model")


def check_run(bench: Bench, run: attrib.Run, rounding: float = U) -> None:
    # the shares are summed by the very pass that the loop made: nothing is rounded otherwise, but for the mean in float32
    assert np.nanmax(run.log("batch_identity")) <= 1e-6
    # a processor without instructions for the type sums a convolution's gradient over the batch, of 10 at most, in that
    # type: as many roundings, which go either way
    rounding *= 10**0.5 if any(isinstance(m, nn.Conv2d) for m in bench.model.modules()) else 1.0
    if run.capture != "replay":  # each entry of a gradient is rounded where autograd sums it, and not in the factors
        assert np.nanmax(run.log("split_identity")) <= rounding
    # the same rounding stands between p.grad and the sum of the shares: of each entry it goes either way, so that along a
    # sensitivity it is no more than a rounding of what is summed
    bench.attribute(run).check(rounding)
    assert attrib.verify(run, progress=False, model=bench.model, loss=bench.loss).failure is None


@pytest.mark.parametrize(("where", "name", "capture"), covered(WHERE, MODELS, CAPTURES))
def test_a_loop_under_autocast_is_accounted_for(where: str, name: str, capture: str, tmp_path: Path) -> None:
    bench = Bench(name, where)
    run = bench.train(tmp_path / "run", capture)
    assert run.precision == torch.bfloat16
    assert run.autocast is not None
    # the loss that enters it by itself is as well computed with it around
    assert run.autocast.around == {"inside loss": "loss", "inside model": "inside"}.get(where, where)
    check_run(bench, run)


def test_autocast_round_the_model_alone_is_told_from_that_round_the_loss(tmp_path: Path) -> None:
    """A product outside of the model is rounded by the one and not by the other."""
    torch.manual_seed(0)
    model, outside = nn.Linear(6, 5), torch.randn(5, 3)
    x, y = torch.randn(12, 6), torch.randint(0, 3, (12,))

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m(x).float() @ outside, y, reduction="none")

    def within(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with on():
            features = m(x)
        return F.cross_entropy(features.float() @ outside, y, reduction="none")

    for around, given_loss in (("loss", loss), ("model", loss), ("model", within)):
        asked = replace(BF16, around=around) if given_loss is loss else None
        store = tmp_path / f"{around} {given_loss.__name__}"
        with attrib.record(torch.optim.SGD(model.parameters(), lr=0.1), model, given_loss, store) as recorder:
            recorder.zero_grad()
            with under(asked, model):
                losses = given_loss(model, x, y)
            losses.mean().backward()
            recorder.step(torch.arange(12), x, y)
        run = attrib.open_run(store)
        assert run.autocast is not None
        assert run.autocast.around == around
        assert run.log("batch_identity")[0] <= 1e-6  # of the same roundings


def test_a_loss_that_rounds_by_hand_is_heard(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 1), torch.randn(12, 6)

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), m.weight.bfloat16(), m.bias.bfloat16()).float().sin().sum(1)

    with attrib.record(
        torch.optim.SGD(model.parameters(), lr=0.1), model, loss, tmp_path / "run", "factors"
    ) as recorder:
        for _ in range(3):
            recorder.zero_grad()
            loss(model, x).mean().backward()
            recorder.step(torch.arange(12), x)
    run = attrib.open_run(tmp_path / "run")
    assert (run.precision, run.autocast) == (torch.bfloat16, replace(BF16, around="inside"))
    attrib.attribute(run, model, lambda m: m(x[:2])[:, 0], loss=loss, progress=False).check(U)


SCALES = ((torch.bfloat16, 65536.0), (torch.float16, 1.0), (torch.float16, 4096.0))


@pytest.mark.parametrize(("scaled", "capture"), crossed(SCALES, CAPTURES))
def test_a_loss_that_is_scaled_as_by_a_grad_scaler_is_accounted_for(
    scaled: tuple[torch.dtype, float], capture: str, tmp_path: Path
) -> None:
    """A power of two rounds nothing otherwise."""
    dtype, scale = scaled
    bench = Bench("cnn", "loss", dtype)
    run = bench.train(tmp_path / "run", capture, scale)
    assert run.precision == dtype
    check_run(bench, run, torch.finfo(dtype).eps / 2)


def test_gradients_that_float16_lets_underflow_are_those_of_the_loop_none_the_less(tmp_path: Path) -> None:
    """What is below 2^-24 is lost in the loop, and in the shares: an unscaled loop trains on less, and is accounted for."""
    bench = Bench("mlp", "loss", torch.float16)
    whole = bench.case.loss
    bench.loss = lambda m, x, y: whole(m, x, y) * 2.0**-14
    run = bench.train(tmp_path / "run")
    assert np.nanmax(run.log("batch_identity")) <= 1e-6  # the same pass
    scaled = Bench("mlp", "loss", torch.float16)
    scaled.loss = lambda m, x, y: whole(m, x, y) * 2.0**-14
    with_scale = scaled.train(tmp_path / "scaled", scale=2.0**14)
    assert np.nanmax(with_scale.log("batch_identity")) <= 1e-6
    first, second = (next(iter(r.blocks(0, 1)))[0].examples for r in (run, with_scale))
    assert bool(((first == 0) & (second != 0)).any())


def test_a_grad_scaler_may_unscale_before_the_step(tmp_path: Path) -> None:
    bench, scaler = Bench("mlp"), torch.amp.GradScaler("cpu")
    recorder = attrib.record(
        torch.optim.SGD(bench.model.parameters(), lr=0.1), bench.model, bench.loss, tmp_path / "run"
    )
    with recorder:
        for _ in range(3):
            at = torch.randperm(24)[:9]
            recorder.zero_grad()
            scaler.scale(bench.losses(at).mean()).backward()
            scaler.unscale_(recorder)
            nn.utils.clip_grad_norm_(bench.model.parameters(), 0.5)
            recorder.step(at, bench.x[at], bench.y[at])
            scaler.update()
    check_run(bench, attrib.open_run(tmp_path / "run"))


def test_dropout_is_drawn_again_under_autocast(tmp_path: Path) -> None:
    bench = Bench("mlp")
    bench.model.output = nn.Sequential(nn.Dropout(0.5), bench.model.output)
    run = bench.train(tmp_path / "run")
    assert run.header["settled"]["stochastic"]
    bench.model.eval()
    check_run(bench, run)


def test_autocast_around_the_steps_of_the_recorder_changes_nothing(tmp_path: Path) -> None:
    alone, surrounded = Bench("mlp"), Bench("mlp")
    first = alone.train(tmp_path / "alone", "factors")
    second = surrounded.train(tmp_path / "surrounded", "factors", each=on)
    for step in range(first.steps):
        assert torch.equal(first.vector(step + 1), second.vector(step + 1))
        for name, factors in first.factors(step).items():
            assert all(
                map(torch.equal, factors[0].tensors().values(), second.factors(step)[name][0].tensors().values())
            )
    want = alone.attribute(first).by("step", "example")
    with on():
        np.testing.assert_array_equal(surrounded.attribute(second).by("step", "example"), want)


def test_a_step_under_another_autocast_than_the_first_is_refused(tmp_path: Path) -> None:
    bench, at = Bench("mlp"), torch.arange(9)
    recorder = attrib.record(
        torch.optim.SGD(bench.model.parameters(), lr=0.1), bench.model, bench.loss, tmp_path / "run"
    )
    with recorder:
        for where, said in (
            ("loss", None),
            ("none", "got none, expected torch.bfloat16 on cpu, at step 1"),
            ("loss", None),
        ):
            bench.where = where
            recorder.zero_grad()
            bench.losses(at).mean().backward()
            if said is None:
                recorder.step(at, bench.x[at], bench.y[at])
            else:
                with pytest.raises(ChangedOutsideError, match=said):
                    recorder.step(at, bench.x[at], bench.y[at])
    assert attrib.open_run(tmp_path / "run").steps == 2


def test_autocast_that_is_entered_once_around_the_whole_loop_is_named(tmp_path: Path) -> None:
    """torch then computes with the weights as they were rounded at the first step."""
    bench, at = Bench("mlp", "none"), torch.arange(12)
    recorder = attrib.record(
        torch.optim.SGD(bench.model.parameters(), lr=0.5), bench.model, bench.loss, tmp_path / "run"
    )

    def train() -> None:
        for _ in range(8):
            recorder.zero_grad()
            bench.loss(bench.model, bench.x[at], bench.y[at]).mean().backward()
            recorder.step(at, bench.x[at], bench.y[at])

    with recorder, on(), pytest.raises(BatchIdentityError, match="entered once around the whole loop"):
        train()
    assert recorder.steps > 0


def test_a_run_under_autocast_that_ended_early_is_gone_on_with(tmp_path: Path) -> None:
    whole, at = Bench("mlp", "model"), torch.arange(9)

    def train(bench: Bench, store: Path, steps: int, **options: Any) -> attrib.Run:
        optimizer = torch.optim.AdamW(bench.model.parameters(), lr=0.01)
        with (
            suppress(KeyboardInterrupt),
            attrib.record(optimizer, bench.model, bench.loss, store, "factors", **options) as recorder,
        ):
            while recorder.steps < steps:
                recorder.zero_grad()
                bench.losses(at).mean().backward()
                recorder.step(at, bench.x[at], bench.y[at])
            if steps < 5:
                raise KeyboardInterrupt
        return attrib.open_run(store)

    want = train(whole, tmp_path / "whole", 5)
    train(Bench("mlp", "model"), tmp_path / "cut", 3)
    run = train(Bench("mlp", "model"), tmp_path / "cut", 5, resume=True)
    assert run.steps == want.steps == 5
    assert run.autocast == want.autocast == replace(BF16, around="model")
    assert torch.equal(run.vector(5), want.vector(5))
    check_run(whole, run)


def test_a_run_under_autocast_is_replayed_bit_for_bit(tmp_path: Path) -> None:
    bench = Bench("mlp")
    run = bench.train(tmp_path / "run")
    with on():
        again = attrib.replay(run, 1, model=bench.model, loss=bench.loss, store=tmp_path / "again")
    assert torch.equal(again.vector(again.steps), run.vector(run.steps))
    assert again.autocast == run.autocast == BF16
    assert from_facts(BF16.facts()) == BF16


def test_in_double_precision_autocast_rounds_nothing(tmp_path: Path) -> None:
    bench = Bench("mlp")
    bench.model.double()
    run = bench.train(tmp_path / "run")
    assert run.precision == torch.float64
    assert (run.autocast, current("cpu")) == (BF16, None)
    bench.attribute(run).check(1e-12)  # float64, 5 steps


def test_a_float32_run_under_autocast_may_be_attributed_in_double_precision(tmp_path: Path) -> None:
    bench = Bench("gpt")
    run = bench.train(tmp_path / "run")
    found, want = (bench.attribute(run, dtype=dtype) for dtype in (torch.float64, None))
    # forward and backward through 7 products, each rounding twice
    found.check(6 * 14**0.5 * U)
    scale = float(np.abs(want.by("step", "example")).max())
    np.testing.assert_allclose(found.by("step", "example"), want.by("step", "example"), atol=6 * 14**0.5 * U * scale)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_a_batch_of_a_low_type_gives_the_shares_of_its_losses(low: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(9, 6).to(low)

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return m(x).float().sin().sum(1)

    check_shares(model, loss, (x,), "loss")


def test_the_hessian_under_autocast_is_that_of_the_loss_to_its_roundings() -> None:
    torch.manual_seed(0)
    case = MODELS["gpt"]
    model, batch = case.build(), case.data(10)
    layout, theta = layout_of(model)
    directions = torch.randn(2, layout.size)
    function = Functional(model, case.loss, layout, torch.float32, BF16)
    found = Curvature(function).products(theta, batch, torch.ones(10), directions).hessian
    exact = Curvature(Functional(model.double(), case.loss, layout, torch.float64))
    want = exact.products(theta.double(), batch, torch.ones(10), directions.double()).hessian
    # four passes of 7 products each: forward, backward, and both again along the direction
    assert float((found - want).norm() / want.norm()) <= 28**0.5 * U


def test_what_a_function_rounds_to_is_known_from_its_first_pass() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    layout, theta = layout_of(model)
    parameters = {n: p.requires_grad_() for n, p in layout.unflatten(theta.clone()).items()}
    for loss, autocast, before, after in (
        (lambda m, x: m(x), None, torch.float32, torch.float32),
        (entering(lambda m, x: m(x)), None, torch.float32, torch.bfloat16),
        (lambda m, x: m(x), BF16, torch.bfloat16, torch.bfloat16),
        (lambda m, x: m(x.half().float()), None, torch.float32, torch.float32),  # what no parameter reaches
    ):
        function = Functional(model, loss, layout, torch.float32, autocast)
        assert function.precision == before
        function(parameters, x)
        assert (function.precision, function.coarse) == (after, after != torch.float32)
