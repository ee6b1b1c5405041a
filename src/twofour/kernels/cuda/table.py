"""The kernels of csrc/cuda: where each lies, what it is launched with, and what its machine code may cost."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from ...errors import UnsupportedError
from . import compiler, driver, resources, tiles


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
        matrix_loads: how often it loads four matrices from shared memory.
        conversions: of two e4m3 to fp16, by the instruction for it where there is one: from sm_89 on.
        rows, tokens, itemsize: of decode.cu: rows of the weight that a block multiplies by so many tokens, bytes of its items.
        across, ahead: of decode.cu: chunks side by side that a block multiplies at once, and how often as many are under way.
        x_bytes: of decode.cu: of x that a block takes in for as many chunks.
        only: how the names of the architectures that have its instructions begin; () for all.
    """

    name: str
    file: str
    threads: int
    blocks: int
    shared_bytes: int = 0
    spilling: tuple[str, ...] = ()
    dynamic_bytes: int = 0
    multiplies: tuple[str, int] | None = None
    matrix_loads: int = 0
    conversions: int = 0
    rows: int = 0
    tokens: int = 0
    itemsize: int = 0
    across: int = 0
    ahead: int = 0
    x_bytes: int = 0
    defines: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def runs_on(self, architecture: str) -> bool:
        return not self.only or architecture.startswith(self.only)

    @property
    def most_registers(self) -> int:
        """Of a thread, of 65,536 of a multiprocessor."""
        return min(255, 65536 // (self.threads * self.blocks) // 8 * 8)


_SELDOM = ("best_mask_in_64", "best_mask_of_any", "two_largest_beside_nan")
_SQUARE, _MASKS = 27904, 5120
"""Bytes of shared memory, of a square of a weight and of the table of its masks."""
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


_SPARSE = {"bf16": "HMMA.SP.16832.F32.BF16", "fp16": "HMMA.SP.16832.F32", "int8": "IMMA.SP.16864.S8.S8"}


_E4M3 = {"e4m3": "QMMA.SP.16864.F32.E4M3.E4M3"}
_MULTIPLY_E4M3 = ("sm_89", "sm_120", "sm_121")
"""Elsewhere mma.sp of it is taken apart into products of 16 bits."""
_WEIGHTS = {**dict.fromkeys((*_SPARSE, *_E4M3)), "e4m3_bf16": "bf16", "e4m3_fp16": "fp16"}
"""What kernels for few tokens are called by -> what e4m3 weights become."""


@dataclass(frozen=True, slots=True)
class Split:
    """Of a block of decode.cu: kRowTiles, kDown, kAhead, kSlots and how many a multiprocessor must hold."""

    row_tiles: int
    down: int
    ahead: int
    slots: int
    blocks: int = 1


_OF_16_BITS = {8: Split(4, 1, 3, 4), 16: Split(4, 2, 3, 4), 32: Split(4, 4, 3, 4), 64: Split(4, 4, 2, 4)}
_OF_8_BITS = {8: Split(4, 1, 4, 6), 16: Split(4, 2, 4, 6), 32: Split(4, 2, 4, 4), 64: Split(4, 4, 3, 4)}
_WIDENED = {8: Split(4, 1, 4, 4), 16: Split(4, 2, 4, 4), 32: Split(4, 4, 4, 4), 64: Split(4, 2, 2, 2)}
_DECODE_WARPS = 8


def split_of(name: str, tokens: int) -> Split:
    """That of the kernel for dtypes of a name, and for so many tokens: 8, 16, 32 or 64."""
    becomes = _WEIGHTS[name]
    return (_WIDENED if becomes else _OF_8_BITS if name in ("int8", "e4m3") else _OF_16_BITS)[tokens]


def decode_text(name: str, tokens: int, split: Split, called: str | None = None) -> KernelText:
    """A kernel for few tokens, as Split of decode.cu.

    Args:
        called: other than by dtypes and tokens, where it is another split than that of the table.
    """
    becomes = _WEIGHTS[name]
    dtype = becomes or name
    called = called or f"decode_{name}_{tokens}"
    itemsize, steps = (1, 1) if dtype in ("int8", "e4m3") else (2, 2)
    across, loads = _DECODE_WARPS // split.down, split.ahead * steps * tokens // 8
    x = split.slots * tokens * (64 * itemsize + 16)
    sums = split.down * min(tokens, 128 // split.row_tiles) * (split.row_tiles * 16 + 4) * 4
    return KernelText(
        called,
        "decode.cu",
        32 * _DECODE_WARPS,
        split.blocks,
        shared_bytes=16,
        dynamic_bytes=across * max(x, sums),
        multiplies=({**_SPARSE, **_E4M3}[dtype], loads * split.row_tiles),
        matrix_loads=loads,
        conversions=8 * split.ahead * split.row_tiles if becomes else 0,
        rows=split.down * split.row_tiles * 16,
        tokens=tokens,
        itemsize=2 if name in ("bf16", "fp16") else 1,
        across=across,
        ahead=split.ahead,
        x_bytes=across * tokens * 64 * itemsize,
        only=_MULTIPLY_E4M3 if name == "e4m3" else (),
        defines=(
            f"TWOFOUR_NAME={called}",
            f"TWOFOUR_PRODUCTS={''.join(each.capitalize() for each in name.split('_'))}Products",
            f"TWOFOUR_TOKEN_TILES={tokens // 8}",
            f"TWOFOUR_ROW_TILES={split.row_tiles}",
            f"TWOFOUR_DOWN={split.down}",
            f"TWOFOUR_AHEAD={split.ahead}",
            f"TWOFOUR_SLOTS={split.slots}",
            f"TWOFOUR_BLOCKS={split.blocks}",
        ),
    )


def _gemm(dtype: str, name: str, tile: tiles.Tile) -> KernelText:
    """Two steps of each warp's tile in a stage, of x three loads ahead."""
    of_tokens = tile.warp_tokens // 8
    return KernelText(
        f"gemm_{dtype}_{name}",
        "gemm.cu",
        tile.threads,
        tile.blocks,
        shared_bytes=16,
        dynamic_bytes=tile.stages * tile.stage_bytes(1 if dtype == "int8" else 2),
        multiplies=(_SPARSE[dtype], 2 * 4 * of_tokens),
        matrix_loads=2 * of_tokens + 3,
        defines=(
            f"TWOFOUR_NAME=gemm_{dtype}_{name}",
            f"TWOFOUR_PRODUCTS={dtype.capitalize()}Products",
            f"TWOFOUR_ROWS={tile.rows}",
            f"TWOFOUR_TOKENS={tile.tokens}",
            f"TWOFOUR_WARP_TOKENS={tile.warp_tokens}",
            f"TWOFOUR_STAGES={tile.stages}",
            f"TWOFOUR_BLOCKS={tile.blocks}",
        ),
    )


_TEXTS = (
    *(
        KernelText(name, "pack_both.cu", 256, 4, _SQUARE + _MASKS, _SELDOM)
        for name in ("prune_both_bf16", "prune_both_fp16")
    ),
    *(
        KernelText(name, "pack_both.cu", 256, 4, 0, _SELDOM)
        for name in ("mask_both_bf16", "mask_both_fp16", "mask_both_fp32")
    ),
    KernelText("keep_both_half", "pack_both.cu", 256, 4, _SQUARE + _MASKS),
    *(KernelText(name, "pack.cu", 256, 4, 0, _SELDOM) for name in _ONE_WAY),
    *(KernelText(name, "pack.cu", 512, 2, 64, _SELDOM) for name in ("quantize_bf16", "quantize_fp16")),
    *(KernelText(f"quantize_tokens_{dtype}", "tokens.cu", 256, 4, 4) for dtype in ("fp32", "bf16", "fp16")),
    *(decode_text(name, tokens, split_of(name, tokens)) for name in _WEIGHTS for tokens in (8, 16, 32, 64)),
    *(_gemm(dtype, name, tile) for dtype in _SPARSE for name, tile in tiles.TILES.items()),
)
KERNEL_TEXTS = {text.name: text for text in _TEXTS}


CLUSTERS = (2, 4, 8)
"""Blocks of a cluster: sizes that every GPU with clusters knows."""


def launch(
    name: str, grid: Sequence[int], device: torch.device, *arguments: int, cluster: int = 1, early: bool = False
) -> None:
    """Starts a kernel on the current stream of a device; compiles and loads it the first time.

    Args:
        cluster, early: as `driver.Driver.launch`.
    Raises:
        UnsupportedError: no driver, no NVRTC, or a device without sparse tensor cores.
        DeviceError: the driver refuses.
    """
    number = device.index
    if number is None or number == resources.current_device():
        _launch(name, grid, device, arguments, cluster, early)
    else:
        with torch.cuda.device(device):  # 3 us, and seldom needed
            _launch(name, grid, device, arguments, cluster, early)


def _launch(
    name: str, grid: Sequence[int], device: torch.device, arguments: Sequence[int], cluster: int, early: bool
) -> None:
    text, number = KERNEL_TEXTS[name], device.index or 0
    loaded, stream = _loaded(name, device), resources.current_stream(number)
    driver.driver().launch(loaded, grid, text.threads, arguments, stream, text.dynamic_bytes, number, cluster, early)


@cache
def most_clusters(name: str, device: torch.device) -> tuple[int, ...]:
    """How many clusters of CLUSTERS blocks of a kernel a GPU holds at once; () where it knows none, before Hopper."""
    if not knows_clusters(device):
        return ()
    text, number = KERNEL_TEXTS[name], device.index or 0
    with torch.cuda.device(device):  # the driver answers for the current one
        loaded, ask = _loaded(name, device), driver.driver().most_clusters
        return tuple(ask(loaded, text.threads, text.dynamic_bytes, blocks, number) for blocks in CLUSTERS)


@cache
def knows_clusters(device: torch.device) -> bool:
    """Can blocks be clusters, and kernels start early? From capability 9.0 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def why_not(name: str, device: torch.device) -> str | None:
    """Why a GPU has no such kernel; None where it has."""
    text = KERNEL_TEXTS[name]
    if not text.only or device.type != "cuda" or text.runs_on(_architecture(device)):
        return None
    return f"{_architecture(device)} does not multiply {name.split('_')[1]}, only {', '.join(text.only)} do"


@cache
def _architecture(device: torch.device) -> str:
    return compiler.architecture_of(torch.cuda.get_device_capability(device))


@cache
def _loaded(name: str, device: torch.device) -> int:
    text = KERNEL_TEXTS[name]
    architecture, reason = _architecture(device), why_not(name, device)
    if reason is not None:
        raise UnsupportedError(f"{name} is not for this GPU: {reason}.")
    cubin = compiler.compiled(text.file, architecture, text.defines)
    digest = hashlib.sha256(cubin).digest()
    return driver.driver().kernel(cubin, digest, name, text.dynamic_bytes, device.index or 0)
