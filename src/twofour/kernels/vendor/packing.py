"""Canonical matrix <-> what NVIDIA's kernels read, bit for bit."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ShapeError, UnsupportedError
from ...format import SparseMatrix
from ...format import pack as canonical
from ...pattern import Pattern
from . import cutlass_layout, support, torch_operations

_TWO_OF_FOUR = Pattern(2, 4)
_CARRIERS = {1: torch.uint8, 2: torch.int16}
_FIRST_TWO = 0b0100
"""The nibble of padding, whose values are zeros."""


class Multiples(NamedTuple):
    """What shapes are padded up to: out_features, in_features, tokens."""

    rows: int
    columns: int
    tokens: int


def multiples(library: str, dtype: torch.dtype) -> Multiples:
    """As torch's SparseSemiStructuredTensor demands them (2.13)."""
    if library == "CUTLASS":
        return Multiples(16, 128, 16) if dtype.itemsize == 1 else Multiples(32, 64, 8)
    return Multiples(32, 32, 16) if dtype.itemsize == 1 else Multiples(16, 16, 8)


def padded(shape: tuple[int, int], library: str, dtype: torch.dtype) -> tuple[int, int]:
    """The shape that the library holds a weight [out_features, in_features] as."""
    rows, columns, _ = multiples(library, dtype)
    return -(-shape[0] // rows) * rows, -(-shape[1] // columns) * columns


def library_of(metadata: Tensor) -> str:
    """Which library the operands with these metadata are for."""
    return "cuSPARSELt" if metadata.dtype == torch.uint8 else "CUTLASS"


def pack(matrix: SparseMatrix) -> tuple[Tensor, Tensor]:
    """The matrix as cuSPARSELt or CUTLASS holds it, padded with zeros to their multiples.

    Returns:
        cuSPARSELt: its buffer (values row by row, then its own metadata), and the matrix's metadata, which are shared.
        Should a version of cuSPARSELt place values otherwise, there is a warning, and the second tensor is flat: the
        metadata and the values again. CUTLASS: values [rows, columns / 2], shared where they need no padding, and words
        of metadata [rows, ...], int16 or int32.
    Raises:
        UnsupportedError: another pattern than 2:4, a dtype or device that `why_not` tells of.
    Cost: for cuSPARSELt a dense matrix of markers, which is compressed and checked; for CUTLASS a pass.
    """
    if (matrix.pattern.keep, matrix.pattern.group) != (2, 4):
        raise UnsupportedError(f"a {matrix.pattern} matrix has no layout of NVIDIA's: it is for 2:4 only.")
    reason: str | None = "it has no kernel for 2:4"
    if matrix.dtype in support.DTYPES:
        reason = support.device_why_not(matrix.dtype, matrix.device)
    if reason is not None:
        name = str(matrix.dtype).removeprefix("torch.")
        raise UnsupportedError(
            f"{name} cannot be packed for NVIDIA's kernels: {reason}. backend=None picks one that can."
        )
    library = support.library(matrix.dtype, matrix.device)
    shape = padded(matrix.shape, library, matrix.dtype)
    values = _padded_values(matrix.values, shape)
    nibbles = _padded_metadata(matrix.metadata, matrix.in_features, shape)
    if library == "CUTLASS":
        return values, cutlass_layout.to_words(nibbles, cutlass_layout.LAYOUTS[matrix.dtype])
    return _compressed(matrix, values, nibbles, shape)


def unpack(
    values: Tensor, metadata: Tensor, pattern: Pattern | str, out_features: int, in_features: int
) -> SparseMatrix:
    """The inverse of `pack`, bit for bit, on memory of its own."""
    pattern, shape, library = Pattern.parse(pattern), (out_features, in_features), library_of(metadata)
    require(values, metadata, shape)
    rows, columns = padded(shape, library, values.dtype)
    if library == "CUTLASS":
        nibbles = cutlass_layout.from_words(metadata, cutlass_layout.LAYOUTS[values.dtype])
        return SparseMatrix(_cut(values, shape), _cut_metadata(nibbles, shape), pattern, shape)
    if metadata.ndim == 1:
        size = _metadata_bytes(shape)
        kept = metadata[size:].clone().view(values.dtype).view(out_features, in_features // 2)
        return SparseMatrix(kept, metadata[:size].clone().view(out_features, -1), pattern, shape)
    return SparseMatrix(_cut(_leading(values, rows, columns), shape), metadata.clone(), pattern, shape)


def copy(values: Tensor, metadata: Tensor) -> tuple[Tensor, Tensor]:
    """The same layout on memory of its own."""
    return values.clone(), metadata.clone()


def to_dense(values: Tensor, metadata: Tensor, pattern: Pattern | str, out_features: int, in_features: int) -> Tensor:
    """The dense weight [out_features, in_features], bit for bit; dropped places are +0.0."""
    return unpack(values, metadata, pattern, out_features, in_features).to_dense()


def require(values: Tensor, metadata: Tensor, shape: tuple[int, int]) -> None:
    """Raises ShapeError unless the operands can be those of a weight of this shape."""
    library = library_of(metadata)
    rows, columns = padded(shape, library, values.dtype)
    if library == "CUTLASS":
        layout = cutlass_layout.LAYOUTS.get(values.dtype)
        fits = (
            layout is not None
            and metadata.dtype == layout.word
            and tuple(values.shape) == (rows, columns // 2)
            and tuple(metadata.shape) == (rows, columns // 8 // layout.word.itemsize)
        )
    else:
        again = shape[0] * (shape[1] // 2) * values.dtype.itemsize
        fits = values.numel() > rows * columns // 2 and (
            tuple(metadata.shape) == (shape[0], -(-shape[1] // 8))
            or tuple(metadata.shape) == (_metadata_bytes(shape) + again,)
        )
    if not fits or not values.is_contiguous():
        raise ShapeError(
            f"values are {list(values.shape)} and metadata {list(metadata.shape)} {metadata.dtype}: a weight of"
            f" {list(shape)} needs what pack() returned."
        )


def _compressed(matrix: SparseMatrix, values: Tensor, nibbles: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    compress = torch_operations.installed().compress
    markers = _markers(values)
    buffer = compress(canonical.unpack(markers, nibbles, shape, _TWO_OF_FOUR)).contiguous()
    leading = _leading(buffer, *shape)
    if torch.equal(_bits(leading), _bits(markers)):
        _bits(leading).copy_(_bits(values))
        return buffer, matrix.metadata
    warnings.warn(
        f"{support.label()} does not hold the kept values row by row at the start of its buffer, as earlier versions did:"
        " layers keep them a second time, so that nothing is lost, and take nearly twice the memory.",
        stacklevel=3,
    )
    # Where values are is unknown, so the weight itself is compressed: at most two non-zeros in each group, and zeros that
    # are kept stand where the compressor likes, which changes no product of finite numbers.
    dense = canonical.unpack(values, nibbles, shape, _TWO_OF_FOUR)
    again = _bits(matrix.values).contiguous().flatten().view(torch.uint8)
    return compress(dense).contiguous(), torch.cat([matrix.metadata.flatten(), again])


def _markers(values: Tensor) -> Tensor:
    """Positive normal numbers of the shape and dtype of `values`, so mixed that no row, or shift of one, is another."""
    row = torch.arange(values.shape[0], dtype=torch.int32, device=values.device)[:, None]
    column = torch.arange(values.shape[1], dtype=torch.int32, device=values.device)
    mixed = row * 0x2C1B3C6D + column * 0x297A2D39  # int32 wraps around
    for shift in (15, 13):
        mixed = (mixed ^ (mixed >> shift)) * 0x2545F491
    mixed ^= mixed >> 16
    if values.dtype.itemsize == 1:  # bytes 8 ... 126: normal in e4m3fn, which has NaN at 127
        bits = (8 + mixed % 119).to(torch.uint8)
    else:  # 0x0400 ... 0x7BFF: normal in float16 and in bfloat16
        bits = (0x0400 + mixed % 0x7800).to(torch.int16)
    return bits.view(values.dtype)


def _leading(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer.view(-1)[: rows * columns // 2].view(rows, columns // 2)


def _padded_values(values: Tensor, shape: tuple[int, int]) -> Tensor:
    if tuple(values.shape) == (shape[0], shape[1] // 2):
        return values.contiguous()
    bits = _bits(values)
    wide = bits.new_zeros(shape[0], shape[1] // 2)
    wide[: bits.shape[0], : bits.shape[1]] = bits
    return wide.view(values.dtype)


def _padded_metadata(metadata: Tensor, in_features: int, shape: tuple[int, int]) -> Tensor:
    if tuple(metadata.shape) == (shape[0], shape[1] // 8):
        return metadata
    wide = metadata.new_full((shape[0], shape[1] // 8), _FIRST_TWO | _FIRST_TWO << 4)
    wide[: metadata.shape[0], : metadata.shape[1]] = metadata
    if in_features % 8:  # the last byte of a row is half full
        wide[: metadata.shape[0], metadata.shape[1] - 1] |= _FIRST_TWO << 4
    return wide


def _cut(values: Tensor, shape: tuple[int, int]) -> Tensor:
    return _bits(values)[: shape[0], : shape[1] // 2].clone(memory_format=torch.contiguous_format).view(values.dtype)


def _cut_metadata(nibbles: Tensor, shape: tuple[int, int]) -> Tensor:
    metadata = nibbles[: shape[0], : -(-shape[1] // 8)].clone(memory_format=torch.contiguous_format)
    if shape[1] % 8:
        metadata[:, -1] &= 15
    return metadata


def _metadata_bytes(shape: tuple[int, int]) -> int:
    return shape[0] * -(-shape[1] // 8)


def _bits(tensor: Tensor) -> Tensor:
    """The same bits as integers, which keep NaN payloads and know every operation."""
    return tensor.view(_CARRIERS[tensor.dtype.itemsize])
