"""The tables that property tests run over: optimizers, models, layers, operations, measurements. A new row is a new test."""

from collections.abc import Callable, Collection
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def covering(*tables: Collection[Any], whole: int = 1) -> list[tuple[Any, ...]]:
    """A few of the combinations of the entries of some tables: the first `whole` tables crossed in full, the others counted
    through beside them, as the digits of i + j + ... in row (i, j, ...).

    Every entry of every table occurs, and every combination of the others, where the rows are as many. That suffices
    because the parts meet in narrow places and know nothing of each other beyond them: an update rule sees flat vectors,
    whatever the model; a capture stores what the layers give, whatever the optimizer; a type is the dtype of every array.
    What is wrong in one part shows beside any entry of the others; what is wrong only where two certain entries meet is
    left to the full cross, see `crossed`.
    """
    found = []
    for row in product(*(enumerate(table) for table in tables[:whole])):
        turn, entries = sum(place for place, _ in row), [entry for _, entry in row]
        for table in tables[whole:]:
            turn, place = divmod(turn, len(table))
            entries.append(list(table)[place])
        found.append(tuple(entries))
    return found


def crossed(*tables: Collection[Any], fast: Collection[tuple[Any, ...]] = ()) -> list[Any]:
    """Every combination, for `parametrize`; slow are those that are not in `fast`, by default the covering ones."""
    fast = fast or covering(*tables)
    return [
        pytest.param(
            *row,
            marks=[] if row in fast else pytest.mark.slow,
            id="-".join(getattr(v, "__name__", str(v)) for v in row),
        )
        for row in product(*tables)
    ]


def covered(*tables: Collection[Any], whole: int = 2) -> list[Any]:
    """The covering rows of some tables with the first `whole` crossed in full, for `parametrize`; slow are those beyond the
    covering ones of the first alone."""
    fast = covering(*tables)
    slow = [row for row in covering(*tables, whole=whole) if row not in fast]
    return [*fast, *(pytest.param(*row, marks=pytest.mark.slow) for row in slow)]


def few_first(*tables: Collection[Any], few: Collection[Any]) -> list[Any]:
    """The covering rows of some tables; slow are those whose first entry is not among the few."""
    fast = covering(few, *tables[1:])
    slow = [row for row in covering(*tables) if row[0] not in few]
    return [*fast, *(pytest.param(*row, marks=pytest.mark.slow) for row in slow)]


def two_groups(parameters: list[nn.Parameter], kind: Callable[..., Any], **rest: Any) -> torch.optim.Optimizer:
    """Every other tensor in a group of its own hyper-parameters."""
    first, second = parameters[::2], parameters[1::2]
    return kind([{"params": first}, {"params": second, "lr": 0.02, "weight_decay": 0.3}], **rest)


SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
RMSPROP, ADAGRAD, ADADELTA, ADAMAX = torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.Adamax
NADAM, RADAM, ASGD, RPROP = torch.optim.NAdam, torch.optim.RAdam, torch.optim.ASGD, torch.optim.Rprop
ADAFACTOR, MUON = torch.optim.Adafactor, torch.optim.Muon


def matrices(parameters: list[nn.Parameter], *kinds: Callable[..., Any]) -> list[torch.optim.Optimizer]:
    """Several optimizers: the first for the matrices, the others in turn for the rest."""
    flat = [p for p in parameters if p.dim() == 2]
    rest = [p for p in parameters if p.dim() != 2]
    first, *others = kinds
    return [first(flat), *(kind(rest[n :: len(others)]) for n, kind in enumerate(others))]


