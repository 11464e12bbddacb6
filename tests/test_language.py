"""Language models: what is measured of them, and paths through models that look at their masks."""

import logging
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import MODELS, covering
from torch import Tensor, nn

import attrib
from attrib import measure
from attrib.layout import Layout
from attrib.path import Measured, PathGradient, limit_bound, limit_gap

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


# paths through models that look at their masks

READS = {  # and how many different things there are to read of the four masks below
    "all": (lambda mask: bool(mask.all()), 2),
    "item": (lambda mask: mask.sum().item() == mask.numel(), 3),
    "tolist": (lambda mask: 0 not in mask[0, 1:].tolist(), 3),
    "numpy": (lambda mask: np.asarray(mask[:, 1:]).all(), 3),
    "equal": (lambda mask: torch.equal(mask, torch.ones_like(mask)), 3),
    "shape": (lambda mask: len(mask.nonzero()) == mask.numel(), 3),
}


class Shortcut(nn.Module):
    """Causal attention that leaves its mask away where `full(mask)` says that there is nothing to mask."""

    def __init__(self, full: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.out, self.full = nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY), full

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        x, mask = self.embedding(tokens), None
        if not self.full(attention_mask):
            mask = attention_mask.bool()[:, None] & torch.ones(2 * tokens.shape[1:], dtype=torch.bool).tril()
        return SimpleNamespace(logits=self.out(F.scaled_dot_product_attention(x, x, x, mask, is_causal=mask is None)))


def integrated(
    model: nn.Module, measurement: Any, path: attrib.path.Path, dtype: torch.dtype = torch.float64
) -> tuple[PathGradient, Tensor, float]:
    """The path's vectors, the change of the parameters, and the gap of the limit."""
    layout = Layout(tuple(n for n, _ in model.named_parameters()), tuple(tuple(p.shape) for p in model.parameters()))
    theta = layout.flatten(model.parameters())
    end = theta + 0.002 * torch.randn(theta.shape, dtype=theta.dtype, generator=torch.Generator().manual_seed(3))
    measured = Measured(model, measurement, layout, dtype, theta.to(dtype))
    over = path.bind(measured)
    found = over(theta, end)
    assert torch.equal(found.start, measured.values(theta)) or torch.allclose(
        found.start, measured.values(theta), 1e-6, 1e-6
    )
    return found, (end - theta).to(dtype), limit_gap(measured, over, torch.stack([theta, end])).gap


def padded() -> measure.Measurement:
    return measure.continuation([[5, 2, 7], [1], [3, 3], [6, 4, 2]], [[3], [4], [4], [1]])


@pytest.mark.parametrize(
    ("path", "read"),
    [*((attrib.Secant(), read) for read in READS), (attrib.GaussLegendre(2), "shape"), (attrib.Midpoint(1), "all")],
)
def test_a_path_takes_each_query_where_what_is_read_of_its_mask_sends_it(
    path: Any, read: str, caplog: pytest.LogCaptureFixture
) -> None:
    full, graphs = READS[read]
    with caplog.at_level(logging.INFO, logger="attrib"):
        found, change, limit = integrated(Shortcut(full).double(), padded(), path)
    want, _, _ = integrated(Shortcut(lambda mask: False).double(), padded(), path)
    for a, b in zip(found, want, strict=True):  # the same attention by two ways, in float64
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert limit <= limit_bound(torch.float64)
    if isinstance(path, attrib.Secant):
        torch.testing.assert_close(found.gradient @ change, found.end - found.start, rtol=1e-12, atol=1e-14)
        assert f"the model reads values of its inputs: {graphs} graphs for 4 queries" in caplog.messages


@pytest.mark.parametrize("path", [attrib.Secant(), attrib.GaussLegendre(2)])
def test_a_model_that_asks_for_gradients_on_its_way_is_measured_as_one_that_does_not(path: Any) -> None:
    """As models of transformers do from when their activations are checkpointed."""

    def ask(module: nn.Module, args: Any, out: Tensor) -> None:
        out.requires_grad_(True)

    model = masked()
    want, _, _ = integrated(model, padded(), path)
    model.embedding.register_forward_hook(ask)
    found, _, limit = integrated(model, padded(), path)
    for a, b in zip(found, want, strict=True):  # the same operations, mapped over queries or not, in float64
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert limit <= limit_bound(torch.float64)


