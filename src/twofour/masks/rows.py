"""Which output rows should share a mask: rows that lose least by it, neighbours or not."""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import ShapeError
from ..pattern import Pattern
from .select import nm_mask

WINDOW_ROWS = 64
"""Rows of the windows 0 ... 63, 64 ... 127, .. inside which rows that share a mask may lie anywhere at no cost: the CPU
kernels (`kWindowRows` in csrc/nm/layout.h) run them as fast as neighbours."""

_MOST_SUPPORTS = 70
_MOST_SPLITS = 500
_NUMBERS_AT_ONCE = 1 << 25


def cluster_rows(
    scores: Tensor,
    pattern: Pattern | str,
    *,
    start: Tensor | None = None,
    rounds: int = 60,
    seed: int = 0,
    window: int | None = WINDOW_ROWS,
) -> Tensor:
    """An order of the rows in which each `pattern.rows` neighbours lose least by sharing one mask.

    Local search: clusters are paired at random, and each pair is split anew in the best of all ways (35 for clusters of
    four); what is kept never falls. Begins with rows in the order of their likeness.

    On a sentence encoder "2:4x4" keeps 0.746 of the scores with neighbours, 0.761 in windows of 16 rows, 0.768 of 64,
    0.770 of 128, 0.772 anywhere.

    Args:
        scores: [out_features, in_features] floating point, not negative, for instance squares of weights.
        pattern: rows above 1 ("2:4x4"); out_features a multiple of `rows`.
        start: an order to begin with, for instance the last answer.
        rounds: pairings that are tried.
        seed: of the pairings. The same seed gives the same order.
        window: clusters stay inside the rows 0 ... window - 1, the next `window`, ..; a multiple of `rows`. Inside
            windows of 64 kernels run them as fast as neighbours. None: anywhere.
    Returns:
        int64 [out_features]: members of the first cluster, of the second, ...; window after window.
    Raises:
        ShapeError: no whole groups, a window that is not a multiple of `rows`, a start that crosses windows.
    Cost: a round makes out_features * in_features * 105 products for "2:4x4".
    """
    pattern = Pattern.parse(pattern)
    rows = pattern.rows
    if scores.ndim != 2 or scores.shape[0] % rows or scores.shape[1] % pattern.group:
        raise ShapeError(f"scores are {list(scores.shape)}: they have no whole {pattern} groups.")
    out_features = scores.shape[0]
    window = max(out_features, 1) if window is None else window
    if window < 1 or (window % rows and window < out_features):
        raise ShapeError(
            f"window={window} for {pattern}: windows must hold whole clusters of {rows} rows. Pass a multiple of {rows}, or"
            " window=None."
        )
    if start is None:
        order = torch.cat([_by_likeness(part, pattern) + window * i for i, part in enumerate(scores.split(window))])
    else:
        order = _by_windows(start, rows, window, out_features).to(scores.device)
    clusters = out_features // rows
    if rows == 1 or clusters < 2:
        return order
    values = _support_scores(scores, pattern)
    splits = _splits(rows).to(scores.device)
    halves = torch.zeros(2 * len(splits), 2 * rows, dtype=values.dtype, device=scores.device)
    halves[: len(splits)].scatter_(1, splits, 1.0)
    halves[len(splits) :] = 1 - halves[: len(splits)]
    generator = torch.Generator().manual_seed(seed)
    groups, supports = values.shape[1:]
    at_once = max(1, _NUMBERS_AT_ONCE // (len(halves) * groups * supports))
    order = order.view(clusters, rows)
    for _ in range(rounds):
        pairs = _pairs(torch.randperm(clusters, generator=generator), max(window // rows, 1)).to(scores.device)
        for part in pairs.split(at_once):
            members = order[part].flatten(1)  # [pairs, 2 * rows]
            sums = halves @ values[members].flatten(2)
            kept = sums.unflatten(2, (groups, supports)).amax(3).sum(2)
            kept = kept[:, : len(splits)] + kept[:, len(splits) :]
            best = kept.argmax(1)
            best = torch.where(kept.gather(1, best[:, None])[:, 0] > kept[:, 0] * (1 + 1e-6), best, 0)
            first = halves[best].bool()
            arranged = torch.cat([members[first].view(-1, rows), members[~first].view(-1, rows)], 1)
            order[part] = arranged.view(-1, 2, rows)
    return order.flatten()


def clustered_mask(scores: Tensor, pattern: Pattern, order: Tensor) -> Tensor:
    """`nm_mask` where the rows that share a mask are neighbours in `order`, not in `scores`."""
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    mask[order] = nm_mask(scores[order], pattern)
    return mask


def _pairs(clusters: Tensor, per_window: int) -> Tensor:
    """int64 [pairs, 2]: the shuffled `clusters` two by two, partners from one window of `per_window`."""
    ordered = clusters[(clusters // per_window).argsort(stable=True)]
    return torch.cat([part[: len(part) // 2 * 2].view(-1, 2) for part in ordered.split(per_window)])


def _by_windows(order: Tensor, rows: int, window: int, out_features: int) -> Tensor:
    """The same clusters, those of the first window first."""
    if len(order) != out_features:
        raise ShapeError(f"start has {len(order)} rows, scores {out_features}: pass what cluster_rows gave for them.")
    clusters = order.view(-1, rows)
    clusters = clusters[(clusters[:, 0] // window).argsort(stable=True)]
    if not torch.equal(clusters.flatten() // window, torch.arange(out_features, device=order.device) // window):
        raise ShapeError(f"start has clusters of rows from several windows of {window}: pass window=None, or no start.")
    return clusters.flatten()


def _support_scores(scores: Tensor, pattern: Pattern) -> Tensor:
    """float32 [out_features, groups, supports]: what each row keeps of each group under each mask."""
    groups = scores.float().unflatten(1, (-1, pattern.group))
    supports = _supports(pattern.keep, pattern.group).to(scores.device)
    values: Tensor = groups @ supports.T
    return values


def _by_likeness(scores: Tensor, pattern: Pattern) -> Tensor:
    """Rows in a greedy chain: each cluster is a row and those most like it among the rows that are left."""
    values = _support_scores(scores, pattern).flatten(1)
    values = values - values.mean(1, keepdim=True)
    values = torch.nn.functional.normalize(values, dim=1)
    likeness = values @ values.T
    free = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    order = []
    for row in range(len(scores)):
        if not free[row]:
            continue
        free[row] = False
        near = likeness[row].masked_fill(~free, -2.0).topk(min(pattern.rows - 1, int(free.sum()))).indices
        free[near] = False
        order += [torch.tensor([row], device=scores.device), near]
    return torch.cat(order)


@lru_cache(maxsize=8)
def _supports(keep: int, group: int) -> Tensor:
    """float32 [supports, group]: every mask of one group; for large groups a sample of them."""
    choices = list(itertools.islice(itertools.combinations(range(group), keep), 4096))
    if len(choices) > _MOST_SUPPORTS:
        choices = choices[:: len(choices) // _MOST_SUPPORTS + 1]
    return torch.zeros(len(choices), group).scatter_(1, torch.tensor(choices), 1.0)


@lru_cache(maxsize=8)
def _splits(rows: int) -> Tensor:
    """int64 [ways, rows]: how two clusters can be split anew, by who is in the first; the first way changes nothing."""
    whole = itertools.combinations(range(1, 2 * rows), rows - 1)
    ways = [(0, *others) for others in itertools.islice(whole, _MOST_SPLITS)]
    if len(ways) == _MOST_SPLITS:  # too many: swaps of two rows
        stay = tuple(range(rows))
        ways = [stay] + [(*stay[:i], *stay[i + 1 :], j) for i in range(rows) for j in range(rows, 2 * rows)]
    return torch.tensor(ways)
