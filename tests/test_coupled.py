"""Losses of a batch that depend on each other: a share is the derivative of the example's own loss, the batch and all."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import crossed
from torch import Tensor, nn

import attrib
from attrib import errors
from attrib.generators import generators, random_state
from attrib.gradients import ExampleGradients

SIZE = 6
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def contrastive(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Each example has to find its own second view among those of the batch."""
    one, other = F.normalize(model(x), dim=1), F.normalize(model(x.flip(1)), dim=1)
    return F.cross_entropy(one @ other.T / 0.5, torch.arange(len(x)), reduction="none")


def r_drop(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Two passes that drop other units, and how far they are apart."""
    one, other = (torch.log_softmax(model(x), 1) for _ in range(2))
    apart = F.kl_div(one, other, reduction="none", log_target=True) + F.kl_div(
        other, one, reduction="none", log_target=True
    )
    return -(one + other).gather(1, y[:, None])[:, 0] + 0.5 * apart.sum(1)


class Experts(nn.Module):
    """Two experts, each for the half of the batch that asks for it most."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.one, self.other = nn.Linear(4, 2), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        share = torch.softmax(scores, 0)  # over the batch
        first = share[:, 0] - share[:, 1] >= (share[:, 0] - share[:, 1]).median()
        weight = torch.where(first, share[:, 0], share[:, 1])[:, None]
        return weight * torch.where(first[:, None], torch.tanh(self.one(x)), torch.tanh(self.other(x)))


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    loss: Loss = cross_entropy
    coupled: bool = True


def net(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), norm, nn.ReLU(), nn.Linear(5, 3))


def frozen() -> nn.Module:
    model = net(nn.BatchNorm1d(5))
    for _ in range(3):
        model(torch.randn(8, 4))
    model[1].eval()
    return model


CASES = {
    "batch norm": Case(lambda: net(nn.BatchNorm1d(5))),
    "batch norm, accumulated statistics": Case(lambda: net(nn.BatchNorm1d(5, momentum=None, affine=False))),
    "batch norm, statistics frozen": Case(frozen, coupled=False),
    "contrastive": Case(lambda: net(nn.Tanh()), contrastive),
    "contrastive, batch norm": Case(lambda: net(nn.BatchNorm1d(5)), contrastive),
    "R-Drop": Case(lambda: net(nn.Dropout(0.4)), r_drop, coupled=False),
    "R-Drop, batch norm": Case(lambda: nn.Sequential(net(nn.BatchNorm1d(5)), nn.Dropout(0.4)), r_drop),
    "experts": Case(Experts),
}


def in_modes_of(model: nn.Module, other: nn.Module) -> nn.Module:
    for part, like in zip(model.modules(), other.modules(), strict=True):
        part.training = like.training
    return model


def one_loss(model: nn.Module, loss: Loss, x: Tensor, y: Tensor, n: int) -> Tensor:
    """(P,): the gradient of the n-th loss of the batch, by autograd."""
    parameters = list(model.parameters())
    pulled = torch.autograd.grad(loss(model, x, y)[n], parameters, allow_unused=True)
    each = zip(parameters, pulled, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in each])


class Recorded:
    """Two steps of a case, captured by "gradients" or "replay"; before each the generators' state and the parameters, and
    the gradient of the sum of the losses."""

    def __init__(self, case: Case, capture: str, store: Path) -> None:
        torch.manual_seed(3)
        self.case, self.model = case, case.build().double()
        self.x, self.y = torch.randn(2, SIZE, 4).double(), torch.randint(0, 3, (2, SIZE))
        self.before: list[tuple[Tensor, list[Tensor]]] = []
        self.gradients: list[Tensor] = []
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.3)
        with attrib.record(optimizer, self.model, case.loss, store, capture) as recorder:
            for step in range(2):
                recorder.zero_grad()
                recorder.batch(torch.arange(SIZE) + SIZE * step, self.x[step], self.y[step])
                self.before.append((generators(), [p.detach().clone() for p in self.model.parameters()]))
                case.loss(self.model, self.x[step], self.y[step]).sum().backward()
                self.gradients.append(
                    torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
                )
                recorder.step()
        self.run = attrib.open_run(store)

    def truth(self, step: int) -> Tensor:
        """(B, P): one loss at a time through the batch."""
        random, theta = self.before[step]
        model, found = in_modes_of(self.case.build().double(), self.model), []
        model.load_state_dict(self.model.state_dict())
        with torch.no_grad():
            for p, value in zip(model.parameters(), theta, strict=True):
                p.copy_(value)
        for n in range(SIZE):
            with random_state(random):
                found.append(one_loss(model, self.case.loss, self.x[step], self.y[step], n))
        return torch.stack(found)

    def result(self) -> attrib.Result:
        measured = attrib.measure.logit(self.x[1, :2], self.y[1, :2])
        found = attrib.attribute(self.run, self.model.eval(), measured, loss=self.case.loss, progress=False)
        found.check(1e-10)
        return found


