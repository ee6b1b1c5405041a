"""What machine this is, and every kernel compiled for it: into the cache, so that no later step waits for NVRTC.

python benchmarks/gpu/machine.py --json build/gpu/machine.json
"""

from __future__ import annotations

import hashlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import cases, record

from twofour.kernels import cpu
from twofour.kernels.cuda import compiler, table
from twofour.report.environment import environment

THREADS = 8
WITHOUT_GPU = "sm_90a"
"""What kernels are compiled for where there is no GPU."""


def facts(device: torch.device) -> dict[str, Any]:
    """The head of a result."""
    found: dict[str, Any] = {**environment(), "nvrtc": compiler.version(), "native": cpu.available() or cpu.isa()}
    if device.type != "cuda":
        return {**found, "gpu": str(device), "dry": True}
    properties = torch.cuda.get_device_properties(device)
    return {
        **found,
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "cache_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cublas": _version_of("nvidia-cublas"),
        "cusparselt": cases.cusparselt_version(),
    }


def _version_of(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def compiled(name: str, architecture: str) -> dict[str, Any]:
    """Digests of a kernel's code, of all that its cubin is made of, and of the cubin."""
    text = table.KERNEL_TEXTS[name]
    start = time.perf_counter()
    cubin = compiler.compiled(text.file, architecture, text.defines)
    options = (*compiler.OPTIONS, *(f"-D{each}" for each in text.defines))
    return {
        "source": record.source_of(name),
        "digest": compiler.digest(text.file, architecture, options),
        "cubin": hashlib.sha256(cubin).hexdigest(),
        "seconds": time.perf_counter() - start,
    }


def main(device: cases.Device = "cuda", json_path: cases.Json = None, smallest: cases.Smallest = False) -> None:
    """Compiles."""
    chosen = cases.chosen_device(device)
    part = record.Part(json_path)
    head = facts(chosen)
    part.tell(**head)
    print("\n".join(f"{name:14} {value}" for name, value in head.items()), flush=True)
    architecture = WITHOUT_GPU
    if chosen.type == "cuda":
        architecture = compiler.architecture_of(torch.cuda.get_device_capability(chosen))
    names = [name for name, text in table.KERNEL_TEXTS.items() if text.runs_on(architecture)]
    names = [name for name in names if name.startswith("decode")][:2] if smallest else names
    with ThreadPoolExecutor(THREADS) as pool:
        made = dict(zip(names, pool.map(lambda name: compiled(name, architecture), names), strict=True))
    part.tell(architecture=architecture, cubins=made)
    print(f"{len(made)} kernels compiled for {architecture}")


if __name__ == "__main__":
    typer.run(main)
