"""Scores -> mask: the best `keep` of every `group`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..errors import ShapeError, UnsupportedError
from ..pattern import Pattern
from . import cpu
from .scores import magnitude
from .transposable import transposable_mask

_COMPARE_UP_TO = 8


def nm_mask(scores: Tensor, pattern: Pattern | str, *, dim: int = -1) -> Tensor:
    """Marks the `pattern.keep` highest scores in every `pattern.group` neighbours along `dim`.

    Equal scores keep the lower index, so every backend returns the same bits; NaN ranks below every number.
    A shared pattern ("2:4x4") adds the scores of each `rows` neighbouring rows (the axis before `dim` when dim=-1; scores
    must be a matrix) and gives them one mask. A transposable one ("2:4t", "8:16t") is the best valid along both axes, and
    has its own rule for equal sums (`transposable_mask`).

    Args:
        scores: [..., in_features, ...] floating point; `scores.shape[dim]` a multiple of `pattern.group`. For "2:4x4"
            and "2:4t" a matrix [out_features, in_features] whose out_features are a multiple of `rows` or `group`.
    Returns:
        bool, shape and device of `scores`; exactly `keep` True in each group.
    Raises:
        ShapeError: an axis is not a multiple.
        UnsupportedError: scores that are not floating point.
    Cost: on CPUs in C++, 4096x4096 as 2:4 in 7 ms on a core, little more than a copy; as 16:32 in 40. In torch, for groups
        up to 8 a pass over the scores for each pair in a group, a stable sort above.
    Source: Mishra et al. 2021, arXiv:2104.08378, section 3.

    >>> nm_mask(torch.tensor([3., 1., 3., 3.]), "2:4").tolist()
    [True, False, True, False]
    """
    pattern = Pattern.parse(pattern)
    require_whole_groups(scores, pattern, dim)
    if scores.dtype.itemsize < 2:  # float8 cannot be compared
        scores = scores.float()
    if pattern.transposable:
        return transposable_mask(scores, pattern)
    moved = scores.movedim(dim, -1)
    wide = moved if moved.dtype.itemsize > 2 else moved.float()
    mask = cpu.best_of_groups(wide, pattern) if cpu.runs(wide) else best_of_groups(moved, pattern)
    return mask.movedim(-1, dim)


def keep_best(x: Tensor, pattern: Pattern | str, *, out: Tensor | None = None) -> Tensor:
    """`x` where `pattern` keeps it by magnitude, 0 elsewhere: the nearest tensor that holds the pattern.

    The mask is that of `nm_mask(magnitude(x), pattern)`, along the last axis; "2:4x4" adds the magnitudes of its rows.
    For solvers that project again and again: float32 and float64 matrices on CPUs take one pass without a mask in memory.

    Args:
        x: floating point, shaped as `nm_mask` asks of scores.
        out: where to write, of the shape, dtype and device of `x`; `x` itself, or apart from it in memory. None makes
            a new tensor.
    Returns:
        `out`: kept values bit for bit, +0.0 elsewhere. No gradients flow through.
    Raises:
        ShapeError: x has no whole groups, or out is not like x.
        UnsupportedError: x is not floating point.
    Cost: a copy and a half, as 2:4 on a CPU.

    >>> keep_best(torch.tensor([[3.0, -4.0, 1.0, 2.0]]), "2:4").tolist()
    [[3.0, -4.0, 0.0, 0.0]]
    """
    pattern = Pattern.parse(pattern)
    require_whole_groups(x, pattern, -1)
    x = x.detach()
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    elif (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        raise ShapeError(
            f"out is {list(out.shape)} {out.dtype} on {out.device}, x is {list(x.shape)} {x.dtype} on {x.device}: they must"
            " be alike. Make it with torch.empty_like(x)."
        )
    into = out.detach()
    one_pass = x.ndim == 2 and not pattern.transposable and cpu.runs(x) and cpu.runs(into) and cpu.has_dense_rows(into)
    if one_pass and (cpu.has_dense_rows(x) or x.data_ptr() != into.data_ptr()):
        cpu.keep_best(x, pattern, into)
    else:
        into.copy_(torch.where(nm_mask(magnitude(x), pattern), x, 0))
    return out


def require_whole_groups(scores: Tensor, pattern: Pattern, dim: int) -> None:
    """Raises ShapeError or UnsupportedError for scores that have no mask."""
    if not scores.dtype.is_floating_point:
        raise UnsupportedError(f"scores are {scores.dtype}: nm_mask ranks floating point scores. Pass scores.float().")
    if scores.ndim and not -scores.ndim <= dim < scores.ndim:
        raise ShapeError(f"scores are {list(scores.shape)}: they have no axis {dim}.")
    if scores.ndim == 0 or scores.shape[dim] % pattern.group:
        raise ShapeError(
            f"scores are {list(scores.shape)}: axis {dim} is not a multiple of {pattern.group}, so it has no whole"
            f" {pattern} groups. Pad it, or leave the layer dense."
        )
    if pattern.transposable or pattern.rows > 1:
        if scores.ndim != 2 or dim not in (-1, 1):
            raise ShapeError(
                f"scores are {list(scores.shape)} along axis {dim}: {pattern} needs a matrix, along its last."
            )
        step = pattern.group if pattern.transposable else pattern.rows
        if scores.shape[0] % step:
            raise ShapeError(
                f"scores are {list(scores.shape)}: {pattern} needs out_features to be a multiple of {step}."
            )


def best_of_groups(scores: Tensor, pattern: Pattern) -> Tensor:
    """`nm_mask` along the last axis in plain torch, on any device: the specification."""
    if pattern.rows > 1:
        # float64: half precision would overflow. Row after row: float64 sums too depend on the order.
        rows = scores.unflatten(0, (-1, pattern.rows)).double().unbind(1)
        shared = best_of_groups(functools.reduce(torch.add, rows), Pattern(pattern.keep, pattern.group))
        return shared.repeat_interleave(pattern.rows, dim=0)
    groups = scores.unflatten(-1, (-1, pattern.group))
    choose = _by_comparing if pattern.group <= _COMPARE_UP_TO else _by_sorting
    return choose(groups, pattern.keep).flatten(-2)


def _by_comparing(groups: Tensor, keep: int) -> Tensor:
    """Rank of a score = how many beat it; far faster than sorting short groups (4096x4096 2:4: 0.3 s against 4 s)."""
    scores = groups.unbind(-1)
    ranks = [torch.zeros(groups.shape[:-1], dtype=torch.uint8, device=groups.device) for _ in scores]
    for low in range(len(scores)):
        for high in range(low + 1, len(scores)):
            # NaN compares false: `high` wins only over a smaller number or over NaN.
            high_wins = (scores[high] > scores[low]) | (scores[low].isnan() & ~scores[high].isnan())
            ranks[low] += high_wins
            ranks[high] += ~high_wins
    return torch.stack([rank < keep for rank in ranks], dim=-1)


def _by_sorting(groups: Tensor, keep: int) -> Tensor:
    # Ascending order of the negated scores: torch puts NaN last, and stable order keeps the lower index. 0 - x, not -x:
    # it makes every zero +0.0, which sorts by radix could tell from -0.0.
    order = torch.sort(0.0 - groups, dim=-1, stable=True).indices[..., :keep]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True)
