"""Masks by ADMM: the weight is pulled to and fro between its outputs and its pattern until the two agree."""

from __future__ import annotations

import torch
from torch import Tensor

from .choose import Chooser

ITERATIONS = 24
RHO = 0.1
RHO_GROWTH = 1.15
RHO_MOST = 10.0
STEADY = 6
"""The penalty grows every so many iterations: each change costs one inverse, each iteration one product."""

_CLUSTER_EVERY = 10


def admm(target: Tensor, matrix: Tensor, choose: Chooser, iterations: int = ITERATIONS) -> tuple[Tensor, Tensor]:
    """(mask, weights on it) that alternate between least squares on the outputs and the nearest weight of the pattern.

    Works in coordinates where the Hessian has ones on its diagonal: weights times the root mean square of their input.
    The weights are a good start for `refit`, not its answer.

    Args:
        target: [out_features, in_features] scaled weights, float32 or float64.
        matrix: [in_features, in_features] scaled Hessian, positive definite, of the same dtype.
        choose: the mask of scores; clusters its rows anew every ten iterations.
    Cost: `iterations` products out_features x in_features x in_features, and an inverse of `matrix` every six.
    Source: Boza 2024, arXiv:2401.02938; Meng et al. 2024, arXiv:2406.07831 (ALPS).
    """
    image = target @ matrix
    eye = torch.eye(*matrix.shape, dtype=matrix.dtype, device=matrix.device)
    mask = choose(target.square())
    nearest = target * mask
    multiplier = torch.zeros_like(target)
    rho = RHO
    inverse = eye
    for i in range(iterations):
        if i % STEADY == 0:
            rho = min(RHO_MOST, RHO * RHO_GROWTH ** max(0, i - STEADY))
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix + rho * eye))
        free = torch.addmm(multiplier, torch.add(image, nearest - multiplier, alpha=rho), inverse)
        scores = free.square()
        if i and i % _CLUSTER_EVERY == 0:
            choose.recluster(scores, seed=i)
        mask = choose(scores)
        nearest = free.masked_fill(~mask, 0.0)
        multiplier = free - nearest
    return mask, nearest
