"""Models drawn at random: every single share against one loss at a time, in every form that it can be had in."""

from collections.abc import Callable

import numpy as np
import oracles
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_along import layout_of
from torch import Tensor, nn

from attrib.gradients import ExampleGradients

WIDTH, LENGTH = 4, 3
Step = Callable[["Random", Tensor, Tensor], Tensor]  # h (B, LENGTH, WIDTH), x -> the same shape


def residual(m: "Random", h: Tensor, x: Tensor) -> Tensor:
    return h + torch.tanh(m.linear(h))


def tied(m: "Random", h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h, m.linear.weight.t() * m.gain, m.shift)


def normed(m: "Random", h: Tensor, x: Tensor) -> Tensor:
    return m.norm(h)


def flattened(m: "Random", h: Tensor, x: Tensor) -> Tensor:
    return torch.sin(m.linear(h.reshape(-1, WIDTH))).view_as(h)


def time_first(m: "Random", h: Tensor, x: Tensor) -> Tensor:
    return m.linear(h.transpose(0, 1).reshape(-1, WIDTH)).view(LENGTH, -1, WIDTH).transpose(0, 1)


def convolved(m: "Random", h: Tensor, x: Tensor) -> Tensor:
    return m.conv(h.transpose(1, 2)).transpose(1, 2)


def attended(m: "Random", h: Tensor, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(m.linear(h), h * m.gain, h)


def sorted_rows(m: "Random", h: Tensor, x: Tensor) -> Tensor:
    order = x[:, 0, 0].argsort()
    return m.linear(torch.tanh(h[order]))[order.argsort()]


def sorted_features(m: "Random", h: Tensor, x: Tensor) -> Tensor:
    return m.linear(h.sort(-1).values)


def gathered(m: "Random", h: Tensor, x: Tensor) -> Tensor:
    at = (x[:, :, :1] > 0).long().expand_as(h)
    return m.linear(h.gather(1, at)) + h


def masked(m: "Random", h: Tensor, x: Tensor) -> Tensor:
    return torch.where(x[:, :1, :1] > 0, m.linear(h), h * m.gain)


def chosen_rows(m: "Random", h: Tensor, x: Tensor) -> Tensor:
    (rows,) = torch.where(x[:, 0, 0] > 0)
    return h.index_add(0, rows, torch.tanh(m.linear(h[rows])))


def assigned(m: "Random", h: Tensor, x: Tensor) -> Tensor:
    out = h * m.gain
    out[:, 1:] = m.linear(h[:, :-1])
    return out


def looked_up(m: "Random", h: Tensor, x: Tensor) -> Tensor:
    return h + m.table((x.abs() * 2).long()[..., 0] % 5)


def centred(m: "Random", h: Tensor, x: Tensor) -> Tensor:
    return m.linear(h - h.mean(0))


STEPS: list[Step] = [residual, tied, normed, flattened, time_first, convolved, attended, sorted_rows, sorted_features]
STEPS += [gathered, masked, chosen_rows, assigned, looked_up, centred]


class Random(nn.Module):
    """Some of the steps, one after the other, on the same few parameters."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.conv, self.table = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.Embedding(5, WIDTH)
        self.gain, self.shift = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for step in self.steps:
            h = step(self, h, x)
        return h


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) * torch.linspace(-1, 1, WIDTH, dtype=x.dtype)).sin().sum((1, 2))


@given(
    steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    seed=st.integers(0, 10_000),
)
def test_every_share_of_a_random_model_is_that_of_its_loss(steps: list[Step], sizes: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    model = Random(steps).double()
    layout, theta = layout_of(model)
    shares = ExampleGradients(loss, model, layout, torch.float64)
    directions = torch.randn(2, layout.size, dtype=torch.float64)
    for size in sizes:
        x = torch.randn(size, LENGTH, WIDTH, dtype=torch.float64)
        want = oracles.losses_one_by_one(model, theta.numpy(), loss, (x,))
        parts = np.stack([directions[:, p].numpy() @ want[:, p].T for _, p in layout.slices()], -1)
        gross = np.stack([directions[:, p].abs().numpy() @ np.abs(want[:, p]).T for _, p in layout.slices()], -1)
        # 1e-9 of the largest, and of what is summed where it cancels
        np.testing.assert_allclose(shares.contract(theta, (x,), directions)[1], parts, atol=1e-9 * gross.max() + 1e-14)
        np.testing.assert_allclose(shares.rows(theta, (x,)), want, atol=1e-9 * np.abs(want).max() + 1e-14)
