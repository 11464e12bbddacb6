"""Slow, plain versions of everything that matters. They share no code with the library.

- `single_gradients`: per-example gradients, one example at a time; `losses_one_by_one`: one loss of a whole batch at a time
- `frozen`: an optimizer's updates as explicit matrices over (update step, gradient step)
- `contributions`: the double sum over gradient steps and update steps
- `path_integral`: the gradient of a measurement averaged over nodes, one autograd call each
- `hessian_products`: by differences of gradients; `transposed_products`, `newton_products`: by whole matrices
- `relu_secant`: the discrete chain rule of one hidden ReLU layer, written out by hand
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


def put(model: nn.Module, theta: np.ndarray) -> None:
    """Write a vector, in the order of model.parameters(), into a model."""
    at = 0
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.from_numpy(theta[at : at + p.numel()]).view_as(p))
            at += p.numel()


def single_gradients(
    model: nn.Module, theta: np.ndarray, loss: Callable[..., Tensor], batch: Sequence[Tensor]
) -> np.ndarray:
    """(B, P): the gradient of each example's loss, the batch being that example alone."""
    put(model, theta)
    rows = []
    for i in range(len(batch[0])):
        model.zero_grad()
        loss(model, *(b[i : i + 1] for b in batch)).sum().backward()
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
        rows.append(np.concatenate([g.reshape(-1).numpy().copy() for g in grads]))
    return np.array(rows)


class Frozen(NamedTuple):
    """delta_s = sum_r matrix[s][r] g_r + own[s] * theta_s, with g_r = sum of shares + coupled * theta_r."""

    matrix: list[list[np.ndarray]]  # [s][r], r <= s: (P,) for entry by entry, or (P, P)
    own: list[float]
    coupled: float | list[np.ndarray]  # for every step, or of each


def frozen_sgd(
    gradients: Sequence[np.ndarray],
    thetas: Sequence[np.ndarray],
    lr: Sequence[float],
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> Frozen:
    """b_s = sum_r momentum^(s-r) (1 - dampening, or 1 for the first) g_r, term by term."""
    steps = len(gradients)
    one = np.ones_like(gradients[0])
    matrix = []
    for s in range(steps):
        row = []
        for r in range(s + 1):
            weight = momentum ** (s - r) * (1.0 if r == 0 else 1.0 - dampening)
            if nesterov:
                weight = momentum * weight + (1.0 if r == s else 0.0)
            if momentum == 0:
                weight = 1.0 if r == s else 0.0
            row.append(-lr[s] * weight * one)
        matrix.append(row)
    return Frozen(matrix, [0.0] * steps, weight_decay)


def frozen_adam(
    gradients: Sequence[np.ndarray],
    thetas: Sequence[np.ndarray],
    lr: Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    amsgrad: bool = False,
) -> Frozen:
    b1, b2 = betas
    coupled = 0.0 if decoupled else weight_decay
    g = [gr + coupled * th for gr, th in zip(gradients, thetas, strict=False)]
    matrix, own, largest = [], [], np.zeros_like(g[0])
    for s in range(len(g)):
        t = s + 1
        second = np.sum([(1 - b2) * b2 ** (s - r) * g[r] ** 2 for r in range(s + 1)], axis=0)
        largest = np.maximum(largest, second)
        used = largest if amsgrad else second
        root = np.sqrt(used / (1 - b2**t)) + eps
        matrix.append([-lr[s] / (1 - b1**t) * (1 - b1) * b1 ** (s - r) / root for r in range(s + 1)])
        own.append(-lr[s] * weight_decay if decoupled else 0.0)
    return Frozen(matrix, own, coupled)


def path_integral(
    model: nn.Module,
    theta0: np.ndarray,
    theta1: np.ndarray,
    measurement: Callable[[nn.Module], Tensor],
    nodes: Sequence[tuple[float, float]],
) -> np.ndarray:
    """(Q, P): sum over (position, weight) of weight * grad m(theta0 + position (theta1 - theta0))."""
    total: np.ndarray | float = 0.0
    for position, weight in nodes:
        put(model, theta0 + position * (theta1 - theta0))
        values = measurement(model)
        rows = []
        for value in values:
            grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, allow_unused=True)
            filled = [torch.zeros_like(p) if d is None else d for p, d in zip(model.parameters(), grads, strict=True)]
            rows.append(np.concatenate([d.reshape(-1).numpy() for d in filled]))
        total = total + weight * np.array(rows)
    assert isinstance(total, np.ndarray)
    return total


class Decomposition(NamedTuple):
    contributions: list[np.ndarray]  # per step (Q, B, P)
    decay: np.ndarray  # (Q, T)


