"""What users give by mistake, or as it happens to lie: the right result or an error that names it, and nothing else changes."""

from __future__ import annotations

import contextlib
import gc
import itertools
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from tests.cuda.products import DTYPES, E4M3, KINDS, decoded, launched, numbers, packed_of, powers, tiled
from tests.cuda.test_layout import matrix_of
from torch import Tensor

from twofour import DeviceError, PatternError, ShapeError, SparseMatrix, UnsupportedError
from twofour.kernels import int8
from twofour.kernels.cuda import arguments, layout, packing, products, resources, table, tokens
from twofour.kernels.cuda.packing import PackedMatrix
from twofour.masks import nm_mask
from twofour.testing import assert_same_bits

__all__ = ["launched"]

WAYS = [decoded, tiled]
SHAPES = list(itertools.product((1, 3, 17), (4, 20, 36)))
MOST_DOWN = 65535
GRID = (2**31 - 1, MOST_DOWN)
META = torch.device("meta")
Launch = tuple[str, tuple[int, ...], tuple[int, ...]]
way = pytest.mark.parametrize("linear", WAYS, ids=["decode", "gemm"])


@pytest.fixture(autouse=True)
def _counters_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_of_streams", "_reserves"):
        monkeypatch.setattr(resources, name, {})
    monkeypatch.setattr(resources, "_kept", [])


@pytest.fixture
def shared_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many processors as have blocks share the columns of small products."""
    monkeypatch.setattr(resources, "processors", lambda _: 132)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Name, grid and arguments of launches that do nothing: tensors of "meta" have sizes and no memory."""
    noted: list[Launch] = []

    def launch(name: str, grid: Sequence[int], device: torch.device, *given: int, **how: Any) -> None:
        noted.append((name, tuple(grid), given))

    monkeypatch.setattr(table, "launch", launch)
    for module in (packing, arguments):
        monkeypatch.setattr(module, "_on_gpu", lambda _: True)
    return noted