FAST = ("batch norm", "batch norm, statistics frozen", "contrastive, batch norm", "R-Drop")


@pytest.mark.parametrize("name", crossed(CASES, fast=[(name,) for name in FAST]))
def test_the_share_of_an_example_is_that_of_its_own_loss(name: str, tmp_path: Path) -> None:
    stored, replayed = (Recorded(CASES[name], kind, tmp_path / kind) for kind in ("gradients", "replay"))
    for step in range(2):
        truth, shares = stored.truth(step), stored.run.shares(step)
        size = float(truth.abs().sum(0).max())
        # sums of a few hundred products in float64, in another order
        np.testing.assert_allclose(shares, truth, rtol=0, atol=1e-12 * size)
        np.testing.assert_allclose(shares.sum(0), stored.gradients[step], rtol=0, atol=1e-12 * size)
    results = [recorded.result() for recorded in (stored, replayed)]
    parts = [result.by("step", "example", "group").values for result in results]
    np.testing.assert_allclose(parts[1], parts[0], rtol=0, atol=1e-12 * float(np.abs(parts[0]).max()))
    assert ("depend on each other" in results[1].dataset.attrs["share"]) == CASES[name].coupled


def test_with_statistics_frozen_a_share_is_the_gradient_of_the_example_by_itself(tmp_path: Path) -> None:
    recorded = Recorded(CASES["batch norm, statistics frozen"], "gradients", tmp_path / "run")
    assert recorded.run.header["buffers"] == []
    with torch.no_grad():
        for p, value in zip(recorded.model.parameters(), recorded.before[1][1], strict=True):
            p.copy_(value)
    x, y = recorded.x[1], recorded.y[1]
    alone = [one_loss(recorded.model, cross_entropy, x[n : n + 1], y[n : n + 1], 0) for n in range(SIZE)]
    np.testing.assert_allclose(recorded.run.shares(1), torch.stack(alone), rtol=0, atol=1e-13)


