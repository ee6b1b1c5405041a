"""The order of CUTLASS's metadata for compute capability 8.x, in plain torch, both ways.

The nibbles are those of the format, 4 (16-bit values) or 8 (8-bit values) to a word; only the words are in another
order, in which a warp's lanes find theirs side by side.

Source: reorder_meta in CUTLASS's host_reorder.h and layout::ColumnMajorInterleaved<2>, as facts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """How words of metadata are ordered for values of one size.

    Args:
        word: dtype of the metadata.
        row_group: rows that are dealt among themselves; out_features comes in multiples of it.
        interweave: how far apart neighbours of a group end up.
    """

    word: torch.dtype
    row_group: int
    interweave: int

    @property
    def column_group(self) -> int:
        """in_features comes in multiples of it: two words, because columns of words are stored in pairs."""
        return 16 * self.word.itemsize


LAYOUTS = {
    torch.float16: Layout(torch.int16, 32, 4),
    torch.bfloat16: Layout(torch.int16, 32, 4),
    torch.int8: Layout(torch.int32, 16, 2),
}
"""By the dtype of the values. float32 has one too, but for 1:2."""


def to_words(metadata: Tensor, layout: Layout) -> Tensor:
    """Canonical metadata, uint8 [rows, bytes], as `layout.word` [rows, bytes / itemsize] in CUTLASS's order.

    Args:
        metadata: rows and 8·bytes multiples of the layout's groups.
    """
    # A clone is aligned to its words; the nibbles of a word are little-endian in both layouts.
    words = metadata.flatten().clone().view(layout.word)
    rows, columns = metadata.shape[0], metadata.shape[1] // layout.word.itemsize
    ordered = torch.empty_like(words)
    ordered[_places(rows, columns, layout, words.device)] = words
    return ordered.view(rows, columns)


def from_words(words: Tensor, layout: Layout) -> Tensor:
    """The inverse of `to_words`."""
    rows, columns = words.shape
    ordered = words.flatten()[_places(rows, columns, layout, words.device)]
    return ordered.view(torch.uint8).view(rows, columns * layout.word.itemsize)


def _places(rows: int, columns: int, layout: Layout, device: torch.device) -> Tensor:
    """int64 [rows·columns]: where each word goes, counted in the order of the rows.

    Rows are dealt like cards: in each group of 32 (16-bit values) or 16 (8-bit), row r goes to (r % 8)·interweave +
    r // 8. Then the two words off the diagonal of each 2x2 block change places. Then columns are stored in pairs:
    all rows of columns 0 and 1, all rows of columns 2 and 3, ...
    """
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(columns, device=device)[None, :]
    row = row // layout.row_group * layout.row_group + row % 8 * layout.interweave + row % layout.row_group // 8
    # Off the diagonal: (even, odd) -> (row + 1, column - 1), (odd, even) -> (row - 1, column + 1).
    swap = column % 2 - row % 2
    row, column = row + swap, column - swap
    return (column // 2 * (rows * 2) + row * 2 + column % 2).flatten()
