"""The kernels for few tokens, on an emulated GPU: exact in whole numbers, for every format, size and way to share columns."""

from __future__ import annotations

import pytest
import torch
from tests.cuda.emulation import Guarded, launch
from tests.cuda.test_layout import matrix_of
from torch import Tensor

from twofour.kernels.cuda import layout
from twofour.kernels.cuda.decode import plan

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}


def run(
    dtype: torch.dtype, tokens: int, shape: tuple[int, int], slices: int, *, bias: bool = False, scales: bool = False
) -> tuple[Tensor, Tensor]:
    """What the kernel gives, and what is right, in double."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(tokens)
    matrix = matrix_of(shape, dtype)
    x = torch.randint(-4, 5, (tokens, columns), generator=generator).to(dtype)
    out = torch.bfloat16 if dtype == torch.int8 else dtype
    b = torch.randint(-9, 10, (rows,), generator=generator).to(out)
    of_rows = 2.0 ** torch.randint(-3, 4, (rows,), generator=generator)
    of_tokens = 2.0 ** torch.randint(-3, 4, (tokens,), generator=generator)
    values, metadata = layout.pack(matrix.values, matrix.metadata, rows, columns)
    wide = -(-columns * dtype.itemsize // 16) * 16 // dtype.itemsize  # rows of x begin at multiples of 16 bytes
    padded = torch.zeros(tokens, wide, dtype=dtype)
    padded[:, :columns] = x
    chunks = metadata.shape[1]
    each = -(-chunks // slices)
    blocks = -(-metadata.shape[0] // 8)
    sums = torch.int32 if dtype == torch.int8 else torch.float32
    y, counters = (
        Guarded(torch.full((tokens, rows), float("nan"), dtype=out)),
        Guarded(torch.zeros(blocks, dtype=torch.int32)),
    )
    name = f"decode_{NAMES[dtype]}_{next(size for size in (8, 16, 32, 64) if size >= tokens)}"
    for _ in range(2):  # counters are as they were
        launch(
            name,
            (blocks, -(-chunks // each)),
            256,
            Guarded(values),
            Guarded(metadata),
            Guarded(padded),
            wide * dtype.itemsize,
            Guarded(b) if bias else None,
            Guarded(of_rows) if scales else None,
            Guarded(of_tokens) if scales else None,
            y,
            rows,
            tokens,
            rows,
            columns,
            each,
            Guarded(torch.full((slices, tokens, rows), 0x7FFFFFFF, dtype=torch.int32).view(sums)),
            counters,
        )
        assert not counters.tensor().any()
    wanted = x.double() @ matrix.to_dense().double().T
    if scales:
        wanted = wanted * of_rows.double() * of_tokens.double()[:, None]
    if bias:
        wanted = wanted + b.double()
    return y.tensor(), wanted.to(out)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 31, 33, 64])
@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_whole_numbers_are_exact(dtype: torch.dtype, tokens: int) -> None:
    found, wanted = run(dtype, tokens, (40, 200), 1)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", [(4, 4), (16, 64), (130, 60), (17, 1100), (300, 576)], ids=str)
@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_any_shape(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    found, wanted = run(dtype, 5, shape, 1, bias=True)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("slices", [2, 3, 5])
@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_blocks_that_share_columns_add_up(dtype: torch.dtype, slices: int) -> None:
    found, wanted = run(dtype, 12, (150, 1400), slices, bias=True, scales=True)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("tokens", [1, 8, 32, 64])
@pytest.mark.parametrize(
    "shape", [(8192, 8192), (28672, 8192), (4096, 14336), (64, 64), (1024, 128), (128, 65536)], ids=str
)
def test_the_plan_covers_all_chunks_and_fills_the_gpu(shape: tuple[int, int], tokens: int) -> None:
    found = plan(*shape, 132)
    chunks = -(-shape[1] // 64)
    assert found.slice * found.slices >= chunks > found.slice * (found.slices - 1)
    assert found.blocks == -(-shape[0] // 128)
    if shape[0] * shape[1] >= 1 << 26:
        assert found.blocks * found.slices >= 1.5 * 132
    assert found.slice >= min(chunks, 8)
