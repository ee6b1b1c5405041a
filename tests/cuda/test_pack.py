"""Kernels that pack, run on an emulated GPU: the bytes of the specification."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.cuda.emulation import Guarded, launch
from tests.cuda.test_layout import matrix_of
from torch import Tensor

from twofour import SparseMatrix
from twofour.kernels.cuda import layout
from twofour.masks import nm_mask

SHAPES = [(64, 64), (4, 4), (16, 64), (68, 132), (128, 60), (60, 200)]
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def weights(shape: tuple[int, int], dtype: torch.dtype, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0] + shape[1])
    normal = torch.randn(shape, generator=generator)
    if kind == "normal":
        return normal.to(dtype)
    if kind == "ties":
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)
    if kind == "far apart":  # exponents that 32 bits do not hold, and some that 64 do not
        power = torch.randint(-60 if dtype == torch.bfloat16 else -14, 15, shape, generator=generator)
        return (normal * 2.0**power).to(dtype)
    if kind == "beyond double":  # equal large weights beside small ones, of which double forgets the last bits
        small = torch.randint(128, 256, shape, generator=generator).double()
        large = 255 * 2.0 ** (45 if dtype == torch.bfloat16 else 0)
        return torch.where(torch.rand(shape, generator=generator) < 0.6, large, small).to(dtype)
    if kind == "edges":  # NaN, infinities, subnormals, -0.0
        special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-40, 6e-8, 1.0])
        places = torch.randint(0, 8, shape, generator=generator)
        return torch.where(torch.rand(shape, generator=generator) < 0.3, special[places], normal).to(dtype)
    raw = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)
    return raw.view(dtype)


def outputs(rows: int, columns: int, dtype: torch.dtype) -> tuple[Guarded, Guarded]:
    """Memory for packed weights; whatever is not written shows."""
    shape, meta_shape = layout.packed_shapes(rows, columns, dtype)
    as_bytes = torch.full((*shape[:-1], 16), 0xA5, dtype=torch.uint8)
    return Guarded(as_bytes.view(dtype)), Guarded(torch.full(meta_shape, -0x5A5A5A5B, dtype=torch.int32))


def same(found: tuple[Guarded, Guarded], wanted: tuple[Tensor, Tensor]) -> None:
    for own, other in zip(found, wanted, strict=True):
        assert torch.equal(bits(own.tensor()), bits(other))


def warps(rows: int, columns: int) -> int:
    return -(-rows // 16) * -(-columns // 64)


@pytest.mark.parametrize("kind", ["normal", "ties", "far apart", "beyond double", "edges", "any bits"])
@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prune_both_is_the_best_transposable_mask_packed_both_ways(
    shape: tuple[int, int], name: str, kind: str
) -> None:
    rows, columns = shape
    weight = weights(shape, HALVES[name], kind)
    mask = nm_mask(weight.abs().double(), "2:4t")
    own, turned = outputs(rows, columns, weight.dtype), outputs(columns, rows, weight.dtype)
    written = Guarded(torch.zeros(shape, dtype=torch.bool))
    grid = (-(-columns // 64), -(-rows // 64))
    launch(f"prune_both_{name}", grid, 256, Guarded(weight), columns, rows, columns, *own, *turned, written)
    assert torch.equal(written.tensor(), mask)
    for found, dense, kept in ((own, weight, mask), (turned, weight.T.contiguous(), mask.T.contiguous())):
        matrix = SparseMatrix.from_dense(dense, "2:4", mask=kept)
        same(found, layout.pack(matrix.values, matrix.metadata, *dense.shape))


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_block_packs_several_squares(blocks: int) -> None:
    rows, columns = 68, 260
    weight = weights((rows, columns), torch.bfloat16, "far apart")
    own, turned = outputs(rows, columns, weight.dtype), outputs(columns, rows, weight.dtype)
    launch("prune_both_bf16", (blocks, 2), 256, Guarded(weight), columns, rows, columns, *own, *turned, 0)
    mask = nm_mask(weight.abs().double(), "2:4t")
    for found, dense, kept in ((own, weight, mask), (turned, weight.T.contiguous(), mask.T.contiguous())):
        matrix = SparseMatrix.from_dense(dense, "2:4", mask=kept)
        same(found, layout.pack(matrix.values, matrix.metadata, *dense.shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_warp_packs_several_tiles(dtype: torch.dtype) -> None:
    weight = torch.randn(70, 132).to(dtype)
    found = outputs(70, 132, dtype)
    name = "prune_bf16" if dtype == torch.bfloat16 else "prune_e4m3"
    launch(name, (1, 2), 256, Guarded(weight), 132, 70, 132, *found, 0)
    matrix = SparseMatrix.from_dense(weight, "2:4", mask=nm_mask(weight.float().abs(), "2:4"))
    same(found, layout.pack(matrix.values, matrix.metadata, 70, 132))


def test_masks_that_are_equally_good_are_told_apart_by_their_first_places() -> None:
    """All 90 masks, each of them the best of a block, alone or along with others."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 3, (128, 128), generator=generator)  # few sums, many masks of each
    for scale in (1.0, 2.0**-120, 2.0**100):
        weight = (blocks * scale).bfloat16()
        own, turned = outputs(128, 128, weight.dtype), outputs(128, 128, weight.dtype)
        mask = Guarded(torch.zeros(128, 128, dtype=torch.bool))
        launch("prune_both_bf16", (2, 2), 256, Guarded(weight), 128, 128, 128, *own, *turned, mask)
        wanted = nm_mask(weight.abs().double(), "2:4t")
        assert torch.equal(mask.tensor(), wanted)
        assert len(torch.unique(wanted.view(32, 4, 32, 4).transpose(1, 2).reshape(-1, 16), dim=0)) == 90


