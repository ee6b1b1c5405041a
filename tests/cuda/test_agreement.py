"""Our format and torch's own CPU packer, `torch.sparse._semi_structured_conversions`, say the same of the same weight.

Kept values, kept places and dense weights agree to the bit for every dtype that torch packs, whoever chose the mask. They
also agree on fillers, the places that are stored in groups with fewer than two non-zeros: {0, 2} for {0}, {1, 2} for {1},
{2, 3} for {2}, {3} and {}. Where they differ, each with a test at the end:

- torch looks for non-zeros alone. A zero that a mask keeps is kept by ours, where the mask says; torch stores a filler.
- A filler of ours is +0.0. torch copies what is at its place, so -0.0 stays -0.0 (and CUTLASS multiplies it).
- Of a group with more than two non-zeros torch silently keeps two, by place and not by size; ours raises PatternError.
- torch has no layout for float8, and for float32 one of 1:2, which our format knows as a pattern of its own.
- An odd number of words of metadata in a row makes torch write beside its tensor; ours raises ShapeError, and the vendor
  backend pads.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from tests.cuda import model
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from twofour import PatternError, ShapeError, SparseMatrix, UnsupportedError
from twofour.interop.torch_semi_structured import from_cutlass, to_cutlass
from twofour.kernels.cuda import layout
from twofour.masks import nm_mask
from twofour.testing import assert_same_bits, hostile_tensor, integer_tensor, random_mask

DTYPES = (torch.float16, torch.bfloat16, torch.int8)
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
SHAPE = (96, 192)


def nonzero_tensor(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Every number of the hostile ones but the zeros; subnormals, NaN and infinities too."""
    weight = hostile_tensor(shape, dtype)
    return torch.where(weight == 0, torch.ones_like(weight), weight)


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, weight, torch.zeros_like(weight))


def assert_agreement(matrix: SparseMatrix) -> None:
    """In both directions: torch packs what we unpack, and unpacks what we pack."""
    dense = matrix.to_dense()
    values, words = sparse_semi_structured_from_dense_cutlass(dense)
    assert_same_bits(matrix.values, values)
    assert_same_bits(to_cutlass(matrix)[1], words)
    assert_same_bits(from_cutlass(values, words, matrix.shape).metadata, matrix.metadata)
    assert_same_bits(sparse_semi_structured_to_dense_cutlass(*to_cutlass(matrix)), dense)


def every_word() -> Tensor:
    """bool SHAPE: each of the six pairs of places beside each other, in every place of a word and every row of a group."""
    neighbours = torch.tensor([PAIRS.index(pair) for both in product(PAIRS, PAIRS) for pair in both])
    groups = torch.stack([neighbours.roll(row) for row in range(SHAPE[0])])[:, : SHAPE[1] // 4]
    mask = torch.zeros(*groups.shape, 4, dtype=torch.bool)
    return mask.scatter_(-1, torch.tensor(PAIRS)[groups], True).view(SHAPE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pair_of_places_beside_every_other(dtype: torch.dtype) -> None:
    mask = every_word()
    nibbles = SparseMatrix.from_dense(mask.to(dtype)).metadata
    assert len(nibbles.unique()) == 36
    assert_agreement(SparseMatrix.from_dense(nonzero_tensor(SHAPE, dtype), mask=mask))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "2:4x4", "2:4t"])
def test_masks_by_size(dtype: torch.dtype, pattern: str) -> None:
    weight = nonzero_tensor(SHAPE, dtype)
    assert_agreement(SparseMatrix.from_dense(weight, pattern, prune=True))
    mask = nm_mask(torch.rand(SHAPE), pattern)
    assert_agreement(SparseMatrix.from_dense(weight, pattern, mask=mask))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(32, 64), (64, 128), (96, 320)], ids=str)