Optimizers = torch.optim.Optimizer | list[torch.optim.Optimizer]

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizers]] = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "sgd momentum": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "sgd momentum dampening decay": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.1),
    "sgd nesterov decay": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd maximize decay": lambda p: SGD(p, lr=0.01, momentum=0.5, maximize=True, weight_decay=0.1),
    "sgd foreach": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "sgd fused": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "sgd groups": lambda p: two_groups(p, SGD, lr=0.1, momentum=0.9),
    "adam": lambda p: ADAM(p, lr=0.01),
    "adam decay": lambda p: ADAM(p, lr=0.01, weight_decay=0.1),
    "adam amsgrad": lambda p: ADAM(p, lr=0.01, betas=(0.7, 0.8), amsgrad=True, weight_decay=0.1),
    "adam maximize": lambda p: ADAM(p, lr=0.01, maximize=True, weight_decay=0.1),
    "adam foreach": lambda p: ADAM(p, lr=0.01, foreach=True),
    "adam fused": lambda p: ADAM(p, lr=0.01, weight_decay=0.1, fused=True),
    "adamw": lambda p: ADAMW(p, lr=0.01, weight_decay=0.5, betas=(0.9, 0.98)),
    "adamw amsgrad": lambda p: ADAMW(p, lr=0.01, weight_decay=0.5, amsgrad=True, betas=(0.7, 0.8)),
    "adamw maximize": lambda p: ADAMW(p, lr=0.001, weight_decay=0.5, maximize=True),
    "adamw foreach": lambda p: ADAMW(p, lr=0.01, weight_decay=0.5, foreach=True),
    "adamw fused": lambda p: ADAMW(p, lr=0.01, weight_decay=0.5, amsgrad=True, fused=True),
    "adamw groups": lambda p: two_groups(p, ADAMW, lr=0.01, weight_decay=0.5),
    "rmsprop": lambda p: RMSPROP(p, lr=0.01, alpha=0.9),
    "rmsprop momentum centered decay": lambda p: RMSPROP(p, lr=0.003, momentum=0.9, centered=True, weight_decay=0.1),
    "rmsprop maximize foreach": lambda p: RMSPROP(
        p, lr=0.001, momentum=0.5, maximize=True, weight_decay=0.1, foreach=True
    ),
    "rmsprop groups": lambda p: two_groups(p, RMSPROP, lr=0.01, centered=True),
    "adagrad": lambda p: ADAGRAD(p, lr=0.1),
    "adagrad begun decay": lambda p: ADAGRAD(p, lr=0.1, lr_decay=0.1, initial_accumulator_value=0.3, weight_decay=0.1),
    "adagrad maximize foreach": lambda p: ADAGRAD(
        p, lr=0.01, lr_decay=0.1, maximize=True, weight_decay=0.1, foreach=True
    ),
    "adagrad fused": lambda p: ADAGRAD(p, lr=0.1, lr_decay=0.1, weight_decay=0.1, fused=True),
    "adadelta": lambda p: ADADELTA(p, lr=1.0, eps=1e-4),
    "adadelta decay": lambda p: ADADELTA(p, lr=2.0, rho=0.8, eps=1e-4, weight_decay=0.1),
    "adadelta maximize foreach": lambda p: ADADELTA(p, lr=0.2, eps=1e-4, maximize=True, weight_decay=0.1, foreach=True),
    "adamax": lambda p: ADAMAX(p, lr=0.01),
    "adamax decay": lambda p: ADAMAX(p, lr=0.01, betas=(0.7, 0.8), weight_decay=0.1),
    "adamax maximize foreach": lambda p: ADAMAX(p, lr=0.001, maximize=True, weight_decay=0.1, foreach=True),
    "nadam": lambda p: NADAM(p, lr=0.01),
    "nadam decay": lambda p: NADAM(p, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1, momentum_decay=0.1),
    "nadam decoupled foreach": lambda p: NADAM(
        p, lr=0.01, weight_decay=0.5, decoupled_weight_decay=True, momentum_decay=0.1, foreach=True
    ),
    "nadam maximize": lambda p: NADAM(p, lr=0.001, maximize=True, weight_decay=0.1),
    "radam": lambda p: RADAM(p, lr=0.01),
    "radam decay": lambda p: RADAM(p, lr=0.01, betas=(0.8, 0.9999), weight_decay=0.1),
    "radam decoupled foreach": lambda p: RADAM(p, lr=0.01, weight_decay=0.5, decoupled_weight_decay=True, foreach=True),
    "radam maximize": lambda p: RADAM(p, lr=0.001, maximize=True, weight_decay=0.1),
    "asgd": lambda p: ASGD(p, lr=0.1),
    "asgd averaging decay": lambda p: ASGD(p, lr=0.1, lambd=0.1, alpha=0.6, t0=2, weight_decay=0.1),
    "asgd maximize foreach": lambda p: ASGD(p, lr=0.01, lambd=0.1, t0=2, maximize=True, weight_decay=0.1, foreach=True),
    "rprop": lambda p: RPROP(p, lr=0.01),
    "rprop bounded": lambda p: RPROP(p, lr=0.01, etas=(0.3, 2.0), step_sizes=(0.005, 0.03)),
    "rprop maximize foreach": lambda p: RPROP(p, lr=0.001, maximize=True, foreach=True),
    "adafactor": lambda p: ADAFACTOR(p, lr=0.1),
    "adafactor decay": lambda p: ADAFACTOR(p, lr=0.1, beta2_decay=-0.5, eps=(1e-3, 0.1), d=1.5, weight_decay=0.5),
    "adafactor maximize foreach": lambda p: ADAFACTOR(p, lr=0.01, maximize=True, weight_decay=0.5, foreach=True),
    "muon + adamw": lambda p: matrices(p, partial(MUON, lr=0.02), partial(ADAMW, lr=0.01)),
    "muon + sgd + adafactor": lambda p: matrices(
        p,
        partial(
            MUON, lr=0.02, momentum=0.8, nesterov=False, ns_steps=3, adjust_lr_fn="match_rms_adamw", weight_decay=0.5
        ),
        partial(SGD, lr=0.1, momentum=0.9),
        partial(ADAFACTOR, lr=0.1),
    ),
    "nadam + adagrad": lambda p: [
        two_groups(p[:2], NADAM, lr=0.01),
        ADAGRAD(p[2:], lr=0.1, initial_accumulator_value=0.1),
    ],
}