def out_of(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def right(x: Tensor, dense: Tensor) -> Tensor:
    return (x.double() @ dense.double().T).to(out_of(x.dtype))


# ---- where tensors lie ------------------------------------------------------------------------------------------------


def views_of(count: int, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    whole = numbers((2 * count, 2 * columns + 3), dtype, 4)
    flat = whole.flatten()
    return {
        "every second row": whole[::2, 16 : 16 + columns],
        "every second column": whole[:count, 1 : 1 + 2 * columns : 2],
        "off by an item": whole[:count, 1 : 1 + columns],
        "rows an odd number of items apart": flat.as_strided((count, columns), (columns + 3, 1), 5),
        "transposed": numbers((columns, count), dtype, 4, 1).T,
        "one row for all": whole[:1, 16 : 16 + columns].expand(count, columns),
        "one row, off by an item": whole[:1, 1 : 1 + columns].expand(count, columns),
        "one number for a row": whole[:count, :1].expand(count, columns),
        "one number for all": whole[:1, :1].expand(count, columns),
        "windows that overlap": flat.as_strided((count, columns), (16, 1), 16),
        "a single row far from the next": flat.as_strided((1, columns), (7, 1), 3),
    }


@way
@pytest.mark.parametrize(("dtype", "weight"), KINDS, ids=str)
def test_x_lies_as_it_likes(
    dtype: torch.dtype, weight: torch.dtype, linear: Callable[..., Tensor], launched: list[str]
) -> None:
    packed, dense = packed_of((20, 68), weight)
    for name, x in views_of(9, 68, dtype).items():
        before = x.clone()
        assert torch.equal(linear(x, packed), right(x, dense)), name
        assert torch.equal(x, before)
    assert launched


@way
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_may_be_a_view_at_a_multiple_of_16_bytes(
    dtype: torch.dtype, linear: Callable[..., Tensor], launched: list[str]
) -> None:
    packed, dense = packed_of((20, 68), dtype)
    x, items = numbers((3, 68), dtype, 4), 16 // dtype.itemsize
    for far in (items, 3 * items):
        values = torch.cat([numbers((far,), dtype, 4), packed.values.flatten()])[far:].view(packed.values.shape)
        metadata = torch.cat([packed.metadata.flatten()[:4], packed.metadata.flatten()])[4:].view(packed.metadata.shape)
        view = PackedMatrix(values, metadata, packed.shape)
        assert torch.equal(linear(x, view), right(x, dense))
        assert torch.equal(packing.expand(view), dense)


@pytest.mark.parametrize("of", ["values", "metadata"])
def test_a_weight_off_a_multiple_of_16_bytes_is_refused_with_where_it_lies(of: str, launched: list[str]) -> None:
    packed, _ = packed_of((20, 64), torch.bfloat16)
    x = numbers((3, 64), torch.bfloat16, 4)
    flat = torch.cat([getattr(packed, of).flatten()[:1], getattr(packed, of).flatten()])
    moved = {"values": packed.values, "metadata": packed.metadata, of: flat[1:].view(getattr(packed, of).shape)}
    view = PackedMatrix(moved["values"], moved["metadata"], packed.shape)
    bytes_off = flat.itemsize + flat.data_ptr() % 16
    message = (
        rf"{of} are .*, {bytes_off} bytes behind a multiple of 16.*: a matrix .* at multiples of 16 bytes.*clone\(\)"
    )
    message = message if of == "values" else message.replace(" are", "")
    for run in (lambda: products.linear(x, view), lambda: packing.expand(view)):
        with pytest.raises(ShapeError, match=message):
            run()
    assert launched == []


@way
@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize("out", arguments.ITEMS, ids=str)
def test_what_is_beside_x_begins_anywhere(
    out: torch.dtype, first: int, linear: Callable[..., Tensor], launched: list[str]
) -> None:
    packed, dense = packed_of((21, 68), torch.int8)
    x = numbers((5, 68), torch.int8, 4)
    bias, row_scale, token_scale = (numbers((30,), out, 9), powers(30, 1), powers(9, 2))
    residual = numbers((6, 29), out, 9)
    y = linear(
        x,
        packed,
        bias[first : first + 21],
        row_scale=row_scale[first : first + 21],
        token_scale=token_scale[first : first + 5],
        residual=residual[1:, first : first + 21],
        out_dtype=out,
    )
    sums = x.double() @ dense.double().T * row_scale[first : first + 21].double()
    sums = sums * token_scale[first : first + 5].double()[:, None] + bias[first : first + 21].double()
    assert torch.equal(y, (sums + residual[1:, first : first + 21].double()).to(out))


@pytest.mark.parametrize("dtype", layout.DTYPES, ids=str)
def test_weights_that_are_packed_lie_as_they_like(dtype: torch.dtype, launched: list[str]) -> None:
    dense = matrix_of((20, 68), dtype).to_dense()
    wanted = packing.prune(dense.clone())
    bits = torch.int16 if dtype.itemsize == 2 else torch.int8
    wide = torch.full((40, 140), 1, dtype=bits)
    places = [wide[:20, 1:69], wide[::2, 3:71], wide[:20, 2:138:2], wide[:20, :68].T.contiguous().T, wide[5:25, 72:]]
    for place in places:
        place.copy_(dense.view(bits))
        weight = place.view(dtype)
        for found in (packing.prune(weight), packing.compress(weight)):
            assert torch.equal(packing.expand(found).view(bits), packing.expand(wanted).view(bits))
        assert_same_bits(packing.take(weight, wanted), wanted.values)
    row = dense[3:4].clone()
    expanded = packing.prune(row.view(bits).expand(20, 68).view(dtype))
    assert torch.equal(
        packing.expand(expanded).view(bits), packing.expand(packing.prune(row)).view(bits).expand(20, 68)
    )


# ---- shapes -----------------------------------------------------------------------------------------------------------


@way
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "weight"), KINDS, ids=str)
def test_products_of_shapes_off_every_multiple(
    dtype: torch.dtype,
    weight: torch.dtype,
    shape: tuple[int, int],
    linear: Callable[..., Tensor],
    launched: list[str],
) -> None:
    packed, dense = packed_of(shape, weight)
    for count in (1, 3, 17):
        x, residual = numbers((count, shape[1]), dtype, 4), numbers((count, shape[0]), out_of(dtype), 9)
        wanted = (x.double() @ dense.double().T + residual.double()).to(out_of(dtype))
        assert torch.equal(linear(x, packed, residual=residual), wanted)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", layout.DTYPES, ids=str)
