"""Masks that hold their pattern along both axes, exact for 2:4."""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..pattern import Pattern

_BLOCKS_AT_ONCE = 1 << 16


def transposable_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """The best mask that keeps 2 of 4 along rows and along columns: exact, over all 90 patterns of each 4x4 block.

    Equal sums keep the pattern whose kept places come first in row order; NaN counts as a score below every other, and
    infinities are counted before numbers are added.

    Args:
        scores: [out_features, in_features] floating point, both multiples of 4 (checked by `nm_mask`).
    Returns:
        bool, same shape; exactly two True in each four neighbours along either axis.
    Raises:
        UnsupportedError: a pattern other than 2:4t.
    Cost: 90 dot products of length 16 per block; 4096x4096 in about a second.
    Source: Hubara et al. 2021, arXiv:2102.08124 (transposable masks); Hu et al. 2024, arXiv:2404.01847 (90 patterns).
    """
    if (pattern.keep, pattern.group) != (2, 4):
        raise UnsupportedError(f"pattern {pattern}: transposable masks are exact for 2:4t only.")
    rows, columns = scores.shape[0] // 4, scores.shape[1] // 4
    blocks = scores.double().view(rows, 4, columns, 4).transpose(1, 2).reshape(-1, 16)
    patterns = _patterns().to(scores.device)
    best = torch.cat([_best_of_90(part, patterns) for part in blocks.split(_BLOCKS_AT_ONCE)] or [blocks.new_empty(0)])
    chosen = patterns.bool()[best.long()]
    return chosen.view(rows, columns, 4, 4).transpose(1, 2).reshape(scores.shape)


def _best_of_90(blocks: Tensor, patterns: Tensor) -> Tensor:
    """int64 [blocks]: which pattern keeps the fewest NaN; among those the most infinities; among those the largest sum."""
    finite = blocks.isfinite()
    # A 16th: eight of the largest float64 must not overflow.
    sums = torch.where(finite, blocks / 16, 0.0) @ patterns.T
    if blocks.is_meta or not bool(finite.all()):
        ranks = torch.where(blocks.isnan(), -64.0, torch.where(finite, 0.0, blocks.sign())) @ patterns.T
        sums = sums.masked_fill(ranks < ranks.amax(dim=1, keepdim=True), -torch.inf)
    return sums.argmax(dim=1)


@lru_cache(maxsize=1)
def _patterns() -> Tensor:
    """float64 [90, 16]: all 4x4 masks with two in every row and column, kept places first in row order."""
    pairs = [tuple(int(i in pair) for i in range(4)) for pair in itertools.combinations(range(4), 2)]
    blocks = [
        rows
        for rows in itertools.product(pairs, repeat=4)
        if all(sum(column) == 2 for column in zip(*rows, strict=True))
    ]
    return torch.tensor(blocks, dtype=torch.float64).view(len(blocks), 16)
