"""Tests on another device than the CPU: what a test makes lies there, with the numbers that it has on the CPU."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import overrides
from torch.utils import _device


def _named() -> torch.device:
    name = os.environ.get("TWOFOUR_TEST_DEVICE", "cpu")
    if name == "pretended":
        from tests.pretended import device

        return device.register()
    return torch.device(name)


DEVICE = _named()
"""Where tests run: `make gpu` runs those of SUITES on a GPU, `make pretended` on a device that is none (tests/pretended)."""

_MAKERS = ("arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "tensor", "zeros")
_DRAWN = ("rand", "randint", "randn", "randperm")
_TESTS = str(Path(__file__).resolve().parent)
_CASES = tuple(str(Path("twofour", "testing", name)) for name in ("cases.py", "strategies.py"))
_FOUND = importlib.util.find_spec("twofour")
assert _FOUND is not None
assert _FOUND.origin is not None
_LIBRARY = str(Path(_FOUND.origin).resolve().parent) + os.sep


@contextmanager
def made_by_tests(device: torch.device) -> Iterator[None]:
    """Tensors that tests make without naming a device are made on this one.

    Those that the library makes are not: where it forgets to name a device, tests must see that. What is drawn is drawn
    on the CPU and moved. Not by a mode of torch, which programs that are compiled would run into.
    """
    # These look for what is replaced here, by its name or by itself, the first time they are needed.
    importlib.import_module("torch._decomp.decompositions_for_jvp")
    importlib.import_module("torch._dynamo.trace_rules").get_torch_obj_rule_map()
    _device._device_constructors()
    with pytest.MonkeyPatch.context() as patch:
        for name in _MAKERS:
            patch.setattr(torch, name, _maker(getattr(torch, name), device))
        for name in _DRAWN:
            patch.setattr(torch, name, _drawer(getattr(torch, name), device))
        yield


def _maker(make: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    def made(*args: Any, **named: Any) -> Any:
        if _elsewhere(named) or not _of_test():
            return make(*args, **named)
        return make(*args, **named | {"device": device})

    return made


def _drawer(draw: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    def drawn(*args: Any, **named: Any) -> Any:
        if _elsewhere(named) or not _of_test():
            return draw(*args, **named)
        differentiable = named.pop("requires_grad", False)
        return draw(*args, **named).to(device).requires_grad_(differentiable)

    return drawn


def _elsewhere(named: dict[str, Any]) -> bool:
    return (
        torch.compiler.is_dynamo_compiling()
        or named.get("device") is not None
        or any(isinstance(mode, _device.DeviceContext) for mode in overrides._get_current_function_mode_stack())
    )


def _of_test() -> bool:
    """Is a test nearer among the callers than the library?"""
    frame = sys._getframe(2)
    while frame is not None:
        of_test = is_of_test(frame.f_code.co_filename)
        if of_test is not None:
            return of_test
        frame = frame.f_back  # type: ignore[assignment]
    return False


def is_of_test(file: str) -> bool | None:
    """True for a file of the tests, False for one of the library, wherever it is installed; None for others."""
    if file.startswith(_TESTS) or file.endswith(_CASES):
        return True
    return False if file.startswith(_LIBRARY) else None
