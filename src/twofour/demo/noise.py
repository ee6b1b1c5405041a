"""Are other programs in the way? Measurements that they disturb are repeated, and marked where that does not help.

On a machine with as many torch threads as cores, one busy neighbour makes every parallel kernel wait a whole slice of
the scheduler (milliseconds) for its last thread. Medians do not help: all rounds wait, dense and sparse alike, and the
ratio tends to 1 or to nonsense.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

_TOLERATED = 0.2  # cores
SHORTEST_S = 0.08
"""The system counts in hundredths of a second: shorter measurements say nothing about neighbours."""


class Quiet:
    """Runs measurements, repeats disturbed ones while time is left, and counts.

    Args:
        patience_s: time to spend on repetitions in all.

    `measurements` and `disturbed` count what was kept. Where the system does not tell (only Linux does), nothing is
    taken as disturbed.
    """

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s
        self.measurements = 0
        self.disturbed = 0

    def measure(self, function: Callable[[], T]) -> tuple[T, bool]:
        """(the result, whether other programs disturbed it)."""
        self.measurements += 1
        for _ in range(3):
            before = _counters()
            result = function()
            after = _counters()
            if not _is_disturbed(before, after):
                return result, False
            self.patience_s -= after[0] - before[0]
            if self.patience_s <= 0:
                break
        self.disturbed += 1
        return result, True


def _counters() -> tuple[float, float, float | None]:
    """Seconds: of the clock, of this process on all cores, of all processes on all cores (None where unknown)."""
    own = os.times()
    return time.perf_counter(), own.user + own.system, _busy_s()


def _busy_s() -> float | None:
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _is_disturbed(before: tuple[float, float, float | None], after: tuple[float, float, float | None]) -> bool:
    wall, own = after[0] - before[0], after[1] - before[1]
    if before[2] is None or after[2] is None or wall < SHORTEST_S:
        return False
    others = (after[2] - before[2] - own) / wall
    free = (os.cpu_count() or 1) - torch.get_num_threads()
    return others > max(free, 0) + _TOLERATED
