"""What a function rounds to on its way is heard, and bounds are of that: float32 inside of float64, and of nothing coarser
than what is there.

eps is 1.2e-7 in float32 and 2.2e-16 in float64; a bound of sqrt(eps) is 3.5e-4 and 1.5e-8.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import covering, crossed
from test_along import layout_of
from torch import Tensor, nn
from zarr.storage import MemoryStore

import attrib
from attrib import errors
from attrib.checks.intake import CAPTURES, SHARES
from attrib.functional import Functional
from attrib.gradients import examples
from attrib.shares import Shares

SIZE = 7  # no power of two, by which means and sums round alike
Loss = Callable[[Any, Tensor, Tensor], Tensor]


class Net(nn.Module):
    """between: of (B, 8), on the way."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.behind, self.between = nn.Linear(5, 8), nn.Linear(8, 3), between
        self.scale = nn.Parameter(torch.ones(8))
        self.double()
        self.register_buffer("halves", torch.full((8,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.behind(self.scale * torch.tanh(self.between(self, self.before(x.double()))))
        return out


def normed(net: Any, h: Tensor) -> Tensor:
    """As models of language have it."""
    single = h.float()
    return (single * torch.rsqrt(single.square().mean(-1, keepdim=True) + 1e-6)).to(h.dtype)


def turned(net: Any, h: Tensor) -> Tensor:
    """Rotary positions, as first written."""
    pairs = torch.view_as_complex(h.float().reshape(-1, 4, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones(4), torch.arange(4.0))).flatten(1).to(h)


def counted(net: Any, h: Tensor) -> Tensor:
    """What float32 there is, is of data and of constants."""
    with torch.no_grad():
        seen = (h.float() > 0).float().mean()
    return h * torch.arange(1.0, 9.0) * torch.tensor(0.5) + seen.sign()


ROUNDED = {
    "normed": normed,
    "softmax": lambda net, h: h.softmax(-1, dtype=torch.float32).to(h),
    "turned": turned,
    "weight": lambda net, h: (h.float() * net.scale.float()).double(),
}
EXACT = {
    "plain": lambda net, h: h,
    "buffer": lambda net, h: h * net.halves,
    "counted": counted,
}


def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(24, 5, generator=g), torch.randint(0, 3, (24,), generator=g)  # in float32


def record(model: nn.Module, store: Any, capture: str = "replay", penalty: float = 0.0, **options: Any) -> attrib.Run:
    (x, y), size = data(), [p for p in model.parameters() if p.dim() > 1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with attrib.record(optimizer, model, loss, store, capture, **options) as recorder:
        for step in range(8):
            index = (torch.arange(SIZE) + 5 * step) % 24
            recorder.zero_grad()
            (loss(model, x[index], y[index]).mean() + penalty * sum(p.sum() for p in size)).backward()
            recorder.step(index, x[index], y[index])
    return attrib.open_run(store)


def explain(run: attrib.Run, model: nn.Module, **options: Any) -> attrib.Result:
    measured = attrib.measure.log_prob(*(d[:3] for d in data()))
    return attrib.attribute(run, model, measured, loss=loss, progress=False, **options)


@pytest.mark.parametrize("name", [*ROUNDED, *EXACT])
def test_what_a_function_rounds_to_is_heard_where_parameters_pass(name: str) -> None:
    model = Net((ROUNDED | EXACT)[name])
    layout, theta = layout_of(model)
    function = Functional(model, loss, layout, torch.float64)
    assert function.precision == torch.float64
    function({n: p.requires_grad_() for n, p in layout.unflatten(theta).items()}, *data())
    assert function.precision == (torch.float32 if name in ROUNDED else torch.float64)
    assert not function.coarse


def test_what_is_coarser_counts_however_little_of_it_there_is() -> None:
    def between(net: Any, h: Tensor) -> Tensor:
        return normed(net, h) + 1e-3 * h.bfloat16().double()

    model = Net(between)
    layout, theta = layout_of(model)
    function = Functional(model, loss, layout, torch.float64)
    function({n: p.requires_grad_() for n, p in layout.unflatten(theta).items()}, *data())
    assert function.precision == torch.bfloat16
    assert function.coarse


@pytest.mark.parametrize(
    ("name", "capture", "shares"), crossed(ROUNDED, CAPTURES, SHARES, fast=covering(ROUNDED, CAPTURES, SHARES))
)
def test_a_model_in_float64_that_rounds_to_float32_is_accounted_for_as_one_in_float32(
    name: str, capture: str, shares: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Net(ROUNDED[name])
    run = record(model, MemoryStore(), capture, shares=shares)
    assert run.precision == torch.float32
    assert not run.accounts_remainder
    # the products of the backward pass are rounded by 6e-8 each; a few of them one behind the other
    assert np.nanmax(run.log("batch_identity")) <= 1e-6
    # the secant has no complex numbers; of a measurement as smooth as this eight nodes leave rounding
    result = explain(run, model, path=attrib.GaussLegendre(8) if name == "turned" else attrib.Secant())
    identities = result.check().identities
    assert max(identities["batch"], identities["split"]) <= 1e-5  # relative to groups a tenth as large
    assert max(identities["step"], identities["measurement"]) <= 1e-12  # these are computed in float64 throughout
    assert attrib.verify(run, progress=False, model=model, loss=loss).failure is None
    assert "slow" not in caplog.text  # rounding is not taken for rows of other examples
    assert [run.scales(step).tolist() for step in (0, 7)] == [
        [1 / SIZE] * SIZE
    ] * 2  # nor for a factor of the loop's own


@pytest.mark.parametrize("name", [*ROUNDED, *EXACT])
def test_a_penalty_is_refused_that_is_more_than_what_the_model_rounds(name: str) -> None:
    """A millionth of p.grad in float64, whatever of the data and constants is float32; a hundredth where it rounds."""
    factor, said = (1e-2, r"0\.0003") if name in ROUNDED else (1e-6, r"1e-08")
    with pytest.raises(errors.BatchIdentityError, match=f"expected at most {said}"):
        record(Net((ROUNDED | EXACT)[name]), MemoryStore(), penalty=factor)


@pytest.mark.parametrize("name", ["plain", "normed"])
def test_shares_that_are_wrong_by_more_than_what_the_model_rounds_are_found(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net((ROUNDED | EXACT)[name])
    run = record(model, MemoryStore())
    explain(run, model).check()
    contract, of_steps = examples.ExampleGradients.contract, examples.ExampleGradients.contract_steps
    wrong = 1e-2 if name in ROUNDED else 1e-6

    def exchanged(self: Any, *given: Any) -> tuple[Tensor, Tensor]:
        losses, found = contract(self, *given)
        return losses, found + wrong * (found.flip(1) - found)

    def exchanged_of_steps(self: Any, *given: Any) -> tuple[Tensor, Tensor] | None:
        found = of_steps(self, *given)
        return None if found is None else (found[0], found[1] + wrong * (found[1].flip(2) - found[1]))

    monkeypatch.setattr(examples.ExampleGradients, "contract", exchanged)
    monkeypatch.setattr(examples.ExampleGradients, "contract_steps", exchanged_of_steps)
    with pytest.raises(errors.SplitIdentityError):
        explain(run, model).check()


def test_what_a_run_rounds_to_is_known_when_it_goes_on(tmp_path: Path) -> None:
    model = Net(normed)
    run = record(model, tmp_path / "run")
    again = attrib.replay(run, 4, model=Net(normed), loss=loss, store=tmp_path / "again")
    assert again.precision == torch.float32
    assert torch.equal(again.vector(again.steps), run.vector(run.steps))


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_llama_of_transformers_in_float64_is_accounted_for(capture: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its norms, rotary positions and softmax are computed in float32 in any case."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 4, "num_attention_heads": 2}
    words = {"vocab_size": 13, "max_position_embeddings": 6, "attn_implementation": "eager"}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **words, **ends)).double()
    texts = torch.randint(1, 13, (20, 6), generator=torch.Generator().manual_seed(0))

    def next_token(m: Any, x: Tensor) -> Tensor:
        logits = m(input_ids=x).logits[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none").mean(1)

    store = MemoryStore()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with attrib.record(optimizer, model, next_token, store, capture) as recorder:
        for step in range(4):
            index = (torch.arange(SIZE) + 3 * step) % 20
            recorder.zero_grad()
            next_token(model, texts[index]).mean().backward()
            recorder.step(index, texts[index])
    run = attrib.open_run(store)
    assert run.precision == torch.float32
    result = attrib.attribute(run, model, lambda m: -next_token(m, texts[:2]), loss=next_token, progress=False)
    identities = result.check().identities
    assert max(identities["batch"], identities["split"]) <= 1e-5
    assert "slow" not in caplog.text


def opposed(model: nn.Module, x: Tensor, sign: Tensor) -> Tensor:
    return 100 * sign * model(x).tanh()[:, 0]


def test_contributions_that_cancel_are_allowed_their_rounding_and_no_wrong_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In single precision a sum is as exact as the largest of what cancels in it: at Adam's first steps, of examples that
    pull against one another, that is more than 1e-6 of the sum."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)), torch.randn(32, 6)
    x, sign = torch.cat([x, x + 1e-2 * torch.randn(32, 6)]), torch.tensor([1.0, -1.0]).repeat_interleave(32)
    recorder = attrib.record(torch.optim.Adam(model.parameters(), lr=1e-3), model, opposed, tmp_path / "run")
    for _ in range(6):
        recorder.zero_grad()
        opposed(model, x, sign).mean().backward()
        recorder.step(torch.arange(64), x, sign)
    recorder.close()
    run = attrib.open_run(tmp_path / "run")

    def ask(**options: Any) -> attrib.Result:
        measurement = lambda m: m(x[:3])[:, 0]  # noqa: E731
        return attrib.attribute(run, model, measurement, loss=opposed, progress=False, **options)

    found = ask()
    found.check()
    sizes = abs(found.by("step", "example", "group")).sum(["step", "example", "group"])
    np.testing.assert_allclose(found.dataset["sizes"], sizes, rtol=1e-12)
    gross = found.dataset["gross"]
    assert float((abs(found.residual) / gross).max()) > 1e-6  # it took more than the usual bound
    assert float((sizes / gross).min()) > 100
    without = attrib.Result(found.dataset.drop_vars("sizes"))
    with pytest.raises(errors.CompletenessError, match="the terms do not add up"):
        without.check()

    contract = Shares.contract

    def wrong(self: Shares, *asked: Any) -> Any:
        found = contract(self, *asked)
        for contributions in found:
            contributions.values[:, 5] *= 1.001  # one of 64
        return found

    monkeypatch.setattr(Shares, "contract", wrong)
    with pytest.raises(errors.CompletenessError, match="the terms do not add up"):
        ask(identities=()).check()
