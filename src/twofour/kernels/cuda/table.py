"""The kernels of csrc/cuda: where each lies, what it is launched with, and what its machine code may cost."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from . import compiler, driver


@dataclass(frozen=True, slots=True)
class KernelText:
    """A kernel by its name.

    Args:
        file: of csrc/cuda.
        threads: of a block, as its text says.
        blocks: that a multiprocessor must hold at once; so many registers a thread may take.
        spilling: functions it seldom calls, which may keep registers in memory.
        shared_bytes: of its own, static.
        oldest: the first compute capability it runs on.
    """

    name: str
    file: str
    threads: int
    blocks: int
    shared_bytes: int = 0
    spilling: tuple[str, ...] = ()
    oldest: tuple[int, int] = compiler.OLDEST

    @property
    def most_registers(self) -> int:
        """Of a thread, of 65,536 of a multiprocessor."""
        return min(255, 65536 // (self.threads * self.blocks) // 8 * 8)


_SELDOM = ("best_mask_in_64", "best_mask_of_any")
_ONE_WAY = (
    "prune_bf16",
    "prune_fp16",
    "compress_half",
    "compress_fp8",
    "compress_int8",
    "take_half",
    "take_byte",
    "expand_half",
    "expand_byte",
)
_TEXTS = (
    *(KernelText(name, "pack.cu", 256, 3, 11264, _SELDOM) for name in ("prune_both_bf16", "prune_both_fp16")),
    *(KernelText(name, "pack.cu", 256, 4) for name in _ONE_WAY),
)
KERNEL_TEXTS = {text.name: text for text in _TEXTS}


def launch(name: str, grid: Sequence[int], device: torch.device, *arguments: int) -> None:
    """Starts a kernel on the current stream of a device; compiles and loads it the first time.

    Raises:
        UnsupportedError: no driver, no NVRTC, or a device without sparse tensor cores.
        DeviceError: the driver refuses.
    """
    text = KERNEL_TEXTS[name]
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        kernel = _loaded(name, torch.cuda.get_device_capability(device))
        driver.driver().launch(kernel, grid, text.threads, arguments, stream)


@cache
def _loaded(name: str, capability: tuple[int, int]) -> int:
    text = KERNEL_TEXTS[name]
    cubin = compiler.compiled(text.file, compiler.architecture_of(capability))
    return driver.driver().kernel(cubin, hashlib.sha256(cubin).digest(), name)
