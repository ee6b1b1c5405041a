"""Scores -> an order of the input channels in which N:M groups keep more."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from .. import native
from ..errors import ShapeError, UnsupportedError
from ..pattern import Pattern
from .select import nm_mask

_LANES = 16  # kPermuteLanes in csrc/cpu/permute.h
_HOT, _COLD = 0.2, 0.04  # kHot, kCold in csrc/cpu/permute.cpp


def search_permutation(
    scores: Tensor,
    pattern: Pattern | str = "2:4",
    *,
    sweeps: int = 2000,
    seconds: float | None = None,
    seed: int = 0,
    backend: str | None = None,
) -> Tensor:
    """A permutation of the input channels under which the pattern keeps more: `scores[:, permutation]` is to be pruned.

    Maximises `kept_score(scores[:, permutation], pattern)` by simulated annealing over swaps of two channels of
    different groups, and then takes swaps until none gains (among all channels up to 1024 of them, among groups of 64
    above). Never worse than the order that is given.

    Args:
        scores: [out_features, in_features] floating point, finite, none negative: |w|, or |w| times an input norm.
            For "2:4x4" out_features must be a multiple of `rows`.
        sweeps: how often each channel is offered all partners of its block. Twice as many take up to twice the time.
        seconds: ends the search about then; the temperature falls with time. None: no limit.
        seed: of the search's own random numbers. Without `seconds` a seed gives the same permutation for any number of
            threads and on every instruction set.
        backend: "cpu" (native, any pattern but transposable ones), "reference" (plain torch, on the scores' device), None:
            "cpu" where there is one.
    Returns:
        int64 [in_features], a permutation, on the device of `scores`; the identity where nothing gains.
    Raises:
        ShapeError: not a matrix, or without whole groups.
        UnsupportedError: scores that are not floating point, not finite or negative; a backend that cannot.
        ValueError: sweeps or seconds that are not positive.
    Cost: 64 channels, 128 rows: 0.1 s; 512x512: 0.4 s on one AVX2 core. `torch.get_num_threads()` threads.
    Source: the aim is that of Pool & Yu 2021 (NeurIPS, channel permutations for N:M sparsity).

    >>> scores = torch.tensor([[9., 8., 7., 0., 1., 2., 3., 0.]])
    >>> permutation = search_permutation(scores)
    >>> kept_score(scores, "2:4"), kept_score(scores[:, permutation], "2:4")
    (22.0, 27.0)
    """
    pattern = Pattern.parse(pattern)
    _check(scores, pattern)
    if sweeps < 1 or (seconds is not None and not seconds > 0):
        raise ValueError(f"sweeps={sweeps}, seconds={seconds}: both must be positive (seconds=None is no limit).")
    if backend not in (None, "cpu", "reference"):
        raise UnsupportedError(f"unknown backend {backend!r}: the search has 'cpu' and 'reference'.")
    if backend == "cpu":
        native.module()
        if pattern.transposable:
            raise UnsupportedError(
                f"pattern {pattern}: the native search has no transposable ones. backend='reference'."
            )
    return improve(scores, pattern, sweeps=sweeps, seconds=seconds, seed=seed, backend=backend)[0]


def improve(
    scores: Tensor, pattern: Pattern, *, sweeps: int, seconds: float | None, seed: int, backend: str | None = None
) -> tuple[Tensor, float, float]:
    """`search_permutation` of scores that are known to be good, with the kept score before and after."""
    identity = torch.arange(scores.shape[1], device=scores.device)
    numbers = scores.detach()
    if numbers.dtype not in (torch.float32, torch.float64):
        numbers = numbers.float()
    before = kept_score(numbers, pattern)
    largest = numbers.max() if numbers.numel() else numbers.sum()
    if scores.shape[1] == pattern.group or not bool(largest > 0):
        return identity, before, before
    use_native = backend == "cpu" or (backend is None and native.LOADED is not None and not pattern.transposable)
    search = _search_native if use_native else _search_plain
    # Scaled: float32 sums must neither overflow nor vanish.
    found = search(numbers / largest, pattern, sweeps, seconds, seed)
    after = kept_score(numbers[:, found], pattern)
    return (found, before, after) if after > before else (identity, before, before)


def kept_score(scores: Tensor, pattern: Pattern | str = "2:4") -> float:
    """The sum of the scores that `nm_mask(scores, pattern)` keeps, added up in float64.

    Args:
        scores: [out_features, in_features] floating point.
    Raises:
        ShapeError, UnsupportedError: as `nm_mask`.
    """
    numbers = scores if scores.dtype.itemsize > 1 else scores.float()  # float8 cannot be added up
    zero = torch.zeros((), dtype=numbers.dtype, device=numbers.device)
    return float(torch.where(nm_mask(numbers, pattern), numbers, zero).sum(dtype=torch.float64))


def efficacy(scores: Tensor, permutation: Tensor, pattern: Pattern | str = "2:4") -> float:
    """How much of what the groups cost a permutation brings back, in percent.

    0: no more than the given order keeps; 100: as much as keeping the same share of each row anywhere. Rows that share a
    mask ("2:4x4") count as one there; 0 where the groups cost nothing.

    Args:
        scores: [out_features, in_features] floating point, finite, none negative.
        permutation: int64 [in_features].
    Raises:
        ShapeError: not a permutation of the input channels; not a matrix, or without whole groups.
        UnsupportedError: scores that are not floating point, not finite or negative.
    Source: Pool & Yu 2021 (NeurIPS, channel permutations for N:M sparsity).

    >>> scores = torch.tensor([[4., 3., 0., 0., 2., 1., 0., 0.], [4., 3., 2., 1., 0., 0., 0., 0.]])
    >>> efficacy(scores, torch.tensor([0, 1, 6, 7, 2, 3, 4, 5]))
    100.0
    """
    pattern = Pattern.parse(pattern)
    _check(scores, pattern)
    channels = scores.shape[1]
    if permutation.dtype != torch.int64 or not torch.equal(
        permutation.sort().values, torch.arange(channels, device=permutation.device)
    ):
        raise ShapeError(
            f"permutation is {permutation.dtype} {list(permutation.shape)}: pass each of 0 ... {channels - 1} once, int64."
        )
    before, after = kept_score(scores, pattern), kept_score(scores[:, permutation], pattern)
    free = free_score(scores, pattern)
    return 100 * (after - before) / (free - before) if free > before else 0.0


def free_score(scores: Tensor, pattern: Pattern | str = "2:4") -> float:
    """The sum of the scores that are kept where each row may keep the same share anywhere: no order keeps more."""
    pattern = Pattern.parse(pattern)
    shared = scores.double().unflatten(0, (-1, pattern.rows)).sum(1)
    return float(shared.topk(scores.shape[1] // pattern.group * pattern.keep, dim=1).values.sum())


def _check(scores: Tensor, pattern: Pattern) -> None:
    if not scores.dtype.is_floating_point:
        raise UnsupportedError(f"scores are {scores.dtype}: pass floating point ones, as weight.abs().")
    if scores.ndim != 2:
        raise ShapeError(f"scores are {list(scores.shape)}: pass a matrix [out_features, in_features].")
    if scores.shape[1] == 0 or scores.shape[1] % pattern.group:
        raise ShapeError(
            f"scores are {list(scores.shape)}: {scores.shape[1]} input channels are no whole {pattern} groups. Leave the"
            " layer dense."
        )
    step = pattern.group if pattern.transposable else pattern.rows
    if scores.shape[0] % step:
        raise ShapeError(f"scores are {list(scores.shape)}: {pattern} needs out_features to be a multiple of {step}.")
    if scores.is_meta:
        raise UnsupportedError("scores are on the meta device: they have a shape and no numbers.")
    numbers = scores.detach() if scores.dtype.itemsize > 1 else scores.detach().float()
    good = numbers.isfinite() & (numbers >= 0)
    if not bool(good.all()):
        first = (~good).nonzero()[0].tolist()
        raise UnsupportedError(
            f"scores have {int((~good).sum())} values that are NaN, infinite or negative, the first at {first}"
            f" ({float(numbers[tuple(first)])}): they cannot be added up. Pass weight.abs() of a finite weight."
        )


def _search_native(scores: Tensor, pattern: Pattern, sweeps: int, seconds: float | None, seed: int) -> Tensor:
    shared = scores.unflatten(0, (-1, pattern.rows)).sum(1) / pattern.rows
    rows, channels = shared.shape
    columns = torch.zeros(channels, -(-rows // _LANES) * _LANES)
    columns[:, :rows] = shared.T
    order = torch.arange(channels)
    native.module().permute(
        columns.data_ptr(),
        order.data_ptr(),
        channels,
        columns.shape[1],
        pattern.keep,
        pattern.group,
        sweeps,
        seconds or 0.0,
        seed % 2**64,
        torch.get_num_threads(),
    )
    return order.to(scores.device)


def _search_plain(scores: Tensor, pattern: Pattern, sweeps: int, seconds: float | None, seed: int) -> Tensor:
    """The same search, slower: at each step the groups meet in pairs, and each pair is offered one swap."""
    start = time.monotonic()
    random = torch.Generator().manual_seed(seed % 2**63)
    groups, group = scores.shape[1] // pattern.group, pattern.group
    order = torch.arange(scores.shape[1]).view(groups, group)
    best, best_kept = order, -1.0
    scores = scores.double()
    kept = _kept_by_group(scores, order, pattern)
    scale = 0.0
    for step in range(sweeps):
        progress = step / sweeps
        if seconds is not None:
            progress = max(progress, (time.monotonic() - start) / seconds)
        if progress >= 1:
            break
        pairs = torch.randperm(groups, generator=random)[: groups // 2 * 2].view(2, -1)
        places = torch.randint(group, pairs.shape, generator=random)
        offered = order.clone()
        offered[pairs[0], places[0]], offered[pairs[1], places[1]] = (
            order[pairs[1], places[1]],
            order[pairs[0], places[0]],
        )
        offered_kept = _kept_by_group(scores, offered, pattern)
        gain = (offered_kept - kept)[pairs].sum(0)
        scale = scale or float(gain.abs().mean())
        # The last tenth takes gains only.
        heat = scale * _HOT / (1 + (_HOT / _COLD - 1) * progress) if progress < 0.9 else 0.0
        chance = torch.rand(len(gain), generator=random, dtype=torch.float64).clamp(min=1e-12).log()
        taken = (gain > heat * chance).unsqueeze(0).expand(2, -1)
        changed = pairs[taken]
        order = order.clone()
        order[changed] = offered[changed]
        kept = kept.clone()
        kept[changed] = offered_kept[changed]
        if float(kept.sum()) > best_kept:
            best, best_kept = order, float(kept.sum())
    return best.flatten().to(scores.device)


def _kept_by_group(scores: Tensor, order: Tensor, pattern: Pattern) -> Tensor:
    """float64 [groups] on the CPU."""
    permuted = scores[:, order.flatten().to(scores.device)]
    if pattern.transposable:
        kept: Tensor = (
            permuted.masked_fill(~nm_mask(permuted, pattern), 0.0).unflatten(1, (-1, pattern.group)).sum((0, 2))
        )
    else:
        shared = permuted.unflatten(0, (-1, pattern.rows)).sum(1).unflatten(1, (-1, pattern.group))
        kept = shared.topk(pattern.keep, dim=2).values.sum((0, 2))
    return kept.cpu()