def test_groups_of_none_one_and_two(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = masked(nonzero_tensor(shape, dtype), random_mask(shape, "2:4"))
    assert_agreement(SparseMatrix.from_dense(weight))


@pytest.mark.parametrize("wanted", [w for w in product([False, True], repeat=4) if sum(w) <= 2], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fillers(dtype: torch.dtype, wanted: tuple[bool, ...]) -> None:
    assert_agreement(SparseMatrix.from_dense(torch.tensor(wanted).tile(SHAPE[0], SHAPE[1] // 4).to(dtype)))


def test_float32_is_our_pattern_1_2() -> None:
    weight = masked(nonzero_tensor(SHAPE, torch.float32), random_mask(SHAPE, "1:2"))
    matrix = SparseMatrix.from_dense(weight, "1:2")
    values, words = sparse_semi_structured_from_dense_cutlass(weight)
    assert_same_bits(matrix.values, values)
    assert_same_bits(sparse_semi_structured_to_dense_cutlass(matrix.values, words), matrix.to_dense())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_torch_packed_is_what_tensor_cores_read_from_our_layout(dtype: torch.dtype) -> None:
    """Through the model of mma.sp, with each selector: fragments of torch's pair, in the CUDA layout, are torch's dense."""
    weight = masked(integer_tensor(SHAPE, dtype), every_word())
    pair = sparse_semi_structured_from_dense_cutlass(weight)
    matrix = from_cutlass(*pair, SHAPE)
    fragments, words = layout.pack(matrix.values, matrix.metadata, *SHAPE)
    dense = sparse_semi_structured_to_dense_cutlass(*pair).double().numpy()
    bits, width, steps = (16, 32, 2) if dtype.itemsize == 2 else (8, 64, 1)
    selectors = set()
    for tile, step in product(range(SHAPE[0] // 16), range(SHAPE[1] // width)):
        lanes = words[tile, step // steps].numpy().view(np.uint32)
        a = model.sparse_a(fragments[tile, step].double().numpy(), lanes, step % steps, bits)
        assert np.array_equal(a, dense[tile * 16 : tile * 16 + 16, step * width : step * width + width])
        selectors.add(step % steps)
    assert selectors == set(range(steps))


# Where they differ


def test_a_zero_that_is_kept() -> None:
    mask = torch.tensor([True, True, False, False]).tile(32, 16)
    matrix = SparseMatrix.from_dense(torch.zeros(32, 64).half(), mask=mask)
    assert matrix.metadata.unique().tolist() == [0x44]
    _, words = sparse_semi_structured_from_dense_cutlass(matrix.to_dense())
    assert from_cutlass(matrix.values, words, matrix.shape).metadata.unique().tolist() == [0xEE]
    assert_same_bits(sparse_semi_structured_to_dense_cutlass(*to_cutlass(matrix)), matrix.to_dense())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_minus_zero_in_a_filler(dtype: torch.dtype) -> None:
    weight = torch.tensor([-0.0, 1.0, -0.0, -0.0]).tile(32, 16).to(dtype)
    values, words = sparse_semi_structured_from_dense_cutlass(weight)
    matrix = SparseMatrix.from_dense(weight)
    assert_same_bits(to_cutlass(matrix)[1], words)
    assert bool(values[:, 1::2].signbit().all())
    assert not bool(matrix.values.signbit().any())
    assert torch.equal(values, matrix.values)


def test_a_crowded_group() -> None:
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0]).tile(32, 16).half()
    values, _ = sparse_semi_structured_from_dense_cutlass(weight)
    assert values.unique().tolist() == [1.0, 2.0]
    with pytest.raises(PatternError, match=r"hold \[1, 2, 3, 4\], 4 non-zeros where 2 may be"):
        SparseMatrix.from_dense(weight)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8(dtype: torch.dtype) -> None:
    weight = torch.zeros(32, 64).to(dtype)
    with pytest.raises(RuntimeError, match="Invalid datatype"):
        sparse_semi_structured_from_dense_cutlass(weight)
    with pytest.raises(UnsupportedError, match="have no CUTLASS layout in torch"):
        to_cutlass(SparseMatrix.from_dense(weight))


def test_an_odd_number_of_words() -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        sparse_semi_structured_from_dense_cutlass(torch.zeros(32, 48).half())
    with pytest.raises(ShapeError, match="in_features in multiples of 32"):
        to_cutlass(SparseMatrix.from_dense(torch.zeros(32, 48).half()))
