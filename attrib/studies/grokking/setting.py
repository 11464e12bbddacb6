"""The networks that grok, and how much is done with each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import frame
from ..modular import TRANSFORMER_GROUPS, PairMlp, Pairs, PairTransformer, ordered_pairs, unordered_pairs

Axes = Mapping[str, int]


def ordered_tokens(a: Tensor, b: Tensor, p: int) -> Tensor:
    return torch.stack([a, b], -1)


def unordered_tokens(a: Tensor, b: Tensor, p: int) -> Tensor:
    """(b, +, a, =) with a <= b."""
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    return torch.stack([high, torch.full_like(a, p), low, torch.full_like(a, p + 1)], -1)


@dataclass(frozen=True, kw_only=True)
class Setting(frame.Setting):
    """A network, its data and optimizer, its layers, and the size of the study.

    pairs: seed -> data. tokens: (a, b, p) -> inputs. groups: layers of the figures; inner, outer: two sets of them that make
    up the network. neurons: the module whose outputs, rectified, are the hidden neurons; before, after: the axes that count
    them in the tensors before and after. every: steps between two looks.
    explained: held-out pairs whose mean log-probability is explained, and as many training pairs; queries: held-out pairs
    that are explained one by one.
    draws: initialisations that a transplant is retrained from, for each seed; inits: how they are drawn.
    retrain: steps that a transplant is given. longest: steps that a re-insertion is given, a multiple of what the untouched
    run still needs; at_most: and no more than these. sets: groups that are re-inserted. sources, targets: from and to where,
    as shares of the step at which the untouched run generalises; compared: targets of the controls. pruned: queries that
    importance is summed over, and whether over all their outputs.
    """

    p: int
    pairs: Callable[[int], Pairs]
    build: Callable[[int], nn.Module]
    tokens: Callable[[Tensor, Tensor, int], Tensor]
    lr: float
    weight_decay: float
    groups: Mapping[str, list[str]]
    inner: tuple[str, ...]
    outer: tuple[str, ...]
    neurons: str
    before: Axes
    after: Axes
    sets: Mapping[str, tuple[str, ...]]
    limit: int = 4000
    every: int = 10
    beyond: float = 0.1
    explained: int = 96
    queries: int = 4
    draws: int = 1
    inits: tuple[str, ...] = ("own", "0.1 normal")
    retrain: int = 1500
    longest: float = 1.5
    at_most: int = 4000
    sources: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    targets: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5)
    compared: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5)
    pruned: tuple[int, bool] = (16, True)
    record: Mapping[str, Any] = field(default_factory=dict)

    def patterns(self, groups: tuple[str, ...]) -> list[str]:
        """Parameter patterns of some of the layers."""
        return [pattern for group in groups for pattern in self.groups[group]]


_MLP_GROUPS = {"embedding": ["embedding.*"], "hidden": ["hidden.*"], "output": ["output.*"]}
_MLP_SETS = {
    "embedding": ("embedding",),
    "hidden (inner)": ("hidden",),
    "output": ("output",),
    "embedding, hidden": ("embedding", "hidden"),
    "embedding, output (outer)": ("embedding", "output"),
    "hidden, output": ("hidden", "output"),
}


def _mlp(name: str, about: str, p: int, share: float, **rest: object) -> Setting:
    known = dict(
        lr=0.01,
        weight_decay=1.0,
        groups=_MLP_GROUPS,
        inner=("hidden",),
        outer=("embedding", "output"),
        neurons="hidden",
        before={"hidden.weight": 0},
        after={"output.weight": 1},
        sets=_MLP_SETS,
        seeds=5,
    )
    data = dict(
        name=name,
        about=about,
        p=p,
        pairs=lambda seed: ordered_pairs(p, share, seed),
        build=PairMlp,
        tokens=ordered_tokens,
    )
    options: dict[str, Any] = {**known, **data, **rest}
    return Setting(**options)


QUICK = _mlp(
    "quick",
    "embed both numbers, one hidden ReLU layer of 128, no biases; p = 31, half of the 961 ordered pairs",
    31,
    0.5,
)
TOY = _mlp(
    "toy",
    "as quick, p = 23 and 423 of the 529 pairs, faster: to see that everything runs, not to learn from",
    *(23, 0.8),
    lr=0.02,
    weight_decay=2.0,
    seeds=2,
    limit=500,
    sets={"hidden (inner)": ("hidden",), "embedding, output (outer)": ("embedding", "output")},
    inits=("own",),
    retrain=100,
    at_most=160,
    explained=10,
    queries=2,
    sources=(0.5, 1.0),
    targets=(0.0, 0.25),
    compared=(0.25,),
    pruned=(2, True),
)
EXPLAIND = Setting(
    name="explaind",
    about="ExPLAIND's network: one layer of attention, hidden layer of 512, p = 113, 4000 of the 6441 unordered pairs",
    p=113,
    pairs=lambda seed: unordered_pairs(seed=seed),
    build=PairTransformer,
    tokens=unordered_tokens,
    lr=1e-3,
    weight_decay=4.0,
    groups=TRANSFORMER_GROUPS,
    inner=("attention encoders", "attention decoders", "linear1"),
    outer=("embedding", "linear2", "decoder"),
    neurons="linear1",
    before={"linear1.weight": 0, "linear1.bias": 0},
    after={"linear2.weight": 1},
    sets={
        "attention, linear1 (inner)": ("attention encoders", "attention decoders", "linear1"),
        "embedding, linear2, decoder (outer)": ("embedding", "linear2", "decoder"),
    },
    seeds=1,
    first_seed=43,
    limit=3000,
    draws=5,
    inits=("0.1 normal",),
    retrain=500,
    longest=1.0,
    at_most=500,
    sources=(0.5, 1.0),
    targets=(0.0, 0.25, 0.5),
    compared=(0.0, 0.25),
    pruned=(32, False),
    record={"states_every": 16},
)
SETTINGS = {setting.name: setting for setting in (QUICK, EXPLAIND, TOY)}
