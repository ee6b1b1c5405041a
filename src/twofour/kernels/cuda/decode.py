"""y = x @ W.T + b on a GPU for few tokens, by the kernels of csrc/cuda/decode.cu."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ...errors import ShapeError, UnsupportedError
from . import layout, table
from .packing import PackedMatrix, _on_gpu

MOST_TOKENS = 64
"""Of a launch; more take several."""
TOKENS = (8, 16, 32, 64)
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}
_ROWS_OF_BLOCK = 8 * layout.TILE
_LEAST_SLICE = 8  # chunks: below that a block spends its time at its ends
_BLOCKS_OF_PROCESSOR = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """How a launch shares the work: blocks along rows, slices of the columns, chunks of a slice."""

    blocks: int
    slices: int
    slice: int


def plan(rows: int, columns: int, processors: int) -> Plan:
    """Two blocks for each multiprocessor, where slices stay long enough.

    Args:
        processors: of the GPU.
    """
    blocks = -(-rows // _ROWS_OF_BLOCK)
    chunks = -(-columns // layout.COLUMNS)
    wanted = max(1, -(-_BLOCKS_OF_PROCESSOR * processors // blocks))
    each = max(-(-chunks // wanted), min(chunks, _LEAST_SLICE))
    return Plan(blocks, -(-chunks // each), each)


def linear(
    x: Tensor,
    packed: PackedMatrix,
    bias: Tensor | None = None,
    *,
    row_scale: Tensor | None = None,
    token_scale: Tensor | None = None,
) -> Tensor:
    """x @ W.T + bias, sums in float32 (int32 for int8), rounded once.

    Results do not depend on which block ran first. Made for few tokens: 64 at a time, each time reading the weight.

    Args:
        x: [tokens, columns] on the GPU of `packed` and of its dtype: bfloat16, float16 or int8.
        packed: of a [rows, columns] weight.
        bias: [rows] of the dtype of the result, or None.
        row_scale, token_scale: [rows] and [tokens] float32 that sums are multiplied with, or None.
    Returns:
        [tokens, rows] of the dtype of x, bfloat16 for int8.
    Raises:
        ShapeError, UnsupportedError: as the arguments say; no driver or compiler.
        DeviceError: no memory.
    """
    rows, columns = packed.shape
    if packed.values.dtype not in _NAMES or x.dtype != packed.values.dtype:
        known = ", ".join(str(each).removeprefix("torch.") for each in _NAMES)
        raise UnsupportedError(f"x is {x.dtype}, the weight {packed.values.dtype}: one of {known}, the same for both.")
    if x.ndim != 2 or x.shape[1] != columns:
        raise ShapeError(f"x is {list(x.shape)}: a weight of [{rows}, {columns}] takes [tokens, {columns}].")
    out = torch.bfloat16 if x.dtype == torch.int8 else x.dtype
    for name, vector, size, dtype in (
        ("bias", bias, rows, out),
        ("row_scale", row_scale, rows, torch.float32),
        ("token_scale", token_scale, len(x), torch.float32),
    ):
        if vector is not None and (vector.shape != (size,) or vector.dtype != dtype or not vector.is_contiguous()):
            raise ShapeError(f"{name} is {list(vector.shape)} {vector.dtype}: it must be [{size}] {dtype}, contiguous.")
        if vector is not None and vector.device != x.device:
            raise UnsupportedError(f"x is on {x.device}, {name} on {vector.device}: put them on one device.")
    if not _on_gpu(x) or x.device != packed.values.device:
        raise UnsupportedError(f"x is on {x.device}, the weight on {packed.values.device}: put both on one GPU.")
    y = torch.empty(len(x), rows, dtype=out, device=x.device)
    if y.numel() == 0:
        return y
    if columns == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    x = _aligned(x.detach())
    share = plan(rows, columns, _processors(x.device))
    sums = torch.int32 if x.dtype == torch.int8 else torch.float32
    partial = counters = None
    if share.slices > 1:
        partial = torch.empty(share.slices, min(len(x), MOST_TOKENS), rows, dtype=sums, device=x.device)
        counters = torch.zeros(share.blocks, dtype=torch.int32, device=x.device)
    for first in range(0, len(x), MOST_TOKENS):
        part = x[first : first + MOST_TOKENS]
        size = next(size for size in TOKENS if size >= len(part))
        table.launch(
            f"decode_{_NAMES[x.dtype]}_{size}",
            (share.blocks, share.slices),
            x.device,
            packed.values.data_ptr(),
            packed.metadata.data_ptr(),
            part.data_ptr(),
            part.stride(0) * part.itemsize,
            0 if bias is None else bias.data_ptr(),
            0 if row_scale is None else row_scale.data_ptr(),
            0 if token_scale is None else token_scale[first:].data_ptr(),
            y[first:].data_ptr(),
            rows,
            len(part),
            rows,
            columns,
            share.slice,
            0 if partial is None else partial.data_ptr(),
            0 if counters is None else counters.data_ptr(),
        )
    return y


def _aligned(x: Tensor) -> Tensor:
    """With rows that begin at multiples of 16 bytes; what lies behind their ends is not read."""
    items = 16 // x.itemsize
    if x.stride(1) == 1 and x.data_ptr() % 16 == 0 and (x.stride(0) % items == 0 or len(x) == 1):
        return x
    wide = x.new_empty(len(x), -(-x.shape[1] // items) * items)
    return wide[:, : x.shape[1]].copy_(x)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
