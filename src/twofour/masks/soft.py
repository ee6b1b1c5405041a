"""Soft thresholds: the continuous way to a sparse weight."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..pattern import Pattern
from .select import nm_mask, require_whole_groups

_BLOCKS_AT_ONCE = 1 << 14
_SIDE = 4
_PAIRS = tuple(itertools.combinations(range(_SIDE), 2))


def soft_threshold(x: Tensor, pattern: Pattern | str) -> Tensor:
    """`x` where `pattern` keeps it by magnitude, no value larger than what keeping it gains; zero elsewhere.

    What keeping a place gains is the sum of magnitudes of the best mask less that of the best mask without the place. It is
    0 where two masks are equally good, so the result changes continuously with `x` while the mask jumps.

    "2:4" and its like: every kept value loses the largest dropped magnitude of its group, which is the map of S-STE. A
    mask that rows share ("2:4x4") compares sums of their magnitudes; a kept column shrinks by the share that the best
    dropped sum is of its own. "2:4t": the best of the 90 masks of a 4x4 block against the best of the 45 without the place;
    a place that lets others in gains more than its own magnitude, and stays what it is.

    Args:
        x: [out_features, in_features], or any shape for a pattern of one row; floating point; groups along the last axis.
    Returns:
        shape and dtype of `x`; at most `keep` non-zeros in each group, none larger than in `x`. NaN makes its group (or
        block) NaN where something is kept. No gradients flow through.
    Raises:
        ShapeError: an axis is not a multiple, as in `nm_mask`.
        UnsupportedError: a transposable pattern other than "2:4t".
    Cost: a mask and four passes; "2:4t" in torch, 90 sums and 16 maxima of 45 for each block.
    Source: Hu et al. 2024 (S-STE), arXiv:2409.09099, equation 7, for "2:4"; the others follow from the same rule.

    >>> soft_threshold(torch.tensor([[3.0, -4.0, 1.0, 2.0]]), "2:4").tolist()
    [[1.0, -2.0, 0.0, 0.0]]
    """
    pattern = Pattern.parse(pattern)
    x = x.detach()
    wide = x.float() if x.dtype.itemsize < 4 else x
    if pattern.transposable:
        if (pattern.keep, pattern.group) != (2, _SIDE):
            raise UnsupportedError(
                f"soft thresholds of {pattern} are not known: of transposable patterns 2:4t alone has them. Use 2:4t, or"
                " masks without thresholds."
            )
        require_whole_groups(wide, pattern, -1)
        return _of_blocks(wide).to(x.dtype)
    sizes = wide.abs()
    mask = nm_mask(sizes, pattern)
    if pattern.rows > 1:
        sums = sizes.unflatten(0, (-1, pattern.rows)).sum(1)
        dropped = (
            torch.where(mask[:: pattern.rows], 0.0, sums).unflatten(-1, (-1, pattern.group)).amax(-1, keepdim=True)
        )
        sums = sums.unflatten(-1, (-1, pattern.group))
        share = ((sums - dropped) / torch.where(sums == 0, 1.0, sums)).flatten(-2).repeat_interleave(pattern.rows, 0)
        return torch.where(mask, wide * share, 0.0).to(x.dtype)
    dropped = torch.where(mask, 0.0, sizes).unflatten(-1, (-1, pattern.group)).amax(-1, keepdim=True)
    kept = (sizes.unflatten(-1, (-1, pattern.group)) - dropped).flatten(-2)
    return torch.where(mask, kept.copysign(wide), 0.0).to(x.dtype)


def _of_blocks(x: Tensor) -> Tensor:
    """Blocks of 4x4, by all their masks."""
    rows, columns = x.shape
    blocks = x.view(rows // _SIDE, _SIDE, columns // _SIDE, _SIDE).transpose(1, 2).reshape(-1, _SIDE * _SIDE)
    masks = _masks_of_a_block().to(x.device)
    with_place = masks.bool()
    shrunk = torch.empty_like(blocks)
    for start in range(0, len(blocks), _BLOCKS_AT_ONCE):
        part = blocks[start : start + _BLOCKS_AT_ONCE].abs()
        sums = (part @ masks.to(part.dtype)).T.contiguous()  # [90, blocks]
        best = sums.amax(0)
        for place in range(_SIDE * _SIDE):
            gain = best - sums[~with_place[place]].amax(0)
            shrunk[start : start + _BLOCKS_AT_ONCE, place] = torch.minimum(gain, part[:, place])
    found = shrunk.copysign(blocks).where(shrunk != 0, 0.0)
    return found.view(rows // _SIDE, columns // _SIDE, _SIDE, _SIDE).transpose(1, 2).reshape(rows, columns)


def _masks_of_a_block() -> Tensor:
    """[16 places, 90 masks] of 0 and 1."""
    found = []
    for pairs in itertools.product(_PAIRS, repeat=_SIDE):
        if all(sum(column in pair for pair in pairs) == 2 for column in range(_SIDE)):
            found.append([float(column in pair) for pair in pairs for column in range(_SIDE)])
    return torch.tensor(found).T.contiguous()
