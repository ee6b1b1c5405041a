"""To and from the CUTLASS layout of torch.sparse.SparseSemiStructuredTensorCUTLASS: exact in both directions.

The values are those of the format. The metadata hold the same nibbles, 4 (16-bit values) or 8 (8-bit values) to a word,
in the order in which the tensor cores of sm_80 read them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FormatError, ShapeError, UnsupportedError
from ..format import SparseMatrix
from ..kernels.vendor import cutlass_layout
from ..kernels.vendor.cutlass_layout import LAYOUTS, Layout
from ..pattern import Pattern


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
    return matrix.values, cutlass_layout.to_words(matrix.metadata, layout)


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
    words_shape = (out_features, in_features // 8 // layout.word.itemsize)
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
    return SparseMatrix(values, cutlass_layout.from_words(metadata, layout), Pattern(2, 4), (out_features, in_features))


def _require_layout(dtype: torch.dtype) -> Layout:
    if dtype not in LAYOUTS:
        known = ", ".join(str(known).removeprefix("torch.") for known in LAYOUTS)
        raise UnsupportedError(f"values of {dtype} have no CUTLASS layout in torch: it is for {known}.")
    return LAYOUTS[dtype]


def _require_multiples(shape: tuple[int, int], dtype: torch.dtype, layout: Layout) -> None:
    if shape[0] % layout.row_group or shape[1] % layout.column_group:
        raise ShapeError(
            f"the matrix is {list(shape)}: the CUTLASS layout of {dtype} needs out_features in multiples of"
            f" {layout.row_group} and in_features in multiples of {layout.column_group}. Pad it, or use another backend."
        )
