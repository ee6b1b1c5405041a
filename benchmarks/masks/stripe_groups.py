"""The published search for channel permutations (Pool & Yu, NeurIPS 2021), written anew from its description, in torch.

Channels stand in stripes of four. Every tuple of `window / 4` stripes is rearranged in the best way of all; the tuples that
gain most, no stripe twice, are rearranged; what they touched is looked at again, until nothing gains. For 2:4 alone.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from torch import Tensor

LEAST_GAIN = 1e-4
COLUMNS_AT_ONCE = 1 << 22  # numbers in one temporary


def search(scores: Tensor, window: int = 8) -> Tensor:
    """int64 [in_features]: the permutation that it ends with. `scores` [out_features, in_features]."""
    order = torch.arange(scores.shape[1]).view(-1, 4)
    tuples = torch.combinations(torch.arange(len(order)), window // 4)
    gains, choices = _best(scores, order[tuples].flatten(1), window)
    while True:
        used: set[int] = set()
        for index in gains.argsort(descending=True).tolist():
            stripes = tuples[index].tolist()
            if gains[index] <= LEAST_GAIN:
                break
            if used.isdisjoint(stripes):
                channels = order[stripes].flatten()
                order[stripes] = channels[_ways(window)[int(choices[index])]].view(-1, 4)
                used.update(stripes)
        if not used:
            return order.flatten()
        again = torch.isin(tuples, torch.tensor(sorted(used))).any(1)
        gains[again], choices[again] = _best(scores, order[tuples[again]].flatten(1), window)


def _best(scores: Tensor, channels: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """What the best way to arrange each [window] channels gains, and which it is."""
    subsets = _subsets(window)
    gains, choices = [], []
    step = max(1, COLUMNS_AT_ONCE // (len(scores) * len(subsets)))
    columns = scores.T.contiguous()
    for part in channels.split(step):
        a, b, c, d = (columns[part[:, subsets[:, i]]] for i in range(4))
        high, low = torch.maximum(a, b), torch.minimum(a, b)
        other_high, other_low = torch.maximum(c, d), torch.minimum(c, d)
        second = torch.maximum(torch.minimum(high, other_high), torch.maximum(low, other_low))
        kept = (torch.maximum(high, other_high) + second).sum(2, dtype=torch.float64)
        of_ways = kept[:, _subset_of_ways(window)].sum(2)
        best = of_ways.max(1)
        gains.append(best.values - of_ways[:, 0])
        choices.append(best.indices)
    return torch.cat(gains), torch.cat(choices)


@lru_cache
def _subsets(window: int) -> Tensor:
    return torch.combinations(torch.arange(window), 4)


@lru_cache
def _ways(window: int) -> Tensor:
    """int64 [ways, window]: 35 for 8, 5775 for 12; the given order first."""
    return torch.tensor(list(_partitions(tuple(range(window)))))


def _partitions(rest: tuple[int, ...]) -> list[tuple[int, ...]]:
    if not rest:
        return [()]
    found = []
    for others in itertools.combinations(rest[1:], 3):
        first = (rest[0], *others)
        found += [first + more for more in _partitions(tuple(c for c in rest if c not in first))]
    return found


@lru_cache
def _subset_of_ways(window: int) -> Tensor:
    index = {tuple(subset): i for i, subset in enumerate(_subsets(window).tolist())}
    return torch.tensor([[index[tuple(group)] for group in way.view(-1, 4).tolist()] for way in _ways(window)])
