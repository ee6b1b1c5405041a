"""The CUTLASS layout, bit for bit as torch's own conversion."""

from __future__ import annotations

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from twofour import FormatError, ShapeError, SparseMatrix, UnsupportedError
from twofour.interop.torch_semi_structured import from_cutlass, to_cutlass
from twofour.testing import assert_same_bits, hostile_tensor, random_mask

CASES = [
    (dtype, rows * multiple[0], columns * multiple[1])
    for dtype, multiple in ((torch.float16, (32, 32)), (torch.bfloat16, (32, 32)), (torch.int8, (16, 64)))
    for rows, columns in ((1, 1), (1, 2), (2, 1), (3, 3), (4, 8), (5, 13))
]


def weight_of(dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
    """Groups of 0, 1 and 2 non-zeros of both signs; no -0.0, which torch's conversion copies into fillers."""
    values = hostile_tensor((rows, columns), dtype, finite=True, seed=rows + columns)
    mask = random_mask((rows, columns), "2:4", seed=rows)
    return torch.where(mask & (values != 0), values, torch.zeros_like(values))


@pytest.mark.parametrize(("dtype", "rows", "columns"), CASES)
def test_bit_for_bit_as_torch(dtype: torch.dtype, rows: int, columns: int) -> None:
    dense = weight_of(dtype, rows, columns)
    expected_values, expected_metadata = sparse_semi_structured_from_dense_cutlass(dense)
    matrix = SparseMatrix.from_dense(dense)
    values, metadata = to_cutlass(matrix)
    assert_same_bits(values, expected_values)
    assert_same_bits(metadata, expected_metadata)
    assert values.data_ptr() == matrix.values.data_ptr()
    assert_same_bits(sparse_semi_structured_to_dense_cutlass(values, metadata), dense)


@pytest.mark.parametrize(("dtype", "rows", "columns"), CASES)
def test_there_and_back(dtype: torch.dtype, rows: int, columns: int) -> None:
    weight = hostile_tensor((rows, columns), dtype)
    matrix = SparseMatrix.from_dense(weight, mask=random_mask((rows, columns), "2:4"))
    back = from_cutlass(*to_cutlass(matrix), matrix.shape)
    assert (back.shape, back.pattern) == (matrix.shape, matrix.pattern)
    assert_same_bits(back.values, matrix.values)
    assert_same_bits(back.metadata, matrix.metadata)
    assert_same_bits(back.to_dense(), matrix.to_dense())


def test_torch_itself_has_no_layout_for_an_odd_number_of_words() -> None:
    """Its check asks for multiples of 16 columns only, and then writes beside the tensor."""
    with pytest.raises(RuntimeError, match="index 32 is out of bounds"):
        sparse_semi_structured_from_dense_cutlass(torch.zeros(32, 16, dtype=torch.float16))


def test_what_torch_made_is_read() -> None:
    dense = weight_of(torch.bfloat16, 64, 96)
    assert_same_bits(from_cutlass(*sparse_semi_structured_from_dense_cutlass(dense), (64, 96)).to_dense(), dense)


def test_minus_zero_does_not_reach_the_fillers() -> None:
    dense = torch.full((32, 32), -0.0, dtype=torch.float16)
    values, metadata = to_cutlass(SparseMatrix.from_dense(dense))
    assert_same_bits(values, torch.zeros(32, 16, dtype=torch.float16))
    assert_same_bits(metadata, sparse_semi_structured_from_dense_cutlass(dense)[1])


def test_metadata_need_not_be_aligned() -> None:
    matrix = SparseMatrix.from_dense(weight_of(torch.int8, 16, 64))
    shifted = torch.empty(matrix.metadata.numel() + 1, dtype=torch.uint8)[1:].view(matrix.metadata.shape)
    shifted.copy_(matrix.metadata)
    assert_same_bits(
        to_cutlass(SparseMatrix(matrix.values, shifted, matrix.pattern, matrix.shape))[1], to_cutlass(matrix)[1]
    )


@pytest.mark.parametrize("text", ["2:4x4", "2:4t"])
def test_every_kind_of_2_4_has_the_layout(text: str) -> None:
    matrix = SparseMatrix.from_dense(torch.randn(32, 32).half(), text, prune=True)
    assert_same_bits(to_cutlass(matrix)[1], sparse_semi_structured_from_dense_cutlass(matrix.to_dense())[1])


def test_empty_matrices() -> None:
    for shape in ((0, 32), (32, 0)):
        matrix = SparseMatrix.from_dense(torch.empty(shape).half())
        assert from_cutlass(*to_cutlass(matrix), shape).shape == shape


@pytest.mark.parametrize(
    ("dtype", "shape", "multiples"),
    [
        (torch.float16, (16, 32), (32, 32)),
        (torch.bfloat16, (32, 48), (32, 32)),
        (torch.int8, (8, 64), (16, 64)),
        (torch.int8, (16, 96), (16, 64)),
    ],
)
def test_shapes_that_do_not_fit(dtype: torch.dtype, shape: tuple[int, int], multiples: tuple[int, int]) -> None:
    matrix = SparseMatrix.from_dense(torch.zeros(shape, dtype=dtype))
    rule = (
        rf"\[{shape[0]}, {shape[1]}\]: .* {dtype} needs out_features in multiples of {multiples[0]}"
        f" and in_features in multiples of {multiples[1]}"
    )
    with pytest.raises(ShapeError, match=rule):
        to_cutlass(matrix)
    with pytest.raises(ShapeError, match=rule):
        from_cutlass(matrix.values, matrix.metadata, shape)


@pytest.mark.parametrize("text", ["1:4", "4:8", "1:2"])
def test_other_patterns_are_refused(text: str) -> None:
    with pytest.raises(UnsupportedError, match=f"a {text} matrix has no CUTLASS layout: it is for 2:4 only"):
        to_cutlass(SparseMatrix.from_dense(torch.zeros(32, 32).half(), text))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    matrix = SparseMatrix.from_dense(torch.zeros(32, 32).to(dtype))
    for convert in (lambda: to_cutlass(matrix), lambda: from_cutlass(matrix.values, matrix.metadata, matrix.shape)):
        with pytest.raises(
            UnsupportedError, match=rf"values of {dtype} have no CUTLASS layout in torch: .*float16, bfloat16, int8"
        ):
            convert()


def test_pairs_that_do_not_fit() -> None:
    values, metadata = to_cutlass(SparseMatrix.from_dense(torch.zeros(32, 32).half()))
    with pytest.raises(ShapeError, match=r"values of a CUTLASS pair for \[32, 64\] must be \[32, 32\], not \[32, 16\]"):
        from_cutlass(values, metadata, (32, 64))
    with pytest.raises(ShapeError, match=r"metadata of a CUTLASS pair for \[32, 32\] must be \[32, 2\], not \[32, 1\]"):
        from_cutlass(values, metadata[:, :1], (32, 32))
    with pytest.raises(FormatError, match=r"metadata of torch.float16 values must be torch.int16, not torch.int32"):
        from_cutlass(values, metadata.int(), (32, 32))
    with pytest.raises(FormatError, match="indices that repeat or descend"):
        from_cutlass(values, metadata * 0, (32, 32))
