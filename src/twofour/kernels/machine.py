"""What this machine offers the kernels."""

from __future__ import annotations

from typing import Any

from . import cpu


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