def test_gradients_map_over_the_queries_of_which_the_same_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Shortcut(READS["all"][0]).double()
    found, want = [], integrated(model, padded(), attrib.GaussLegendre(2))[0]
    monkeypatch.setattr("attrib.path.quadrature.gradients_one_by_one", lambda measured: found.append(measured))
    again = integrated(model, padded(), attrib.GaussLegendre(2))[0]
    assert not found
    torch.testing.assert_close(again.gradient, want.gradient, rtol=0, atol=0)


def test_queries_that_are_another_thing_among_the_others_are_taken_together() -> None:
    """The first of them says how all are weighed; by itself the last one says the same."""
    x = torch.tensor([[1, 2], [0, 3], [4, 5]])

    def rows(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).sum((1, 2)) * (2.0 if int(x[0, 0]) > 0 else 1.0)

    model = nn.Embedding(VOCABULARY, 3).double()
    found, change, _ = integrated(model, measure.Measurement(rows, (x,), "weighed"), attrib.Secant())
    torch.testing.assert_close(
        found.end - found.start, 2 * (change.reshape(-1, 3)[x]).sum((1, 2)), rtol=1e-12, atol=1e-14
    )
    torch.testing.assert_close(found.gradient @ change, found.end - found.start, rtol=1e-12, atol=1e-14)


SINGLE = {
    "float": lambda x: x.float(),
    "to": lambda x: x.to(torch.float32),
    "type": lambda x: x.type(torch.float32),
    "argument": lambda x: F.softmax(x, -1, dtype=torch.float32),
    "named": lambda x: x.to(dtype=torch.float32).to(torch.float32),
}


@pytest.mark.parametrize("cast", SINGLE)
def test_what_casts_to_single_precision_is_measured_in_double(cast: str) -> None:
    class Casting(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return SINGLE[cast](y).to(y.dtype)

    x, y = torch.randn(2, 3, dtype=torch.float64), torch.tensor([1, 3])
    found, change, _ = integrated(Casting(None).double(), measure.logit(x, y), attrib.Secant())
    # rounding of float64 in sums of a few terms of order one; single precision leaves 1e-8
    torch.testing.assert_close(found.gradient @ change, found.end - found.start, rtol=0, atol=1e-14)


def transformer(name: str, attention: str) -> tuple[nn.Module, measure.Measurement]:
    """A tiny model of transformers, and a measurement of padded texts, or of images."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"attn_implementation": attention}
    if name == "ViT":
        config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes)
        images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
        return transformers.ViTForImageClassification(config), measure.log_prob(images, torch.tensor([0, 2, 1]))
    sizes |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name == "BERT":
        (tokens, _, mask), classes = padded().batch, torch.tensor([0, 2, 1, 1])
        config = transformers.BertConfig(num_labels=3, **sizes)
        inputs = {"input_ids": tokens, "attention_mask": mask}
        return transformers.BertForSequenceClassification(config), measure.log_prob(inputs, classes)
    if name == "Llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=1, **sizes)), padded()
    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, **sizes)
    return transformers.GPT2LMHeadModel(config), padded()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attention", "path"),
    covering(("GPT-2", "Llama", "BERT", "ViT"), ("sdpa", "eager"), (attrib.Secant(), attrib.GaussLegendre(6)), whole=2),
    ids=str,
)
def test_a_transformer_is_accounted_for_to_rounding_with_padding(name: str, attention: str, path: Any) -> None:
    model, measurement = transformer(name, attention)
    model = model.eval().double()
    found, change, limit = integrated(model, measurement, path)
    # values of order 2 to 10 in float64; six nodes leave less than that
    torch.testing.assert_close(found.gradient @ change, found.end - found.start, rtol=0, atol=1e-13)
    assert limit <= limit_bound(torch.float64) / 100
    torch.testing.assert_close(found.start, measurement(model).detach(), rtol=1e-6, atol=1e-6)