def test_packing_of_shapes_off_every_multiple(dtype: torch.dtype, shape: tuple[int, int], launched: list[str]) -> None:
    matrix = matrix_of(shape, dtype)
    dense = matrix.to_dense()
    packed = packing.compress(dense)
    assert torch.equal(packing.expand(packed).double(), dense.double())
    assert_same_bits(packing.take(dense, packed), packed.values)
    kept = SparseMatrix.from_dense(dense, "2:4", mask=nm_mask(dense.double().abs(), "2:4"))
    for found, wanted in zip(
        (packing.prune(dense).values, packing.prune(dense).metadata),
        layout.pack(kept.values, kept.metadata, *shape),
        strict=True,
    ):
        assert_same_bits(found, wanted)


@pytest.mark.parametrize("shape", [(4, 20), (12, 36), (36, 4), (20, 20)], ids=str)
def test_both_ways_of_shapes_off_every_tile(shape: tuple[int, int], launched: list[str]) -> None:
    weight = torch.randn(shape).bfloat16()
    mask = nm_mask(weight.abs(), "2:4t")
    kept = torch.where(mask, weight, 0)
    for own, turned in (packing.prune_both(weight), packing.keep_both(weight, mask)):
        assert torch.equal(packing.expand(own), kept)
        assert torch.equal(packing.expand(turned), kept.T)
    assert torch.equal(packing.mask_both(weight), mask)


@way
def test_without_rows_or_tokens_nothing_is_launched(linear: Callable[..., Tensor], launched: list[str]) -> None:
    x = numbers((3, 64), torch.bfloat16, 4)
    shape, meta_shape = layout.packed_shapes(0, 64, torch.bfloat16)
    none = PackedMatrix(torch.zeros(shape).bfloat16(), torch.zeros(meta_shape, dtype=torch.int32), (0, 64))
    empty = torch.zeros(0, dtype=torch.bfloat16)
    assert linear(x, none, empty, residual=torch.zeros(3, 0).bfloat16()).shape == (3, 0)
    assert linear(x[:0], none, out_dtype=torch.float32).shape == (0, 0)
    some, _ = packed_of((20, 64), torch.bfloat16)
    assert linear(x[:0], some, token_scale=torch.zeros(0)).shape == (0, 20)
    assert packing.expand(none).shape == (0, 64)
    assert packing.take(x[:0], none).shape == shape
    assert launched == []


def test_nothing_is_packed_of_nothing(launched: list[str]) -> None:
    for shape in ((0, 64), (16, 0), (0, 0)):
        empty = torch.zeros(shape).bfloat16()
        mask = torch.zeros(shape, dtype=torch.bool)
        packed, scales = packing.quantize(empty)
        assert packed.values.numel() == 0
        assert torch.equal(scales, torch.zeros(shape[0]))
        assert packing.mask_both(empty).shape == shape
        assert packing.keep_both(empty, mask, in_place=True)[1].shape == shape[::-1]
        assert packing.take(empty, packing.prune(empty)).numel() == 0
        q, of_tokens = tokens.quantize(empty)
        assert q.shape == shape
        assert torch.equal(of_tokens, torch.zeros(shape[0]))
    assert launched == []


@way
def test_the_leading_axes_of_x_are_those_of_y(linear: Callable[..., Tensor], launched: list[str]) -> None:
    packed, dense = packed_of((20, 64), torch.bfloat16)
    for shape in ((2, 3, 64), (64,), (1, 1, 5, 64), (2, 0, 64), (2, 3, 64)):
        x, residual = numbers(shape, torch.bfloat16, 4), numbers((*shape[:-1], 20), torch.bfloat16, 9)
        for given in (x, x.flip(0), x.transpose(0, -2) if len(shape) > 1 else x):
            added = residual if given.shape == x.shape else None
            y = linear(given, packed, residual=added)
            assert torch.equal(y, (right(given, dense).double() + (0 if added is None else added.double())).bfloat16())
            assert y.is_contiguous()


