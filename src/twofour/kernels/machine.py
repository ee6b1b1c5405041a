"""What this machine offers the kernels."""

from __future__ import annotations

from typing import Any

import torch

from . import cpu
from .cuda import backend, compiler, driver


def describe() -> dict[str, Any]:
    """Native module, instruction sets and threads, as plain JSON values; imports nothing of CUDA."""
    missing = cpu.available()
    if missing is not None:
        return {"native kernels": f"no: {missing}"}
    return {
        "native kernels": "yes",
        "instruction set": cpu.isa(),
        "instruction sets here": ", ".join(cpu.isas()),
        "threads from": cpu.threads_source(),
    }


def describe_gpu() -> dict[str, Any]:
    """The GPUs, the architecture that kernels are compiled for, and the compiler, or why there is none."""
    none = driver.why_not() or backend.missing()
    found: dict[str, Any] = {"GPU": f"none: {none}" if none is not None else _gpus()}
    missing = compiler.why_not()
    found["GPU compiler"] = f"NVRTC {compiler.version()}" if missing is None else f"none: {missing}"
    return found


def _gpus() -> str:
    names = []
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        names.append(f"{torch.cuda.get_device_name(device)} ({major}.{minor})")
    return ", ".join(names) or "none: torch sees none"
