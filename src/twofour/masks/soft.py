"""Soft thresholds: the continuous way to a sparse weight."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..pattern import Pattern
from . import cpu
from .select import nm_mask, require_whole_groups

_BLOCKS_AT_ONCE = 1 << 13
_SIDE = 4
_PAIRS = tuple(itertools.combinations(range(_SIDE), 2))


def soft_threshold(x: Tensor, pattern: Pattern | str, *, scale: float = 1.0) -> Tensor:
    """`x` where `pattern` keeps it by magnitude, no value larger than what keeping it gains; zero elsewhere.

    What keeping a place gains is the sum of magnitudes of the best mask less that of the best mask without the place. It is
    0 where two masks are equally good, so the result changes continuously with `x` while the mask jumps.

    "2:4" and its like: every kept value loses the largest dropped magnitude of its group, which is the map of S-STE. A
    mask that rows share ("2:4x4") compares sums of their magnitudes; a kept column shrinks by the share that the best
    dropped sum is of its own. "2:4t": the best of the 90 masks of a 4x4 block against the best of the 45 without the place;
    a place that lets others in gains more than its own magnitude, and stays what it is.

    Args:
        x: [out_features, in_features], or any shape for a pattern of one row; floating point; groups along the last axis.
        scale: what the result is multiplied by.
    Returns:
        shape and dtype of `x`; at most `keep` non-zeros in each group, none larger than in `x` times `scale`. NaN makes its
        group NaN, or its block. No gradients flow through.
    Raises:
        ShapeError: an axis is not a multiple, as in `nm_mask`.
        UnsupportedError: a transposable pattern other than "2:4t".
    Cost: in C++, of 4096x1024 float32 on a core of Zen 5, "2:4" takes 2 ms and "2:4t" 3.5; in torch ten passes, and some 300
        sums and maxima for each block. Other patterns: a mask and four passes.
    Source: Hu et al. 2024 (S-STE), arXiv:2409.09099, equation 7, for "2:4"; the others follow from the same rule.

    >>> soft_threshold(torch.tensor([[3.0, -4.0, 1.0, 2.0]]), "2:4").tolist()
    [[1.0, -2.0, 0.0, 0.0]]
    """
    pattern = Pattern.parse(pattern)
    x = x.detach()
    wide = x.float() if x.dtype.itemsize < 4 else x
    if pattern.transposable and (pattern.keep, pattern.group) != (2, _SIDE):
        raise UnsupportedError(
            f"soft thresholds of {pattern} are not known: of transposable patterns 2:4t alone has them. Use 2:4t, or"
            " masks without thresholds."
        )
    require_whole_groups(wide, pattern, -1)
    if (pattern.keep, pattern.group, pattern.rows) == (2, _SIDE, 1):
        if x.ndim == 2 and x.dtype in (torch.float32, torch.bfloat16) and cpu.runs_weights(x):
            return cpu.soft_threshold(x, scale, pattern.transposable).to(x.dtype)
        return (_of_blocks if pattern.transposable else _of_fours)(wide).mul_(scale).to(x.dtype)
    sizes = wide.abs()
    mask = nm_mask(sizes, pattern)
    if pattern.rows > 1:
        sums = sizes.unflatten(0, (-1, pattern.rows)).sum(1)
        dropped = (
            torch.where(mask[:: pattern.rows], 0.0, sums).unflatten(-1, (-1, pattern.group)).amax(-1, keepdim=True)
        )
        sums = sums.unflatten(-1, (-1, pattern.group))
        share = ((sums - dropped) / torch.where(sums == 0, 1.0, sums)).flatten(-2).repeat_interleave(pattern.rows, 0)
        return torch.where(mask, wide * share, 0.0).mul_(scale).to(x.dtype)
    dropped = torch.where(mask, 0.0, sizes).unflatten(-1, (-1, pattern.group)).amax(-1, keepdim=True)
    kept = (sizes.unflatten(-1, (-1, pattern.group)) - dropped).flatten(-2)
    return torch.where(mask, kept.copysign(wide), 0.0).mul_(scale).to(x.dtype)


def _of_fours(x: Tensor) -> Tensor:
    """2:4: what is left of each magnitude above the second smallest of its four."""
    groups = x.unflatten(-1, (-1, _SIDE))
    a, b, c, d = groups.abs().unbind(-1)
    dropped = torch.minimum(
        torch.maximum(torch.minimum(a, b), torch.minimum(c, d)), torch.minimum(torch.maximum(a, b), torch.maximum(c, d))
    )
    # x less its nearest value in [-dropped, dropped]: two passes, and the sign comes by itself.
    limit = dropped.unsqueeze(-1)
    found: Tensor = groups - torch.minimum(torch.maximum(groups, -limit), limit)
    return found.flatten(-2)


def _of_blocks(x: Tensor) -> Tensor:
    """Blocks of 4x4: for each pair of places of a row, the best mask that has it, by halves as in transposable.py."""
    rows, columns = x.shape
    blocks = x.view(rows // _SIDE, _SIDE, columns // _SIDE, _SIDE).permute(1, 3, 0, 2).reshape(_SIDE, _SIDE, -1)
    shrunk = torch.empty_like(blocks)
    for start in range(0, blocks.shape[-1], _BLOCKS_AT_ONCE):
        part = blocks[..., start : start + _BLOCKS_AT_ONCE].abs()
        first, second = (part[:, [pair[i] for pair in _PAIRS]] for i in (0, 1))
        with_pairs = _best_with_pairs(first + second)
        best = with_pairs[0].amax(0)
        for column in range(_SIDE):
            without = with_pairs[:, [i for i, pair in enumerate(_PAIRS) if column not in pair]].amax(1)
            shrunk[:, column, start : start + _BLOCKS_AT_ONCE] = torch.minimum(best - without, part[:, column])
    found = shrunk.copysign(blocks).where(shrunk != 0, 0.0)
    return found.view(_SIDE, _SIDE, rows // _SIDE, columns // _SIDE).permute(2, 0, 3, 1).reshape(rows, columns)


def _best_with_pairs(pairs: Tensor) -> Tensor:
    """[4 rows, 6 pairs, blocks] sums of pairs -> the sum of the best mask that keeps the pair in the row, same shape."""
    halves = [(pairs[row][:, None] + pairs[row + 1]).flatten(0, 1) for row in (0, 2)]
    best = [torch.stack([half[members].amax(0) for members in _KINDS]) for half in halves]
    rests = [best[1 - lower][_REST] for lower in (0, 1)]
    wholes = [(half + rest).unflatten(0, (6, 6)) for half, rest in zip(halves, rests, strict=True)]
    return torch.stack([wholes[0].amax(1), wholes[0].amax(0), wholes[1].amax(1), wholes[1].amax(0)])


def _kinds() -> tuple[list[list[int]], list[int]]:
    """The halves of each kind, which keep equally many places of each column; for each half, the kind that completes it."""
    counts = [tuple((c in p) + (c in q) for c in range(_SIDE)) for p, q in itertools.product(_PAIRS, _PAIRS)]
    kinds = sorted(set(counts))
    members = [[half for half, own in enumerate(counts) if own == kind] for kind in kinds]
    return members, [kinds.index(tuple(2 - count for count in own)) for own in counts]


_KINDS, _REST = _kinds()
