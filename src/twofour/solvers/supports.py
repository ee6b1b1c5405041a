"""Coordinate descent over supports: each group takes the best of its masks while all others stand still."""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from torch import Tensor

from ..pattern import Pattern

MOST_SUPPORTS = 70
"""Patterns with more masks per group (4:8 has 70) are left as they are."""

_BLOCK = 128


def descends(pattern: Pattern) -> bool:
    """True where `descend` knows the pattern: few masks per group, each group free to choose."""
    return not pattern.transposable and len(_choices(pattern.keep, pattern.group)) <= MOST_SUPPORTS


def descend(target: Tensor, start: Tensor, matrix: Tensor, pattern: Pattern, sweeps: int = 1) -> tuple[Tensor, Tensor]:
    """(weights, mask) after `sweeps` passes over the groups; the output error never grows.

    A group's turn solves the least squares of each of its masks (six for 2:4) with all other groups as they are, for
    every row, and takes the best. Rows that share a mask are neighbours here, and choose together.

    Args:
        target: [out_features, in_features] scaled weights, float32 or float64.
        start: same shape, of the pattern.
        matrix: [in_features, in_features] scaled Hessian, positive definite, of the same dtype.
    Cost: out_features * in_features² products per sweep.
    """
    group, rows = pattern.group, pattern.rows
    out_features, in_features = target.shape
    choices = _choices(pattern.keep, group).to(target.device)
    supports = len(choices)
    flags = torch.zeros(supports, group, dtype=torch.bool, device=target.device).scatter_(1, choices, True)
    solve = _inverses(matrix, choices, group)
    weights = start.clone()
    mask = torch.empty_like(target, dtype=torch.bool)
    step = max(group, _BLOCK - _BLOCK % group)
    for _ in range(sweeps):
        gradient = (target - weights) @ matrix
        for first in range(0, in_features, step):
            last = min(first + step, in_features)
            local = gradient[:, first:last].contiguous()
            own = matrix[first:last, first:last]
            moved = torch.empty_like(local)
            for at in range(0, last - first, group):
                here = slice(at, at + group)
                there = slice(first + at, first + at + group)
                old = weights[:, there]
                pull = torch.addmm(local[:, here], old, own[here, here])
                found = (pull @ solve[there.start // group]).view(out_features, supports, group)
                gain = (found @ pull[:, :, None]).squeeze(2)
                best = gain.view(-1, rows, supports).sum(1).argmax(1).repeat_interleave(rows)
                new = found.gather(1, best[:, None, None].expand(-1, 1, group)).squeeze(1)
                moved[:, here] = new - old
                local.addmm_(moved[:, here], own[here], alpha=-1.0)
                weights[:, there] = new
                mask[:, there] = flags[best]
            if last < in_features:
                gradient[:, last:].addmm_(moved, matrix[first:last, last:], alpha=-1.0)
    return weights, mask


def _inverses(matrix: Tensor, choices: Tensor, group: int) -> Tensor:
    """[groups, group, supports * group]: times the pull on a group, the least squares weights of each of its masks."""
    blocks = torch.stack([matrix[g : g + group, g : g + group] for g in range(0, len(matrix), group)]).double()
    inverse = torch.linalg.inv(blocks[:, choices[:, :, None], choices[:, None, :]])
    padded = blocks.new_zeros(len(blocks), len(choices), group, group)
    padded[:, torch.arange(len(choices))[:, None, None], choices[:, :, None], choices[:, None, :]] = inverse
    return padded.transpose(1, 2).flatten(2).to(matrix.dtype).contiguous()


@lru_cache(maxsize=8)
def _choices(keep: int, group: int) -> Tensor:
    """int64 [supports, keep]; empty where there are too many to list."""
    if group > 16:
        return torch.empty(MOST_SUPPORTS + 1, keep, dtype=torch.int64)
    return torch.tensor(list(itertools.combinations(range(group), keep)))
