"""The best weights on a mask that is given: least squares on the outputs, all rows at once by conjugate gradients."""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 60
TOLERANCE = 1e-4


def refit(
    target: Tensor,
    mask: Tensor,
    matrix: Tensor,
    start: Tensor,
    *,
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """The weights on `mask` whose outputs come nearest to those of `target`: argmin tr((V - W) H (V - W)ᵀ), V = 0 off it.

    Conjugate gradients, each row with steps of its own; the error of a row never grows. In coordinates where the
    Hessian has ones on its diagonal, which is the diagonal preconditioner.

    Args:
        target: [out_features, in_features] scaled weights, float32 or float64.
        mask: bool, same shape. Any mask: it need not hold a pattern.
        matrix: [in_features, in_features] scaled Hessian, positive definite, of the same dtype.
        start: where to begin; counted on the mask only.
        iterations: at most so many, each a product out_features x in_features x in_features.
        tolerance: a row is done when its residual is this much smaller than that of all zeros.
    Returns:
        same shape and dtype as `target`; zero off the mask.
    Source: Meng et al. 2024, arXiv:2406.07831 (ALPS), section 3.3; Hestenes & Stiefel 1952.
    """
    dropped = ~mask
    goal = (target @ matrix).masked_fill_(dropped, 0.0)
    enough = tolerance**2 * goal.square().sum(1, keepdim=True)
    found = start.masked_fill(dropped, 0.0)
    residual = goal - (found @ matrix).masked_fill_(dropped, 0.0)
    direction = residual.clone()
    size = residual.square().sum(1, keepdim=True)
    for _ in range(iterations):
        active = size > enough
        if not bool(active.any()):
            break
        image = (direction @ matrix).masked_fill_(dropped, 0.0)
        curvature = (direction * image).sum(1, keepdim=True)
        step = torch.where(active & (curvature > 0), size / curvature, 0.0)
        found.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1.0)
        new_size = residual.square().sum(1, keepdim=True)
        direction = torch.addcmul(residual, torch.where(active, new_size / size, 0.0), direction)
        size = new_size
    return found
