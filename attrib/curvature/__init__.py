"""Products of the Hessian of a batch's weighted loss with several directions, and the derivative of each loss along them.

- `curvature`: `Curvature.products`: slices of the batch, queries at once, taped
- `point`: where they are taken: the losses of a batch as a function of the parameters that move
- `exact`: of the loss itself: forward over reverse, or a second backward pass; which of them, found out and compared once
- `outputs`, `newton`: of the loss in what the model returns, the generalised Gauss-Newton matrix
"""

from .curvature import KINDS, Curvature, Products

__all__ = ["KINDS", "Curvature", "Products"]
