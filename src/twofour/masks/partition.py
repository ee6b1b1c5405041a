"""Which rows of a weight can share a mask: found from its zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pattern import Pattern
from .rows import WINDOW_ROWS

_FIRST_COLUMNS = 256


def shared_places(nonzero: Tensor, pattern: Pattern, *, window: int = WINDOW_ROWS) -> Tensor | None:
    """The places that each row's cluster has together, for clusters of `pattern.rows` rows anywhere; None without such.

    Neighbours come first. Where they do not share, rows with `keep` non-zeros in every group find their equals, and rows
    with fewer join, one after another, the cluster they change least, of those in their window before others. Such rows
    are rare in a weight that was pruned; where there are many and they fit several clusters, a partition that exists may
    not be found.

    Args:
        nonzero: bool [out_features, in_features], in whole groups.
        window: clusters inside the rows 0 ... window - 1, the next `window`, .. are found before others.
    Returns:
        bool, shape of `nonzero`: every True of it and more, equal in the rows of a cluster, at most `keep` in a group.
    Cost: two passes where neighbours share. Elsewhere a sort of the rows, and for each row with spare places a comparison
        with the clusters that are not complete: 4096x4096 in 0.1 to 1 s.
    """
    rows = pattern.rows
    if nonzero.shape[0] % rows or not bool(_holds(nonzero, pattern).all()):
        return None
    together: Tensor = nonzero.unflatten(0, (nonzero.shape[0] // rows, rows)).any(1)
    if bool(_holds(together, pattern).all()):
        return together.repeat_interleave(rows, dim=0)
    settled = (nonzero.unflatten(1, (-1, pattern.group)).sum(-1, dtype=torch.int16) == pattern.keep).all(1)
    masks, kinds = torch.unique(_as_bits(nonzero), dim=0, return_inverse=True)
    lonely = int((-torch.bincount(kinds[settled], minlength=len(masks)) % rows).sum())
    if lonely > int((~settled).sum()):
        return None
    for sizes in ((window, len(nonzero)), (len(nonzero),)):
        places = _partition(nonzero, kinds, settled, pattern, sizes)
        if places is not None:
            return places
    return None


def _partition(
    nonzero: Tensor, kinds: Tensor, settled: Tensor, pattern: Pattern, windows: tuple[int, ...]
) -> Tensor | None:
    """`shared_places` with clusters found in windows of these sizes, one size after another."""
    places = nonzero.clone()
    left = torch.arange(len(nonzero), device=nonzero.device)
    for window in windows:
        left = _without_equals(left, left // window * len(nonzero) + kinds[left], settled, pattern.rows)
        if not len(left):
            break
        remaining = []
        for part in left.split(torch.bincount(left // window).tolist()):
            spare = ~settled[part]
            found = _gather(nonzero[part], kinds[part], spare, pattern) if bool(spare.any()) else []
            for members, union in found:
                places[part[members]] = union
            alone = torch.ones(len(part), dtype=torch.bool, device=part.device)
            alone[[row for members, _ in found for row in members]] = False
            remaining.append(part[alone])
        left = torch.cat(remaining)
    return None if len(left) else places


def _holds(marked: Tensor, pattern: Pattern) -> Tensor:
    """bool [rows]: at most `keep` True in each group."""
    groups: Tensor = marked.unflatten(1, (-1, pattern.group)).sum(-1, dtype=torch.int16) <= pattern.keep
    return groups.all(1)


def _as_bits(nonzero: Tensor) -> Tensor:
    """uint8 [rows, ceil(columns / 8)]: equal where the rows are."""
    padded: Tensor = torch.nn.functional.pad(nonzero, (0, -nonzero.shape[1] % 8)).unflatten(1, (-1, 8))
    return (padded * (1 << torch.arange(8, device=nonzero.device))).sum(-1).to(torch.uint8)


def _without_equals(left: Tensor, keys: Tensor, settled: Tensor, rows: int) -> Tensor:
    """`left` without the settled rows that have a whole cluster of equals among those with their key."""
    own = settled[left]
    _, which, counts = torch.unique(keys[own], return_inverse=True, return_counts=True)
    order = which.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=left.device) - (counts.cumsum(0) - counts)[which[order]]
    keep = torch.ones_like(own)
    keep[own] = rank >= counts[which] // rows * rows
    return left[keep]


def _gather(nonzero: Tensor, kinds: Tensor, spare: Tensor, pattern: Pattern) -> list[tuple[list[int], Tensor]]:
    """The complete clusters (members, places) when rows with spare places join others greedily, fullest rows first."""
    partners = _partners(nonzero, pattern)
    members: list[list[int]] = []
    cluster_of: dict[int, int] = {}
    of_kind: dict[int, int] = {}
    for row in (~spare).nonzero().flatten().tolist():  # equal ones, too few for a cluster
        number = of_kind.setdefault(int(kinds[row]), len(members))
        if number == len(members):
            members.append([])
        members[number].append(row)
        cluster_of[row] = number
    unions = torch.zeros_like(nonzero)
    for number, rows in enumerate(members):
        unions[number] = nonzero[rows[0]]
    joining = spare.nonzero().flatten()
    for row in joining[nonzero[joining].sum(1).argsort(descending=True, stable=True)].tolist():
        near = {cluster_of[other] for other in partners[row].nonzero().flatten().tolist() if other in cluster_of}
        fitting = [number for number in sorted(near) if len(members[number]) < pattern.rows]
        if fitting:
            holds = _holds(unions[fitting] | nonzero[row], pattern).tolist()
            fitting = [number for number, fits in zip(fitting, holds, strict=True) if fits]
        if fitting:
            growth = (nonzero[row] & ~unions[fitting]).sum(1).tolist()
            _, _, number = min((g, -len(members[n]), n) for g, n in zip(growth, fitting, strict=True))
        else:
            number = len(members)
            members.append([])
        members[number].append(row)
        cluster_of[row] = number
        unions[number] |= nonzero[row]
    return [(rows, unions[number]) for number, rows in enumerate(members) if len(rows) == pattern.rows]


def _partners(nonzero: Tensor, pattern: Pattern) -> Tensor:
    """bool [rows, rows]: who may share with whom, as far as the first columns say, where full groups forbid the rest."""
    part = nonzero[:, : _FIRST_COLUMNS // pattern.group * pattern.group]
    groups: Tensor = part.unflatten(1, (-1, pattern.group))
    full = groups.sum(-1, keepdim=True, dtype=torch.int16) == pattern.keep
    forbidden = (full & ~groups).flatten(1)
    free: Tensor = forbidden.float() @ part.float().T == 0
    return free & free.T
