"""The optimizers in their plain form: the realised coefficients of each step, as matrices over (update step, gradient step).

Sums over all steps before instead of recurrences, numpy, no code of the library. `gradients`, `thetas`: one vector (P,) a
step; lr: one number a step; shapes: of the tensors that the vectors are made of.
"""

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
from oracles import Frozen, frozen_adam

Vectors = Sequence[np.ndarray]
Shapes = Sequence[tuple[int, ...]]


def decayed(values: Vectors, rate: float, s: int) -> np.ndarray:
    """sum_r (1 - rate) rate^(s - r) values_r, r <= s."""
    return np.sum([(1 - rate) * rate ** (s - r) * values[r] for r in range(s + 1)], axis=0)


def only_now(now: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Coefficients of an optimizer without momentum: the gradient of a step acts in that step."""
    return [[*(np.zeros_like(d) for _ in range(s)), d] for s, d in enumerate(now)]


def with_decay(gradients: Vectors, thetas: Vectors, rate: float) -> list[np.ndarray]:
    return [g + rate * theta for g, theta in zip(gradients, thetas, strict=True)]


def frozen_rmsprop(
    gradients: Vectors,
    thetas: Vectors,
    lr: Sequence[float],
    shapes: Shapes,
    alpha: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    centered: bool = False,
    weight_decay: float = 0.0,
) -> Frozen:
    g = with_decay(gradients, thetas, weight_decay)
    roots = []
    for s in range(len(g)):
        variance = decayed([x**2 for x in g], alpha, s)
        roots.append(np.sqrt(variance - decayed(g, alpha, s) ** 2 if centered else variance) + eps)
    matrix = [[-lr[s] * momentum ** (s - r) / roots[r] for r in range(s + 1)] for s in range(len(g))]
    return Frozen(matrix, [0.0] * len(g), weight_decay)


def frozen_adagrad(
    gradients: Vectors,
    thetas: Vectors,
    lr: Sequence[float],
    shapes: Shapes,
    lr_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
) -> Frozen:
    g = with_decay(gradients, thetas, weight_decay)
    now = []
    for s in range(len(g)):
        total = initial_accumulator_value + np.sum([x**2 for x in g[: s + 1]], axis=0)
        now.append(-lr[s] / (1 + s * lr_decay) / (np.sqrt(total) + eps))
    return Frozen(only_now(now), [0.0] * len(g), weight_decay)


def frozen_adadelta(
    gradients: Vectors,
    thetas: Vectors,
    lr: Sequence[float],
    shapes: Shapes,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
) -> Frozen:
    g = with_decay(gradients, thetas, weight_decay)
    now, squares = [], [np.zeros_like(g[0])]  # of what was moved per unit of lr, nothing before the first step
    for s in range(len(g)):
        moved = np.sum([(1 - rho) * rho ** (s - r) * squares[r] for r in range(s + 1)], axis=0)
        quotient = np.sqrt(moved + eps) / np.sqrt(decayed([x**2 for x in g], rho, s) + eps)
        squares.append((quotient * g[s]) ** 2)
        now.append(-lr[s] * quotient)
    return Frozen(only_now(now), [0.0] * len(g), weight_decay)


def frozen_adamax(
    gradients: Vectors,
    thetas: Vectors,
    lr: Sequence[float],
    shapes: Shapes,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Frozen:
    g, (b1, b2) = with_decay(gradients, thetas, weight_decay), betas
    matrix = []
    for s in range(len(g)):
        largest = np.max([b2 ** (s - r) * (np.abs(g[r]) + eps) for r in range(s + 1)], axis=0)
        rate = -lr[s] / (1 - b1 ** (s + 1)) / largest
        matrix.append([rate * (1 - b1) * b1 ** (s - r) for r in range(s + 1)])
    return Frozen(matrix, [0.0] * len(g), weight_decay)


def frozen_nadam(
    gradients: Vectors,
    thetas: Vectors,
    lr: Sequence[float],
    shapes: Shapes,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
) -> Frozen:
    coupled = 0.0 if decoupled_weight_decay else weight_decay
    g, (b1, b2) = with_decay(gradients, thetas, coupled), betas
    mu = [b1 * (1 - 0.5 * 0.96 ** (t * momentum_decay)) for t in range(1, len(g) + 2)]
    matrix, product = [], np.float32(1)
    for s in range(len(g)):
        product = product * np.float32(mu[s])  # kept by torch in single precision
        root = np.sqrt(decayed([x**2 for x in g], b2, s) / (1 - b2 ** (s + 1))) + eps
        averaging = lr[s] * mu[s + 1] / (1 - float(product) * mu[s + 1])
        row = [-averaging * (1 - b1) * b1 ** (s - r) / root for r in range(s + 1)]
        row[s] = row[s] - lr[s] * (1 - mu[s]) / (1 - float(product)) / root
        matrix.append(row)
    return Frozen(matrix, [-rate * (weight_decay - coupled) for rate in lr], coupled)


def frozen_radam(
    gradients: Vectors,
    thetas: Vectors,
    lr: Sequence[float],
    shapes: Shapes,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
) -> Frozen:
    coupled = 0.0 if decoupled_weight_decay else weight_decay
    g, (b1, b2) = with_decay(gradients, thetas, coupled), betas
    limit, matrix = 2 / (1 - b2) - 1, []
    for s in range(len(g)):
        t = s + 1
        length = limit - 2 * t * b2**t / (1 - b2**t)
        rate = np.full_like(g[0], lr[s] / (1 - b1**t))
        if length > 5:
            tract = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
            rate *= np.sqrt(tract * (1 - b2**t)) / (np.sqrt(decayed([x**2 for x in g], b2, s)) + eps)
        matrix.append([-rate * (1 - b1) * b1 ** (s - r) for r in range(s + 1)])
    return Frozen(matrix, [-rate * (weight_decay - coupled) for rate in lr], coupled)


def frozen_asgd(
    gradients: Vectors,
    thetas: Vectors,
    lr: Sequence[float],
    shapes: Shapes,
    lambd: float = 1e-4,
    alpha: float = 0.75,
    t0: float = 1e6,
    weight_decay: float = 0.0,
) -> Frozen:
    later = [rate / (1 + lambd * rate * (s + 1)) ** alpha for s, rate in enumerate(lr)]
    etas = [float(np.float32(eta)) for eta in (lr[0], *later)][: len(lr)]  # kept by torch in single precision
    now = [np.full_like(gradients[0], -eta) for eta in etas]
    return Frozen(only_now(now), [-lambd * eta for eta in etas], weight_decay)


def frozen_rprop(
    gradients: Vectors,
    thetas: Vectors,
    lr: Sequence[float],
    shapes: Shapes,
    etas: tuple[float, float] = (0.5, 1.2),
    step_sizes: tuple[float, float] = (1e-6, 50),
) -> Frozen:
    """An entry at a time."""
    now = [np.zeros_like(g) for g in gradients]
    for p in range(len(gradients[0])):
        size, before = lr[0], 0.0
        for s, g in enumerate(float(g[p]) for g in gradients):
            if g * before != 0:
                size *= etas[1] if g * before > 0 else etas[0]
            size = min(max(size, step_sizes[0]), step_sizes[1])
            before = 0.0 if g * before < 0 else g
            now[s][p] = -size / abs(g) if before else 0.0
    return Frozen(only_now(now), [0.0] * len(now), 0.0)


def frozen_adafactor(
    gradients: Vectors,
    thetas: Vectors,
    lr: Sequence[float],
    shapes: Shapes,
    beta2_decay: float = -0.8,
    eps: tuple[float, float] = (float(np.finfo(np.float64).eps), 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
) -> Frozen:
    """The outer product of row and column means, written out index by index."""
    fresh = [(s + 1) ** beta2_decay for s in range(len(gradients))]
    now: list[list[np.ndarray]] = [[] for _ in gradients]
    for part, shape in parts(shapes):
        g = [x[part].reshape(shape) for x in gradients]
        for s in range(len(g)):
            weights = [fresh[r] * prod(1 - fresh[q] for q in range(r + 1, s + 1)) for r in range(s + 1)]
            square = sum(w * x**2 for w, x in zip(weights, g, strict=False))
            if len(shape) > 1:
                rows, columns = square.mean(-1, keepdims=True), square.mean(-2, keepdims=True)
                square = rows * columns / np.maximum(rows.mean(-2, keepdims=True), eps[0])
            inverse = 1 / np.sqrt(np.maximum(square, eps[0] ** 2))
            size = max(eps[1], rms(thetas[s][part])) * min(lr[s], 1 / (s + 1) ** 0.5)
            now[s].append((-size / max(1, rms(inverse * g[s]) / d) * inverse).reshape(-1))
    return Frozen(only_now([np.concatenate(n) for n in now]), [-rate * weight_decay for rate in lr], 0.0)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


def parts(shapes: Shapes) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Where each tensor sits in a vector."""
    at = 0
    for shape in shapes:
        yield slice(at, at + prod(shape)), shape
        at += prod(shape)


def frozen_lion(
    gradients: Vectors,
    thetas: Vectors,
    lr: Sequence[float],
    shapes: Shapes,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
) -> Frozen:
    b1, b2 = betas
    matrix = []
    for s in range(len(gradients)):
        weights = [b1 * (1 - b2) * b2 ** (s - 1 - r) for r in range(s)] + [1 - b1]
        u = np.sum([w * g for w, g in zip(weights, gradients, strict=False)], axis=0)
        inverse = np.divide(1.0, np.abs(u), out=np.zeros_like(u), where=u != 0)
        matrix.append([-lr[s] * inverse * w for w in weights])
    return Frozen(matrix, [-rate * weight_decay for rate in lr], 0.0)


def averaging(lr: Sequence[float], beta: float, r: float, warmup_steps: int, power: float) -> list[list[float]]:
    """[s][r]: what y moves at step s per unit of the (normalised) gradient of step r, from x, y and z themselves.

    z_{s+1} = z_s - rate_s g_s, x_{s+1} = (1 - c_s) x_s + c_s z_{s+1}, y = (1 - beta) z + beta x; each a row of what it owes
    to every gradient.
    """
    steps = len(lr)
    rates = [rate * min(1.0, (s + 1) / warmup_steps if warmup_steps else 1.0) for s, rate in enumerate(lr)]
    weights = [(s + 1) ** r * max(rates[: s + 1]) ** power for s in range(steps)]
    x, z, y = (np.zeros(steps) for _ in range(3))
    rows = []
    for s in range(steps):
        c = weights[s] / sum(weights[: s + 1])
        z = z - rates[s] * np.eye(steps)[s]
        x = (1 - c) * x + c * z
        before, y = y, (1 - beta) * z + beta * x
        rows.append(list((y - before)[: s + 1]))
    return rows


def frozen_schedule_free_sgd(
    gradients: Vectors,
    thetas: Vectors,
    lr: Sequence[float],
    shapes: Shapes,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    r: float = 0.0,
    warmup_steps: int = 0,
) -> Frozen:
    rows = averaging(lr, momentum, r, warmup_steps, 2.0)
    one = np.ones_like(gradients[0])
    return Frozen([[w * one for w in row] for row in rows], [0.0] * len(rows), weight_decay)


def frozen_schedule_free_adamw(
    gradients: Vectors,
    thetas: Vectors,
    lr: Sequence[float],
    shapes: Shapes,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Frozen:
    """coupled: of each step, entry by entry, since the decay stands beside the division."""
    b1, b2 = betas
    rows = averaging(lr, b1, 0.0, 0, 2.0)
    squares = [g**2 for g in gradients]
    roots = [np.sqrt(decayed(squares, b2, s) / (1 - b2 ** (s + 1))) + eps for s in range(len(rows))]
    matrix = [[w / root for w, root in zip(row, roots, strict=False)] for row in rows]
    return Frozen(matrix, [0.0] * len(rows), [weight_decay * root for root in roots])


def frozen_muon_and_adamw(
    gradients: Vectors,
    thetas: Vectors,
    lr: Sequence[float],
    shapes: Shapes,
    after: np.ndarray,
    adam_lr: float,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.1,
    match: bool = False,
) -> Frozen:
    """Matrices (P, P), block by block: Muon for the tensors of two dimensions, AdamW with torch's defaults for the others.

    K is had from the eigenvectors of M M^T, O from the update that was made. after: the last state.
    """
    rates = [adam_lr * rate / lr[0] for rate in lr]
    adam = frozen_adam(gradients, thetas, rates, weight_decay=1e-2, decoupled=True)
    states = [*thetas, after]
    steps, size = len(gradients), len(gradients[0])
    matrix = [[np.diag(adam.matrix[s][r]) for r in range(s + 1)] for s in range(steps)]
    own = [np.full(size, adam.own[s]) for s in range(steps)]
    for part, shape in parts(shapes):
        if len(shape) != 2:
            continue
        ratio = 0.2 * max(shape) ** 0.5 if match else max(1, shape[0] / shape[1]) ** 0.5
        for s in range(steps):
            weights = [(1 - momentum) * momentum ** (s - r) for r in range(s + 1)]
            if nesterov:
                weights = [momentum * w + (1 - momentum) * (r == s) for r, w in enumerate(weights)]
            m = np.sum([w * g[part].reshape(shape) for w, g in zip(weights, gradients, strict=False)], axis=0)
            moved = states[s + 1][part] - (1 - lr[s] * weight_decay) * states[s][part]
            whole = -lr[s] * ratio * orthogonal(m, moved.reshape(shape) / (-lr[s] * ratio))
            own[s][part] = -lr[s] * weight_decay
            for r, w in enumerate(weights):
                matrix[s][r][part, part] = w * whole
    return Frozen(matrix, own, 0.0)  # type: ignore[arg-type]


def orthogonal(m: np.ndarray, o: np.ndarray, abc: Sequence[float] = (3.4445, -4.7750, 2.0315)) -> np.ndarray:
    """(P, P): the frozen map of Newton-Schulz at the matrix m, of which the real one gave o; five steps."""
    tall = m.shape[0] > m.shape[1]
    norm = np.sqrt(np.sum(m**2))
    if norm == 0:
        return np.zeros((m.size, m.size))
    values, vectors = np.linalg.eigh((m.T @ m if tall else m @ m.T) / norm**2)
    gain = np.ones_like(values)
    for _ in range(5):
        square = values * gain**2
        gain = gain * (abc[0] + abc[1] * square + abc[2] * square**2)
    k = vectors @ np.diag(gain / norm) @ vectors.T
    whole = np.kron(np.eye(m.shape[0]), k.T) if tall else np.kron(k, np.eye(m.shape[1]))
    missed = o.reshape(-1) - whole @ m.reshape(-1)
    return whole + np.outer(missed, m.reshape(-1)) / norm**2