@pytest.mark.parametrize("kind", ["normal", "ties", "edges", "any bits"])
@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("shape", [*SHAPES, (7, 68)], ids=str)
def test_prune_keeps_the_larger_two_of_each_four(shape: tuple[int, int], name: str, kind: str) -> None:
    rows, columns = shape
    weight = weights(shape, HALVES[name], kind)
    mask = nm_mask(weight.abs().double(), "2:4")
    found = outputs(rows, columns, weight.dtype)
    status = Guarded(torch.zeros(1, dtype=torch.int32))
    launch(
        f"prune_{name}", (-(-warps(rows, columns) // 8),), 256, Guarded(weight), columns, rows, columns, *found, status
    )
    matrix = SparseMatrix.from_dense(weight, "2:4", mask=mask)
    same(found, layout.pack(matrix.values, matrix.metadata, rows, columns))
    assert int(status.tensor()) == 0


NAMES: dict[torch.dtype, str] = {
    torch.bfloat16: "half",
    torch.float16: "half",
    torch.int8: "int8",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
}


@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (7, 68)], ids=str)
def test_compress_take_and_expand(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, columns = shape
    matrix = matrix_of(shape, dtype)
    dense = matrix.to_dense()
    grid = (-(-warps(rows, columns) // 8),)
    found = outputs(rows, columns, dtype)
    status = Guarded(torch.zeros(1, dtype=torch.int32))
    launch(f"compress_{NAMES[dtype]}", grid, 256, Guarded(dense), columns, rows, columns, *found, status)
    assert int(status.tensor()) == 0
    values, metadata = layout.unpack(found[0].tensor(), found[1].tensor(), rows, columns)
    again = SparseMatrix(values, metadata, matrix.pattern, shape).to_dense()
    assert torch.equal(again.double(), dense.double())
    size = "half" if dtype.itemsize == 2 else "byte"
    back = Guarded(torch.ones(shape).to(dtype))
    launch(f"expand_{size}", grid, 256, *found, rows, columns, back, columns)
    assert torch.equal(back.tensor().double(), dense.double())
    packed = layout.pack(matrix.values, matrix.metadata, rows, columns)
    taken = outputs(rows, columns, dtype)[0]
    launch(f"take_{size}", grid, 256, Guarded(dense), columns, rows, columns, Guarded(packed[1]), taken)
    assert torch.equal(bits(taken.tensor()), bits(packed[0]))


@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_compress_tells_of_a_group_that_keeps_three(dtype: torch.dtype) -> None:
    for row, column in ((0, 0), (17, 66), (39, 99)):
        dense = matrix_of((40, 100), dtype).to_dense()
        dense[row, column // 4 * 4 : column // 4 * 4 + 3] = torch.ones(3).to(dtype)
        status = Guarded(torch.zeros(1, dtype=torch.int32))
        launch(
            f"compress_{NAMES[dtype]}",
            (1,),
            256,
            Guarded(dense),
            100,
            40,
            100,
            *outputs(40, 100, dtype),
            status,
        )
        assert int(status.tensor()) == 1


def test_minus_zero_is_a_zero_for_floats_and_minus_128_is_none_for_integers() -> None:
    for dtype, name in ((torch.bfloat16, "half"), (torch.float8_e4m3fn, "fp8")):
        dense = torch.tensor([[-0.0, 1.0, -0.0, 2.0] * 4]).to(dtype)
        found, status = outputs(1, 16, dtype), Guarded(torch.zeros(1, dtype=torch.int32))
        launch(f"compress_{name}", (1,), 256, Guarded(dense), 16, 1, 16, *found, status)
        values, _ = layout.unpack(found[0].tensor(), found[1].tensor(), 1, 16)
        assert values.float().tolist() == [[1.0, 2.0] * 4]
        assert int(status.tensor()) == 0
    dense = torch.tensor([[0, -128, 5, 0] * 4], dtype=torch.int8)
    found, status = outputs(1, 16, torch.int8), Guarded(torch.zeros(1, dtype=torch.int32))
    launch("compress_int8", (1,), 256, Guarded(dense), 16, 1, 16, *found, status)
    assert layout.unpack(found[0].tensor(), found[1].tensor(), 1, 16)[0].tolist() == [[-128, 5] * 4]


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_rows_need_no_alignment(offset: int) -> None:
    """A view whose rows begin anywhere, and are farther apart than they are long."""
    whole = torch.randn(16, 71).bfloat16()
    weight = whole[:, offset : offset + 64]
    matrix = SparseMatrix.from_dense(weight.contiguous(), "2:4", mask=nm_mask(weight.abs().double(), "2:4"))
    found, status = outputs(16, 64, weight.dtype), Guarded(torch.zeros(1, dtype=torch.int32))
    memory = Guarded(whole)
    place: Callable[[], int] = lambda: memory.place + 2 * offset  # noqa: E731
    launch("prune_bf16", (1,), 256, place(), 71, 16, 64, *found, status)
    same(found, layout.pack(matrix.values, matrix.metadata, 16, 64))
