"""To and from the CUTLASS layout of torch.sparse.SparseSemiStructuredTensorCUTLASS: exact in both directions.

The values are those of the format. The metadata hold the same nibbles, 4 (16-bit values) or 8 (8-bit values) to a word,
in the order in which the tensor cores of sm_80 read them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import FormatError, ShapeError, UnsupportedError
from ..format import SparseMatrix
from ..pattern import Pattern


class _Layout(NamedTuple):
    word: torch.dtype
    row_group: int
    interweave: int


_LAYOUTS = {
    torch.float16: _Layout(torch.int16, 32, 4),
    torch.bfloat16: _Layout(torch.int16, 32, 4),
    torch.int8: _Layout(torch.int32, 16, 2),
}


def to_cutlass(matrix: SparseMatrix) -> tuple[Tensor, Tensor]:
    """The matrix as torch's CUTLASS kernels want it.

    Args:
        matrix: 2:4 (shared and transposable masks too); float16 or bfloat16 with out_features and in_features
            multiples of 32, or int8 with multiples of 16 and 64.
    Returns:
        values [out_features, in_features/2] (the matrix's own tensor), and metadata [out_features, words], int16 for
        16-bit and int32 for 8-bit values: bit for bit what torch makes of `matrix.to_dense()`, if the matrix was
        made by `SparseMatrix.from_dense` (which chooses the same fillers).
    Raises:
        UnsupportedError: another pattern or dtype. ShapeError: other multiples.
    Cost: a pass over the metadata.
    Source: reorder_meta in CUTLASS's host_reorder.h; torch.sparse._semi_structured_conversions.

    >>> matrix = SparseMatrix.from_dense(torch.eye(64, dtype=torch.float16))
    >>> values, metadata = to_cutlass(matrix)
    >>> values.shape, metadata.shape, metadata.dtype
    (torch.Size([64, 32]), torch.Size([64, 4]), torch.int16)
    """
    layout = _require_layout(matrix.dtype)
    if (matrix.pattern.keep, matrix.pattern.group) != (2, 4):
        raise UnsupportedError(f"a {matrix.pattern} matrix has no CUTLASS layout: it is for 2:4 only.")
    _require_multiples(matrix.shape, matrix.dtype, layout)
    # A clone is aligned to its words; the nibbles of a word are little-endian in both layouts.
    words = matrix.metadata.flatten().clone().view(layout.word)
    rows, columns = _words_shape(matrix.shape, layout)
    ordered = torch.empty_like(words)
    ordered[_places(rows, columns, layout, words.device)] = words
    return matrix.values, ordered.view(rows, columns)


def from_cutlass(values: Tensor, metadata: Tensor, shape: tuple[int, int]) -> SparseMatrix:
    """The 2:4 SparseMatrix of a CUTLASS pair, such as `packed` and `meta` of torch's semi-structured tensors.

    Args:
        values: [out_features, in_features/2] float16, bfloat16 or int8.
        metadata: [out_features, words] int16 (16-bit values) or int32 (int8).
        shape: (out_features, in_features).
    Returns:
        A matrix that shares `values`; the inverse of `to_cutlass`, bit for bit.
    Raises:
        UnsupportedError: another dtype. ShapeError: shapes that do not fit. FormatError: metadata of another dtype, or
            with indices that repeat or descend.
    Cost: a pass over the metadata.
    """
    layout = _require_layout(values.dtype)
    _require_multiples(shape, values.dtype, layout)
    out_features, in_features = shape
    words_shape = _words_shape(shape, layout)
    for name, tensor, expected in (
        ("values", values, (out_features, in_features // 2)),
        ("metadata", metadata, words_shape),
    ):
        if tuple(tensor.shape) != expected:
            raise ShapeError(
                f"{name} of a CUTLASS pair for [{out_features}, {in_features}] must be {list(expected)},"
                f" not {list(tensor.shape)}."
            )
    if metadata.dtype != layout.word:
        raise FormatError(f"metadata of {values.dtype} values must be {layout.word}, not {metadata.dtype}.")
    words = metadata.flatten()[_places(*words_shape, layout, metadata.device)]
    rows = words.view(torch.uint8).view(out_features, in_features // 8)
    return SparseMatrix(values, rows, Pattern(2, 4), (out_features, in_features))


def _words_shape(shape: tuple[int, int], layout: _Layout) -> tuple[int, int]:
    return shape[0], shape[1] // 8 // layout.word.itemsize


def _places(rows: int, columns: int, layout: _Layout, device: torch.device) -> Tensor:
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


def _require_layout(dtype: torch.dtype) -> _Layout:
    if dtype not in _LAYOUTS:
        known = ", ".join(str(known).removeprefix("torch.") for known in _LAYOUTS)
        raise UnsupportedError(f"values of {dtype} have no CUTLASS layout in torch: it is for {known}.")
    return _LAYOUTS[dtype]


def _require_multiples(shape: tuple[int, int], dtype: torch.dtype, layout: _Layout) -> None:
    columns = 16 * layout.word.itemsize  # two words: columns of words are stored in pairs
    if shape[0] % layout.row_group or shape[1] % columns:
        raise ShapeError(
            f"the matrix is {list(shape)}: the CUTLASS layout of {dtype} needs out_features in multiples of"
            f" {layout.row_group} and in_features in multiples of {columns}. Pad it, or use another backend."
        )
