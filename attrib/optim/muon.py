"""Muon (Jordan et al. 2024), as torch.optim.Muon computes it, a matrix at a time.

    b = mu b + (1 - mu) g                              M = mu b + (1 - mu) g with Nesterov, else b
    O = Newton-Schulz(M), in bfloat16                  theta' = theta - lr weight_decay theta - lr r O

r is the adjustment of the rate by the shape. Newton-Schulz multiplies by polynomials of the Gram matrix: in exact arithmetic
O = K M with K symmetric (M K of a tall matrix), since X_{n+1} = (a + b A + c A^2) X_n, A = X X^T, X_0 = M / |M|:

    K_0 = 1 / |M|,  A_0 = M M^T / |M|^2,  p = a + b A + c A^2,  K <- p K,  A <- p A p

Frozen: the linear map X -> K X + (O - K M) <M, X> / <M, M>, K in working precision, O torch's own: what rounding to
bfloat16 adds goes along M (Broyden's correction), so that the map meets O exactly. Where M is 0 nothing moves, and the map
is 0. Linear in the gradients: b, and M through it.
"""

import torch
from torch import Tensor

from ..kernels.recurrence import Coefficients, Matrix
from .numbers import count, flag, number, several, word
from .rule import MOMENTUM, Options, Rule, State, always, realised, taken_off


def _freeze(o: Options, state: State, gradient: Tensor, theta: Tensor) -> tuple[Coefficients, State]:
    from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

    mu = o["momentum"]
    low = o.get("low") or theta.dtype

    def rounded(t: Tensor) -> Tensor:
        return t.to(low).to(t.dtype)

    buffer = rounded(state[MOMENTUM].lerp(gradient, 1 - mu))  # as torch does: O is of the very bits of M
    combined = rounded(gradient.lerp(buffer, mu)) if o["nesterov"] else buffer
    polynomial = o["ns_coefficients"], o["ns_steps"], o["eps"]
    matrix = _frozen_map(combined, _zeropower_via_newtonschulz(combined, *polynomial).to(theta.dtype), *polynomial)
    rate, feed = float(_adjust_lr(o["lr"], o["adjust_lr_fn"], theta.shape)), realised(1 - mu, theta.dtype)
    keep = 1 - feed
    old, new = (mu * keep, 1 - mu + mu * feed) if o["nesterov"] else (keep, feed)
    frozen = Coefficients(
        keep=keep,
        feed=feed,
        apply_old=rate * old,
        apply_new=rate * new,
        matrix=matrix,
        decoupled=taken_off(o["lr"] * o["weight_decay"], theta.dtype),
    )
    return frozen, {MOMENTUM: buffer}


def _frozen_map(m: Tensor, o: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Matrix:
    tall = m.shape[0] > m.shape[1]
    square = float(m.norm()) ** 2
    gram = (m.T @ m if tall else m @ m.T) / max(square, eps * eps)
    one = torch.eye(len(gram), dtype=m.dtype, device=m.device)
    factor = one / max(square**0.5, eps) if square else torch.zeros_like(one)
    a, b, c = coefficients
    for _ in range(steps):
        polynomial = a * one + b * gram + c * gram @ gram
        factor, gram = polynomial @ factor, polynomial @ gram @ polynomial
    missed = o - (m @ factor if tall else factor @ m)
    along = m / square if square else torch.zeros_like(m)
    shape = m.shape[0], m.shape[1]
    return Matrix(factor=factor, shape=shape, from_right=tall, along=along.reshape(-1), rise=missed.reshape(-1))


MUON = Rule(
    name="Muon",
    momentum="momentum_buffer",
    accumulators={"momentum_buffer": always},
    numbers=(
        *map(number, ("lr", "weight_decay", "momentum")),
        flag("nesterov"),
        several("ns_coefficients", "ns_a", "ns_b", "ns_c"),
        number("eps"),
        count("ns_steps"),
        word("adjust_lr_fn", (None, "original", "match_rms_adamw")),
    ),
    freeze=_freeze,
    whole=True,
)
