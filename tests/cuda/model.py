"""mma.sp in NumPy, from the PTX ISA alone: what lanes hold, and what a warp multiplies. It knows nothing of twofour.

PTX ISA 8.7, 9.7.14.6, "Matrix fragments for mma.sp.m16n8k32" (16-bit) and ".m16n8k64" (8-bit), and their metadata.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LANES = 32


def sparse_a(registers: NDArray[np.void], metadata: NDArray[np.uint32], selector: int, bits: int) -> NDArray[np.void]:
    """The 16 x 32 (16-bit items) or 16 x 64 (8-bit) matrix A, zeros where nothing is kept.

    Args:
        registers: [32 lanes, 8 or 16] items, as they follow each other in the four registers of a lane.
        metadata: [32 lanes] words.
        selector: which lanes of four give the metadata of 16-bit items: 0 the first two, 1 the last two. 0 for 8-bit.
    """
    items = 128 // bits
    width = 32 if bits == 16 else 64
    a = np.zeros((16, width), registers.dtype)
    for lane in range(LANES):
        group_id, in_group = lane // 4, lane % 4
        for i in range(items):
            if bits == 16:
                row = group_id if i < 2 or 4 <= i < 6 else group_id + 8
                first = in_group * 4 + (0 if i < 4 else 16)
                place = i % 2
            else:
                row = group_id if i < 4 or 8 <= i < 12 else group_id + 8
                first = in_group * 8 + (0 if i < 8 else 32) + (i % 4) // 2 * 4
                place = i % 2
            a[row, first + index_of(metadata, row, first // 4, place, selector, bits)] = registers[lane, i]
    return a


def index_of(metadata: NDArray[np.uint32], row: int, group: int, place: int, selector: int, bits: int) -> int:
    """Where in its group of four a kept item lies: two bits of the metadata of one of the four lanes of its row."""
    if bits == 16:
        lane = row % 8 * 4 + 2 * selector + group // 4
        nibble = int(metadata[lane]) >> (16 * (row // 8) + 4 * (group % 4))
    else:
        lane = row % 8 * 4 + row // 8 + 2 * (group // 8)
        nibble = int(metadata[lane]) >> (4 * (group % 8))
    return nibble >> (2 * place) & 3


def dense_b(registers: NDArray[np.void], bits: int) -> NDArray[np.void]:
    """The 32 x 8 or 64 x 8 matrix B of [32 lanes, 8 or 16] items."""
    in_register = 32 // bits
    height = 32 if bits == 16 else 64
    b = np.zeros((height, 8), registers.dtype)
    for lane in range(LANES):
        group_id, in_group = lane // 4, lane % 4
        for i in range(128 // bits):
            register, place = divmod(i, in_register)
            b[register * 4 * in_register + in_group * in_register + place, group_id] = registers[lane, i]
    return b


def fragment_of_b(b: NDArray[np.void], bits: int) -> NDArray[np.void]:
    """The way back of `dense_b`."""
    numbered = dense_b(np.arange(LANES * 128 // bits).reshape(LANES, -1), bits)
    registers = np.zeros(numbered.size, b.dtype)
    registers[numbered.ravel()] = b.ravel()
    return registers.reshape(LANES, -1)


def fragment_of_c(c: NDArray[np.void]) -> NDArray[np.void]:
    """[32 lanes, 4] of a 16 x 8 matrix."""
    found = np.zeros((LANES, 4), c.dtype)
    for lane in range(LANES):
        for i in range(4):
            found[lane, i] = c[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2]
    return found
