"""Timing kernels in turns, so that all of them see the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection

Times = dict[str, list[float]]
"""Seconds of each round that a kernel took part in."""

SELDOM = 5
"""A slow rival takes part in every fifth round."""


def in_turns(kernels: dict[str, Callable[[], object]], repeats: int, seldom: Collection[str] = ()) -> Times:
    """Seconds of `repeats` rounds after two to warm up; the first kernel sets the measure.

    A rival that takes more than twice the time of the first, and more than 20 ms, or that `seldom` names, takes part in
    every fifth round only.
    """
    once = {name: seconds_of(function) for name, function in kernels.items()}
    own = once[next(iter(kernels))]
    slow = {name for name in kernels if once[name] > max(2 * own, 0.02)} | set(seldom)
    times: Times = {name: [] for name in kernels}
    for repeat in range(repeats + 2):
        for name, function in kernels.items():
            if name not in slow or repeat % SELDOM == 2:
                seconds = seconds_of(function)
                if repeat >= 2:
                    times[name].append(seconds)
    return times


def ratios_to(own: str, times: Times) -> dict[str, float]:
    """How many times as long each kernel took as `own`: the median of the paired ratios, or the ratio of the medians
    where it took part in fewer rounds."""
    return {
        name: statistics.median(rival / mine for rival, mine in zip(seconds, times[own], strict=True))
        if len(seconds) == len(times[own])
        else statistics.median(seconds) / statistics.median(times[own])
        for name, seconds in times.items()
    }


def seconds_of(function: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