class Small(nn.Module):
    """A layer whose gradients are a millionth of those of the others, in training; Adam makes up for that."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8, bias=False), norm, nn.Tanh(), nn.Linear(8, 3))
        self.small = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        small = self.small(x)
        out: Tensor = self.net(x) + (small.detach() + 1e-6 * (small - small.detach()) if self.training else small)
        return out


def trained_by_adam(model: nn.Module, store: Path, **options: Any) -> tuple[attrib.Run, Callable[..., attrib.Result]]:
    """20 steps; the run, and what explains it."""
    g, kind = torch.Generator().manual_seed(0), next(model.parameters()).dtype
    x, y = torch.randn(64, 5, generator=g).to(kind), torch.arange(64) % 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, eps=1e-12)
    with attrib.record(optimizer, model, cross_entropy, store, **options) as recorder:
        for step in range(20):
            index = torch.arange(step * 16, step * 16 + 16) % 60
            recorder.zero_grad()
            cross_entropy(model, x[index], y[index]).mean().backward()
            recorder.step(index, x[index], y[index])
    run, measured = attrib.open_run(store), attrib.measure.log_prob(x[:3], y[:3])
    loss = {"loss": cross_entropy, "progress": False}
    return run, lambda **options: attrib.attribute(run, model.eval(), measured, **{**loss, **options})


def normed_by_batch(width: int = 8, kind: torch.dtype = torch.float32, bias: bool = True) -> nn.Module:
    """The gradient of its first bias is zero but for rounding, in float32 some 1e-8, and Adam divides it by its own size."""
    torch.manual_seed(0)
    layers = nn.Linear(5, width, bias=bias), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 3)
    return nn.Sequential(*layers).to(kind)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_shares_of_other_examples_in_a_tensor_of_small_gradients_are_found_coupled_or_not(
    norm: type[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    run, explain = trained_by_adam(Small(norm(8)), tmp_path / "run")
    result = explain()
    assert result.check().identities["split"] < 1e-4
    assert "remainder" not in result.dataset  # small, and no rounding
    contract, place = ExampleGradients.contract, list(run.groups).index("small.weight")

    def exchanged(self: ExampleGradients, *given: Any, by: Any = contract) -> tuple[Tensor, Tensor]:
        losses, found = by(self, *given)
        found[..., place] = found[..., place].roll(1, -1)
        return losses, found

    of_steps = ExampleGradients.contract_steps
    monkeypatch.setattr(ExampleGradients, "contract_steps", lambda self, *given: exchanged(self, *given, by=of_steps))
    monkeypatch.setattr(ExampleGradients, "contract", exchanged)
    with pytest.raises(errors.SplitIdentityError, match=r"group 'small\.weight'"):
        explain().check()


KINDS = {torch.float32: 1e-6, torch.float64: 1e-15}  # and what is left of the gross
STORED = [pytest.param(*row, "gradients", marks=pytest.mark.slow) for row in zip(KINDS, (1, 8), strict=True)]


@pytest.mark.parametrize(("kind", "width", "capture"), [(torch.float32, 1, "replay"), *STORED])
def test_a_gradient_of_rounding_alone_is_no_examples_and_a_row_of_the_ledger(
    kind: torch.dtype, width: int, capture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, explain = trained_by_adam(normed_by_batch(width, kind), tmp_path / "run", capture=capture)
    result = explain()
    result.check()
    assert (abs(result.residual) / result.dataset["gross"]).max() < KINDS[kind]
    aside = result.dataset["group"].values.tolist().index("0.bias")
    assert (result.by("example", "group").values[..., aside] == 0).all()
    rows = abs(result.remainder).sum(("query", "step")).values
    assert rows[aside] > 0
    assert np.delete(rows, aside).max() == 0
    first = explain(groups={"first": ["0.*"], "others": ["1.*", "3.*"]})  # that share one derivative along U
    first.check()
    np.testing.assert_allclose(first.remainder.sum(("step", "group")), result.remainder.sum(("step", "group")))
    monkeypatch.setattr(importlib.import_module("attrib.attribute"), "rounding_alone", lambda *given: None)
    plain = explain()
    assert (abs(plain.residual) / plain.dataset["gross"]).max() > KINDS[kind]
    others = [np.delete(r.by("step", "example", "group").values, aside, -1) for r in (plain, result)]
    np.testing.assert_allclose(*others, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("kind", "width", "capture"), [(torch.float32, 8, "replay"), *STORED])
def test_a_gradient_of_rounding_alone_is_no_share_of_another_example(
    kind: torch.dtype, width: int, capture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, explain = trained_by_adam(normed_by_batch(width, kind), tmp_path / "run", capture=capture, remainder="account")
    assert "split_failure" not in explain().dataset.attrs
    monkeypatch.setattr("attrib.shares.ROUNDED", 0)
    assert "group 'rounding alone'" in explain().dataset.attrs["split_failure"]


def test_a_loss_that_draws_numbers_of_its_own_has_no_rounding_to_be_excused_by(tmp_path: Path) -> None:
    _, explain = trained_by_adam(normed_by_batch(), tmp_path / "run")
    random = torch.Generator().manual_seed(0)

    def drawing(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model, x, y) * (1 + 0.1 * torch.rand(len(x), generator=random))

    assert "split_failure" in explain(loss=drawing).dataset.attrs


def test_by_rows_a_bias_before_batch_norm_is_named_and_the_advice_is_true(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """There the shares of single examples are of order one, and only their sum is rounding."""
    _, refused = trained_by_adam(normed_by_batch(), tmp_path / "refused", shares="rows")
    with pytest.raises(errors.CompletenessError, match=r'bias=False, or record with remainder="account"'):
        refused().check()
    caplog.clear()
    _, without = trained_by_adam(normed_by_batch(bias=False), tmp_path / "without", shares="rows")
    assert "remainder" not in without().check().terms
    assert "cancel" not in caplog.text
    _, accounted = trained_by_adam(normed_by_batch(), tmp_path / "rows", remainder="account", shares="rows")
    assert abs(accounted().check().terms["remainder"]).max() > 1e-4
    assert "contributions of single examples cancel" in caplog.text
