"""Language models: what is measured of them, and paths through models that look at their masks."""

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import MODELS
from torch import Tensor, nn

import attrib
from attrib import measure

VOCABULARY = 8


class Masked(nn.Module):
    """A causal language model of two layers whose call takes a mask; what is masked is never looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY)
        self.seen: list[Tensor | None] = []

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        self.seen.append(attention_mask)
        x = self.embedding(tokens)
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        return SimpleNamespace(logits=self.out(x.cumsum(1).tanh()))


def masked(dtype: torch.dtype = torch.float64) -> Masked:
    torch.manual_seed(0)
    return Masked().to(dtype)


def token_by_token(model: nn.Module, text: list[int], start: int) -> list[float]:
    """Log-probabilities of the tokens from `start` on, each by a call of its own with those before it alone."""
    out = []
    for t in range(start, len(text)):
        logits = model(torch.tensor([text[:t]])).logits[0, -1].tolist()
        top = max(logits)
        out.append(
            logits[text[t]]
            - top
            - float(torch.tensor([v - top for v in logits], dtype=torch.float64).exp().sum().log())
        )
    return out


PAIRS = [([5, 2, 7], [3]), ([1], [4, 4, 0, 6]), ([2, 2], [7, 1])]


@pytest.mark.parametrize("given", [list, torch.tensor])
def test_a_continuation_is_the_sum_of_its_tokens_each_by_itself(given: Any) -> None:
    model = masked()
    prompts, continuations = zip(*((given(p), given(c)) for p, c in PAIRS), strict=True)
    found = measure.continuation(prompts, continuations, pad=3)
    want = [sum(token_by_token(model, p + c, len(p))) for p, c in PAIRS]
    # sums of at most four log-probabilities in float64
    torch.testing.assert_close(found(model), torch.tensor(want, dtype=torch.float64), rtol=1e-13, atol=1e-13)
    assert torch.equal(found.select([2, 0])(model), found(model)[[2, 0]])
    assert torch.equal(pickle.loads(pickle.dumps(found))(model), found(model))


def test_a_token_is_measured_given_those_before_it_and_gives_its_query_the_name() -> None:
    model, text = masked(), [5, 2, 7, 2, 1]
    found = measure.tokens(text, start=2, tokenizer=SimpleNamespace(decode=lambda ids: "abcdefgh"[ids[0]]))
    want = token_by_token(model, text, 2)
    torch.testing.assert_close(found(model), torch.tensor(want, dtype=torch.float64), rtol=1e-13, atol=1e-13)
    assert found.names == ("h", "c", "b")
    assert found.select([1]).names == ("c",)
    assert measure.tokens(torch.tensor(text), 2, names=["x", "y", "z"]).names == ("x", "y", "z")


def test_the_mask_goes_to_calls_that_take_one_and_only_where_something_is_padded() -> None:
    model, plain = masked(), MODELS["gpt"].build().double()
    measure.continuation([[1, 2], [3]], [[4], [5]])(model)
    measure.continuation([[1, 2], [3]], [[4], [5, 6]])(model)
    (first, second) = model.seen
    assert first is not None
    assert second is None
    assert first.tolist() == [[1, 1, 1], [1, 1, 0]]
    padded = [measure.continuation([[1, 2], [3]], [[4], [5]], pad=pad)(plain) for pad in (0, 4)]
    torch.testing.assert_close(*padded, rtol=1e-13, atol=1e-13)  # a causal model never looks there


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: measure.continuation([[1], [2]], [[3]]), "prompts and continuations differ in number: got 2 and 1"),
        (lambda: measure.continuation([[]], [[3]]), "prompts is not made of token ids: got an empty one at 0"),
        (lambda: measure.continuation("a", "b"), "tokenizer"),
        (lambda: measure.continuation([1, 2], [3, 4]), "expected lists or tensors"),
        (lambda: measure.tokens([1.5, 2.0]), "text is not made of token ids"),
        (lambda: measure.tokens([1]), "start is no position"),
        (lambda: measure.tokens([1, 2, 3], start=0), "Begin the text with the token"),
        (lambda: measure.tokens([1, 2, 3], names=["one"]), "names do not fit the queries"),
        (lambda: measure.log_prob({"x": torch.zeros(2, 3)}, torch.tensor([1])), "x and y differ in length"),
    ],
)
def test_what_is_no_text_is_refused(call: Any, message: str) -> None:
    with pytest.raises(attrib.errors.MeasurementError, match=message):
        call()


class Wrapped(nn.Module):
    """A linear model whose output is wrapped."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.wrap = nn.Linear(3, 4), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.linear(x))


MEASURES = (measure.log_prob, measure.logit, measure.margin, measure.loss)
WRAPS = {
    "object": lambda y: SimpleNamespace(logits=y, loss=None),
    "dict": lambda y: {"loss": None, "logits": y},
    "tuple": lambda y: (y, None),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("kind", MEASURES)
def test_every_measurement_takes_the_logits_out_of_what_a_model_returns(kind: Any, wrap: str) -> None:
    x, y = torch.randn(2, 3), torch.tensor([1, 3])
    want = kind(x, y)(Wrapped(lambda out: out))
    assert torch.equal(kind(x, y)(Wrapped(WRAPS[wrap])), want)
    assert torch.equal(kind({"x": x}, y)(Wrapped(WRAPS[wrap])), want)


@pytest.mark.parametrize(
    "wrap", [lambda y: {"hidden": y}, lambda y: SimpleNamespace(hidden=y), lambda y: (None, y), lambda y: ()]
)
def test_an_output_without_logits_is_refused(wrap: Any) -> None:
    with pytest.raises(attrib.errors.MeasurementError, match="the model's output holds no logits: got"):
        measure.log_prob(torch.randn(2, 3), torch.tensor([1, 3]))(Wrapped(wrap))
