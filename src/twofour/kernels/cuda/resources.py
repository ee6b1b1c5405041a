"""What launches take of a GPU: where it stands, multiprocessors, and memory: for results, and for sums of blocks that share
columns.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from ... import native
from . import driver

_LEAST_COUNTERS = 4096
_RESERVE = 1 << 18
_LEAST_SHARED_BYTES = 99 << 10
_SHARED_BYTES = {(8, 0): 163 << 10, (8, 7): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10, (11, 0): 227 << 10}
# What code that torch compiles asks too: without making objects, and without a look at what is certain by now.
_GET_DEVICE = getattr(torch._C, "_cuda_getDevice", None)
_GET_STREAM = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_EMPTY = native.fast_empty_strided("cuda")
_lock = threading.Lock()
_of_streams: dict[tuple[torch.device, int], Tensor] = {}
_kept: list[Tensor] = []
_reserves: dict[torch.device, Tensor] = {}


def current_device() -> int:
    """The number of torch's."""
    number: int = torch.cuda.current_device() if _GET_DEVICE is None else _GET_DEVICE()
    return number


def current_stream(number: int) -> int:
    """torch's of a device, as the driver knows it."""
    stream: int = torch.cuda.current_stream(number).cuda_stream if _GET_STREAM is None else _GET_STREAM(number)
    return stream


def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.empty_strided, which takes twice the time."""
    if _EMPTY is not None and _is_current(device):
        return _EMPTY(tuple(shape), tuple(strides), dtype)
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def _is_current(device: torch.device) -> bool:
    return device.index is not None and device.index == current_device()


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return tuple(accumulate((1, *(max(size, 1) for size in shape[:0:-1])), mul))[::-1]


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
    stream = current_stream(device.index or 0) if device.type == "cuda" else 0
    found = _of_streams.get((device, stream))
    if found is None or len(found) < count:
        found = _lasting_zeros(max(count, _LEAST_COUNTERS), device)
        reserve = _lasting_zeros(_RESERVE, device) if device not in _reserves else None
        with _lock:
            _kept.append(found)  # kernels under way may use the ones before
            _of_streams[device, stream] = found
            if reserve is not None:
                _reserves.setdefault(device, reserve)
    return found


def _lasting_zeros(count: int, device: torch.device) -> Tensor:
    """int32 zeros that every stream may use, on memory of no CUDA graph.

    torch.compile(mode="reduce-overhead") and torch.cuda.use_mem_pool have what a thread allocates put into a pool, also
    where nothing is captured yet, and the former raises where something in its pool stays. So another thread allocates.
    """
    with ThreadPoolExecutor(1, "twofour") as other:
        return other.submit(_zeros, count, device).result()


def _zeros(count: int, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    with driver.driver().relaxed(), torch.cuda.device(device):
        found = torch.zeros(count, dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()
    return found


def _captures(device: torch.device) -> bool:
    """Is the current stream of `device` being captured? torch answers for the current device."""
    if device.type != "cuda":
        return False
    if device.index is None or device.index == current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
