"""How each mode is learned by itself, from small balanced weights, y = W2 W1 x, gradient descent on half the squared error
summed over items, of rate eta = 1 / tau:

    deep        a(t) = s e^(2 s t / tau) / (e^(2 s t / tau) - 1 + s / a0)      half at t = tau / (2 s) ln(s / a0 - 1)
    shallow     b(t) = s (1 - e^(-t / tau)) + b0 e^(-t / tau)
    discrete    a_(k+1) = a_k (1 + eta (s - a_k))^2                            exact for the algorithm itself

Source: Saxe, McClelland, Ganguli 2013 (arXiv 1312.6120) and 2019; the discrete form is the same without the limit.
Tree: Delta_k = q_k - q_(k-1), q_k = (1 - 2 flip)^(2 (depth - 1 - k)); eigenvalue of level l: P sum_(k >= l) Delta_k / M_k.
Category in noise: overlap^2 of the leading singular vectors 1 - 1 / snr above snr = 1 and 0 below (Benaych-Georges and
Nadakuditi 2012, square matrices).
"""

import numpy as np


def deep(s: float, a0: float, eta: float, steps: np.ndarray) -> np.ndarray:
    """(T,): a(t)."""
    grown = np.exp(np.minimum(2 * s * eta * steps, 700.0))
    found: np.ndarray = s * grown / (grown - 1 + s / a0)
    return found


def half_rise(s: float, a0: float, eta: float) -> float:
    """The time, in steps, at which a(t) = s / 2."""
    return float(np.log(s / a0 - 1) / (2 * s * eta))


def shallow(s: float, b0: float, eta: float, steps: np.ndarray) -> np.ndarray:
    """(T,): b(t)."""
    rest = np.exp(-eta * steps)
    found: np.ndarray = s * (1 - rest) + b0 * rest
    return found


def discrete(s: float, a0: float, eta: float, steps: int) -> np.ndarray:
    """(steps + 1,): a_k."""
    a = [a0]
    for _ in range(steps):
        a.append(a[-1] * (1 + eta * (s - a[-1])) ** 2)
    return np.array(a)


def crossing(curve: np.ndarray, value: float) -> int | None:
    """The step, counted from 0, whose update takes a curve (T + 1,) over a value; None where none does."""
    above = np.flatnonzero(curve >= value)
    return int(above[0]) - 1 if len(above) else None


def eigenvalues(depth: int, flip: float) -> np.ndarray:
    """(depth,): of the items' correlations, one a level; level l >= 1 has 2^(l - 1) of them."""
    q = (1 - 2 * flip) ** (2.0 * (depth - 1 - np.arange(depth)))
    delta, nodes = np.diff(q, prepend=0.0), 2.0 ** np.arange(depth)
    found: np.ndarray = nodes[-1] * np.cumsum((delta / nodes)[::-1])[::-1]
    return found


def overlap(snr: np.ndarray) -> np.ndarray:
    """Squared overlap of the leading singular vector with the planted one, in the limit of size."""
    return np.maximum(0.0, 1 - 1 / np.maximum(snr, 1e-9))