def in_train_mode(optimizer: Any) -> Any:
    """One that is schedule-free."""
    optimizer.train()
    return optimizer


if find_spec("lion_pytorch"):
    from lion_pytorch import Lion

    OPTIMIZERS |= {
        "lion": lambda p: Lion(p, lr=0.01, betas=(0.8, 0.9), weight_decay=0.5),
        "lion groups": lambda p: two_groups(p, Lion, lr=0.01),
    }

if find_spec("schedulefree"):
    from schedulefree import AdamWScheduleFree, SGDScheduleFree

    OPTIMIZERS |= {
        "schedule-free sgd": lambda p: in_train_mode(SGDScheduleFree(p, lr=0.1, weight_decay=0.1, warmup_steps=3)),
        "schedule-free sgd one by one": lambda p: in_train_mode(
            SGDScheduleFree(p, lr=0.1, momentum=0.7, r=1.0, foreach=False)
        ),
        "schedule-free adamw": lambda p: in_train_mode(AdamWScheduleFree(p, lr=0.01, weight_decay=0.5, warmup_steps=3)),
        "schedule-free adamw one by one": lambda p: in_train_mode(
            AdamWScheduleFree(p, lr=0.01, betas=(0.8, 0.9), r=0.5, weight_lr_power=1.0, foreach=False)
        ),
    }

# one of each rule, and of each way in which torch or the store treats them differently: what the fast tier goes through
FEW = (
    "sgd groups",
    "sgd nesterov decay",
    "adam amsgrad",
    "adamw fused",
    "rmsprop momentum centered decay",
    "adagrad begun decay",
    "adadelta decay",
    "adamax decay",
    "nadam decoupled foreach",
    "radam",
    "asgd averaging decay",
    "rprop bounded",
    "adafactor decay",
    "muon + adamw",
    "muon + sgd + adafactor",
    "nadam + adagrad",
    *(name for name in ("lion", "schedule-free sgd", "schedule-free adamw") if name in OPTIMIZERS),
)

# one of each sort of state that an optimizer may have: what goes on with a state, or makes it again, knows no more of it
SORTS = (
    "sgd groups",
    "adamw fused",
    "adafactor decay",
    "muon + sgd + adafactor",
    "schedule-free adamw" if "schedule-free adamw" in OPTIMIZERS else "asgd averaging decay",
)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.hidden = nn.Linear(12, 16)
        self.output = nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.relu(self.hidden(self.embedding(x).flatten(1))))


