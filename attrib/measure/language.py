"""Measurements of language models: `model(tokens) -> logits (Q, T, V)`, those at position t being of token t + 1.

Texts are ids of tokens; a tokenizer only shows them. Prompts and continuations of different lengths are padded on the right,
where no causal model looks, and the model is given the mask where its call takes an `attention_mask`.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import MeasurementError
from .base import Measurement
from .outputs import IGNORED, logits_of, picked, total

Ids = Sequence[int] | Tensor


def continuation(
    prompts: Sequence[Ids] | Tensor,
    continuations: Sequence[Ids] | Tensor,
    pad: int = 0,
    names: Sequence[str] = (),
    tokenizer: Any = None,
) -> Measurement:
    """Log-probability of a continuation given a prompt, summed over the continuation's tokens, in nats: a query per pair.

    Args:
        prompts, continuations: Q each, of token ids: lists or (T,) int tensors, of any lengths from 1 on.
        pad: the id that shorter ones are filled up with. No value depends on it.
        names: what the queries are called; else what the tokenizer makes of the continuations; else their numbers.
        tokenizer: with `decode(ids) -> str`, or such a function. To name queries, for nothing else.

    Raises:
        MeasurementError: no ids, an empty text, or not as many of one as of the other.

    Example:
        >>> names = ["cat", "dogs"]
        >>> measurement = attrib.measure.continuation([[5, 2, 7], [1]], [[3], [4, 4]], names=names)
        >>> model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
        >>> measurement(model).shape
        torch.Size([2])
    """
    pairs = _texts(prompts, "prompts"), _texts(continuations, "continuations")
    if len(pairs[0]) != len(pairs[1]):
        raise MeasurementError(
            f"prompts and continuations differ in number: got {len(pairs[0])} and {len(pairs[1])}, expected as many, at "
            f"measure.continuation. Repeat the prompt for each of its continuations."
        )
    whole = [p + c for p, c in zip(*pairs, strict=True)]
    targets = [[IGNORED] * len(p) + c for p, c in zip(*pairs, strict=True)]
    batch = [_padded(whole, pad), _padded(targets, IGNORED)]
    if len({len(ids) for ids in whole}) > 1:
        batch.append(_padded([[1] * len(ids) for ids in whole], 0))
    return Measurement(_log_prob, tuple(batch), "continuation", "nats", _names(names, tokenizer, pairs[1]))


def tokens(text: Ids, start: int = 1, names: Sequence[str] = (), tokenizer: Any = None) -> Measurement:
    """Log-probability of each token of a text given those before it, in nats: a query per token.

    Args:
        text: (T,) token ids, a list or an int tensor.
        start: position of the first token that is measured: T - start queries. Nothing comes before the token at 0.
        names: what the queries are called; else what the tokenizer makes of each token; else their numbers.
        tokenizer: with `decode(ids) -> str`, or such a function. To name queries, for nothing else.

    Raises:
        MeasurementError: no ids, or no token from `start` on.

    Example:
        >>> measurement = attrib.measure.tokens([5, 2, 7, 1], tokenizer=lambda ids: "abcdefgh"[ids[0]])
        >>> measurement.names
        ('c', 'h', 'b')
        >>> model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
        >>> whole = attrib.measure.continuation([[5]], [[2, 7, 1]])
        >>> torch.allclose(measurement(model).sum(), whole(model))
        True
    """
    (ids,) = _texts([text], "text", "tokens")
    if not isinstance(start, int) or not 1 <= start < len(ids):
        raise MeasurementError(
            f"start is no position of a token with others before it: got {start!r}, expected 1 to {len(ids) - 1}, at "
            f"measure.tokens. Begin the text with the token that the model was trained to begin with."
        )
    measured = range(start, len(ids))
    rows = torch.tensor(ids).expand(len(measured), -1)
    targets = torch.full_like(rows, IGNORED)
    targets[torch.arange(len(measured)), torch.tensor(measured)] = torch.tensor(ids[start:])
    called = _names(names, tokenizer, [[ids[t]] for t in measured])
    return Measurement(_log_prob, (rows.clone(), targets), "tokens", "nats", called)


def _log_prob(model: Any, ids: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """(Q, T) ids, and which of them are measured -> (Q,)."""
    given = {} if mask is None or not _takes_mask(model) else {"attention_mask": mask}
    logits = logits_of(model(ids, **given))
    return total(picked(F.log_softmax(logits[:, :-1], -1), targets[:, 1:]))


def _takes_mask(model: Any) -> bool:
    return "attention_mask" in inspect.signature(getattr(model, "forward", model)).parameters


def _texts(texts: Any, label: str, place: str = "continuation") -> list[list[int]]:
    try:
        found = [[index(i) for i in text] for text in texts]
    except TypeError:
        found = []
    if found and all(found):
        return found
    got = f"an empty one at {found.index([])}" if found else repr(texts)[:80]
    raise MeasurementError(
        f"{label} is not made of token ids: got {got}, expected lists or tensors of at least one whole number each, "
        f"at measure.{place}. Pass what the tokenizer makes of a text: tokenizer(text)['input_ids']."
    )


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """(Q, T), filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


def _names(names: Sequence[str], tokenizer: Any, texts: Iterable[Sequence[int]]) -> tuple[str, ...]:
    if len(names) or tokenizer is None:
        return tuple(map(str, names))
    decode: Callable[[list[int]], str] = getattr(tokenizer, "decode", tokenizer)
    return tuple(str(decode(list(ids))) for ids in texts)
