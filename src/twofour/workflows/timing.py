"""Fair timing: rivals take turns in one process, medians and quartiles are kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_SHORTEST_SAMPLE_US = 200.0


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of one rival: median and quartiles in microseconds, and how many samples they come from."""

    median_us: float
    low_us: float
    high_us: float
    samples: int

    @property
    def spread(self) -> float:
        """Distance of the quartiles relative to the median."""
        return (self.high_us - self.low_us) / self.median_us if self.median_us else 0.0


def paired(
    rivals: Mapping[str, Callable[[], object]], *, repeats: int = 21, budget_s: float | None = None
) -> dict[str, Timing]:
    """Times each callable `repeats` times, in turns, after a warm-up. Calls shorter than 0.2 ms are timed in batches.

    A sample ends when the GPUs have done their part. What a call costs Python counts as well where that is longer, as in a
    model that runs without CUDA graphs. Rivals find their weights in the caches that they fit in, which in a model the
    other layers would have emptied: a GPU's last cache takes up to 130 MB, and a weight from memory gains more by being
    sparse than is measured here.

    Args:
        budget_s: stop early (but not before 5 rounds) when this much time is spent.
    """
    loops = {}
    for name, function in rivals.items():
        function()
        once = min(_sample(function, 1) for _ in range(2))
        loops[name] = max(1, int(_SHORTEST_SAMPLE_US / max(once, 0.1)))
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    start = time.perf_counter()
    for round_ in range(repeats):
        if budget_s is not None and round_ >= 5 and time.perf_counter() - start > budget_s:
            break
        for name, function in rivals.items():
            samples[name].append(_sample(function, loops[name]))
    return {name: _summary(times) for name, times in samples.items()}


def _sample(function: Callable[[], object], loops: int) -> float:
    _settle()
    start = time.perf_counter_ns()
    for _ in range(loops):
        function()
    _settle()
    return (time.perf_counter_ns() - start) / loops / 1e3


def _settle() -> None:
    """Waits for GPUs that this process uses: they work behind what the program has done."""
    if not torch.cuda.is_initialized():
        return
    for device in range(torch.cuda.device_count()):
        if torch.cuda.memory_reserved(device):
            torch.cuda.synchronize(device)


def _summary(times: list[float]) -> Timing:
    if len(times) == 1:
        return Timing(times[0], times[0], times[0], 1)
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, low, high, len(times))
