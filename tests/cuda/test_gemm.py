"""The kernels for many tokens, on an emulated GPU: exact in whole numbers, for every format, tile, tail and way to share."""

from __future__ import annotations

import pytest
import torch
from tests.cuda.emulation import Guarded, launch
from tests.cuda.products import DTYPES, E4M3, Case, close, launched, name_of, numbers, packed_of, powers, tiled

from twofour import ShapeError, UnsupportedError
from twofour.kernels import epilogue
from twofour.kernels.cuda import arguments, decode, products, resources, table
from twofour.kernels.cuda.gemm import plan
from twofour.kernels.cuda.tiles import TILES

__all__ = ["launched"]


def run(case: Case, tile: str, slices: int = 1) -> torch.Tensor:
    """What the kernel gives; twice where columns are shared: counters are as they were."""
    rows, columns = case.shape
    blocks = -(-rows // TILES[tile].rows) * -(-case.tokens // TILES[tile].tokens)
    stages = -(-columns * case.dtype.itemsize // 128)
    each = -(-stages // slices)
    partial = counters = None
    if slices > 1:
        shape = (-(-stages // each), blocks, TILES[tile].tokens, TILES[tile].rows)
        partial = Guarded(torch.full(shape, 0x7FFFFFFF, dtype=torch.int32))
        counters = Guarded(torch.zeros(blocks, dtype=torch.int32))
    grid = (blocks, -(-stages // each))
    for _ in range(min(slices, 2)):
        name = f"gemm_{arguments.NAMES[case.dtype]}_{tile}"
        launch(name, grid, TILES[tile].threads, *case.of_product(), each, partial, counters, *case.of_epilogue())
        assert counters is None or not counters.tensor().any()
    return case.y.tensor()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_are_exact(dtype: torch.dtype, tile: str) -> None:
    """More stages than are under way at once, the last one cut off; more than one block each way, the last ones cut off."""
    across = TILES[tile].tokens + 9
    case = Case(dtype, across, (TILES[tile].rows + 20, 712 // dtype.itemsize), bias=True, residual=True)
    assert torch.equal(run(case, tile), case.wanted().to(case.out))


@pytest.mark.parametrize("shape", [(4, 4), (17, 60), (33, 64), (65, 68), (130, 196), (50, 1032)], ids=str)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_any_shape(dtype: torch.dtype, tile: str, shape: tuple[int, int]) -> None:
    case = Case(dtype, shape[0] % 11 + 1, shape, bias=True)
    assert torch.equal(run(case, tile), case.wanted().to(case.out))


@pytest.mark.parametrize(("tile", "slices"), [("128x64", 2), ("128x64", 5), ("128x128", 3), ("256x128", 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_that_share_columns_add_up(dtype: torch.dtype, tile: str, slices: int) -> None:
    case = Case(dtype, 70, (150, 1200 // dtype.itemsize), bias=True, scales=True)
    assert torch.equal(run(case, tile, slices), case.wanted().to(case.out))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("activation", epilogue.ACTIVATIONS)
@pytest.mark.parametrize("out", arguments.ITEMS, ids=str)
def test_what_follows_the_sums(out: torch.dtype, activation: str, tile: str) -> None:
    case = Case(torch.int8, 37, (47, 8), out=out, bias=True, scales=True, activation=activation, residual=True)
    assert case.residual is not None
    assert close(run(case, tile), case.wanted(), case.residual)


def test_blocks_go_down_2048_rows_before_the_next_tokens() -> None:
    """17 tiles of rows and three of tokens: the second round of rows has one tile."""
    case = Case(torch.int8, 130, (2100, 4))
    assert torch.equal(run(case, "128x64"), case.wanted().to(case.out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_takes_what_few_tokens_take(
    dtype: torch.dtype, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, rows, columns = 70, 36, 2200
    monkeypatch.setattr(resources, "_of_streams", {})
    monkeypatch.setattr(resources, "processors", lambda _: 132)
    packed, dense = packed_of((rows, columns), dtype)
    x = numbers((tokens, columns + 5), dtype, 4)[:, 5:]
    out = torch.bfloat16 if dtype == torch.int8 else dtype
    bias, residual = numbers((rows,), out, 9), numbers((tokens, rows), out, 9)
    row_scale, token_scale = powers(rows, 1), powers(tokens, 2)
    y = tiled(x, packed, bias, row_scale=row_scale, token_scale=token_scale, activation="relu", residual=residual)
    sums = x.double() @ dense.double().T * row_scale.double() * token_scale.double()[:, None]
    assert torch.equal(y, ((sums + bias.double()).relu() + residual.double()).to(out))
    assert len(launched) == 1
    assert launched[0].startswith(f"gemm_{arguments.NAMES[dtype]}_")
    (counters,) = resources._of_streams.values()
    assert not counters.any()


def test_nothing_is_launched_for_nothing_or_for_what_does_not_fit(launched: list[str]) -> None:
    packed, _ = packed_of((20, 64), torch.bfloat16)
    for linear in (tiled, products.linear):
        assert linear(torch.zeros(0, 64, dtype=torch.bfloat16), packed).shape == (0, 20)
        nothing, _ = packed_of((20, 0), torch.bfloat16)
        bias = numbers((20,), torch.bfloat16, 9)
        assert torch.equal(linear(torch.zeros(70, 0, dtype=torch.bfloat16), nothing, bias), bias.expand(70, 20))
        with pytest.raises(ShapeError, match=r"x is \[70, 32\]: a weight of \[20, 64\] takes \[\.\.\., 64\]"):
            linear(torch.zeros(70, 32, dtype=torch.bfloat16), packed)
        with pytest.raises(UnsupportedError, match="activation 'tanh' is unknown"):
            linear(torch.zeros(70, 64, dtype=torch.bfloat16), packed, activation="tanh")
    with pytest.raises(UnsupportedError, match="kernels is 'few': it must be 'decode' or 'gemm', or None"):
        products.linear(torch.zeros(70, 64, dtype=torch.bfloat16), packed, kernels="few")  # type: ignore[arg-type]
    assert launched == []


def test_as_many_tokens_as_there_are_choose_the_kernel(launched: list[str]) -> None:
    packed, dense = packed_of((20, 64), torch.bfloat16)
    for tokens, kernel in ((1, "decode"), (products.MOST_DECODED, "decode"), (products.MOST_DECODED + 1, "gemm")):
        x = numbers((tokens, 64), torch.bfloat16, 4)
        assert torch.equal(products.linear(x, packed, out_dtype=torch.float32), x.float() @ dense.float().T)
        assert launched.pop().startswith(kernel)
        assert launched == []


@pytest.mark.parametrize("dtype", arguments.NAMES_OF_E4M3, ids=str)
def test_e4m3_weights_are_read_up_to_four_times_and_then_widened(dtype: torch.dtype, launched: list[str]) -> None:
    packed, dense = packed_of((20, 60), E4M3)
    out = torch.bfloat16 if dtype == E4M3 else dtype
    name, scale = name_of(dtype, E4M3), powers(20, 1)
    for tokens, kernels in (
        (products.MOST_DECODED_E4M3, [f"decode_{name}_64"] * 4),
        (products.MOST_DECODED_E4M3 + 1, [f"gemm_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_128x128"]),
    ):
        x, bias = numbers((tokens, 60), dtype, 4), numbers((20,), out, 9)
        y = products.linear(x, packed, bias, row_scale=scale)
        assert torch.equal(y, (x.double() @ dense.double().T * scale.double() + bias.double()).to(out))
        assert launched == kernels
        launched.clear()
    assert torch.equal(tiled(x[:9], packed, bias, row_scale=scale), y[:9])


@pytest.mark.parametrize("itemsize", [1, 2])
@pytest.mark.parametrize("room", [99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("tokens", [65, 128, 200, 512, 4096])
@pytest.mark.parametrize("shape", [(8192, 8192), (28672, 8192), (4096, 14336), (64, 64), (128, 65536)], ids=str)
def test_the_plan_covers_everything_once(shape: tuple[int, int], tokens: int, room: int, itemsize: int) -> None:
    found = plan(*shape, tokens, itemsize, 132, room)
    tile, stages = TILES[found.tile], -(-shape[1] * itemsize // 128)
    assert found.slice * found.slices >= stages > found.slice * (found.slices - 1)
    assert found.blocks == -(-shape[0] // tile.rows) * -(-tokens // tile.tokens)
    assert tile.stages * tile.stage_bytes(itemsize) <= room
    for dtype in ("int8",) if itemsize == 1 else ("bf16", "fp16"):
        text = table.KERNEL_TEXTS[f"gemm_{dtype}_{found.tile}"]
        assert (text.threads, text.dynamic_bytes) == (tile.threads, tile.stages * tile.stage_bytes(itemsize))
    if shape[0] * shape[1] >= 1 << 26:
        assert found.blocks * found.slices >= 0.75 * 132
    assert found.slices == 1 or found.blocks < 4 * 132


def test_the_plan_takes_tall_tiles_where_there_is_room_and_work() -> None:
    assert plan(8192, 8192, 4096, 2, 132, 227 << 10).tile == "256x128"
    assert plan(8192, 8192, 4096, 2, 128, 99 << 10).tile == "128x128"
    assert plan(8192, 8192, 4096, 2, 132, 227 << 10).slices == 1
    assert plan(1024, 8192, 65, 2, 132, 227 << 10).slices > 4
    assert decode.MOST_TOKENS == products.MOST_DECODED
