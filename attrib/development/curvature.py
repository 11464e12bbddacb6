"""The sharpest directions of a loss along a run: largest eigenvalues of its Hessian, by Lanczos (ARPACK), from products of
the Hessian with vectors alone. Gradient descent of rate lr is stable in a direction while its eigenvalue is below 2 / lr.

Source: Lanczos 1950; Pearlmutter 1994 for the products; Cohen et al. 2021, arXiv 2103.00065, for the line 2 / lr.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import xarray as xr
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from tqdm import tqdm

from ..batch import Batch
from ..curvature import Curvature
from ..functional import Functional, uncompiled
from ..generators import generators, random_state
from ..losses import check_shape
from ..matching import check_model
from ..run import Run

TOLERANCE = 1e-4  # relative, of the eigenvalues


def curvature(
    run: Run,
    model: nn.Module,
    loss: Callable[..., Tensor],
    batch: tuple[Tensor, ...],
    states: Sequence[int] | None = None,
    count: int = 1,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Largest eigenvalues and eigenvectors of the Hessian of the mean loss, at states of a run (Lanczos 1950).

    Args:
        run: from `attrib.open_run`.
        model: of the recorded architecture, in its mode; left as it is.
        loss: `loss(model, *batch) -> (B,)`.
        batch: the examples whose mean loss it is, such as all that were trained on.
        states: 0 .. T; None for all.
        count: eigenvalues, largest first; fewer than P - 1.
        dtype: compute type; None for the recorded one.

    Returns:
        `eigenvalue` (state, rank), to 1e-4, in the loss's units per squared unit of the parameters; `vector` (state, rank,
        parameter), of length 1, in the order of `run.groups`, its sign that of the state before.

    Raises:
        ModelMismatchError. IndexError: no such state. ValueError: more eigenvalues than Lanczos finds.
        scipy.sparse.linalg.ArpackNoConvergence: it did not find them.

    Example:
        >>> found = attrib.curvature(run, model, loss, (x, y), states=[0, 12], count=2)
        >>> found["eigenvalue"].shape, found["vector"].shape
        ((2, 2), (2, 2, 75))
    """
    model = uncompiled(model)
    check_model(run, model)
    size, device = run.layout.size, next(model.parameters()).device
    if not 0 < count < size - 1:
        raise ValueError(f"too many eigenvalues: got {count}, expected 1 to {size - 2}, at curvature.")
    chosen = list(range(run.steps + 1)) if states is None else [int(s) for s in states]
    function = Functional(model, _one_each(loss), run.layout, dtype or run.compute)
    hessian = Curvature(function)
    values, vectors = np.zeros((len(chosen), count)), np.zeros((len(chosen), count, size))
    before = np.random.default_rng(0).normal(size=(count, size))  # the first guess; then the state before
    for n, state in enumerate(tqdm(chosen, desc="curvature", unit="state", delay=2, disable=not progress)):
        buffers = {name: t.to(device) for name, t in run.buffers(state).items()}
        there = hessian.at(hessian.active, buffers=buffers)
        product = _product(there, run.vector(state).to(device, dtype or run.compute), Batch.of(batch))
        operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
        found, basis = eigsh(operator, k=count, which="LA", v0=before.sum(0), tol=TOLERANCE)
        order = np.argsort(-found)
        signs = np.sign((basis.T[order] * before).sum(1, keepdims=True))
        values[n], vectors[n] = found[order], basis.T[order] * np.where(signs == 0, 1.0, signs)
        before = vectors[n]
    labels = {"state": chosen, "rank": np.arange(count)}
    return xr.Dataset(
        {"eigenvalue": (("state", "rank"), values), "vector": (("state", "rank", "parameter"), vectors)}, labels
    )


def _one_each(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss, which has to be one number per example."""
    return lambda m, *b: check_shape(loss(m, *b), Batch.of(b))


def _product(hessian: Curvature, theta: Tensor, batch: Batch) -> Callable[[np.ndarray], np.ndarray]:
    """v -> H v, of arrays; whatever the loss draws is drawn alike each time."""
    start, weights = generators(), torch.full((batch.size,), 1 / batch.size, dtype=theta.dtype)

    def product(vector: np.ndarray) -> np.ndarray:
        with random_state(start):
            direction = torch.as_tensor(np.ravel(vector)).to(theta)
            return hessian.products(theta, batch, weights, direction[None]).hessian[0].cpu().numpy()

    return product
