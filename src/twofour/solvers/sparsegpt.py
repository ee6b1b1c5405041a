"""SparseGPT: columns from left to right; what is pruned is made up for by the columns that are still to come."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128
"""Columns whose corrections are applied one by one; those to the right of them get theirs in one product."""


def sparsegpt(weight: Tensor, factor: Tensor, group: int, choose: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """(new weights, mask): masks chosen group by group on w² / U_jj², every dropped weight carried on to its right.

    Args:
        weight: [out_features, in_features] float32 or float64.
        factor: [in_features, in_features] upper U with Uᵀ U the inverse of the damped Hessian (`inverse_factor`), of the
            same dtype.
        group: columns of a group; `in_features` a multiple of it.
        choose: scores [out_features, group] -> bool mask of the same shape.
    Returns:
        weights (zero off the mask) and bool mask, both of the shape of `weight`.
    Cost: out_features * in_features² / 2 products.
    Source: Frantar & Alistarh 2023, arXiv:2301.00774, algorithm 1.
    """
    weight = weight.clone()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    in_features = weight.shape[1]
    step = max(group, BLOCK - BLOCK % group)
    for first in range(0, in_features, step):
        last = min(first + step, in_features)
        # Columns in rows: each correction then runs along contiguous memory.
        block = weight[:, first:last].T.contiguous()
        own = factor[first:last, first:last]
        diagonal = own.diagonal()
        errors = torch.empty_like(block)
        for j in range(last - first):
            if j % group == 0:
                scores = (block[j : j + group] / diagonal[j : j + group, None]).square()
                mask[:, first + j : first + j + group] = choose(scores.T.contiguous())
            errors[j] = block[j].masked_fill(mask[:, first + j], 0.0) / diagonal[j]
            block[j + 1 :].addr_(own[j, j + 1 :], errors[j], alpha=-1.0)
        weight[:, first:last] = block.T.masked_fill(~mask[:, first:last], 0.0)
        if last < in_features:
            weight[:, last:].addmm_(errors.T, factor[first:last, last:], alpha=-1.0)
    return weight, mask
