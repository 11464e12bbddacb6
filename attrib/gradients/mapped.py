"""The gradient of each example by `vmap` of the loss of one: where examples do not see each other and every call maps."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..batch import Batch
from ..constants import is_low, resolution, rounding
from ..functional import Functional, mapped

log = logging.getLogger("attrib")


def rows_by_vmap(
    loss: Functional, parameters: dict[str, Tensor], batch: Batch, names: Sequence[str]
) -> dict[str, Tensor]:
    """(B, *parameter) by name; nothing where a call does not map over examples or draws random numbers. Whether the loss of
    an example by itself is what it is in the batch has to be seen to."""
    fixed = {n: t.detach() for n, t in parameters.items()}

    def one(moving: dict[str, Tensor], *example: Any) -> Tensor:
        rows = [e[None] if rows else e for e, rows in zip(example, batch.rows, strict=True)]
        return loss({**fixed, **moving}, *replace(batch, size=1, leaves=tuple(rows)).args)[0]

    dims = (None, *(0 if rows else None for rows in batch.rows))
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels do not map over examples
            return mapped(torch.func.grad(one), dims)({n: fixed[n] for n in names}, *batch.leaves)
    except Exception as error:  # whatever a loss does that one example is not enough for
        log.debug("gradients are not mapped over examples: %s", error)
        return {}


def agree(rows: Tensor, gradient: Tensor, weights: Tensor, precision: torch.dtype) -> bool:
    """Whether rows (B, *parameter), times weights (B,), sum to the gradient of the losses so weighted, in passes that round
    to `precision`. To few bits each row is rounded by itself, and the gradient once more."""
    terms = rows * weights.view(-1, *(1,) * (rows.dim() - 1))
    if not rows.numel():
        return True
    if is_low(precision):
        bound = rounding(precision) * (terms.norm(dim=0) + gradient.abs())
        bound = bound + torch.finfo(rows.dtype).eps * terms.abs().max()
    else:
        bound = resolution(rows.dtype, precision) ** 0.5 * terms.abs().sum(0).max()
    return bool(((terms.sum(0) - gradient).abs() <= bound).all())
