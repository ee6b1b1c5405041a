"""The CUDA layout in plain torch: the specification of csrc/cuda/layout.h, where it is drawn, and of the kernels of pack.cu.

It works on any device, and is what packs where no kernel can.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...errors import ShapeError, UnsupportedError

TILE = 16
"""Rows."""
COLUMNS = 64
"""Of a chunk: a word of metadata for each lane of a warp."""
GROUPS = COLUMNS // 4
LANES = 32
ALIGNED = 16
"""Bytes that kernels read at a time, at multiples of as many."""
PADDING_NIBBLE = 0b0100
DTYPES = (torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def packed_shapes(
    rows: int, columns: int, dtype: torch.dtype
) -> tuple[tuple[int, int, int, int], tuple[int, int, int]]:
    """Of values, [tiles, steps, 32 lanes, items], in `dtype`, and of metadata, [tiles, chunks, 32 lanes] int32.

    Raises:
        UnsupportedError: a dtype that sparse tensor cores do not multiply here.
        ShapeError: columns are no multiple of 4.
    """
    if dtype not in DTYPES:
        names = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
        raise UnsupportedError(f"{str(dtype).removeprefix('torch.')} has no CUDA layout: {names} have.")
    if rows < 0 or columns < 0 or columns % 4:
        raise ShapeError(f"a matrix of [{rows}, {columns}] has no CUDA layout: its columns come in groups of 4.")
    tiles, chunks = -(-rows // TILE), -(-columns // COLUMNS)
    return (tiles, chunks * steps(dtype), LANES, 16 // dtype.itemsize), (tiles, chunks, LANES)


def steps(dtype: torch.dtype) -> int:
    """Multiplications of a warp that a chunk takes."""
    return 2 if dtype.itemsize == 2 else 1


def pack(values: Tensor, metadata: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """From the canonical format (SPEC.md).

    Args:
        values: [rows, columns / 2] of one of DTYPES.
        metadata: [rows, ceil(columns / 8)] uint8.
    Returns:
        tensors of `packed_shapes`; padding holds zeros and the nibble of (0, 1).
    """
    shape, meta_shape = packed_shapes(rows, columns, values.dtype)
    tiles, chunks, _ = meta_shape
    bits = torch.int16 if values.dtype.itemsize == 2 else torch.int8
    nibbles = torch.stack([metadata & 15, metadata >> 4], dim=-1).flatten(1)[:, : columns // 4]
    kept = values.new_zeros((tiles * TILE, chunks * GROUPS, 2), dtype=bits)
    codes = nibbles.new_full((tiles * TILE, chunks * GROUPS), PADDING_NIBBLE, dtype=torch.int32)
    kept[:rows, : columns // 4] = values.contiguous().view(bits).view(rows, columns // 4, 2)
    codes[:rows, : columns // 4] = nibbles
    of_values, of_metadata = (index.to(values.device) for index in _places(values.dtype.itemsize))
    kept = kept.view(tiles, TILE, chunks, GROUPS, 2).transpose(1, 2).reshape(tiles, chunks, TILE * GROUPS, 2)
    codes = codes.view(tiles, TILE, chunks, GROUPS).transpose(1, 2).reshape(tiles, chunks, TILE * GROUPS)
    fragments = kept[:, :, of_values.flatten()].contiguous().view(values.dtype).view(shape)
    words = codes[:, :, of_metadata.flatten()].view(tiles, chunks, LANES, 8).long()
    words = (words << 4 * torch.arange(8, device=values.device)).sum(-1)
    return fragments, torch.where(words < 2**31, words, words - 2**32).int()


def unpack(fragments: Tensor, words: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The way back, bit for bit: canonical values and metadata."""
    tiles, chunks, _ = words.shape
    bits = torch.int16 if fragments.dtype.itemsize == 2 else torch.int8
    of_values, of_metadata = (index.to(words.device) for index in _places(fragments.dtype.itemsize))
    kept = fragments.new_zeros((tiles, chunks, TILE * GROUPS, 2), dtype=bits)
    kept[:, :, of_values.flatten()] = fragments.contiguous().view(bits).view(tiles, chunks, -1, 2)
    codes = words.new_zeros((tiles, chunks, TILE * GROUPS))
    nibbles = (words[..., None] >> 4 * torch.arange(8, dtype=torch.int32, device=words.device)) & 15
    codes[:, :, of_metadata.flatten()] = nibbles.view(tiles, chunks, -1)
    kept = kept.view(tiles, chunks, TILE, GROUPS, 2).transpose(1, 2).reshape(tiles * TILE, chunks * GROUPS, 2)
    codes = codes.view(tiles, chunks, TILE, GROUPS).transpose(1, 2).reshape(tiles * TILE, chunks * GROUPS)
    values = kept[:rows, : columns // 4].reshape(rows, columns // 2).view(fragments.dtype)
    codes = torch.nn.functional.pad(codes[:rows, : columns // 4], (0, columns // 4 % 2)).to(torch.uint8)
    return values.contiguous(), (codes[:, ::2] | codes[:, 1::2] << 4).contiguous()


def widen(values: Tensor, metadata: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix of 1-byte items in the layout of 2-byte ones, each item as `dtype` holds its number.

    Args:
        values, metadata: of `packed_shapes`.
        dtype: of 2 bytes.
    Returns:
        the same, of `packed_shapes` for `dtype`.
    Cost: two copies; of each place of the matrix 0.625 bytes are read and 1.125 written.
    """
    tiles, chunks, _ = metadata.shape
    # Lane 4 * g + 2 * a + e, register 2 * h + r: rows g + 8 * r, groups 4 * a + 2 * e + b + 8 * h. As 2-byte items they lie
    # in step h, lane 4 * g + 2 * e + b, register 2 * a + r.
    of_items = values.view(tiles, chunks, 8, 2, 2, 2, 2, 2, 2)  # g, a, e, h, r, b, items
    moved = of_items.permute(0, 1, 5, 2, 4, 7, 3, 6, 8)
    wide = torch.empty(moved.shape, dtype=dtype, device=values.device).copy_(moved)
    # Lane 4 * g + 2 * h + r, half i: row g + 8 * r, groups 8 * h + 4 * i + 0 .. 3. They go to lane 4 * g + 2 * h + i, half r.
    halves = metadata.view(torch.int16).view(tiles, chunks, 8, 2, 2, 2)
    words = halves.transpose(-1, -2).contiguous().view(torch.int32)
    return wide.view(tiles, chunks * 2, LANES, 8), words.view(metadata.shape)


@lru_cache(maxsize=2)
def _places(itemsize: int) -> tuple[Tensor, Tensor]:
    """Places in a chunk of a tile, row * GROUPS + group: of the pairs of [step, lane, part], of the nibbles of [lane, 8]."""
    lane = torch.arange(LANES)
    g, q = (lane // 4)[:, None], (lane % 4)[:, None]
    i = torch.arange(8)[None]
    if itemsize == 2:
        r = torch.arange(4)[None]
        first = (g + 8 * (r % 2)) * GROUPS + q + 4 * (r // 2)
        return torch.stack([first, first + 8]), (g + 8 * (i // 4)) * GROUPS + 4 * q + i % 4
    r = i // 2
    pairs = (g + 8 * (r % 2)) * GROUPS + 2 * q + 8 * (r // 2) + i % 2
    return pairs[None], (g + 8 * (q % 2)) * GROUPS + 8 * (q // 2) + i
