"""The CUDA layout: lanes that hold what mma.sp takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.cuda import model

from twofour import ShapeError, SparseMatrix, UnsupportedError
from twofour.kernels.cuda import layout

SHAPES = [(16, 64), (32, 128), (5, 4), (40, 100), (33, 196), (1, 64), (128, 256)]
DTYPES = [torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn]


def matrix_of(shape: tuple[int, int], dtype: torch.dtype) -> SparseMatrix:
    """Whole numbers, so that products are exact in whatever order; -128 among them."""
    generator = torch.Generator().manual_seed(shape[0] * shape[1])
    low, high = (-128, 128) if dtype == torch.int8 else (-4, 5)
    dense = torch.randint(low, high, shape, generator=generator).to(dtype)
    mask = torch.zeros(shape, dtype=torch.bool)
    places = torch.rand(shape[0], shape[1] // 4, 4, generator=generator).topk(2).indices
    mask.view(shape[0], -1, 4).scatter_(2, places, True)
    return SparseMatrix.from_dense(dense, "2:4", mask=mask)


def as_numbers(items: torch.Tensor) -> np.ndarray:
    return items.double().numpy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_there_and_back_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = matrix_of(shape, dtype)
    values, metadata = layout.pack(matrix.values, matrix.metadata, *shape)
    assert (tuple(values.shape), tuple(metadata.shape)) == layout.packed_shapes(*shape, dtype)
    back, back_metadata = layout.unpack(values, metadata, *shape)
    assert torch.equal(back.view(torch.uint8), matrix.values.view(torch.uint8))
    assert torch.equal(back_metadata, matrix.metadata)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_of_a_model_of_the_hardware_is_that_of_the_dense_matrix(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Fragment by fragment, with every selector, as a kernel would multiply."""
    matrix = matrix_of(shape, dtype)
    values, metadata = layout.pack(matrix.values, matrix.metadata, *shape)
    bits, width, steps = (16, 32, 2) if dtype.itemsize == 2 else (8, 64, 1)
    tiles, chunks, _ = metadata.shape
    words = metadata.numpy().view(np.uint32)
    b = np.random.default_rng(0).integers(-4, 5, (chunks * 64, 8)).astype(np.float64)
    found = np.zeros((tiles * 16, 8))
    for tile in range(tiles):
        for step in range(chunks * steps):
            registers = as_numbers(values[tile, step])
            a = model.sparse_a(registers, words[tile, step // steps], step % steps, bits)
            part = b[step * width : (step + 1) * width]
            again = model.dense_b(model.fragment_of_b(part, bits), bits)
            assert np.array_equal(again, part)
            found[tile * 16 : tile * 16 + 16] += a @ again
    dense = np.zeros((tiles * 16, chunks * 64))
    dense[: shape[0], : shape[1]] = as_numbers(matrix.to_dense())
    assert np.array_equal(found, dense @ b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_widen_into_the_layout_of_two_bytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = matrix_of(shape, torch.float8_e4m3fn)
    found = layout.widen(*layout.pack(matrix.values, matrix.metadata, *shape), dtype)
    for own, wanted in zip(found, layout.pack(matrix.values.to(dtype), matrix.metadata, *shape), strict=True):
        assert own.shape == wanted.shape
        assert torch.equal(own, wanted)


def test_indices_rise_as_ordered_metadata_must() -> None:
    matrix = matrix_of((64, 128), torch.bfloat16)
    _, metadata = layout.pack(matrix.values, matrix.metadata, 64, 128)
    nibbles = (metadata[..., None] >> 4 * torch.arange(8, dtype=torch.int32)) & 15
    assert set(nibbles.unique().tolist()) == {0x4, 0x8, 0x9, 0xC, 0xD, 0xE}


def test_padding_is_zeros_under_the_nibble_of_the_first_two() -> None:
    matrix = matrix_of((3, 8), torch.int8)
    values, metadata = layout.pack(matrix.values, matrix.metadata, 3, 8)
    assert int((values != 0).sum()) == int((matrix.values != 0).sum())
    nibbles = (metadata[..., None] >> 4 * torch.arange(8, dtype=torch.int32)) & 15
    assert int((nibbles != layout.PADDING_NIBBLE).sum()) <= 6


def test_what_it_refuses() -> None:
    with pytest.raises(UnsupportedError, match="float32 has no CUDA layout: float16, bfloat16, int8"):
        layout.packed_shapes(16, 64, torch.float32)
    with pytest.raises(ShapeError, match=r"\[16, 6\] has no CUDA layout: its columns come in groups of 4"):
        layout.packed_shapes(16, 6, torch.int8)
