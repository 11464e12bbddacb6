"""The two networks that are watched, what is looked at of them, and how much is done."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...measure import Measurement
from .. import digits, frame, modular

LOOKS = ("training loss", "held-out loss", "training accuracy", "held-out accuracy")


@dataclass(frozen=True)
class Network:
    """train: (seed, store) -> the trained model, recorded. x, y: all examples; trained, held_out: ids into them. groups:
    of the figures. pull: weight of `Suppress` in the windows."""

    name: str
    train: Callable[[int, Path], nn.Module]
    build: Callable[[], nn.Module]
    x: Tensor
    y: Tensor
    trained: Tensor
    held_out: Tensor
    groups: Mapping[str, list[str]]
    pull: float

    def looks(self, model: Any) -> Tensor:
        """(4,): LOOKS, losses in nats."""
        found = []
        for ids in (self.trained, self.held_out):
            outputs, y = model(_typed(self.x[ids], model)), self.y[ids]
            found.append((F.cross_entropy(outputs, y), (outputs.argmax(-1) == y).to(outputs.dtype).mean()))
        (trained, right), (held_out, rightly) = found
        return torch.stack([trained, held_out, right, rightly])

    def held_out_loss(self, model: Any) -> Tensor:
        """(1,): mean loss of the held-out examples, in nats."""
        return F.cross_entropy(model(_typed(self.x[self.held_out], model)), self.y[self.held_out])[None]

    def queries(self, count: int) -> Measurement:
        """Mean margin of held-out examples, their mean log-probability, and that of single ones."""
        some = self.held_out[:: max(1, len(self.held_out) // 64)][:64]
        single = some[:: max(1, len(some) // count)][:count]
        ids = torch.stack([some, some, *(q.expand(len(some)) for q in single)])
        names = ("held-out margin", "held-out log-probability", *(f"example {int(q)}" for q in single))
        is_margin = torch.tensor([True, *[False] * (1 + len(single))])
        return Measurement(_mean, (self.x[ids], self.y[ids], is_margin), "margin, log_prob", "nats", names)


def _typed(x: Tensor, model: Any) -> Tensor:
    return x.to(next(iter(model.parameters())).dtype) if x.is_floating_point() else x


def _mean(model: Any, x: Tensor, y: Tensor, is_margin: Tensor) -> Tensor:
    """(Q, n, ...), (Q, n), (Q,) -> (Q,): the mean margin against the mean of the other outputs, or log-probability."""
    outputs = model(x.flatten(0, 1))
    own = outputs.gather(1, y.flatten()[:, None])[:, 0]
    margin = own - (outputs.sum(1) - own) / (outputs.shape[1] - 1)
    log_prob = own - torch.logsumexp(outputs, 1)
    means = (v.view(y.shape).mean(1) for v in (margin, log_prob))
    return torch.where(is_margin, next(means), next(means))


@dataclass(frozen=True, kw_only=True)
class Setting(frame.Setting):
    """epochs: of the digits network. p, share: of the modular pairs; limit: of steps. curve: states that are looked at.
    checkpoints: shares of a run, between all of which lines are walked, over all seeds; positions: on a line; height:
    of a barrier, in nats, that parts two basins. windows: that the run is cut into; branches: shares at which a run
    goes on with other batches. queries: single held-out examples. dropped: examples left out for each; asked: of how
    many queries. planted_steps: of the network with the planted layer."""

    epochs: int = 8
    p: int = 31
    share: float = 0.5
    limit: int = 4000
    curve: int = 80
    checkpoints: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    positions: int = 11
    height: float = 0.1
    windows: int = 4
    branches: tuple[float, ...] = (0.0, 0.05, 0.1, 0.25, 0.5)
    queries: int = 8
    dropped: int = 20
    asked: int = 2
    planted_steps: int = 300

    def networks(self) -> list[Network]:
        """The same data for all seeds; a seed draws the weights and the order of the batches."""
        data = digits.load()
        pairs = modular.ordered_pairs(self.p, self.share, 0)
        tensors = ("conv1", "conv2", "hidden", "output")
        return [
            Network(
                "digits",
                lambda seed, store: digits.train(data, store, self.epochs, seed, overwrite=True),
                digits.DigitsCnn, data.x, data.y, data.train, data.test, {name: [f"{name}.*"] for name in tensors}, 0.05,
            ),
            Network(
                "grokking",
                lambda seed, store: modular.train_until_generalised(
                    pairs, store, self.limit, seed, progress=False, beyond=0.1, overwrite=True
                )[0],
                lambda: modular.PairMlp(self.p), pairs.x, pairs.y, pairs.train, pairs.test,
                {name: [f"{name}.*"] for name in ("embedding", "hidden", "output")}, 0.01,
            ),
        ]  # fmt: skip


_ABOUT = "a network of digits (1400 images, momentum, schedule) and the grokking MLP (AdamW, full batch)"
SETTINGS = {
    "quick": Setting(name="quick", about=f"{_ABOUT}, p = 31", seeds=5),
    "toy": Setting(
        name="toy",
        about=f"{_ABOUT}, p = 11; few steps: to see that everything runs, not to learn from",
        seeds=2,
        epochs=1,
        p=11,
        share=0.8,
        limit=40,
        curve=8,
        checkpoints=(0.0, 1.0),
        positions=3,
        windows=2,
        branches=(0.5,),
        queries=2,
        dropped=5,
        asked=1,
        planted_steps=60,
    ),
}
