"""What the tests on GPUs compare with, computed on the CPU."""

from __future__ import annotations

import gc
from functools import partial

import torch
from torch import Tensor

from twofour import SparseMatrix
from twofour.kernels.cuda import layout, packing, products
from twofour.masks import nm_mask
from twofour.testing import assert_same_bits

decoded = partial(products.linear, kernels="decode")
tiled = partial(products.linear, kernels="gemm")
SLOW = 1 << 24
"""Weights that plain torch takes seconds for on a CPU."""


def specified(dense: Tensor, mask: Tensor) -> packing.PackedMatrix:
    """`layout.pack` of a matrix under a mask."""
    matrix = SparseMatrix.from_dense(dense.contiguous(), "2:4", mask=mask.contiguous())
    rows, columns = matrix.shape
    return packing.PackedMatrix(*layout.pack(matrix.values, matrix.metadata, rows, columns), (rows, columns))


def mask_of(weight: Tensor, pattern: str) -> Tensor:
    """By magnitude."""
    return nm_mask(weight.cpu().float().abs(), pattern)


def assert_packed(found: packing.PackedMatrix, dense: Tensor, mask: Tensor) -> None:
    """Bit for bit what the specification makes of `dense` under `mask`, on the CPU unless that takes seconds."""
    where = torch.device("cpu") if dense.numel() < SLOW else found.values.device
    wanted = specified(dense.to(where), mask.to(where))
    assert found.shape == wanted.shape
    assert_same_bits(found.values, wanted.values)
    assert_same_bits(found.metadata, wanted.metadata)


def bytes_held(gpu: torch.device) -> int:
    """Of tensors that are alive; garbage is let go of first, which earlier tests leave too."""
    gc.collect()
    torch.cuda.synchronize(gpu)
    torch.cuda.empty_cache()  # and memory whose last use on another stream is over
    return torch.cuda.memory_allocated(gpu)


def pruned(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0, *, whole: bool = False) -> Tensor:
    """2:4 of N(0, 1), on the CPU; with `whole`, of whole numbers from -4 to 4."""
    generator = torch.Generator().manual_seed(seed)
    if whole or not dtype.is_floating_point:
        dense = torch.randint(-4, 5, shape, generator=generator).float()
    else:
        dense = torch.randn(shape, generator=generator).to(dtype).float()
    return torch.where(nm_mask(dense.abs(), "2:4"), dense, 0.0).to(dtype)  # a product would have -0.0
