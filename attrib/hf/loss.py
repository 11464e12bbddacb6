"""The loss of each example, as the models of transformers and their Trainer compute it, unreduced.

    tokens     l_i = sum over the labelled tokens t of i of  - log p(label_t)
    classes    l_i = - log p(label_i)
    flags      l_i = mean over labels of the binary cross-entropy of each
    values     l_i = mean over outputs of (output - label)^2
    smoothed   (1 - e) l_i + e * mean over classes of - log p(class), summed over tokens as l_i is

The Trainer divides their sum, by the examples or tokens of the batch or of all batches of the step. That divisor is recorded
with the batch, so that the losses of a step sum to the one that was differentiated: an example's is its part of it. What is
computed in less than single precision is widened first, as transformers does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import uncompiled

IGNORED = -100  # the label of a token that counts for nothing

CLASSIFIERS = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForVideoClassification",
    "ForAudioClassification",
)
TAGGERS = ("ForMaskedLM", "ForTokenClassification")
WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")

PROBLEMS = {
    "single_label_classification": "classes",
    "multi_label_classification": "flags",
    "regression": "values",
}


@dataclass(frozen=True)
class Loss:
    """`loss(model, inputs, divisor=1) -> (B,)`, inputs being what the Trainer calls the model with, labels among them.

    Args:
        kind: "tokens", "classes", "flags" or "values"; None for what type and number of the labels say, as transformers
            reads it.
        shift: whether tokens are labels of the place before.
        smoothing: e, the share of the loss that goes to all classes alike.
        feeds: whether the model is given the labels, of which an encoder-decoder makes its own inputs.

    Example:
        >>> def model(input_ids):
        ...     return {"logits": torch.zeros(*input_ids.shape, 10)}  # ten tokens, all as likely
        >>> texts = torch.ones(2, 4, dtype=torch.int64)
        >>> attrib.hf.Loss("tokens", shift=True)(model, {"input_ids": texts, "labels": texts})
        tensor([6.9078, 6.9078])
    """

    kind: str | None
    shift: bool = False
    smoothing: float = 0.0
    feeds: bool = False

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], divisor: Tensor | float = 1.0) -> Tensor:
        return self._losses(model, inputs) / divisor

    def count(self, inputs: Mapping[str, Any]) -> int:
        """What the sum of the losses is divided by in their mean: tokens that count, or examples."""
        labels = self._targets(inputs)
        return len(labels) if labels.is_floating_point() else int((labels != IGNORED).sum())

    def _targets(self, inputs: Mapping[str, Any]) -> Tensor:
        if "shift_labels" in inputs:
            return inputs["shift_labels"]
        return inputs["labels"][:, 1:] if self.shift else inputs["labels"]

    def _losses(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        labels = inputs["labels"]
        output = model(**{name: part for name, part in inputs.items() if name != "labels" or self.feeds})
        logits = output["logits"] if isinstance(output, Mapping) else output[1 if self.feeds else 0]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        kind = self.kind or _kind_of(labels, logits)
        if kind == "values":
            return (logits - labels.view_as(logits)).square().flatten(1).mean(1)
        if kind == "flags":
            losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none")
            return losses.flatten(1).mean(1)
        if kind == "classes":
            return self._entropy(logits, labels.view(-1))
        labels = self._targets(inputs)
        return self._entropy(logits[:, : labels.shape[1]].transpose(1, 2), labels).sum(1)

    def _entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B, C, ...) and (B, ...) -> (B, ...), 0 where the label is ignored."""
        if not self.smoothing:
            return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
        surprise = -F.log_softmax(logits, 1)
        picked = surprise.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
        smoothed = (1 - self.smoothing) * picked + self.smoothing * surprise.mean(1)
        return smoothed.masked_fill(labels == IGNORED, 0.0)


def loss(model: nn.Module, label_smoothing: float = 0.0) -> Loss:
    """The loss of each example that a model of transformers is trained with, for `attrib.attribute(loss=...)`.

    Args:
        model: a model with a head for causal or masked language modelling, for sequences to sequences, for classifying
            sequences, tokens, images, videos or audio; also with adapters of peft, also compiled.
        label_smoothing: `TrainingArguments.label_smoothing_factor`.

    Returns:
        `loss(model, inputs, divisor=1) -> (B,)`, inputs being a dict with "labels".

    Raises:
        ValueError: the model's loss is none of these.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=2))
        >>> attrib.hf.loss(model)
        Loss(kind='tokens', shift=True, smoothing=0.0, feeds=False)
    """
    base = base_of(model)
    name, config = type(base).__name__, getattr(base, "config", None)
    encodes = bool(getattr(config, "is_encoder_decoder", False))
    if any(word in name for word in CLASSIFIERS):
        return Loss(PROBLEMS.get(getattr(config, "problem_type", None) or ""), smoothing=label_smoothing)
    if any(word in name for word in TAGGERS):
        return Loss("tokens", smoothing=label_smoothing)
    if any(word in name for word in WRITERS):
        return Loss("tokens", shift=not encodes, smoothing=label_smoothing, feeds=encodes)
    known = ", ".join((*WRITERS, *TAGGERS, *CLASSIFIERS))
    raise ValueError(
        f"the loss of each example is not known: got a model {name}, expected one whose name has one of {known}. Pass "
        f"loss=, a function loss(model, inputs) -> (B,) of the dict that the model is called with."
    )


def base_of(model: nn.Module) -> Any:
    """The model of transformers in one that is compiled, or has adapters."""
    base: Any = uncompiled(model)
    return base.get_base_model() if hasattr(base, "get_base_model") else base


def _kind_of(labels: Tensor, logits: Tensor) -> str:
    if logits.shape[-1] == 1:
        return "values"
    return "flags" if labels.is_floating_point() else "classes"
