"""The native module: the C++ kernels of this build, loaded once, or the reason why there are none.

`LOADED` is the module, or None; `MISSING` says why it is None. What runs on it checks its arguments first: the module
takes addresses.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from .errors import UnsupportedError

LOADED: ModuleType | None
try:
    LOADED = importlib.import_module("twofour._native")
    MISSING = ""
except ImportError as _error:
    LOADED = None
    MISSING = f"this build of twofour has no native kernels ({_error}); reinstall it without TWOFOUR_NO_NATIVE"


def module() -> ModuleType:
    """The native module.

    Raises:
        UnsupportedError: this build has none.
    """
    if LOADED is None:
        raise UnsupportedError(MISSING)
    return LOADED


def fast_empty_strided(device: str) -> Callable[..., Tensor] | None:
    """What code that torch compiles calls for torch.empty_strided(size, stride, dtype=) on "cpu" or the current "cuda".

    It takes half a microsecond less. None where this torch has it not. Size and stride must be tuples, and no torch.Size.
    """
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    return getattr(guards, f"_empty_strided_{device}", None)


_EMPTY = fast_empty_strided("cpu")
_HUGE_BYTES = 4 << 20  # below, hardly a whole huge page lies inside


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory to be written by C++: on huge pages where it is large and the system has them.

    Fresh pages of 4 KiB cost as much as what is written to them: a mask of 14336x4096 took 48 ms, 21 of them for itself.
    And large memory is often fresh, for malloc gives it back to the system: 64 MiB of results at each call.
    """
    if _EMPTY is not None and len(shape) == 2:
        tensor = _EMPTY(tuple(shape), (shape[1] or 1, 1), dtype)
    else:
        tensor = torch.empty(shape, dtype=dtype)
    if tensor.nbytes >= _HUGE_BYTES:
        module().ask_for_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor
