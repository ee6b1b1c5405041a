"""The device "pretended": tensors of another device than the CPU where there is no GPU (device.cpp)."""

from __future__ import annotations

import contextlib
import os
import sys
import types
from pathlib import Path

import torch
from torch.utils import cpp_extension

NAME = "pretended"


def register() -> torch.device:
    """The device, known to torch from now on. Compiles the first time, into build/pretended."""
    device = torch.device(NAME) if hasattr(torch, NAME) else None
    if device is not None:
        return device
    here = Path(__file__).resolve().parent
    folder = here.parents[1] / "build" / NAME
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where ninja is
    cpp_extension.load(f"{NAME}_device", [str(here / "device.cpp")], extra_cflags=["-O1"], build_directory=str(folder))
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return torch.device(NAME)


def _module() -> types.ModuleType:
    """What torch asks of a device beside its operations."""
    module = types.ModuleType(f"torch.{NAME}")
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda device=None: None,
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
    }
    for name, answer in answers.items():
        setattr(module, name, answer)
    return module
