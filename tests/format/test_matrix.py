"""SparseMatrix: dense there and back, and everything it refuses."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofour import FormatError, PatternError, ShapeError, SparseMatrix, UnsupportedError
from twofour.format.pack import VALUE_DTYPES, numbers
from twofour.masks import magnitude, nm_mask
from twofour.pattern import Pattern
from twofour.testing import assert_same_bits, hostile_tensor, random_mask, strategies

CARRIER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def where(mask: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """torch.where(mask, weight, 0), bits kept, for float8 too."""
    bits = weight.contiguous().view(CARRIER[weight.dtype.itemsize])
    return torch.where(mask, bits, torch.zeros_like(bits)).view(weight.dtype)


@settings(deadline=None, max_examples=160)
@given(st.data(), strategies.patterns(), strategies.dtypes())
def test_with_a_mask_to_dense_is_where(data: st.DataObject, pattern: Pattern, dtype: torch.dtype) -> None:
    weight = data.draw(strategies.weights(pattern, dtype, max_groups=3))
    mask = data.draw(strategies.masks(pattern, tuple(weight.shape)))
    matrix = SparseMatrix.from_dense(weight, pattern, mask=mask)
    assert_same_bits(matrix.to_dense(), where(mask, weight))
    assert bool((matrix.mask() | ~mask).all())
    assert (matrix.out_features, matrix.in_features) == tuple(weight.shape) == matrix.shape


@settings(deadline=None, max_examples=120)
@given(st.data(), strategies.patterns(), strategies.dtypes())
def test_without_a_mask_non_zeros_are_kept_and_minus_zero_is_not(
    data: st.DataObject, pattern: Pattern, dtype: torch.dtype
) -> None:
    weight = data.draw(strategies.weights(pattern, dtype, max_groups=3))
    mask = data.draw(strategies.masks(pattern, tuple(weight.shape)))
    kept = where(mask, weight)
    matrix = SparseMatrix.from_dense(kept, pattern)
    assert_same_bits(matrix.to_dense(), where(numbers(kept) != 0, kept))
    again = SparseMatrix.from_dense(matrix.to_dense(), pattern)
    assert_same_bits(again.values, matrix.values)
    assert_same_bits(again.metadata, matrix.metadata)


@settings(deadline=None, max_examples=80)
@given(st.data(), strategies.patterns(), strategies.dtypes())
def test_prune_keeps_the_largest_magnitudes(data: st.DataObject, pattern: Pattern, dtype: torch.dtype) -> None:
    weight = data.draw(strategies.weights(pattern, dtype, max_groups=3))
    matrix = SparseMatrix.from_dense(weight, pattern, prune=True)
    assert_same_bits(matrix.to_dense(), where(nm_mask(magnitude(weight), pattern), weight))


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8"])
def test_strides_do_not_matter(dtype: torch.dtype, text: str) -> None:
    weight = where(random_mask((12, 24), text, seed=1), hostile_tensor((12, 24), dtype))
    plain = SparseMatrix.from_dense(weight, text)
    wide = weight.view(CARRIER[dtype.itemsize]).repeat_interleave(2, dim=1).view(dtype)
    for view in (weight.T.contiguous().T, wide[:, ::2]):
        assert not view.is_contiguous()
        matrix = SparseMatrix.from_dense(view, text)
        assert_same_bits(matrix.values, plain.values)
        assert_same_bits(matrix.metadata, plain.metadata)


def test_a_kept_minus_zero_and_nan_payloads_survive() -> None:
    weight = torch.tensor([[-0.0, 1, 0, 0]])
    weight.view(torch.int32)[0, 1] = 0x7FC12345
    mask = torch.tensor([[True, True, False, False]])
    dense = SparseMatrix.from_dense(weight, mask=mask).to_dense()
    assert [value & 0xFFFFFFFF for value in dense.view(torch.int32)[0].tolist()] == [0x80000000, 0x7FC12345, 0, 0]


def test_the_matrix_is_a_copy_without_gradient() -> None:
    weight = torch.nn.Parameter(torch.eye(4))
    matrix = SparseMatrix.from_dense(weight)
    with torch.no_grad():
        weight.zero_()
    assert matrix.to_dense().equal(torch.eye(4))
    assert not matrix.values.requires_grad


@pytest.mark.of_cpu
def test_a_matrix_cannot_be_changed_and_says_what_it_is() -> None:
    matrix = SparseMatrix.from_dense(torch.eye(4, dtype=torch.bfloat16))
    assert repr(matrix) == "SparseMatrix(2:4, [4, 4], bfloat16, 20 bytes)"
    assert (matrix.dtype, matrix.device) == (torch.bfloat16, torch.device("cpu"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        matrix.shape = (2, 2)  # type: ignore[misc]
    assert matrix != copy.copy(matrix)  # by identity: tensors have no single answer


def test_to_converts_values_and_keeps_places() -> None:
    matrix = SparseMatrix.from_dense(torch.eye(8) * -3)
    half = matrix.to(torch.float16)
    assert half.dtype == torch.float16
    assert_same_bits(half.metadata, matrix.metadata)
    assert_same_bits(half.to_dense(), torch.eye(8, dtype=torch.float16) * -3 + 0.0)
    with pytest.raises(UnsupportedError, match="a weight of float64 cannot be stored"):
        matrix.to(torch.float64)


def test_meta_matrices_have_shapes_and_no_numbers() -> None:
    matrix = SparseMatrix.from_dense(torch.eye(8)).to("meta")
    assert (matrix.device.type, matrix.nbytes) == ("meta", 136)
    for numbers_of in (matrix.to_dense, matrix.mask):
        with pytest.raises(UnsupportedError, match="the matrix is on the meta device: it has a shape and no numbers"):
            numbers_of()
    with pytest.raises(UnsupportedError, match="fc is on the meta device"):
        SparseMatrix.from_dense(torch.empty(4, 8, device="meta"), name="fc")


@pytest.mark.parametrize("shape", [(0, 16), (16, 0), (0, 0)])
@pytest.mark.parametrize("text", ["2:4", "1:4", "8:16", "2:4t", "2:4x4"])
def test_empty_weights(shape: tuple[int, int], text: str) -> None:
    for options in ({}, {"prune": True}, {"mask": torch.zeros(shape, dtype=torch.bool)}):
        matrix = SparseMatrix.from_dense(torch.empty(shape), text, **options)  # type: ignore[arg-type]
        assert matrix.shape == shape
        assert matrix.nbytes == 0
        assert matrix.to_dense().shape == shape


def test_a_weight_that_is_not_n_m_is_refused() -> None:
    weight = torch.eye(8)
    weight[5, 4:8] = torch.tensor([1.0, -2, 3, 0])
    with pytest.raises(
        PatternError, match=r"'?fc'? is not 2:4: row 5, columns 4:8 hold \[1, -2, 3, 0\], 3 non-zeros.*\n.*prune=True"
    ):
        SparseMatrix.from_dense(weight, name="fc")


@pytest.mark.of_cpu
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(4, 8), ShapeError, r"mask is torch.float32 \[4, 8\] on cpu: it must be torch.bool \[4, 8\]"),
        (torch.ones(8, 4, dtype=torch.bool), ShapeError, r"mask is torch.bool \[8, 4\]"),
        (torch.ones(4, 8, dtype=torch.bool, device="meta"), ShapeError, "on meta: it must be .* on cpu"),
        (torch.ones(4, 8, dtype=torch.bool), PatternError, "mask is not 2:4: row 0, columns 0:4 keep more than 2"),
    ],
)
def test_masks_that_do_not_fit(mask: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SparseMatrix.from_dense(torch.ones(4, 8), mask=mask)


def test_other_wrong_uses() -> None:
    with pytest.raises(PatternError, match="mask= and prune=True both choose"):
        SparseMatrix.from_dense(torch.ones(4, 8), mask=torch.zeros(4, 8, dtype=torch.bool), prune=True)
    with pytest.raises(ShapeError, match=r"'fc' is \[4, 6\]: in_features 6 is not a multiple of 4"):
        SparseMatrix.from_dense(torch.zeros(4, 6), name="fc")
    with pytest.raises(ShapeError, match=r"weight is \[4\]: an N:M matrix is"):
        SparseMatrix.from_dense(torch.zeros(4))
    with pytest.raises(UnsupportedError, match="a weight of float64"):
        SparseMatrix.from_dense(torch.zeros(4, 4, dtype=torch.float64))
    with pytest.raises(PatternError, match="unknown pattern '24'"):
        SparseMatrix.from_dense(torch.zeros(4, 4), "24")


def test_transposable_is_checked_along_both_axes() -> None:
    rows_only = torch.tensor([[1.0, 1, 0, 0]]).repeat(4, 1)
    with pytest.raises(
        PatternError, match=r"weight is not 2:4t: column 0, rows 0:4 have more than 2 non-zeros.\n.*'2:4'"
    ):
        SparseMatrix.from_dense(rows_only, "2:4t")
    with pytest.raises(PatternError, match="mask is not 2:4t: column 0"):
        SparseMatrix.from_dense(rows_only, "2:4t", mask=rows_only.bool())
    with pytest.raises(ShapeError, match="2:4t needs out_features to be a multiple of 4 too"):
        SparseMatrix.from_dense(rows_only[:2], "2:4t")
    matrix = SparseMatrix.from_dense(torch.randn(8, 8), "2:4t", prune=True)
    assert matrix.to_dense().T.contiguous().equal(SparseMatrix.from_dense(matrix.to_dense().T, "2:4t").to_dense())


VALUES = torch.zeros(4, 4)
METADATA = torch.full((4, 1), 0x44, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("values", "metadata", "shape", "error", "message"),
    [
        (VALUES[:3], METADATA, (4, 8), FormatError, r"values of a 2:4 matrix \[4, 8\] must be \[4, 4\], not \[3, 4\]"),
        (
            VALUES,
            METADATA[:, :0],
            (4, 8),
            FormatError,
            r"metadata of a 2:4 matrix \[4, 8\] must be \[4, 1\], not \[4, 0\]",
        ),
        (VALUES, METADATA, (4, 7), FormatError, "in_features 7 is not a multiple of 4"),
        (VALUES, METADATA, (-4, 8), FormatError, r"values of a 2:4 matrix \[-4, 8\] must be"),
        (VALUES, METADATA.to(torch.int8), (4, 8), FormatError, "metadata must be uint8, not torch.int8"),
        (VALUES, METADATA.to("meta"), (4, 8), FormatError, "values are on cpu, metadata on meta: put both on one"),
        (VALUES, METADATA * 0, (4, 8), FormatError, r"indices that repeat or descend: row 0, group 0 \(code 0x0\)"),
        (VALUES[:, :2], METADATA, (4, 4), FormatError, "bits set after the last group"),
        (VALUES.double(), METADATA, (4, 8), UnsupportedError, "a weight of float64"),
    ],
)
def test_records_that_do_not_fit_are_refused(
    values: torch.Tensor, metadata: torch.Tensor, shape: tuple[int, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SparseMatrix(values, metadata, Pattern(), shape)


TWO_MASKS = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool).repeat(4, 1)  # rows 0 2 4 6, and 1 3 5 7


def test_shared_rows_are_checked() -> None:
    weight = TWO_MASKS.float()
    with pytest.raises(
        PatternError,
        match=r"fc is not 2:4x4: rows 0:4 together have more than 2 non-zeros in columns 0:4, and no other.*\n.*'2:4'",
    ):
        SparseMatrix.from_dense(weight[1:7].repeat(2, 1), "2:4x4", name="fc")
    with pytest.raises(ShapeError, match=r"\[6, 4\]: 2:4x4 needs out_features to be a multiple of 4"):
        SparseMatrix.from_dense(torch.zeros(6, 4), "2:4x4")
    lonely = TWO_MASKS.clone()
    lonely[5] = lonely[4]
    with pytest.raises(PatternError, match="mask is not 2:4x4: row 0 and its equals are not a multiple of 4 rows"):
        SparseMatrix.from_dense(weight, "2:4x4", mask=lonely)
    packed = SparseMatrix.from_dense(lonely.float(), "2:4")
    with pytest.raises(FormatError, match="metadata is not 2:4x4: row 0 and its equals are not a multiple of 4 rows"):
        SparseMatrix(packed.values, packed.metadata, Pattern.parse("2:4x4"), packed.shape)


def test_rows_that_share_a_mask_need_not_be_neighbours() -> None:
    matrix = SparseMatrix.from_dense(TWO_MASKS.float(), "2:4x4", mask=TWO_MASKS)
    assert torch.equal(matrix.to_dense(), TWO_MASKS.float())
    SparseMatrix(matrix.values, matrix.metadata, matrix.pattern, matrix.shape)
    found = SparseMatrix.from_dense(TWO_MASKS.float(), "2:4x4")
    assert torch.equal(found.metadata, matrix.metadata)
    assert torch.equal(found.values, matrix.values)


def test_scattered_rows_with_fewer_non_zeros_get_equal_metadata() -> None:
    weight = TWO_MASKS.float()
    weight[2, 0] = weight[7, 3] = weight[0, 1] = 0
    matrix = SparseMatrix.from_dense(weight, "2:4x4")
    assert torch.equal(matrix.mask(), TWO_MASKS)
    assert torch.equal(matrix.to_dense(), weight)


def test_neighbours_with_fewer_non_zeros_get_equal_metadata() -> None:
    weight = torch.zeros(4, 4)
    weight[0, 0], weight[1, 1], weight[2, 0] = 3.0, 4.0, -0.0
    matrix = SparseMatrix.from_dense(weight, "2:4x4")
    assert matrix.metadata.unique().numel() == 1
    assert_same_bits(matrix.to_dense(), where(weight != 0, weight))


def test_transposable_matrices_are_checked_when_they_are_made() -> None:
    rows_only = SparseMatrix.from_dense(torch.tensor([[1.0, 1, 0, 0]]).repeat(4, 1))
    with pytest.raises(FormatError, match="matrix is not 2:4t: column 0, rows 0:4 have more than 2 non-zeros"):
        SparseMatrix(rows_only.values, rows_only.metadata, Pattern.parse("2:4t"), rows_only.shape)
    two_rows = SparseMatrix.from_dense(torch.tensor([[1.0, 1, 0, 0]]).repeat(2, 1))
    with pytest.raises(FormatError, match="2:4t needs out_features to be a multiple of 4 too"):
        SparseMatrix(two_rows.values, two_rows.metadata, Pattern.parse("2:4t"), two_rows.shape)
    one = torch.zeros(4, 4)
    one[0, 0] = 1  # fillers crowd the last columns, and count for nothing
    assert torch.equal(SparseMatrix.from_dense(one, "2:4t").to_dense(), one)


@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_copies_and_pickles_hold_the_matrix_and_nothing_else(dtype: torch.dtype) -> None:
    matrix = SparseMatrix.from_dense(hostile_tensor((8, 16), dtype), mask=random_mask((8, 16), "2:4"))
    matrix.prepared["cpu"] = (matrix.values, matrix.metadata)
    for other in (pickle.loads(pickle.dumps(matrix)), copy.deepcopy(matrix)):
        assert_same_bits(other.values, matrix.values)
        assert_same_bits(other.metadata, matrix.metadata)
        assert (other.pattern, other.shape, other.prepared) == (matrix.pattern, matrix.shape, {})
        assert other.values.data_ptr() != matrix.values.data_ptr()
