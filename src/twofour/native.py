"""The native module: the C++ kernels of this build, loaded once, or the reason why there are none.

`LOADED` is the module, or None; `MISSING` says why it is None. What runs on it checks its arguments first: the module
takes addresses.
"""

from __future__ import annotations

import importlib
from types import ModuleType

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
