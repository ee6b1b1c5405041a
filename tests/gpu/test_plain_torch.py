"""What is plain torch on every device: masks, the format and the CUDA layout give the bits that they give on the CPU."""

from __future__ import annotations

import pytest
import torch

from twofour import SparseMatrix
from twofour.format.pack import VALUE_DTYPES
from twofour.kernels.cuda import layout
from twofour.masks import nm_mask
from twofour.testing import assert_same_bits, hostile_tensor, random_mask

PATTERNS = ["2:4", "1:4", "4:8", "2:4x4", "2:4t", "16:32"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks(pattern: str, device: torch.device) -> None:
    for scores in (
        hostile_tensor((64, 128), torch.float32).abs(),
        torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16().abs(),
        torch.randint(0, 3, (64, 128), generator=torch.Generator().manual_seed(0)).float(),
    ):
        assert torch.equal(nm_mask(scores.to(device), pattern).cpu(), nm_mask(scores, pattern))


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "16:32"])
@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_matrices(dtype: torch.dtype, pattern: str, device: torch.device) -> None:
    dense, mask = hostile_tensor((24, 96), dtype), random_mask((24, 96), pattern)
    here = SparseMatrix.from_dense(dense, pattern, mask=mask)
    there = SparseMatrix.from_dense(dense.to(device), pattern, mask=mask.to(device))
    assert there.device.type == device.type
    assert_same_bits(there.values, here.values)
    assert_same_bits(there.metadata, here.metadata)
    assert_same_bits(there.to_dense(), here.to_dense())
    assert torch.equal(there.mask().cpu(), here.mask())
    assert_same_bits(here.to(device).to_dense(), here.to_dense())


@pytest.mark.parametrize("dtype", layout.DTYPES, ids=str)
def test_the_layout(dtype: torch.dtype, device: torch.device) -> None:
    dense, mask = hostile_tensor((40, 100), dtype), random_mask((40, 100), "2:4")
    matrix = SparseMatrix.from_dense(dense, "2:4", mask=mask)
    here = layout.pack(matrix.values, matrix.metadata, 40, 100)
    there = layout.pack(matrix.values.to(device), matrix.metadata.to(device), 40, 100)
    for own, other in zip(there, here, strict=True):
        assert_same_bits(own, other)
    for own, other in zip(layout.unpack(*there, 40, 100), (matrix.values, matrix.metadata), strict=True):
        assert_same_bits(own, other)
