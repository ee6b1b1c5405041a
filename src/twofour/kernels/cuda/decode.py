"""y = x @ W.T and what follows it, on a GPU for few tokens, by the kernels of csrc/cuda/decode.cu."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import arguments, layout, resources, table
from .packing import PackedMatrix

MOST_TOKENS = 64
"""Of a launch; more take several."""
TOKENS = (8, 16, 32, 64)
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
    activation: str = "none",
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """activation(x @ W.T * token_scale * row_scale + bias) + residual: sums in float32 (int32 for int8), rounded once.

    Results do not depend on which block ran first. Made for few tokens: 64 at a time, each time reading the weight.

    Args:
        x: [tokens, columns] on the GPU of `packed` and of its dtype: bfloat16, float16 or int8; only rows that begin at
            multiples of 16 bytes avoid a copy.
        packed: of a [rows, columns] weight.
        bias: [rows] of the dtype of the result, or None.
        row_scale, token_scale: [rows] and [tokens] float32 that sums are multiplied with, or None.
        activation: a name of `epilogue.ACTIVATIONS`.
        residual: [tokens, rows] of the dtype of the result, rows any distance apart; or None.
        out_dtype: of the result, one of `arguments.ITEMS`; None for that of x, bfloat16 for int8.
    Returns:
        [tokens, rows], contiguous.
    Raises:
        ShapeError, UnsupportedError: as the arguments say; no driver or compiler.
        DeviceError: no memory.
    """
    call = arguments.check(x, packed, bias, row_scale, token_scale, activation, residual, out_dtype)
    done = call.without_kernels()
    return multiplied(call) if done is None else done


def multiplied(call: arguments.Arguments) -> Tensor:
    """y of arguments that have something to multiply."""
    tokens, device = len(call.x), call.x.device
    share = plan(*call.packed.shape, resources.processors(device))
    partial = counters = None
    if share.slices > 1:
        width = next((size for size in TOKENS if size >= tokens), MOST_TOKENS)
        shape = (share.slices, share.blocks, width, _ROWS_OF_BLOCK)
        partial = torch.empty(shape, dtype=call.sums, device=device)
        counters = resources.counters(device, share.blocks)
    for first in range(0, tokens, MOST_TOKENS):
        count = min(tokens - first, MOST_TOKENS)
        size = next(size for size in TOKENS if size >= count)
        table.launch(
            f"decode_{call.name}_{size}",
            (share.blocks, share.slices),
            device,
            *call.of_product(first, count),
            share.slice,
            0 if partial is None else partial.data_ptr(),
            0 if counters is None else counters.data_ptr(),
            *call.of_epilogue(first),
        )
    return call.y