@way
def test_nothing_with_leading_axes_is_nothing(linear: Callable[..., Tensor], launched: list[str]) -> None:
    bias = numbers((20,), torch.bfloat16, 9)
    for shape, leading in (((20, 0), (2, 3)), ((20, 64), (2, 0)), ((20, 0), (0, 3))):
        packed, _ = packed_of(shape, torch.bfloat16)
        x = torch.zeros(*leading, shape[1], dtype=torch.bfloat16)
        residual = numbers((*leading, shape[0]), torch.bfloat16, 9)
        y = linear(x, packed, bias[: shape[0]], residual=residual)
        assert torch.equal(y, bias[: shape[0]] + residual)
    assert launched == []


@way
def test_x_with_other_columns_is_refused(linear: Callable[..., Tensor], launched: list[str]) -> None:
    packed, _ = packed_of((20, 64), torch.bfloat16)
    for shape in ((), (32,), (2, 3, 32), (64, 2)):
        message = rf"x is {re.escape(str(list(shape)))}: a weight of \[20, 64\] takes \[\.\.\., 64\]\.$"
        with pytest.raises(ShapeError, match=message):
            linear(torch.zeros(shape).bfloat16(), packed)
    x = torch.zeros(2, 3, 64).bfloat16()
    for other in ((2, 3, 19), (3, 2, 20), (6, 20), (20,)):
        with pytest.raises(ShapeError, match=r"residual is .*: it must be \[2, 3, 20\], as y"):
            linear(x, packed, residual=torch.zeros(other).bfloat16())
        linear(x, packed)
        launched.clear()
    for shape in ((2, 3, 64), (64,)):
        with pytest.raises(ShapeError, match=r"is no matrix whose rows come in groups of 4"):
            packing.prune(torch.zeros(shape).bfloat16())
    assert launched == []


# ---- sizes ------------------------------------------------------------------------------------------------------------

AROUND_THE_GRID = [16 * (MOST_DOWN + more) + rest for more in (-1, 0, 1, MOST_DOWN) for rest in (-1, 0, 1)]


