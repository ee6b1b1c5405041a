"""Transposable masks that are nearly the best, all blocks at once in torch: for devices where solver.py would be a detour."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError
from ..pattern import Pattern


def entropic_mask(scores: Tensor, pattern: Pattern | str, *, steps: int = 100, sharpness: float = 40.0) -> Tensor:
    """A mask that keeps `keep` of `group` along both axes, some thousandths below the sum of the best one.

    Each block is relaxed to fractions between 0 and 1 with `keep` in every row and column, smoothed by an entropy, and
    solved by scaling rows and columns in turn and clipping at 1 (Dykstra). The fractions are rounded largest first, and
    rows and columns that are not full then exchange places. `nm_mask` gives the best mask itself, and on a CPU in a small part
    of the time (it begins with the largest scores: these fractions would cost more than they spare).

    Args:
        scores: [out_features, in_features] floating point, multiples of the group. Where NaN or infinities are, the mask
            is valid and no more.
        steps: of scaling and clipping. More come closer to the smoothed optimum.
        sharpness: the largest |score| of a block as an exponent of e, at most 80. Higher is closer to the best mask, and
            needs more steps.
    Returns:
        bool, shape and device of `scores`; exactly `keep` True in each group of neighbours along either axis.
    Raises:
        ShapeError: scores are no matrix of whole groups.
    Cost: `steps` times a dozen passes over the scores, in float32, and group**2 steps of rounding for all blocks at once.
    Source: TSENOR, arXiv:2505.23949.

    >>> entropic_mask(torch.eye(4), "1:4t").int().tolist()
    [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    """
    pattern = Pattern.parse(pattern)
    size = pattern.group
    _require_whole_groups(scores, pattern)
    if scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    across = scores.shape[1] // size
    blocks = scores.detach().float().reshape(-1, size, across, size).transpose(1, 2).reshape(-1, size, size)
    blocks = blocks.nan_to_num(nan=torch.finfo(torch.float32).min)
    blocks = blocks / blocks.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    kept = _rounded(_fractions(blocks, pattern.keep, steps, sharpness), pattern.keep)
    _complete(kept, blocks, pattern.keep)
    return kept.view(-1, across, size, size).transpose(1, 2).reshape(scores.shape)


def _require_whole_groups(scores: Tensor, pattern: Pattern) -> None:
    if scores.ndim != 2 or scores.shape[0] % pattern.group or scores.shape[1] % pattern.group:
        raise ShapeError(
            f"scores are {list(scores.shape)}: {pattern} needs a matrix of whole blocks of {pattern.group} x"
            f" {pattern.group}. Pad it, or leave the layer dense."
        )


def _fractions(blocks: Tensor, keep: int, steps: int, sharpness: float) -> Tensor:
    """[blocks, size, size] of fractions, whose rows and columns nearly add up to `keep`."""
    now = (blocks * sharpness).exp()
    taken = torch.ones_like(now)  # by clipping so far, as a factor, given back before the next
    for _ in range(steps):
        now = now * (keep / now.sum(2, keepdim=True))
        now = now * (keep / now.sum(1, keepdim=True))
        whole = now * taken
        now = whole.clamp_max(1.0)
        taken = whole.clamp_min(1.0)  # whole / now
    return now


def _rounded(fractions: Tensor, keep: int) -> Tensor:
    """bool: the largest first, wherever row and column have room."""
    count, size, _ = fractions.shape
    order = fractions.flatten(1).argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros(count, size * size, dtype=torch.bool, device=fractions.device)
    rows, columns = (torch.zeros(count, size, dtype=torch.int32, device=fractions.device) for _ in range(2))
    for place in order.unbind(1):
        row, column = (place // size)[:, None], (place % size)[:, None]
        room = (rows.gather(1, row) < keep) & (columns.gather(1, column) < keep)
        kept.scatter_(1, place[:, None], room)
        rows.scatter_add_(1, row, room.int())
        columns.scatter_add_(1, column, room.int())
    return kept.view_as(fractions)


def _complete(kept: Tensor, blocks: Tensor, keep: int) -> None:
    """Fills rows and columns that have room, by the exchange that costs least, one in each block at a time (solver.py)."""
    size = kept.shape[1]
    while True:
        room_rows, room_columns = kept.sum(2) < keep, kept.sum(1) < keep
        open_blocks = room_rows.any(1).nonzero()[:, 0]
        if not len(open_blocks):
            return
        row, column = (room[open_blocks].int().argmax(1) for room in (room_rows, room_columns))
        worth, mask = blocks[open_blocks], kept[open_blocks]
        one = torch.arange(len(open_blocks), device=kept.device)
        gain = worth[one, row][:, None, :] + worth[one, :, column][:, :, None] - worth
        possible = mask & ~mask[one, row][:, None, :] & ~mask[one, :, column][:, :, None]
        best = gain.masked_fill(~possible, -torch.inf).flatten(1).argmax(1)
        kept[open_blocks, best // size, best % size] = False
        kept[open_blocks, row, best % size] = True
        kept[open_blocks, best // size, column] = True
