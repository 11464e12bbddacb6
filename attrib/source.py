"""Where the shares of a step come from when a run is read: recomputed, or from the store as they are or as factors."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .errors import LossError
from .functional import random_state, training_modes
from .gradients import Shares
from .kernels import factors
from .kernels.contraction import contract_rows
from .run import Block, Run

Contract = Callable[[Block, int, Tensor, Tensor], Tensor]  # (block, n-th step, theta (P,), U (Q, P)) -> (Q, B, K)


def shares_source(
    run: Run,
    model: nn.Module,
    loss: Callable[..., Tensor] | None,
    dtype: torch.dtype,
    device: torch.device,
    slices: int,
) -> Contract:
    """By the run's capture. slices: bytes of a slice of the passes over the examples.

    Raises:
        LossError: a loss is needed and missing. CoupledExamplesError: from the model.
    """
    if run.capture == "gradients":

        def stored(block: Block, n: int, theta: Tensor, sensitivity: Tensor) -> Tensor:
            rows = run.shares(block.steps[n])
            return torch.from_numpy(contract_rows(sensitivity.cpu().numpy(), rows, run.layout.bounds))

        return stored
    if run.capture == "factors":

        def factored(block: Block, n: int, theta: Tensor, sensitivity: Tensor) -> Tensor:
            named = run.layout.unflatten(sensitivity.to(run.dtype))
            found = run.factors(block.steps[n])
            empty = torch.zeros(len(sensitivity), len(block.index[n]), dtype=torch.float64)
            parts = [sum((factors.contract(f, named[k]) for f in found[k]), empty) for k in run.layout.names]
            return torch.stack(parts, 2) * float(block.scale[n])

        return factored
    if loss is None:
        raise LossError(
            "a loss is needed: got loss=None, expected the loss given to attrib.record, since this run was captured by "
            '"replay". Pass loss=, or record with capture="gradients".'
        )
    with training_modes(model, run.header["training"]):
        shares = Shares(loss, model, run.layout, dtype, slices)

    def replayed(block: Block, n: int, theta: Tensor, sensitivity: Tensor) -> Tensor:
        batch = tuple(b.to(device) for b in run.inputs(int(block.kind[n]), block.rows[n]))
        shares.active = block.active[n]
        with training_modes(model, run.header["training"]), random_state(block.random[n]):
            _, contracted = shares.contract(theta.to(dtype), batch, sensitivity)
        return contracted.mul_(float(block.scale[n]))

    return replayed
