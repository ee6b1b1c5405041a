"""What launches take of a GPU: multiprocessors, and memory in which blocks that share columns leave their sums."""

from __future__ import annotations

import threading
from functools import cache

import torch
from torch import Tensor

_LEAST_COUNTERS = 4096
_RESERVE = 1 << 18
_LEAST_SHARED_BYTES = 99 << 10
_SHARED_BYTES = {(8, 0): 163 << 10, (8, 7): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10, (11, 0): 227 << 10}
_lock = threading.Lock()
_of_streams: dict[tuple[torch.device, int], Tensor] = {}
_reserves: dict[torch.device, Tensor] = {}


@cache
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def shared_bytes(device: torch.device) -> int:
    """Of shared memory, that a block may take."""
    if device.type != "cuda":
        return _LEAST_SHARED_BYTES
    major, minor = torch.cuda.get_device_capability(device)
    return _SHARED_BYTES.get((major, 0 if major > 8 else minor), _LEAST_SHARED_BYTES)


def counters(device: torch.device, count: int) -> Tensor:
    """At least `count` zeros for a launch on the current stream, which leaves zeros behind.

    Kernels of a stream run one after the other and share them; streams each have their own. What a CUDA graph captures may
    later run beside anything, so every launch in it keeps counters for itself: of a reserve that the first launch outside
    of a graph makes, or else zeros that the graph makes at each replay.

    Returns:
        int32.
    Cost: nothing once they are there.
    """
    if _captures(device):
        with _lock:
            reserve = _reserves.get(device)
            if reserve is not None and len(reserve) >= count:
                _reserves[device] = reserve[count:]
                return reserve[:count]
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _of_streams.get((device, stream))
    if found is None or len(found) < count:
        found = torch.zeros(max(count, _LEAST_COUNTERS), dtype=torch.int32, device=device)
        with _lock:
            _of_streams[device, stream] = found
            if device not in _reserves:
                _reserves[device] = torch.zeros(_RESERVE, dtype=torch.int32, device=device)
    return found


def _captures(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
