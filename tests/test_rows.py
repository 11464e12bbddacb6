"""Shares by rows: the second definition of a share, for batches whose examples see each other and for scalar objectives."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import LAYERS, crossed
from test_along import Experts, Sorted
from test_gradients import layout_of, setting
from test_gradients import loss as layer_loss
from torch import Tensor, nn
from zarr.storage import MemoryStore

import attrib
from attrib import errors
from attrib.gradients import ExampleGradients, RowGradients
from attrib.intervention import Drop, Reweight
from attrib.report.payload import payload

SUMS = 1e-12  # of float64 sums of a few hundred terms, relative to the largest


class Normed(nn.Module):
    """Two layers, between them batch norm on the batch's own statistics."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)
        self.drop = nn.Dropout(drop)
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 1.5)
            self.norm.bias.uniform_(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(torch.tanh(self.norm(self.a(x)))))


class Tower(nn.Module):
    """An embedding of each example, by layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.norm(self.a(x))))


class ByHand(nn.Module):
    """Statistics of the batch, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b((h - h.mean(0)) / h.std(0))


class Looking(nn.Module):
    """Reads a value of the batch on its way, as language models read their masks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        keep = x[:, :1] > -1.5
        h = torch.tanh(self.a(x))
        return self.b(h if keep.all() else h * keep)


class Picking(nn.Module):
    """One of two positions of each example, by what it holds, as a classifier takes the last token."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x.unflatten(1, (2, 2))))
        return self.b(h[torch.arange(len(x)), (x[:, 0] > 0).long()])


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def balanced(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A scalar: what balances the classes over the batch is no example's."""
    z = model(x)
    return F.cross_entropy(z, y) + 0.3 * z.softmax(1).mean(0).square().sum()


def contrastive(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Each example against all others of the batch."""
    z, other = F.normalize(model(x), dim=1), F.normalize(model(x.flip(1)), dim=1)
    return F.cross_entropy(z @ other.T / 0.2, torch.arange(len(x)), reduction="none")


def data(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, dtype=torch.float64, generator=drawn)
    return x, torch.randint(0, 3, (size,), generator=drawn)


def shares_of(model: nn.Module, loss: Callable[..., Tensor], size: int = 9) -> tuple[RowGradients, Tensor, Any]:
    layout, theta = layout_of(model.double())
    return RowGradients(loss, model, layout, torch.float64), theta.detach(), data(size)


def made(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build().double()


def close(found: Any, expected: Any) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(found), expected, rtol=SUMS, atol=SUMS * np.abs(expected).max())


@pytest.mark.parametrize(
    ("build", "loss"), [(Normed, losses), (Normed, balanced), (Tower, contrastive), (Tower, balanced)]
)
def test_rows_sum_to_the_gradient_of_any_objective(build: Callable[[], nn.Module], loss: Callable[..., Tensor]) -> None:
    model = made(build)
    shares, theta, batch = shares_of(model, loss)
    pulled = torch.autograd.grad(loss(model, *batch).sum(), list(model.parameters()))
    whole = torch.cat([g.flatten() for g in pulled])
    close(shares.rows(theta, batch).sum(0), whole)
    close(shares.total(theta, batch)[1], whole)


def test_rows_of_a_net_with_batch_norm_are_those_derived_by_hand() -> None:
    model = made(Normed)
    shares, theta, batch = shares_of(model, losses)
    close(shares.rows(theta, batch), rows_by_hand(model, *(t.numpy() for t in batch)))


def rows_by_hand(model: nn.Module, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(B, P): x -> h = x A' + a, n = (h - mean) / s, u = w n + c, z = tanh(u), o = z B' + b, cross-entropy summed."""
    first, first_bias, w, c, second, second_bias = (p.detach().numpy() for p in model.parameters())
    h = x @ first.T + first_bias
    spread = np.sqrt(h.var(0) + 1e-5)
    n = (h - h.mean(0)) / spread
    z = np.tanh(w * n + c)
    o = z @ second.T + second_bias
    p = np.exp(o) / np.exp(o).sum(1, keepdims=True)
    d_o = p - np.eye(3)[y]
    d_u = d_o @ second * (1 - z**2)
    d_n = d_u * w
    d_h = (d_n - d_n.mean(0) - n * (d_n * n).mean(0)) / spread
    parts = (d_h[:, :, None] * x[:, None], d_h, d_u * n, d_u, d_o[:, :, None] * z[:, None], d_o)
    return np.concatenate([part.reshape(len(x), -1) for part in parts], 1)


@pytest.mark.parametrize("loss", [contrastive, balanced])
def test_rows_are_the_gradients_of_copies_of_the_parameters_that_each_example_has_for_itself(
    loss: Callable[..., Tensor],
) -> None:
    model = made(Tower)
    shares, theta, batch = shares_of(model, loss)
    copies = [made(Tower) for _ in range(9)]

    def each(x: Tensor) -> Tensor:
        return torch.cat([copy(row[None]) for copy, row in zip(copies, x, strict=True)])

    loss(each, *batch).sum().backward()
    rows = [torch.cat([p.grad.flatten() for p in copy.parameters()]) for copy in copies]
    close(shares.rows(theta, batch), torch.stack(rows))


@pytest.mark.parametrize(("name", "size"), crossed(LAYERS, (9, 1), fast=[(name, 9) for name in LAYERS]))
def test_rows_are_the_examples_gradients_where_losses_are_independent(name: str, size: int) -> None:
    model, layout, theta, x, expected = setting(name, size)
    shares = RowGradients(layer_loss, model, layout, torch.float64)
    directions = torch.randn(2, layout.size, dtype=torch.float64)
    products = directions.numpy()[:, None] * expected[None]
    want = np.stack([products[..., part].sum(-1) for _, part in layout.slices()], -1)
    for _ in range(4):  # as it is, and from the traced graph
        found = shares.contract(theta, (x,), directions)[1]
    np.testing.assert_allclose(found, want, rtol=1e-10, atol=1e-10 * np.abs(products).sum(-1).max())
    np.testing.assert_allclose(shares.rows(theta, (x,)), expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())
    truth = [torch.cat([g.flatten() for g in row.values()]) for row in shares.vector.rows(theta, (x,), layout.names)]
    np.testing.assert_allclose(torch.stack(truth), expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("build", [ByHand, Sorted, Experts])
def test_where_rows_have_no_owner_that_is_said_and_the_advice_works(build: Callable[[], nn.Module]) -> None:
    model = made(build)
    shares, theta, batch = shares_of(model, losses)
    with pytest.raises(errors.LossError, match=r'no row shares here.*at parameter.*use shares="example"'):
        shares.contract(theta, batch, theta[None])
    by_loss = ExampleGradients(losses, model, shares.layout, torch.float64)
    expected = oracles.losses_one_by_one(model, theta.numpy(), losses, batch)
    close(by_loss.rows(theta, batch), expected)


@pytest.mark.parametrize(("build", "known"), [(Looking, 2), (Picking, 0)])
def test_whose_rows_are_whose_is_known_by_what_python_read_and_read_anew_where_content_places_them(
    build: Callable[[], nn.Module], known: int
) -> None:
    model = made(build)
    shares, theta, _ = shares_of(model, losses)
    for seed in range(8):  # on both branches, from the traced graph too
        batch = data(9, seed)
        expected = oracles.losses_one_by_one(model, theta.numpy(), losses, batch)
        close(shares.rows(theta, batch), expected)
        close(shares.contract(theta, batch, theta[None])[1].sum(2)[0], expected @ theta.numpy())
    assert len(shares.vector._owners) == known


def test_a_loss_that_is_neither_losses_nor_a_number_is_refused() -> None:
    shares, theta, batch = shares_of(made(Tower), lambda m, x, y: m(x))
    with pytest.raises(errors.LossError, match="not one number per example"):
        shares.total(theta, batch)


# whole runs


ADAMW, SGD = partial(torch.optim.AdamW, lr=0.02), partial(torch.optim.SGD, lr=0.1)


def recorded(
    loss: Callable[..., Tensor],
    capture: str = "replay",
    dtype: torch.dtype = torch.float64,
    accumulated: int = 1,
    build: Callable[[], nn.Module] = lambda: Normed(0.3),
    store: Any = None,
    steps: int = 6,
    stop: int | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = ADAMW,
    **options: Any,
) -> tuple[attrib.Run, nn.Module]:
    """stop: the step before which the loop dies."""
    model, (x, y) = made(build).to(dtype), data(16)
    x, store = x.to(dtype), MemoryStore() if store is None else store
    options = {"shares": "rows", "check_every": 3, "block": 2, **options}
    recorder = attrib.record(optimizer(model.parameters()), model, loss, store, capture, **options)
    for step in range(recorder.steps, steps):
        if step == stop:
            return attrib.open_run(store), model
        order = torch.randperm(16, generator=torch.Generator().manual_seed(step))
        recorder.zero_grad()
        for index in order[: 8 * accumulated - step % 2].chunk(accumulated):
            recorder.batch(index, x[index], y[index])
            (loss(model, x[index], y[index]).mean() / accumulated).backward()
        recorder.step()
    recorder.close()
    return attrib.open_run(store), model


QUERIES = data(8, 99)[0]


def asked(model: nn.Module) -> Tensor:
    return model(QUERIES)[:2, 0]  # the eight together: by itself a row has no statistics


def attributed(run: attrib.Run, model: nn.Module, loss: Any, **options: Any) -> attrib.Result:
    model.train()
    for module in model.modules():
        module.training = module.training and not isinstance(module, nn.Dropout)
    return attrib.attribute(run, model, asked, loss=loss, progress=False, **options)


@pytest.mark.parametrize(
    ("capture", "loss", "dtype", "accumulated"),
    [
        ("replay", losses, torch.float64, 2),
        ("gradients", balanced, torch.float64, 2),
        ("factors", losses, torch.float64, 1),
        ("factors", balanced, torch.float32, 2),
        pytest.param("replay", balanced, torch.float64, 1, marks=pytest.mark.slow),
        pytest.param("replay", balanced, torch.float32, 2, marks=pytest.mark.slow),
        pytest.param("gradients", losses, torch.float32, 1, marks=pytest.mark.slow),
        pytest.param("factors", balanced, torch.float64, 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_by_rows_is_complete(
    capture: str, loss: Callable[..., Tensor], dtype: torch.dtype, accumulated: int
) -> None:
    run, model = recorded(loss, capture, dtype, accumulated)
    double = dtype == torch.float64
    ledger = attributed(run, model, loss).check(1e-12 if double else 1e-6)
    bound = 1e-13 if double else 1e-5  # a few hundred roundings
    assert ledger.identities["batch"] < bound
    assert ledger.identities["split"] < bound
    assert "shares by rows          what passed through each example's rows" in str(ledger)
    assert attrib.verify(run, progress=False, model=model, loss=loss).failure is None


def test_contributions_are_those_of_the_rows() -> None:
    run, model = recorded(losses, build=Normed, steps=1, optimizer=SGD)
    result = attributed(run, model, losses, keep=("step", "example"), path=attrib.GaussLegendre(8))
    theta, delta = run.vector(0), run.vector(1) - run.vector(0)
    batch = run.inputs(run.passes(0)[0]).args
    run.load(model, 0)
    rows = rows_by_hand(model, *(t.numpy() for t in batch)) / len(batch[0])
    gradients = []
    for a in np.polynomial.legendre.leggauss(8)[0] / 2 + 0.5:
        torch.nn.utils.vector_to_parameters(theta + a * delta, model.parameters())
        pulled = torch.autograd.grad(asked(model)[0], list(model.parameters()))
        gradients.append(torch.cat([g.flatten() for g in pulled]).numpy())
    mean = np.average(gradients, 0, np.polynomial.legendre.leggauss(8)[1])
    want = dict(zip(run.index(0).tolist(), rows @ mean * -0.1, strict=True))
    found = result.by("example").isel(query=0)
    close(found.sel(example=[*want]), [*want.values()])


def test_a_share_at_the_wrong_example_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    run, model = recorded(losses)
    right = RowGradients.contract

    def rolled(self: RowGradients, *args: Any) -> tuple[Tensor, Tensor]:
        found, products = right(self, *args)
        return found, products.roll(1, 1)

    monkeypatch.setattr(RowGradients, "contract", rolled)
    with pytest.raises(errors.SplitIdentityError, match="not those of their own examples"):
        attributed(run, model, losses).check()


def test_a_definition_is_the_runs_own_or_the_other_where_shares_are_recomputed() -> None:
    run, model = recorded(losses)
    rows, own = (attributed(run, model, losses, shares=shares) for shares in (None, "example"))
    assert [r.dataset.attrs["shares"] for r in (rows, own)] == ["rows", "example"]
    assert "depend on each other, so it goes through" in own.dataset.attrs["share"]
    assert own.check(1e-12).identities["split"] < 1e-13
    close(rows.by().values, own.by().values)
    assert abs(rows.by("example") - own.by("example")).max() > 0.01 * abs(own.by("example")).max()
    stored, model = recorded(losses, "gradients")
    with pytest.raises(ValueError, match=r"stored as they were defined: got shares='example', expected 'rows'"):
        attributed(stored, model, losses, shares="example")
    with pytest.raises(ValueError, match="unknown shares"):
        attributed(run, model, losses, shares="row")
    with pytest.raises(ValueError, match="unknown shares"):
        recorded(losses, shares="row")
    scalar, model = recorded(balanced)
    with pytest.raises(errors.LossError, match="not one number per example"):
        attributed(scalar, model, balanced, shares="example")


def test_the_definition_stands_in_the_run_the_result_and_the_page(tmp_path: Path) -> None:
    run, model = recorded(losses)
    assert run.header["shares"] == "rows"
    assert "replay, shares by rows" in str(run)
    result = attributed(run, model, losses)
    result.save(tmp_path / "result.zarr")
    again = attrib.open_result(tmp_path / "result.zarr")
    page = payload(again, None, None, None, False)
    for shown in (dict(page["facts"])["shares"], str(again), again._repr_html_()):
        assert "what passed through each example" in shown


@pytest.mark.slow
@pytest.mark.parametrize(("capture", "loss"), [("replay", losses), ("factors", balanced)])
def test_a_run_by_rows_that_died_goes_on_bit_for_bit(tmp_path: Path, capture: str, loss: Callable[..., Tensor]) -> None:
    whole, _ = recorded(loss, capture)
    recorded(loss, capture, store=tmp_path / "run.zarr", stop=4)
    run, model = recorded(loss, capture, store=tmp_path / "run.zarr", resume=True)
    assert run.steps == whole.steps
    for name in {*whole.reader.names()} - {"facts", "digests"}:
        np.testing.assert_array_equal(run.reader.read(name), whole.reader.read(name), err_msg=name)
    attributed(run, model, loss).check(1e-12)
    recorded(losses, store=tmp_path / "other.zarr", stop=4, shares="example")
    with pytest.raises(errors.ResumeError, match="shares="):
        recorded(losses, store=tmp_path / "other.zarr", resume=True)


@pytest.mark.slow
def test_the_past_of_a_run_by_rows_can_be_changed() -> None:
    run, model = recorded(balanced)
    again = attrib.replay(run, 0, model=model, loss=balanced, store=MemoryStore(), progress=False)
    assert again.definition == "rows"
    assert torch.equal(again.vector(run.steps), run.vector(run.steps))
    dropped = attrib.replay(run, 0, Drop([3]), model=model, loss=balanced, store=MemoryStore(), progress=False)
    attributed(dropped, model, balanced).check(1e-12)
    with pytest.raises(errors.ReplayError, match="an objective has no losses to be changed"):
        attrib.replay(run, 0, Reweight({3: 2.0}), model=model, loss=balanced, store=MemoryStore(), progress=False)
    run, model = recorded(losses)
    weighed = attrib.replay(run, 0, Reweight({3: 2.0}), model=model, loss=losses, store=MemoryStore(), progress=False)
    attributed(weighed, model, attrib.intervention.weighted(losses)).check(1e-12)


@pytest.mark.slow  # new processes, which import torch
def test_workers_give_what_one_process_gives(tmp_path: Path) -> None:
    run, model = recorded(
        balanced, store=tmp_path / "run.zarr", optimizer=SGD
    )  # Adam divides rounding of a bias by itself
    alone = attributed(run, model, balanced)
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        shared = attributed(run, model, balanced, executor=executor)
    close(shared.by("step", "example").values, alone.by("step", "example").values)


def one_step(model: nn.Module, loss: Callable[..., Tensor], batch: Any, rounded: bool = False) -> attrib.Run:
    store = MemoryStore()
    with attrib.record(torch.optim.SGD(model.parameters(), lr=0.1), model, loss, store, shares="rows") as recorder:
        recorder.batch(torch.arange(8), *batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            value = loss(model, *batch)
        value.backward()
        recorder.step()
    return attrib.open_run(store)


def test_under_autocast_statistics_are_fixed_in_the_type_of_the_norm() -> None:
    model, (x, y) = made(Normed).float(), data(8)
    run = one_step(model, balanced, (x.float(), y), rounded=True)
    ledger = attributed(run, model, balanced).check()
    assert ledger.identities["split"] < 2.0**-8  # what bfloat16 rounds by


@pytest.mark.slow
def test_the_loss_that_a_language_model_returns_will_do() -> None:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)
    model = hf.GPT2LMHeadModel(config)
    ids, length = torch.randint(0, 30, (8, 6)), torch.tensor([6, 3, 4, 6, 5, 2, 6, 3])
    mask = (torch.arange(6) < length[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    run = one_step(model, lambda m, b: m(**b).loss, (batch,))
    model.eval()
    result = attrib.attribute(
        run, model, lambda m: m(input_ids=ids[:1]).logits[:, -1, 0], loss=lambda m, b: m(**b).loss, progress=False
    )
    ledger = result.check()
    assert ledger.identities["batch"] < 1e-6  # of float32
    assert ledger.identities["split"] < 1e-5
