"""Masks that hold their pattern along both axes: the best there are."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..pattern import Pattern
from . import cpu
from .solver import best_of_blocks

_BLOCKS_AT_ONCE = 1 << 14
_PAIRS = tuple(itertools.combinations(range(4), 2))  # kept places of a row, those that come first first
_LARGEST_PLAIN = 2.0**1019


def transposable_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """The best mask that keeps `keep` of `group` along rows and along columns: no mask of a block has a larger sum.

    NaN counts as a score below every other, and infinities are counted before numbers are added. C++ and torch give the
    same bits for any scores.

    2:4: a 4x4 block has 90 masks; equal sums keep the one whose kept places come first in row order. Sums are in float64,
    each as ((a + b) + (c + d)) + ((e + f) + (g + h)): the two kept in the first row, in the second, the third, the fourth. So
    float32 scores within a factor of 2**26 of each other are compared exactly. Where float64 rounds too, the upper and
    the lower two rows are compared by their own sums first, and only halves that are best for the places they leave in
    each column make up a mask.

    Other groups: a b-matching, solved as a flow of least cost by cancelling cycles (solver.py). Scores are rounded to
    2**-54 of the largest of their block, and of those the sum is the largest, exactly. Equal sums keep any one of them.

    Args:
        scores: [out_features, in_features] floating point, both multiples of the group (checked by `nm_mask`).
    Returns:
        bool, same shape; exactly `keep` True in each group of neighbours along either axis.
    Cost: on CPUs in C++, 2:4 of 4096x4096 in 25 ms on a core, four times as long as a copy (in torch a second); 4:8 of
        2048x2048 in half a second, 8:16 in one. Other groups are solved on the CPU wherever the scores are, and in a
        build without C++ in plain Python, milliseconds for each 8x8 block and 30 times that for 32x32.
    Source: Hubara et al. 2021, arXiv:2102.08124 (transposable masks, as flows); Hu et al. 2024, arXiv:2404.01847 (90
        patterns).
    """
    wide = scores if scores.dtype.itemsize > 2 else scores.float()
    if (pattern.keep, pattern.group) == (2, 4):
        return cpu.transposable_2_4(wide) if cpu.runs(wide) else best_of_90(scores)
    if scores.is_meta:
        return torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    here = wide.detach().cpu()
    mask = cpu.transposable_blocks(here, pattern) if cpu.runs(here) else best_of_blocks(here, pattern)
    return mask.to(scores.device)


def best_of_90(scores: Tensor) -> Tensor:
    """`transposable_mask` for "2:4t" in plain torch, on any device: the specification."""
    rows, columns = scores.shape[0] // 4, scores.shape[1] // 4
    blocks = scores.detach().double().view(rows, 4, columns, 4).transpose(1, 2).reshape(-1, 16)
    parts = blocks.split(_BLOCKS_AT_ONCE) if len(blocks) else [blocks]
    chosen = torch.cat([_best_of_block(part) for part in parts])
    return chosen.view(rows, columns, 4, 4).transpose(1, 2).reshape(scores.shape)


def _best_of_block(blocks: Tensor) -> Tensor:
    """bool [blocks, 16]: the best mask of each.

    The kind of a half, two rows, is how many places of each column it keeps. There are 19 kinds; the other half must be of
    the one kind that fills the columns. So the best half of each kind, above and below, decides.
    """
    scores = blocks.T.contiguous()
    finite = scores.isfinite()
    numbers = torch.where(finite, scores, 0.0)
    large = numbers.abs().amax(dim=0) > _LARGEST_PLAIN  # eight of them must not overflow
    worths = torch.where(large, numbers * 0.0625, numbers)[None]
    if blocks.is_meta or not bool(finite.all()):
        # Compared before the sums: what is not a number counts, -64 for NaN and 1 or -1 for infinities.
        counts = torch.where(scores.isnan(), -64.0, torch.where(finite, 0.0, scores.sign()))
        worths = torch.cat([counts[None], worths])
    rows = [[worths[:, 4 * row + a] + worths[:, 4 * row + b] for a, b in _PAIRS] for row in range(4)]
    above, below = _best_halves(rows[0], rows[1]), _best_halves(rows[2], rows[3])
    best: tuple[Tensor, Tensor] | None = None
    for kind, (worth, bits) in above.items():
        rest_worth, rest_bits = below[tuple(2 - count for count in kind)]
        worth, bits = worth + rest_worth, bits * 256 + rest_bits
        if best is not None:
            wins = _above(worth, best[0]) | (~_above(best[0], worth) & (bits > best[1]))
            worth, bits = torch.where(wins, worth, best[0]), torch.where(wins, bits, best[1])
        best = worth, bits
    assert best is not None
    places = torch.arange(15, -1, -1, device=blocks.device)
    return (best[1][:, None] >> places & 1).bool()


def _best_halves(upper: list[Tensor], lower: list[Tensor]) -> dict[tuple[int, ...], tuple[Tensor, Tensor]]:
    """The best half of each kind: its worth and its mask as 8 bits, of which those of places that come first are higher."""
    best: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    for (p, above), (q, below) in itertools.product(zip(_PAIRS, upper, strict=True), zip(_PAIRS, lower, strict=True)):
        kind = tuple((c in p) + (c in q) for c in range(4))
        worth = above + below
        bits = worth.new_full(worth.shape[1:], sum(128 >> c for c in p) + sum(8 >> c for c in q), dtype=torch.int64)
        if kind in best:
            wins = _above(worth, best[kind][0])
            worth, bits = torch.where(wins, worth, best[kind][0]), torch.where(wins, bits, best[kind][1])
        best[kind] = worth, bits
    return best


def _above(one: Tensor, other: Tensor) -> Tensor:
    """bool [blocks]: where worths [counts and sums, blocks] are larger; the first that differ decide."""
    if len(one) == 1:
        return one[0] > other[0]
    return (one[0] > other[0]) | ((one[0] == other[0]) & (one[1] > other[1]))
