"""The kernels for few tokens, on an emulated GPU: exact in whole numbers, for every format, size and way to share columns."""

from __future__ import annotations

import threading

import pytest
import torch
from tests.cuda.emulation import Guarded, launch
from tests.cuda.products import DTYPES, Case, close, launched, numbers, packed_of, powers

from twofour import ShapeError, UnsupportedError
from twofour.kernels import epilogue
from twofour.kernels.cuda import arguments, decode, resources
from twofour.kernels.cuda.decode import linear, plan

__all__ = ["launched"]


def run(case: Case, slices: int = 1) -> torch.Tensor:
    """What the kernel gives, twice: counters are as they were."""
    blocks, chunks = -(-case.shape[0] // 128), -(-case.shape[1] // 64)
    each = -(-chunks // slices)
    size = next(size for size in decode.TOKENS if size >= case.tokens)
    counters = Guarded(torch.zeros(blocks, dtype=torch.int32))
    partial = Guarded(torch.full((slices, blocks, size, 128), 0x7FFFFFFF, dtype=torch.int32))
    name = f"decode_{arguments.NAMES[case.dtype]}_{size}"
    grid = (blocks, -(-chunks // each))
    for _ in range(2):
        launch(name, grid, 256, *case.of_product(), each, partial, counters, *case.of_epilogue())
        assert not counters.tensor().any()
    return case.y.tensor()


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 31, 33, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_are_exact(dtype: torch.dtype, tokens: int) -> None:
    case = Case(dtype, tokens, (40, 200))
    assert torch.equal(run(case), case.wanted().to(case.out))


@pytest.mark.parametrize("shape", [(4, 4), (16, 64), (130, 60), (17, 1100), (300, 576)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_shape(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    case = Case(dtype, 5, shape, bias=True, residual=True)
    assert torch.equal(run(case), case.wanted().to(case.out))


@pytest.mark.parametrize("slices", [2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_that_share_columns_add_up(dtype: torch.dtype, slices: int) -> None:
    case = Case(dtype, 12, (150, 1400), bias=True, scales=True)
    assert torch.equal(run(case, slices), case.wanted().to(case.out))


@pytest.mark.parametrize("activation", epilogue.ACTIVATIONS)
@pytest.mark.parametrize("out", arguments.ITEMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_follows_the_sums(dtype: torch.dtype, out: torch.dtype, activation: str) -> None:
    case = Case(dtype, 6, (23, 8), out=out, bias=True, scales=True, activation=activation, residual=True)
    assert case.residual is not None
    assert close(run(case), case.wanted(), case.residual)


@pytest.mark.parametrize("activation", epilogue.ACTIVATIONS)
@pytest.mark.parametrize("out", arguments.ITEMS, ids=str)
def test_activations_of_any_number(out: torch.dtype, activation: str) -> None:
    """By way of the bias: NaN stays, -inf becomes -inf * 0, small results keep their digits."""
    infinity = float("inf")
    special = torch.tensor([0.0, infinity, -infinity, float("nan"), 1e-6, -1e-6, 40.0, -40.0])
    case = Case(torch.int8, 2, (136, 4), out=out, activation=activation)
    case.dense.zero_()
    case.packed.values.zero_()
    case.bias = torch.cat([special, torch.linspace(-9, 9, 128)]).to(out)
    assert close(run(case), case.wanted())


@pytest.mark.parametrize("itemsize", [1, 2])
@pytest.mark.parametrize("tokens", [1, 8, 32, 64])
@pytest.mark.parametrize(
    "shape", [(8192, 8192), (28672, 8192), (4096, 14336), (64, 64), (1024, 128), (128, 65536)], ids=str
)
def test_the_plan_covers_all_chunks_and_fills_the_gpu(shape: tuple[int, int], tokens: int, itemsize: int) -> None:
    found = plan(*shape, tokens, itemsize, 132)
    chunks = -(-shape[1] // 64)
    assert found.slice * found.slices >= chunks > found.slice * (found.slices - 1)
    assert found.blocks == -(-shape[0] // 128)
    if shape[0] * shape[1] >= 1 << 26:
        places = 132 * (1 if tokens == 64 else 2)
        rounds = found.blocks * found.slices / places
        assert rounds > 0.7
        assert rounds <= 1 or rounds % 1 == 0 or rounds % 1 > 0.5  # no last round of a few blocks, for whom all wait


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_tokens_than_a_launch_takes(dtype: torch.dtype, launched: list[str]) -> None:
    """65 tokens, columns shared by two blocks, everything that can follow, each of its own row or token."""
    tokens, rows, columns = 65, 36, 1100
    packed, dense = packed_of((rows, columns), dtype)
    x = numbers((tokens, columns), dtype, 4)
    out = torch.bfloat16 if dtype == torch.int8 else dtype
    bias, residual = numbers((rows,), out, 9), numbers((tokens, rows), out, 9)
    row_scale, token_scale = powers(rows, 1), powers(tokens, 2)
    y = linear(x, packed, bias, row_scale=row_scale, token_scale=token_scale, activation="relu", residual=residual)
    sums = x.double() @ dense.double().T * row_scale.double() * token_scale.double()[:, None]
    assert torch.equal(y, ((sums + bias.double()).relu() + residual.double()).to(out))
    name = arguments.NAMES[dtype]
    assert launched == [f"decode_{name}_64", f"decode_{name}_8"]


def test_views_are_read_where_they_lie_or_copied(launched: list[str]) -> None:
    packed, dense = packed_of((20, 64), torch.float16)
    whole = numbers((6, 88), torch.float16, 4)
    residual = numbers((6, 40), torch.float16, 9)
    for x in (whole[:, :64], whole[:, 8:72], whole[:, 1:65], whole[::2, 16:80], whole[:, :64].T.contiguous().T):
        assert torch.equal(linear(x, packed).double(), x.double() @ dense.double().T)
        for other in (residual[: len(x), 1:21], residual[: len(x), ::2], residual[:1, 3:23].expand(len(x), 20)):
            y = linear(x, packed, residual=other, out_dtype=torch.float16)
            assert torch.equal(y.double(), x.double() @ dense.double().T + other.double())


def test_nothing_is_launched_for_nothing(launched: list[str]) -> None:
    packed, _ = packed_of((20, 64), torch.bfloat16)
    assert linear(torch.zeros(0, 64, dtype=torch.bfloat16), packed).shape == (0, 20)
    nothing, _ = packed_of((20, 0), torch.bfloat16)
    x, bias = torch.zeros(3, 0, dtype=torch.bfloat16), numbers((20,), torch.bfloat16, 9)
    residual = numbers((3, 20), torch.bfloat16, 9)
    assert torch.equal(linear(x, nothing), torch.zeros(3, 20, dtype=torch.bfloat16))
    y = linear(x, nothing, bias, activation="relu", residual=residual)
    assert torch.equal(y, bias.relu() + residual)
    assert launched == []


def test_counters_are_made_once_and_stay_zeros(launched: list[str]) -> None:
    packed, _ = packed_of((300, 1100), torch.bfloat16)
    x = numbers((2, 1100), torch.bfloat16, 4)
    first = linear(x, packed)
    kept = resources.counters(x.device, 3)
    assert kept is resources.counters(x.device, 1)
    assert len(resources.counters(x.device, len(kept) + 1)) > len(kept)
    assert torch.equal(linear(x, packed), first)
    assert not kept.any()


def test_counters_belong_to_no_pool_of_the_thread_that_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    make = resources._zeros

    def zeros(count: int, device: torch.device) -> torch.Tensor:
        threads.append(threading.get_ident())
        return make(count, device)

    monkeypatch.setattr(resources, "_zeros", zeros)
    monkeypatch.setattr(resources, "_of_streams", {})
    assert not resources.counters(torch.device("cpu"), 5).any()
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


def test_what_it_refuses(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = packed_of((20, 64), torch.bfloat16)
    x = torch.zeros(3, 64, dtype=torch.bfloat16)
    known = "one of bfloat16, float16, int8, the same for both"
    with pytest.raises(UnsupportedError, match=f"x is torch.float16, the weight torch.bfloat16: {known}"):
        linear(x.half(), packed)
    with pytest.raises(UnsupportedError, match=f"the weight torch.float8_e4m3fn: {known}"):
        linear(x.to(torch.float8_e4m3fn), packed_of((20, 64), torch.float8_e4m3fn)[0])
    for wrong in (x[0], x[:, :32]):
        with pytest.raises(ShapeError, match=r"x is \[.*\]: a weight of \[20, 64\] takes \[tokens, 64\]"):
            linear(wrong, packed)
    with pytest.raises(
        UnsupportedError, match="out_dtype is torch.int8: sums are rounded to bfloat16, float16, float32"
    ):
        linear(x, packed, out_dtype=torch.int8)
    with pytest.raises(UnsupportedError, match="activation 'tanh' is unknown: the kernels have none, relu"):
        linear(x, packed, activation="tanh")
    bias, scale = torch.zeros(20, dtype=torch.bfloat16), torch.ones(20)
    for wrong in (bias[:10], bias.float(), bias.repeat(2)[::2]):
        with pytest.raises(ShapeError, match=r"bias is .*: it must be \[20\] torch.bfloat16, contiguous"):
            linear(x, packed, wrong)
    with pytest.raises(ShapeError, match=r"bias is .*: it must be \[20\] torch.float32, contiguous"):
        linear(x, packed, bias, out_dtype=torch.float32)
    with pytest.raises(ShapeError, match=r"row_scale is .*: it must be \[20\] torch.float32, contiguous"):
        linear(x, packed, row_scale=scale.double())
    with pytest.raises(ShapeError, match=r"token_scale is \[20\] .*: it must be \[3\] torch.float32, contiguous"):
        linear(x, packed, token_scale=scale)
    for wrong in (torch.zeros(3, 19).bfloat16(), torch.zeros(3, 20)):
        with pytest.raises(ShapeError, match=r"residual is .*: it must be \[3, 20\] torch.bfloat16, as y"):
            linear(x, packed, residual=wrong)
    elsewhere = torch.device("meta")
    for name, tensor in (("row_scale", scale), ("residual", torch.zeros(3, 20).bfloat16())):
        with pytest.raises(UnsupportedError, match=f"x is on cpu, {name} on meta: put them on one device"):
            linear(x, packed, **{name: tensor.to(elsewhere)})  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="x is on meta, the weight on cpu: put both on one GPU"):
        linear(x.to(elsewhere), packed)
    monkeypatch.undo()
    with pytest.raises(UnsupportedError, match="x is on cpu, the weight on cpu: put both on one GPU"):
        linear(x, packed)
    assert launched == []