def contributions(
    frozen: Frozen, bars: Sequence[np.ndarray], shares: Sequence[np.ndarray], thetas: Sequence[np.ndarray]
) -> Decomposition:
    """The double sum: example i of step r acts at every step s >= r, through matrix[s][r]."""
    steps = len(bars)
    found, decay = [], np.zeros((len(bars[0]), steps))
    for r in range(steps):
        total = np.zeros((len(bars[0]), *shares[r].shape))
        for s in range(r, steps):
            matrix = frozen.matrix[s][r]
            pulled = bars[s] @ matrix if matrix.ndim == 2 else bars[s] * matrix
            total += pulled[:, None, :] * shares[r][None]
            coupled = frozen.coupled if isinstance(frozen.coupled, float) else frozen.coupled[r]
            decay[:, r] += (pulled * coupled * thetas[r]).sum(1)
        decay[:, r] += (bars[r] * frozen.own[r] * thetas[r]).sum(1)
        found.append(total)
    return Decomposition(found, decay)


def relu_secant(
    w1: tuple[np.ndarray, np.ndarray], w2: tuple[np.ndarray, np.ndarray], x: np.ndarray, target: int
) -> tuple[np.ndarray, np.ndarray]:
    """The discrete gradient of log softmax(W2 relu(W1 x))[target], each weight given at both ends; loops and scalars."""
    a = [w @ x for w in w1]
    h = [np.maximum(v, 0) for v in a]
    z = [w @ v for w, v in zip(w2, h, strict=True)]
    log_sum = [np.log(np.sum(np.exp(v - v.max()))) + v.max() for v in z]
    c = np.zeros_like(z[0])
    for k in range(len(c)):
        u0, u1 = np.exp(z[0][k]), np.exp(z[1][k])
        s0, s1 = np.exp(log_sum[0]), np.exp(log_sum[1])
        mean_u = (u1 - u0) / (z[1][k] - z[0][k])
        mean_s = (s1 - s0) / (log_sum[1] - log_sum[0])
        c[k] = float(k == target) - mean_u / mean_s
    bar2 = np.outer(c, (h[0] + h[1]) / 2)
    back = (w2[0] + w2[1]).T @ c / 2
    for j in range(len(back)):
        change = a[1][j] - a[0][j]
        back[j] *= (h[1][j] - h[0][j]) / change if change else 0.0
    return np.outer(back, x), bar2


def losses_one_by_one(
    model: nn.Module, theta: np.ndarray, loss: Callable[..., Tensor], batch: Sequence[Tensor]
) -> np.ndarray:
    """(B, P): the gradient of each example's loss within its batch, a pass over the whole batch for each of them."""
    before = [p.detach().clone() for p in model.parameters()]
    put(model, theta)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    rows = []
    for i in range(len(batch[0])):
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        np.random.set_state(state[2])  # noqa: NPY002
        model.zero_grad()
        loss(model, *batch)[i].backward()
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
        rows.append(np.concatenate([g.reshape(-1).numpy().copy() for g in grads]))
    model.zero_grad()
    with torch.no_grad():
        for p, value in zip(model.parameters(), before, strict=True):
            p.copy_(value)
    return np.array(rows)


Value = Callable[[Tensor], Tensor]


def hessian_products(value: Value, theta: Tensor, directions: Tensor, step: float = 1e-5) -> Tensor:
    """(Q, P): differences of the gradients of a number at theta + step V and theta - step V. Wrong by step^2 of the third
    derivative, and by the rounding of a gradient over step: 1e-10 and 1e-11 of numbers of order one."""

    def gradient(at: Tensor) -> Tensor:
        leaf = at.detach().requires_grad_()
        return torch.autograd.grad(value(leaf), leaf)[0]

    return torch.stack([(gradient(theta + step * v) - gradient(theta - step * v)) / (2 * step) for v in directions])


def transposed_products(value: Value, theta: Tensor, directions: Tensor) -> Tensor:
    """(Q, P): V times the matrix of derivatives of torch's gradient, which is no gradient where a backward pass is not the
    derivative of its forward; entry by entry of the gradient."""
    leaf = theta.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf, create_graph=True)
    return directions @ torch.stack([torch.autograd.grad(g, leaf, retain_graph=True)[0] for g in gradient])


def newton_products(outputs: Value, loss: Value, theta: Tensor, directions: Tensor) -> Tensor:
    """(Q, P): V J^T A J with J (O, P) of theta -> outputs, and A (O, O) the Hessian of outputs -> number."""
    leaf = theta.detach().requires_grad_()
    out = outputs(leaf)
    jacobian = torch.stack([torch.autograd.grad(o, leaf, retain_graph=True)[0] for o in out])
    curved = torch.autograd.functional.hessian(loss, out.detach())
    return directions @ jacobian.T @ curved @ jacobian
