"""Pruning by contribution against pruning by magnitude.

The importance of a weight w is sum over queries |sum over steps Gbar_s,w Delta_s,w|: what its updates did to the outputs, by
the path gradient of each step (ExPLAIND, arXiv 2505.20076, with the exact path in place of quadrature).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...path import Measured, Secant
from ...run import Run
from ..modular import Pairs
from .setting import Setting

KEPT = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)  # shares of the weights


def importance(setting: Setting, run: Run, model: nn.Module, pairs: Pairs) -> Tensor:
    """(P,), from the logits of some held-out pairs: of the right answer, or of all."""
    count, everything = setting.pruned
    ids = pairs.test[:: max(1, len(pairs.test) // count)][:count]
    x, y = pairs.x[ids], pairs.y[ids]

    def outputs(network: nn.Module) -> Tensor:
        logits: Tensor = network(x)
        return logits.flatten() if everything else logits.gather(1, y[:, None]).squeeze(1)

    query = Measured(model, outputs, run.layout, run.dtype, run.vector(run.steps))
    integrate, total = Secant().bind(query), torch.zeros(query.count, run.layout.size, dtype=run.dtype)
    for block in run.blocks(0, run.steps):
        for lo in range(0, len(block), at_once := query.steps_at_once()):
            theta = block.theta[lo : min(lo + at_once, len(block)) + 1]
            gradient = integrate(theta[:-1], theta[1:]).gradient
            for path, update in zip(gradient, theta[1:] - theta[:-1], strict=True):
                total.addcmul_(path, update)
    return total.abs().sum(0)


def within_layers(run: Run, score: Tensor) -> Tensor:
    """(P,) -> the rank of each weight among those of its tensor, 0 to 1: pruned by it, every tensor keeps the same share."""
    parts = [score[part].argsort().argsort() / (part.stop - part.start) for _, part in run.layout.slices()]
    return torch.cat(parts)


def pruned(run: Run, model: nn.Module, pairs: Pairs, scores: dict[str, Tensor]) -> list[dict[str, float | str]]:
    """Keep the weights of the largest score, set the others to zero: accuracy on the held-out pairs, agreement with the
    whole network, KL(whole || pruned) in nats. scores: name -> (P,)."""
    theta, x, y = run.vector(run.steps), pairs.x[pairs.test], pairs.y[pairs.test]

    def outputs(vector: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = torch.func.functional_call(model, run.layout.unflatten(vector), (x,))
            return F.log_softmax(found, -1)

    whole = outputs(theta)
    rows: list[dict[str, float | str]] = []
    for name, score in scores.items():
        order = score.argsort(descending=True)
        for kept in KEPT:
            mask = torch.zeros_like(theta)
            mask[order[: max(1, round(kept * len(order)))]] = 1
            left = outputs(theta * mask)
            best = left.argmax(-1)
            rows.append({
                "score": name,
                "kept": kept,
                "accuracy": float((best == y).double().mean()),
                "agreement": float((best == whole.argmax(-1)).double().mean()),
                "kl": float(F.kl_div(left, whole, reduction="batchmean", log_target=True)),
            })  # fmt: skip
    return rows