class Cnn(nn.Module):
    """Two convolutions, max and average pooling, batch norm with fixed statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4).eval()
        self.second = nn.Conv2d(4, 6, 3, bias=False)
        self.output = nn.Linear(6, 4)
        self.norm.running_mean.uniform_(-0.1, 0.1)
        self.norm.running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        return self.output(F.avg_pool2d(F.relu(self.second(x), inplace=True), 2).flatten(1))


class GptBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (z.view(b, t, 2, c // 2).transpose(1, 2) for z in self.qkv(self.norm1(x)).split(c, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """Embedding, learned positions as a bare parameter, causal attention, tied head."""

    def __init__(self, vocabulary: int = 9, length: int = 5, width: int = 8) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.1)
        self.block = GptBlock(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(self.tokens(x) + self.positions[: x.shape[1]])
        return F.linear(self.norm(h), self.tokens.weight)


def classify(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def language(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).transpose(1, 2), y, reduction="none").mean(1)


class ModelCase(NamedTuple):
    build: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]]  # number of examples -> x, y
    loss: Callable[..., Tensor]


def pairs(n: int) -> tuple[Tensor, Tensor]:
    x = torch.randint(0, 7, (n, 2))
    return x, x.sum(1) % 7


MODELS = {
    "mlp": ModelCase(Mlp, pairs, classify),
    "cnn": ModelCase(Cnn, lambda n: (torch.randn(n, 1, 8, 8), torch.randint(0, 4, (n,))), classify),
    "gpt": ModelCase(Gpt, lambda n: (torch.randint(0, 9, (n, 5)), torch.randint(0, 9, (n, 5))), language),
}


# Layers for per-example gradients: (batch) -> (B, ...). Each takes float input of the shape beside it.


class Scaled(nn.Module):
    """Bare parameters in plain arithmetic, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))
        self.gain = nn.Parameter(torch.randn(5))
        self.shift = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight * self.gain + self.shift) @ self.weight.t()


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.linear(x)))


class TimeFirst(nn.Module):
    """The batch is the second dimension inside."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2)
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.linear(x).transpose(0, 1)


class Flattened(nn.Module):
    """Batch and positions are one dimension inside."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.reshape(-1, 6)).relu().view(x.shape[0], -1)


class Frames(nn.Module):
    """The frames of an example stand in the batch dimension of a convolution and its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.flatten(0, 1))).relu().unflatten(0, x.shape[:2])


class ClassToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.cat([self.token.expand(len(x), -1, -1), x], 1)).tanh()


class Looked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4, padding_idx=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x.abs() * 3).long() % 5)


class Tempered(nn.Module):
    """A parameter of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.heat = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.heat.exp()


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btd,dhe->bthe", x, self.weight)


def normed() -> nn.Module:
    norm = nn.BatchNorm1d(4).eval()
    norm.running_mean.uniform_(-1, 1)
    return norm


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "linear over positions": (lambda: nn.Linear(6, 4, bias=False), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1), (2, 7)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (4, 7, 6)),
    "embedding with padding": (Looked, (4,)),
    "layer norm": (lambda: nn.LayerNorm((3, 6)), (3, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), (3, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 5)),
    "batch norm in eval mode": (normed, (4, 5)),
    "bare parameters": (Scaled, (3, 5)),
    "a number": (Tempered, (6,)),
    "one layer used twice": (Reused, (5,)),
    "attention, batch second": (TimeFirst, (3, 6)),
    "attention, batch first": (lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), (3, 6)),
    "positions and batch in one dimension": (Flattened, (3, 6)),
    "frames in the batch dimension": (Frames, (3, 2, 6)),
    "class token": (ClassToken, (3, 6)),
    "einsum": (Mixed, (3, 6)),
    "bilinear": (lambda: nn.Sequential(nn.Linear(6, 6), nn.GLU()), (6,)),
    "weight norm": (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), (6,)),
    "prelu": (lambda: nn.Sequential(nn.Linear(6, 4), nn.PReLU(4)), (6,)),
}


# Operations of the secant: a function of one tensor of the shape beside it; all inputs are drawn from a normal.


class OperationCase(NamedTuple):
    function: Callable[[Tensor], Tensor]
    shape: tuple[int, ...] = (4, 6)
    positive: bool = False
    kinks: bool = False  # no derivative to compare the limit with


def split_in_two(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: f(*x.chunk(2, 0))


def assigned(x: Tensor) -> Tensor:
    out = torch.zeros(4, 7, dtype=x.dtype)
    out[:, 1:] = x
    out[:, 0] = x[:, 0] * 2
    return out


FIXED = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6)

