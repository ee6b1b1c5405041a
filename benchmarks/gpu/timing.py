"""Timing in turns on a GPU: A B C, A B C, .., each a block of calls between two CUDA events.

The calls of a block are queued behind a kernel that only waits, so that the GPU never waits for Python: what is timed is
the GPU's time. Calls that make Python wait for the GPU cannot be queued; their blocks are counted in `waited`, and their
times hold the waiting. What a call costs Python is `host_us`. Each call takes the next of a kernel's copies of its
inputs, enough of them to exceed the L2 cache several times, so that weights come from memory.

On a CPU, where only these scripts are checked, the clock of the process takes the place of events.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

Call = Callable[[], object]
CYCLES_OF_SECOND = 2.0e9
"""Of a GPU's clock; too many only make the queue wait longer."""
LONGEST_WAIT = 0.02
CACHES = 4
"""Copies exceed the L2 cache so many times."""


@dataclass
class Timed:
    """Of one kernel: microseconds of a call, and of Python's part of it, in each round."""

    us: list[float] = field(default_factory=list)
    host_us: list[float] = field(default_factory=list)
    waited: int = 0

    @property
    def median(self) -> float:
        """Microseconds."""
        return statistics.median(self.us)

    @property
    def quartiles(self) -> list[float]:
        """The first and the third."""
        if len(self.us) < 2:
            return [self.us[0], self.us[0]]
        low, _, high = statistics.quantiles(self.us, n=4, method="inclusive")
        return [low, high]


def in_turns(
    kernels: Mapping[str, Sequence[Call]], device: torch.device, *, rounds: int, calls: int
) -> dict[str, Timed]:
    """Times of `rounds` blocks of `calls` calls of each kernel, after two rounds to warm up.

    Args:
        kernels: the calls of each, one for each copy of its inputs.
    """
    found = {name: Timed() for name in kernels}
    waits = dict.fromkeys(kernels, 0.0)
    places = dict.fromkeys(kernels, 0)
    for turn in range(rounds + 2):
        for name, copies in kernels.items():
            chosen = [copies[(places[name] + i) % len(copies)] for i in range(calls)]
            places[name] = (places[name] + calls) % len(copies)
            seconds, host, ahead = _block(chosen, device, waits[name])
            waits[name] = min(max(waits[name], 1.5 * host + 1e-4), LONGEST_WAIT)
            if turn >= 2:
                found[name].us.append(seconds / calls * 1e6)
                found[name].host_us.append(host / calls * 1e6)
                found[name].waited += not ahead
    return found


def ratios_to(own: str, times: Mapping[str, Timed]) -> dict[str, float]:
    """How many times as long each other kernel took: the median of the ratios of each round."""
    mine = times[own].us
    return {
        name: statistics.median(theirs / ours for theirs, ours in zip(timed.us, mine, strict=True))
        for name, timed in times.items()
        if name != own
    }


def copies_for(nbytes: int, device: torch.device) -> int:
    """How many copies of inputs of so many bytes exceed the cache."""
    if device.type != "cuda":
        return 2
    cache = int(torch.cuda.get_device_properties(device).L2_cache_size)
    return max(2, -(-CACHES * cache // max(nbytes, 1)))


def _block(calls: Sequence[Call], device: torch.device, wait: float) -> tuple[float, float, bool]:
    """Seconds of all calls, of Python's part, and whether Python was ahead of the GPU all the time."""
    if device.type != "cuda":
        start = time.perf_counter()
        for call in calls:
            call()
        seconds = time.perf_counter() - start
        return seconds, seconds, True
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    torch.cuda._sleep(int(wait * CYCLES_OF_SECOND) + 1)
    first.record()
    start = time.perf_counter()
    for call in calls:
        call()
    host = time.perf_counter() - start
    last.record()
    ahead = not first.query()
    last.synchronize()
    return first.elapsed_time(last) / 1e3, host, ahead
