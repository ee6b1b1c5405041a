"""SparseMatrix.transposed: exact, for every dtype, and only where both axes hold the pattern."""

from __future__ import annotations

import pytest
import torch

from twofour import SparseMatrix
from twofour.errors import PatternError
from twofour.format.pack import VALUE_DTYPES
from twofour.masks import nm_mask
from twofour.testing import assert_same_bits, integer_tensor


@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 4), (8, 20), (36, 12)])
def test_it_is_the_transposed_matrix_bit_for_bit(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = integer_tensor(shape, dtype)
    mask = nm_mask(torch.rand(shape), "2:4t")
    matrix = SparseMatrix.from_dense(weight, "2:4t", mask=mask)
    turned = matrix.transposed()
    assert turned.shape == shape[::-1]
    assert turned.pattern == matrix.pattern
    assert_same_bits(turned.to_dense(), matrix.to_dense().T.contiguous())
    assert torch.equal(turned.mask(), mask.T)
    back = turned.transposed()
    assert_same_bits(back.values, matrix.values)
    assert torch.equal(back.metadata, matrix.metadata)


def test_stored_zeros_give_way_to_numbers() -> None:
    weight = torch.zeros(4, 4)
    weight[0, 0] = weight[1, 0] = 1.0
    matrix = SparseMatrix.from_dense(weight, "2:4t")
    assert int(matrix.mask()[:, 2].sum()) == 4  # every row stores a zero there
    assert torch.equal(matrix.transposed().to_dense(), weight.T)


def test_rows_alone_are_refused() -> None:
    matrix = SparseMatrix.from_dense(torch.eye(4))
    with pytest.raises(PatternError, match=r"pattern 2:4 holds along the rows only: choose the mask with nm_mask"):
        matrix.transposed()