OPERATIONS: dict[str, OperationCase] = {
    **{
        f.__name__: OperationCase(f)
        for f in (F.relu, F.silu, F.softplus, F.elu, F.selu, F.mish, F.logsigmoid, F.softsign)
    },
    **{f.__name__: OperationCase(f) for f in (torch.tanh, torch.sigmoid, torch.exp, torch.erf, torch.sin, torch.cos)},
    **{
        f.__name__: OperationCase(f, positive=True)
        for f in (torch.log, torch.sqrt, torch.rsqrt, torch.reciprocal, torch.log1p, torch.log2)
    },
    "gelu": OperationCase(F.gelu),
    "gelu tanh": OperationCase(lambda x: F.gelu(x, approximate="tanh")),
    "leaky relu": OperationCase(lambda x: F.leaky_relu(x, 0.2)),
    "relu6": OperationCase(lambda x: F.relu6(3 * x)),
    "hardtanh": OperationCase(F.hardtanh),
    "hardswish": OperationCase(lambda x: F.hardswish(3 * x)),
    # torch's own derivative of hardsigmoid is 1/6 rounded to float32, so there is no limit to compare with
    "hardsigmoid": OperationCase(lambda x: F.hardsigmoid(3 * x), kinks=True),
    "clamp": OperationCase(lambda x: x.clamp(-0.5, 0.7)),
    "clamp min": OperationCase(lambda x: x.clamp(min=0.1)),
    "abs": OperationCase(torch.abs),
    "square": OperationCase(torch.square),
    "cube": OperationCase(lambda x: x**3),
    "power": OperationCase(lambda x: x**1.7, positive=True),
    "inverse square": OperationCase(lambda x: x**-2, positive=True),
    "division": OperationCase(split_in_two(lambda a, b: a / b), positive=True),
    "product": OperationCase(split_in_two(lambda a, b: a * b)),
    "product with itself": OperationCase(lambda x: x * x + x),
    "matrix product": OperationCase(lambda x: x @ x.T),
    "batched product": OperationCase(lambda x: torch.bmm(x, x.transpose(1, 2)), (2, 3, 4)),
    "einsum": OperationCase(lambda x: torch.einsum("ij,kj->ik", x, x)),
    "broadcast sum": OperationCase(lambda x: x[:1] + x),
    "constant product": OperationCase(lambda x: (x * FIXED) @ FIXED.T),
    "softmax": OperationCase(lambda x: x.softmax(-1)),
    "softmax along the first": OperationCase(lambda x: x.softmax(0)),
    "masked softmax": OperationCase(lambda x: x.masked_fill(FIXED.abs() < 0.3, -torch.inf).softmax(-1)),
    "log softmax": OperationCase(lambda x: x.log_softmax(-1)),
    "logsumexp": OperationCase(lambda x: x.logsumexp((0, 1))),
    "cross entropy": OperationCase(lambda x: F.cross_entropy(x, torch.tensor([0, 1, 5, 3]))),
    "amax": OperationCase(lambda x: x.amax(1)),
    "amax over two": OperationCase(lambda x: x.amax((0, 2)), (3, 2, 4)),
    "amin": OperationCase(lambda x: x.amin(-1, keepdim=True)),
    "max": OperationCase(lambda x: x.max()),
    "max along": OperationCase(lambda x: x.max(1).values),
    "min along": OperationCase(lambda x: x.min(0).values),
    "maximum": OperationCase(split_in_two(torch.maximum)),
    "minimum": OperationCase(lambda x: torch.minimum(x[:1], x)),
    "max pool 1d": OperationCase(lambda x: F.max_pool1d(x, 3, 2, 1), (2, 2, 9)),
    "max pool 2d": OperationCase(lambda x: F.max_pool2d(x, 2), (2, 2, 4, 6)),
    "overlapping max pool": OperationCase(lambda x: F.max_pool2d(x, 3, 1, 1), (1, 2, 4, 4)),
    "average pool": OperationCase(lambda x: F.avg_pool2d(x, 2), (1, 2, 4, 4)),
    "adaptive average pool": OperationCase(lambda x: F.adaptive_avg_pool2d(x, 2), (1, 2, 4, 6)),
    "convolution 1d": OperationCase(lambda x: F.conv1d(x, x[:, :, :3], padding=1), (2, 2, 5)),
    "convolution 2d": OperationCase(lambda x: F.conv2d(x, x[..., :3, :3]), (2, 2, 4, 5)),
    "layer norm": OperationCase(lambda x: F.layer_norm(x, (6,), x[0], x[1])),
    "rms norm": OperationCase(lambda x: F.rms_norm(x, (6,), x[0])),
    "group norm": OperationCase(lambda x: F.group_norm(x, 2, x[0, :, 0], x[0, :, 1]), (2, 4, 3)),
    "batch norm": OperationCase(lambda x: F.batch_norm(x, FIXED[0], FIXED[1] ** 2 + 1, x[0], x[1])),
    "variance": OperationCase(lambda x: x.var(1)),
    "standard deviation": OperationCase(lambda x: x.std(1)),
    "norm": OperationCase(lambda x: x.norm(dim=1)),
    "embedding": OperationCase(lambda x: F.embedding(torch.tensor([[0, 2], [2, 3]]), x)),
    # whose padding row torch gives no derivative, though it is looked up
    "embedding of a padding row": OperationCase(
        lambda x: F.embedding(torch.tensor([[0, 2], [2, 3]]), x, padding_idx=2), kinks=True
    ),
    "attention": OperationCase(lambda x: F.scaled_dot_product_attention(x, x * 0.5, x + 1, is_causal=True), (2, 3, 4)),
    "shapes": OperationCase(lambda x: torch.cat([x.T.flip(0), x.T.roll(1, 0)], 1)[1:, ::2].unfold(0, 2, 1)),
    "pad and split": OperationCase(lambda x: torch.stack(F.pad(x, (1, 3)).split(5, 1), 0)),
    "masked by itself": OperationCase(lambda x: x * (x > 0)),
    "masked by itself, converted": OperationCase(lambda x: x * (x > 0.1).to(x.dtype)),
    "slope by where": OperationCase(lambda x: x * torch.where(x > 0, 1.0, 0.1)),
    "step": OperationCase(lambda x: (x[:2] > x[2:]).double() + (x[:2] == x[2:]) + (x[0] <= x[1])),
    "logic": OperationCase(lambda x: x * ((x > 0) & (x < 1) | ~(x > -1))),
    "masked fill by itself": OperationCase(lambda x: x.masked_fill(x < 0, -1.0)),
    "floor division": OperationCase(lambda x: torch.div(3 * x, 2, rounding_mode="floor") + x // 0.5 + x, kinks=True),
    "sharp softplus": OperationCase(lambda x: F.softplus(x, beta=100)),
    "log of a small sigmoid": OperationCase(lambda x: torch.sigmoid(x - 30).log()),
    "log of a sigmoid near one": OperationCase(lambda x: (1 - torch.sigmoid(x + 8)).log()),
    "norm with a row of zeros": OperationCase(lambda x: (x * FIXED[0] ** 0 * (FIXED[:, :1] > -0.9)).norm(dim=1)),
    "power at zero": OperationCase(lambda x: F.relu(x) ** 1.5 + x.abs() ** 2.5),
    "clamp by a tensor": OperationCase(lambda x: x.clamp(min=FIXED) + x.clamp(max=x[0])),
    "cosine similarity": OperationCase(lambda x: F.cosine_similarity(x[:2], x[2:])),
    "power of two": OperationCase(lambda x: 2**x),
    "both move": OperationCase(split_in_two(torch.pow), positive=True),
    "scaled sum of products": OperationCase(lambda x: torch.addmm(x[:, :4], x, x.T, beta=0.5, alpha=2)),
    "assigned": OperationCase(lambda x: assigned(x)),
    "scalar reductions": OperationCase(lambda x: x[0, 0].amax() + x[0, 1].logsumexp(0) + x[1, 1].max(0).values),
    "in place": OperationCase(lambda x: x.clone().mul_(2).add_(x[:1]).relu_()),
    "running sum": OperationCase(lambda x: x.cumsum(1)),
    "where on itself": OperationCase(lambda x: torch.where(x > 0, 2 * x, x**2), kinks=True),
    "sort": OperationCase(lambda x: x.sort(1).values, kinks=True),
    "top k": OperationCase(lambda x: x.topk(2).values, kinks=True),
    "product of all": OperationCase(lambda x: x.prod(1)),
    "two arguments without a rule": OperationCase(split_in_two(torch.atan2)),
}
