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
        dynamic_bytes: of shared memory that a launch gives it besides.
        defines: what makes the file this kernel alone.
        multiplies: the instruction that skips zeros, and how often the text has it; None where it does not multiply.
        oldest: the first compute capability it runs on.
    """

    name: str
    file: str
    threads: int
    blocks: int
    shared_bytes: int = 0
    spilling: tuple[str, ...] = ()
    dynamic_bytes: int = 0
    multiplies: tuple[str, int] | None = None
    defines: tuple[str, ...] = ()
    oldest: tuple[int, int] = compiler.OLDEST

    @property
    def most_registers(self) -> int:
        """Of a thread, of 65,536 of a multiprocessor."""
        return min(255, 65536 // (self.threads * self.blocks) // 8 * 8)


_SELDOM = ("best_mask_in_64", "best_mask_of_any")
_ONE_WAY = (
    "prune_bf16",
    "prune_fp16",
    "prune_e4m3",
    "prune_e5m2",
    "prune_int8",
    "compress_half",
    "compress_fp8",
    "compress_int8",
    "take_half",
    "take_byte",
    "expand_half",
    "expand_byte",
)


def _decode(dtype: str, tokens: int) -> KernelText:
    """As Stage of decode.cu: two of them, of `chunks` chunks of 64 columns of each token, 16 bytes apart."""
    itemsize, chunks = (1 if dtype == "int8" else 2), (4 if tokens == 64 else 8)
    instruction = {"bf16": "HMMA.SP.16832.F32.BF16", "fp16": "HMMA.SP.16832.F32", "int8": "IMMA.SP.16864.S8.S8"}[dtype]
    return KernelText(
        f"decode_{dtype}_{tokens}",
        "decode.cu",
        256,
        1 if tokens == 64 else 2,
        shared_bytes=16,
        dynamic_bytes=2 * tokens * (chunks * 64 * itemsize + 16),
        multiplies=(instruction, chunks * itemsize * tokens // 8),
        defines=(
            f"TWOFOUR_NAME=decode_{dtype}_{tokens}",
            f"TWOFOUR_PRODUCTS={dtype.capitalize()}Products",
            f"TWOFOUR_TOKEN_TILES={tokens // 8}",
            f"TWOFOUR_BLOCKS={1 if tokens == 64 else 2}",
        ),
    )


_TEXTS = (
    *(KernelText(name, "pack.cu", 256, 3, 11264, _SELDOM) for name in ("prune_both_bf16", "prune_both_fp16")),
    KernelText("keep_both_half", "pack.cu", 256, 4, 11264),
    *(KernelText(name, "pack.cu", 256, 4) for name in _ONE_WAY),
    *(KernelText(name, "pack.cu", 512, 2, 64) for name in ("quantize_bf16", "quantize_fp16")),
    *(KernelText(f"quantize_tokens_{dtype}", "tokens.cu", 256, 4, 4) for dtype in ("fp32", "bf16", "fp16")),
    *(_decode(dtype, tokens) for dtype in ("bf16", "fp16", "int8") for tokens in (8, 16, 32, 64)),
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
        driver.driver().launch(kernel, grid, text.threads, arguments, stream, text.dynamic_bytes)


@cache
def _loaded(name: str, capability: tuple[int, int]) -> int:
    text = KERNEL_TEXTS[name]
    cubin = compiler.compiled(text.file, compiler.architecture_of(capability), text.defines)
    return driver.driver().kernel(cubin, hashlib.sha256(cubin).digest(), name, text.dynamic_bytes)