@pytest.mark.parametrize("rows", AROUND_THE_GRID)
@pytest.mark.parametrize("columns", [4, 516])
def test_more_tiles_than_a_grid_has_blocks(rows: int, columns: int, asked: list[Launch]) -> None:
    """One way: blocks of eight chunks across, as many tiles down as there are or as a grid may have."""
    weight = torch.empty(rows, columns, dtype=torch.bfloat16, device=META)
    packed = packing.prune(weight)
    packing.compress(weight, check=False)
    packing.take(weight, packed)
    packing.expand(packed)
    packing.quantize(weight)
    tiles, across = -(-rows // 16), -(-columns // 512)
    names = ["prune_bf16", "compress_half", "take_half", "expand_half"]
    assert [launch[:2] for launch in asked[:4]] == [(name, (across, min(tiles, MOST_DOWN))) for name in names]
    assert asked[4][:2] == ("quantize_bf16", (tiles,))
    assert all(size <= most for _, grid, _ in asked for size, most in zip(grid, GRID, strict=False))
    assert all(rows in given and columns in given for _, _, given in asked)


@pytest.mark.parametrize("dtype", layout.DTYPES, ids=str)
def test_blocks_that_take_several_tiles_pack_all_of_them(
    dtype: torch.dtype, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 7 tiles, on grids of 1, 2 and 6 blocks: as beyond a million rows."""
    dense = matrix_of((101, 68), dtype).to_dense()
    wanted = packing.prune(dense)
    for most in (1, 2, 6):
        monkeypatch.setattr(packing, "_MOST_BLOCKS_DOWN", most)
        assert packing._blocks(wanted.metadata) == (1, most)
        for found in (packing.prune(dense), packing.compress(dense)):
            assert torch.equal(packing.expand(found).double(), dense.double())
        assert_same_bits(packing.prune(dense).values, wanted.values)
        assert_same_bits(packing.prune(dense).metadata, wanted.metadata)
        assert_same_bits(packing.take(dense, wanted), wanted.values)


@pytest.mark.parametrize("columns", [4, 132])
def test_more_squares_than_a_grid_has_blocks_are_refused(columns: int, asked: list[Launch]) -> None:
    most = MOST_DOWN * 64
    ways: list[Callable[[Tensor], Any]] = [
        packing.prune_both,
        packing.mask_both,
        lambda weight: packing.keep_both(
            weight, torch.empty(weight.shape, dtype=torch.bool, device=META), check=False, in_place=True
        ),
    ]
    for run in ways:
        run(torch.empty(most, columns, dtype=torch.bfloat16, device=META))
        with pytest.raises(ShapeError, match=rf"\[{most + 4}, {columns}\]: at most {most} rows are packed at once"):
            run(torch.empty(most + 4, columns, dtype=torch.bfloat16, device=META))
    assert [grid[1] for _, grid, _ in asked] == [MOST_DOWN] * 3
    asked.clear()
    for run in ways:  # the other way there is room
        run(torch.empty(4, most + 4, dtype=torch.bfloat16, device=META))
    assert [grid for _, grid, _ in asked] == [
        (-(-(MOST_DOWN + 1) // 8), 1),
        (MOST_DOWN + 1, 1),
        (-(-(MOST_DOWN + 1) // 8), 1),
    ]


@pytest.mark.parametrize("shape", [(2**31, 4), (4, 2**31), (1, 2**32 + 64)], ids=str)
def test_sizes_that_kernels_cannot_count_are_refused(shape: tuple[int, int], asked: list[Launch]) -> None:
    weight = torch.empty(shape, dtype=torch.bfloat16, device=META)
    for run in (packing.prune, packing.quantize, packing.compress):
        with pytest.raises(
            ShapeError, match=rf"{re.escape(str(list(shape)))}: a side has less than 2147483648 items.*part"
        ):
            run(weight)
    assert asked == []
    packing.prune(torch.empty(1, 2**31 - 4, dtype=torch.bfloat16, device=META))
    assert asked[0][1] == (-(-(2**31 - 4) // 512), 1)


@way
def test_products_that_kernels_cannot_count_are_refused(linear: Callable[..., Tensor], asked: list[Launch]) -> None:
    def run(count: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        shape, meta_shape = layout.packed_shapes(rows, columns, dtype)
        values = torch.empty(shape, dtype=dtype, device=META)
        packed = PackedMatrix(values, torch.empty(meta_shape, dtype=torch.int32, device=META), (rows, columns))
        return linear(torch.empty(count, columns, dtype=dtype, device=META), packed)

    for count, rows, columns, dtype in (
        (1, 4, 2**30, torch.bfloat16),
        (1, 2**31, 4, torch.bfloat16),
        (2**31, 4, 4, torch.bfloat16),
        (1, 4, 2**30, torch.int8),
    ):
        with pytest.raises(
            ShapeError, match=rf"x is \[{count}, {columns}\], the weight \[{rows}, .*: at most .* part by part"
        ):
            run(count, rows, columns, dtype)
    assert asked == []
    assert run(1, 4, 2**30 - 4, torch.bfloat16).shape == (1, 4)
    assert run(1, 4, 2**18, torch.int8).shape == (1, 4)
    assert arguments.MOST_COLUMNS[torch.int8] == int8.MOST_INPUTS
    with pytest.raises(ShapeError, match=r"x is \[1, 262148\], .* and 262144 columns of int8, as .* part by part"):
        run(1, 4, 2**18 + 4, torch.int8)


def test_more_tokens_than_a_grid_has_blocks_are_not_quantized(asked: list[Launch]) -> None:
    with pytest.raises(ShapeError, match=r"x is \[2147483648, 1\]: at most 2147483647 tokens .*part"):
        tokens.quantize(torch.empty(2**31, 1, device=META))
    assert asked == []
    tokens.quantize(torch.empty(2**31 - 1, 1, device=META))
    assert asked[0][1] == (2**31 - 1,)


def test_the_products_of_many_tokens_ask_for_no_more_blocks_down_than_a_grid_has(asked: list[Launch]) -> None:
    for count, rows, columns in (
        (64, 2**27, 64),
        (2**27, 64, 64),
        (65, 16, 2**25),
        (2**16, 2**16, 2**16),
        (1, 16, 2**25),
    ):
        shape, meta_shape = layout.packed_shapes(rows, columns, torch.bfloat16)
        values = torch.empty(shape, dtype=torch.bfloat16, device=META)
        packed = PackedMatrix(values, torch.empty(meta_shape, dtype=torch.int32, device=META), (rows, columns))
        products.linear(torch.empty(count, columns, dtype=torch.bfloat16, device=META), packed)
    assert len(asked) == 5
    assert all(0 < size <= most for _, grid, _ in asked for size, most in zip(grid, GRID, strict=True))


# ---- devices and dtypes -----------------------------------------------------------------------------------------------


@way
def test_whatever_is_on_another_device_is_named(
    linear: Callable[..., Tensor], launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: int(tensor.is_meta))  # -1 for both, as for no GPU
    packed, _ = packed_of((20, 64), torch.bfloat16)
    x = numbers((3, 64), torch.bfloat16, 4)
    beside = {
        "bias": numbers((20,), torch.bfloat16, 4),
        "row_scale": powers(20, 1),
        "token_scale": powers(3, 1),
        "residual": numbers((3, 20), torch.bfloat16, 4),
    }
    linear(x, packed, **beside)
    launched.clear()
    for name, tensor in beside.items():
        with pytest.raises(UnsupportedError, match=f"x is on cpu, {name} on meta: put them on one device"):
            linear(x, packed, **{**beside, name: tensor.to(META)})
    with pytest.raises(UnsupportedError, match="x is on meta, the weight on cpu: put both on one GPU"):
        linear(x.to(META), packed)
    elsewhere = PackedMatrix(packed.values.to(META), packed.metadata.to(META), packed.shape)
    with pytest.raises(UnsupportedError, match="x is on cpu, the weight on meta: put both on one GPU"):
        linear(x, elsewhere)
    for values, metadata in ((packed.values, packed.metadata.to(META)), (packed.values.to(META), packed.metadata)):
        where = rf"values .* on {values.device}.*, metadata .* on {metadata.device}.*: .*on one device"
        for run in (lambda split: linear(x, split), packing.expand):
            with pytest.raises(ShapeError, match=where):
                run(PackedMatrix(values, metadata, packed.shape))
    weight = torch.zeros(20, 64).bfloat16()
    with pytest.raises(ShapeError, match="on meta, what is packed .* on cpu: they must agree"):
        packing.take(weight.to(META), packed)
    mask = torch.zeros(20, 64, dtype=torch.bool, device=META)
    for both in (packing.prune_both, packing.keep_both):
        with pytest.raises(UnsupportedError, match="weight is on cpu, mask on meta: put them on one"):
            both(weight, mask)
    assert launched == []


def test_nothing_runs_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "launch", lambda *_, **how: pytest.fail("it was launched"))
    weight = torch.zeros(16, 64).bfloat16()
    mask = torch.zeros(16, 64, dtype=torch.bool)
    for run in (
        packing.prune,
        packing.quantize,
        packing.compress,
        packing.prune_both,
        packing.mask_both,
        lambda weight: packing.keep_both(weight, mask),
    ):
        with pytest.raises(UnsupportedError, match="the matrix is on cpu: GPU kernels need it on a GPU; layout.pack"):
            run(weight)
    packed, _ = packed_of((16, 64), torch.bfloat16)
    with pytest.raises(UnsupportedError, match="the matrix is on cpu: GPU kernels need it on a GPU"):
        packing.take(weight, packed)
    with pytest.raises(UnsupportedError, match="the matrix is on cpu: GPU kernels need it on a GPU"):
        packing.expand(packed)


@way
@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float16),
        (torch.int8, torch.bfloat16),
        (torch.bfloat16, torch.int8),
        (torch.float32, torch.int8),
        (torch.float32, E4M3),
        (torch.uint8, torch.int8),
        (torch.bool, torch.int8),
    ],
    ids=str,
)
def test_dtypes_that_do_not_go_together(
    x: torch.dtype, weight: torch.dtype, linear: Callable[..., Tensor], launched: list[str]
) -> None:
    packed, _ = packed_of((20, 64), weight)
    with pytest.raises(UnsupportedError, match=f"x is {x}, the weight {weight}: one of bfloat16, .* the same for both"):
        linear(torch.zeros(3, 64).to(x), packed)
    assert launched == []


@way
def test_results_of_other_dtypes_are_refused(linear: Callable[..., Tensor], launched: list[str]) -> None:
    packed, _ = packed_of((20, 64), torch.int8)
    x = torch.zeros(3, 64, dtype=torch.int8)
    for out in (torch.int8, torch.int32, torch.float64, E4M3, torch.complex64):
        with pytest.raises(
            UnsupportedError, match=f"out_dtype is {out}: sums are rounded to bfloat16, float16, float32"
        ):
            linear(x, packed, out_dtype=out)
    for beside in ("bias", "residual"):
        tensor = torch.zeros(20) if beside == "bias" else torch.zeros(3, 20)
        with pytest.raises(ShapeError, match=rf"{beside} is .* torch.float32: it must be .* torch.bfloat16"):
            linear(x, packed, **{beside: tensor})
    assert launched == []


# ---- autograd ---------------------------------------------------------------------------------------------------------


@way
@pytest.mark.parametrize("columns", [0, 64])
def test_gradients_are_not_recorded_whatever_asks_for_them(
    columns: int, linear: Callable[..., Tensor], launched: list[str]
) -> None:
    packed, dense = packed_of((20, columns), torch.bfloat16)
    x = numbers((3, columns + 1), torch.bfloat16, 4).requires_grad_()[:, 1:]
    bias, residual = (numbers(shape, torch.bfloat16, 9).requires_grad_() for shape in ((20,), (3, 20)))
    y = linear(x, packed, bias, residual=residual[:, :20])
    assert not y.requires_grad
    assert torch.equal(y, (x.detach().double() @ dense.double().T + bias.double() + residual.double()).bfloat16())
    weight = torch.randn(20, 64).bfloat16().requires_grad_()
    assert not packing.prune(weight).values.requires_grad
    assert not tokens.quantize(weight)[1].requires_grad


@way
def test_tensors_of_inference_mode_are_read_within_and_without(
    linear: Callable[..., Tensor], launched: list[str], shared_columns: None
) -> None:
    packed, dense = packed_of((20, 2200), torch.bfloat16)
    x = numbers((3, 2201), torch.bfloat16, 4)
    with torch.inference_mode():
        inside = x.clone()[:, 1:]
        held = PackedMatrix(packed.values.clone(), packed.metadata.clone(), packed.shape)
        within = linear(inside, held)
        repacked = packing.compress(dense.clone())
    wanted = right(x[:, 1:], dense)
    assert within.is_inference()
    for found in (
        within,
        linear(inside, held),
        linear(x[:, 1:].clone().requires_grad_(), held),
        linear(inside, repacked),
    ):
        assert torch.equal(found, wanted)
    assert [each.is_inference() for each in resources._of_streams.values()] == [False]
    assert torch.equal(packing.expand(repacked), dense)
    q, scales = tokens.quantize(inside)
    again, same = tokens.quantize(x[:, 1:])
    assert torch.equal(q, again)
    assert torch.equal(scales, same)


# ---- what is not finite -----------------------------------------------------------------------------------------------


@way
@pytest.mark.parametrize(("dtype", "weight"), [each for each in KINDS if each[0].itemsize == 2], ids=str)
def test_what_is_not_finite_reaches_outputs_that_keep_its_place_alone(
    dtype: torch.dtype, weight: torch.dtype, linear: Callable[..., Tensor], launched: list[str]
) -> None:
    packed, dense = packed_of((70, 200), weight)
    pattern = SparseMatrix.from_dense(torch.zeros(1, 4)).pattern
    kept = SparseMatrix(*layout.unpack(packed.values, packed.metadata, 70, 200), pattern, (70, 200)).mask()
    x = numbers((9, 200), dtype, 4)
    clean = right(x, dense)
    places = {0: 0, 1: 3, 4: 130, 7: 197, 8: 199}
    for token, column in places.items():
        x[token, column] = float("nan") if token % 2 else float("inf")
    y = linear(x, packed)
    for token in range(9):
        away = ~kept[:, places[token]] if token in places else torch.ones(70, dtype=torch.bool)
        assert torch.equal(y[token, away], clean[token, away])
        assert not bool(y[token, ~away].isfinite().any())
        assert token not in places or 0 < int(away.sum()) < 70


# ---- what fails in the middle -----------------------------------------------------------------------------------------


class Memory:
    """torch.empty and torch.zeros that have `left` calls before memory is out, and tell which tensors still live."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
        self.left = left
        self.made: list[weakref.ref[Tensor]] = []
        monkeypatch.setattr(resources, "_EMPTY", None)
        for name in ("empty", "zeros", "empty_like", "empty_strided"):
            monkeypatch.setattr(torch, name, self._giving(getattr(torch, name)))

    def _giving(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def given(*args: Any, **named: Any) -> Tensor:
            if self.left == 0:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            self.left -= 1
            found = make(*args, **named)
            self.made.append(weakref.ref(found))
            return found

        return given

    def alive(self) -> int:
        gc.collect()
        return sum(each() is not None for each in self.made)


def tensors_that_it_takes(run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs with memory for no tensor, for one and so on: none of them outlives an error."""
    for left in range(20):
        with monkeypatch.context() as patch:
            memory = Memory(patch, left)
            with contextlib.suppress(torch.OutOfMemoryError):
                run()
                return left
            assert memory.left == 0
        assert memory.alive() == 0
        assert not any(bool(each.any()) for each in resources._of_streams.values())
    raise AssertionError("it takes more than 20 tensors")


@way
def test_products_without_memory_leave_nothing_and_run_again(
    linear: Callable[..., Tensor], launched: list[str], shared_columns: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, dense = packed_of((36, 2200), torch.bfloat16)
    x = numbers((65, 2200), torch.bfloat16, 4)
    assert tensors_that_it_takes(lambda: linear(x, packed), monkeypatch) == 4  # y, sums, counters and their reserve
    assert tensors_that_it_takes(lambda: linear(x, packed), monkeypatch) == 2
    assert torch.equal(linear(x, packed), right(x, dense))
    assert not any(bool(each.any()) for each in resources._of_streams.values())


def test_packing_without_memory_leaves_nothing_and_the_weight_as_it_was(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(64, 64).bfloat16()
    mask, before = nm_mask(weight.abs(), "2:4t"), weight.clone()
    sparse = torch.where(mask, weight, 0)
    for run, wanted in (
        (lambda: packing.prune(weight), 2),
        (lambda: packing.quantize(weight), 3),
        (lambda: packing.compress(sparse), 3),
        (lambda: packing.mask_both(weight), 1),
        (lambda: packing.prune_both(weight), 4),
        (lambda: packing.keep_both(weight, mask), 5),
        (lambda: tokens.quantize(weight), 2),
    ):
        assert tensors_that_it_takes(run, monkeypatch) == wanted
    for left in range(5):
        with monkeypatch.context() as patch:
            Memory(patch, left)
            with pytest.raises(torch.OutOfMemoryError):
                packing.keep_both(weight, mask, in_place=True)
        assert torch.equal(weight, before)


@way
def test_a_launch_that_is_refused_leaves_counters_as_they_were(
    linear: Callable[..., Tensor], launched: list[str], shared_columns: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, dense = packed_of((36, 2200), torch.bfloat16)
    x = numbers((130, 2200), torch.bfloat16, 4)
    launch, given = table.launch, x.clone()
    for which in range(3 if linear is decoded else 1):
        count = itertools.count()

        def refuse(name: str, *rest: Any, count: Iterator[int] = count, which: int = which, **how: Any) -> None:
            if next(count) == which:
                raise DeviceError("a launch failed: out of memory (CUDA error 2). Free memory, or take less at a time.")
            launch(name, *rest, **how)

        monkeypatch.setattr(table, "launch", refuse)
        with pytest.raises(DeviceError, match="out of memory"):
            linear(x, packed)
        monkeypatch.setattr(table, "launch", launch)
        assert not any(bool(each.any()) for each in resources._of_streams.values())
        assert torch.equal(x, given)
        assert torch.equal(linear(x, packed), right(x, dense))


def test_a_mask_that_is_refused_leaves_the_weight_as_it_was(launched: list[str]) -> None:
    weight = torch.randn(64, 68).bfloat16()[:, :64]
    before = weight.clone()
    for wrong in (torch.zeros(64, 64, dtype=torch.bool), nm_mask(torch.rand(64, 64), "2:4")):
        with pytest.raises(PatternError, match="does not keep two of each four along both axes: nm_mask"):
            packing.keep_both(weight, wrong, in_place=True)
        assert torch.equal(weight, before)
    mask = nm_mask(torch.rand(64, 64), "2:4t")
    packing.keep_both(weight, mask, in_place=True)
    assert torch.equal(weight, torch.where(mask, before, 0))
    with torch.inference_mode():
        weight = before.clone()
    packing.keep_both(weight, mask, in_place=True)
    assert torch.equal(weight, torch.where(mask, before, 0))
