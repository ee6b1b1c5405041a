"""Products that were checked once: the same numbers again, and the same errors, without the checks."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.cuda.products import E4M3, KINDS, launched, numbers, packed_of, powers
from torch import Tensor

from twofour import ShapeError, UnsupportedError
from twofour.kernels.cuda import arguments, packing, products, resources, table
from twofour.kernels.cuda.packing import PackedMatrix

__all__ = ["launched"]
ROWS, COLUMNS = 20, 128


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of the calls that were checked."""
    found: list[int] = []
    check: Callable[..., arguments.Arguments] = arguments.check

    def noted(x: Tensor, *rest: Any) -> arguments.Arguments:
        found.append(len(x))
        return check(x, *rest)

    monkeypatch.setattr(arguments, "check", noted)
    return found


def beside(tokens: int, out: torch.dtype, columns: int = ROWS) -> dict[str, Tensor]:
    return {
        "bias": numbers((columns,), out, 9, 1),
        "row_scale": powers(columns, 2),
        "token_scale": powers(tokens, 3),
        "residual": numbers((tokens, columns + 4), out, 9, 4)[:, 1 : columns + 1],
    }


@pytest.mark.parametrize("kernels", [None, "decode", "gemm"])
@pytest.mark.parametrize("tokens", [1, 5, 70, 130])
@pytest.mark.parametrize(("dtype", "weight"), KINDS, ids=str)
def test_a_call_like_the_last_one_is_not_checked_again(
    dtype: torch.dtype,
    weight: torch.dtype,
    tokens: int,
    kernels: products.Kernels | None,
    launched: list[str],
    checks: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resources, "processors", lambda _: 132)  # some share columns
    packed, dense = packed_of((ROWS, COLUMNS), weight)
    out = torch.bfloat16 if dtype.itemsize == 1 else dtype
    apart = COLUMNS + 16 // dtype.itemsize
    for turn in range(3):  # other numbers, at other places, each time
        x = numbers((tokens, apart), dtype, 4, turn)[:, :COLUMNS]
        more = beside(tokens, out) if turn else {}
        y = products.linear(x, packed, **more, activation="relu", kernels=kernels)  # type: ignore[arg-type]
        wanted = x.double() @ dense.double().T
        if more:
            wanted = wanted * more["row_scale"].double() * more["token_scale"].double()[:, None] + more["bias"].double()
        wanted = wanted.relu() + (more["residual"].double() if more else 0)
        assert torch.equal(y, wanted.to(out))
        assert y.is_contiguous()
    widened = weight == E4M3 and kernels == "gemm"  # made anew each time
    assert checks == [tokens] * (3 if widened else 1)
    assert len(set(launched)) <= 2


def misplaced(tensor: Tensor) -> Tensor:
    """The same numbers, no multiple of 16 bytes away."""
    bytes_of = tensor.contiguous().view(torch.uint8).flatten()
    held = torch.empty(len(bytes_of) + 32, dtype=torch.uint8)
    first = -held.data_ptr() % 16 + tensor.itemsize
    held[first : first + len(bytes_of)] = bytes_of
    return held[first : first + len(bytes_of)].view(tensor.dtype).view(tensor.shape)


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "bias of another size": (lambda t: t[:-1].clone(), "bias"),
    "bias of another dtype": (lambda t: t.float(), "bias"),
    "bias that is spread": (lambda t: torch.stack([t, t], 1)[:, 0], "bias"),
    "bias of two sides": (lambda t: t[None], "bias"),
    "row scales of another size": (lambda t: t[:-1].clone(), "row_scale"),
    "row scales of another dtype": (lambda t: t.double(), "row_scale"),
    "token scales of another size": (lambda t: t[:-1].clone(), "token_scale"),
    "token scales that are spread": (lambda t: torch.stack([t, t], 1)[:, 0], "token_scale"),
    "residual of another size": (lambda t: t[:-1], "residual"),
    "residual of another dtype": (lambda t: t.float(), "residual"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_as_at_first(case: str, launched: list[str]) -> None:
    change, name = WRONG[case]
    packed, _ = packed_of((ROWS, COLUMNS), torch.bfloat16)
    x, more = numbers((3, COLUMNS), torch.bfloat16, 4), beside(3, torch.bfloat16)
    products.linear(x, packed, **more)  # type: ignore[arg-type]
    launched.clear()
    with pytest.raises(ShapeError, match=f"{name} is "):
        products.linear(x, packed, **{**more, name: change(more[name])})  # type: ignore[arg-type]
    assert launched == []


MOVED: dict[str, Callable[[PackedMatrix], PackedMatrix]] = {
    "values misplaced": lambda p: PackedMatrix(misplaced(p.values), p.metadata, p.shape),
    "metadata misplaced": lambda p: PackedMatrix(p.values, misplaced(p.metadata), p.shape),
    "fewer values": lambda p: PackedMatrix(p.values[:1], p.metadata, p.shape),
    "less metadata": lambda p: PackedMatrix(p.values, p.metadata[:1], p.shape),
    "values turned": lambda p: PackedMatrix(p.values.transpose(0, 1), p.metadata, p.shape),
    "metadata turned": lambda p: PackedMatrix(p.values, p.metadata.transpose(0, 1), p.shape),
    "metadata of another dtype": lambda p: PackedMatrix(p.values, p.metadata.float(), p.shape),
}


@pytest.mark.parametrize("case", MOVED)
def test_a_weight_that_moved_is_refused_as_at_first(case: str, launched: list[str]) -> None:
    packed, _ = packed_of((ROWS, COLUMNS), torch.bfloat16)
    x = numbers((3, COLUMNS), torch.bfloat16, 4)
    products.linear(x, packed)
    launched.clear()
    with pytest.raises(ShapeError, match="is packed as"):
        products.linear(x, MOVED[case](packed))
    assert launched == []


def test_inputs_that_kernels_cannot_read_are_copied_as_at_first(launched: list[str], checks: list[int]) -> None:
    packed, dense = packed_of((ROWS, COLUMNS), torch.bfloat16)
    x, residual = numbers((3, COLUMNS), torch.bfloat16, 4), numbers((3, ROWS), torch.bfloat16, 9)
    right = (x.double() @ dense.double().T + residual.double()).bfloat16()
    wide = torch.zeros(3, COLUMNS + 1, dtype=torch.bfloat16)
    wide[:, :COLUMNS] = x
    spread = torch.stack([x, x], 2)[:, :, 0]
    assert torch.equal(products.linear(x, packed, residual=residual), right)
    for given in (misplaced(x), wide[:, :COLUMNS], spread, x.T.contiguous().T):
        assert torch.equal(products.linear(given, packed, residual=residual), right)
    assert torch.equal(products.linear(x, packed, residual=residual.T.contiguous().T), right)
    assert torch.equal(products.linear(x, packed, residual=residual), right)
    assert len(checks) == 6


@pytest.mark.parametrize("leading", [(), (1, 1), (2, 3), (3, 1), (1, 70), (2, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_leading_axes_are_kept_without_views(
    leading: tuple[int, ...], dtype: torch.dtype, launched: list[str], checks: list[int]
) -> None:
    packed, dense = packed_of((ROWS, 120), dtype)  # rows of int8 begin at no multiples of 16 bytes
    for turn in range(3):
        x = numbers((*leading, 120), dtype, 4, turn)
        residual = numbers((*leading, ROWS), torch.bfloat16, 9, turn)
        y = products.linear(x, packed, residual=residual, activation="relu")
        wanted = (x.double() @ dense.double().T).relu() + residual.double()
        assert torch.equal(y, wanted.bfloat16())
        assert y.is_contiguous()
        apart = numbers((*leading, ROWS + 1), torch.bfloat16, 9, turn)[..., :ROWS]
        y = products.linear(x, packed, residual=apart, activation="relu")
        assert torch.equal(y, (wanted - residual.double() + apart.double()).bfloat16())
    tokens, turned = y[..., 0].numel(), leading in ((2, 0), (2, 3))
    if turned:
        x = numbers((leading[1], leading[0], 120), dtype, 4).transpose(0, 1)  # no kernel reads it as it is
        for _ in range(3):
            assert torch.equal(products.linear(x, packed).double(), (x.double() @ dense.double().T).bfloat16().double())
    readable = tokens > 0 and (tokens == 1 or dtype == torch.bfloat16)
    assert len(checks) == (1 + turned if readable else 6 + 3 * turned)


def test_the_last_token_of_each_text_is_read_where_it_lies(launched: list[str], checks: list[int]) -> None:
    packed, dense = packed_of((ROWS, COLUMNS), torch.bfloat16)
    for turn in range(3):
        hidden = numbers((2, 7, COLUMNS), torch.bfloat16, 4, turn)
        y = products.linear(hidden[:, -1:], packed)
        assert torch.equal(y.double(), (hidden[:, -1:].double() @ dense.double().T).bfloat16().double())
        assert y.shape == (2, 1, ROWS)
    assert checks == [2]


def test_calls_that_differ_in_anything_that_kernels_know_are_told_apart(launched: list[str]) -> None:
    wide, dense = packed_of((ROWS, COLUMNS), torch.bfloat16)
    narrow, numbers_of_narrow = packed_of((ROWS, COLUMNS), E4M3)
    other, dense_of_other = packed_of((ROWS - 4, COLUMNS), torch.bfloat16)
    for turn in range(2):
        for tokens in (3, 70):
            x = numbers((tokens, COLUMNS), torch.bfloat16, 4, turn)
            for packed, weight in ((wide, dense), (narrow, numbers_of_narrow), (other, dense_of_other)):
                right = x.double() @ weight.double().T
                for out in (None, torch.float16, torch.float32):
                    for activation, wanted in (("none", right), ("relu", right.relu())):
                        for kernels in (None, "decode", "gemm"):
                            launched.clear()
                            y = products.linear(x, packed, activation=activation, out_dtype=out, kernels=kernels)
                            assert y.dtype == (out or torch.bfloat16)
                            assert torch.equal(y, wanted.to(y.dtype))
                            of_decode = (
                                tokens <= (256 if packed is narrow else 64) if kernels is None else kernels == "decode"
                            )
                            dtype = "e4m3_bf16" if packed is narrow else "bf16"
                            wanted_name = f"decode_{dtype}_" if of_decode else "gemm_bf16_"
                            assert {name.startswith(wanted_name) for name in launched} == {True}


def test_counters_last_until_all_kernels_have_started(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "processors", lambda _: 132)
    alive: list[bool] = []
    made: list[weakref.ref[Tensor]] = []

    def counters(device: torch.device, count: int) -> Tensor:
        found = torch.zeros(count, dtype=torch.int32)
        made.append(weakref.ref(found))
        return found

    launch: Callable[..., None] = table.launch

    def noted(*given: Any, **how: Any) -> None:
        alive.append(made[-1]() is not None)
        launch(*given, **how)

    monkeypatch.setattr(resources, "counters", counters)
    monkeypatch.setattr(table, "launch", noted)
    packed, dense = packed_of((ROWS, 2048), torch.bfloat16)
    x = numbers((130, 2048), torch.bfloat16, 4)
    for _ in range(2):
        y = products.linear(x, packed, kernels="decode")
        assert torch.equal(y.double(), (x.double() @ dense.double().T).bfloat16().double())
    assert alive == [True] * 6


def test_a_single_row_may_lie_anywhere_that_is_aligned(launched: list[str], checks: list[int]) -> None:
    packed, dense = packed_of((ROWS, COLUMNS), torch.bfloat16)
    many = numbers((3, COLUMNS + 1), torch.bfloat16, 4)
    for row in (many[:1, :COLUMNS], many[:1, :COLUMNS].clone()):
        assert torch.equal(products.linear(row, packed).double(), (row.double() @ dense.double().T).bfloat16().double())
    assert len(checks) == 1


def test_inputs_of_the_cpu_are_refused_as_at_first(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = packed_of((ROWS, COLUMNS), torch.bfloat16)
    x = numbers((3, COLUMNS), torch.bfloat16, 4)
    products.linear(x, packed)
    for module in (packing, arguments):
        monkeypatch.setattr(module, "_on_gpu", lambda tensor: tensor.is_cuda)
    with pytest.raises(UnsupportedError, match="x is on cpu"):
        products.linear(x, packed)


def test_no_more_are_kept_than_are_many(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_MOST_PREPARED", 3)
    packed, dense = packed_of((ROWS, COLUMNS), torch.bfloat16)
    for tokens in range(1, 9):
        x = numbers((tokens, COLUMNS), torch.bfloat16, 4)
        assert torch.equal(products.linear(x, packed).double(), (x.double() @ dense.double().T).bfloat16().double())
        assert len(products._prepared) <= 3


def test_results_are_made_on_the_device_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of what all tests here begin with
    made: list[tuple[Any, ...]] = []

    def fast(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made.append((shape, strides, dtype))
        return torch.empty_strided(shape, strides, dtype=dtype)

    monkeypatch.setattr(resources, "_EMPTY", fast)
    monkeypatch.setattr(resources, "_GET_DEVICE", lambda: 1)
    y = resources.empty((3, 5), (5, 1), torch.float16, torch.device("cuda", 1))
    assert (y.shape, y.stride(), y.dtype) == ((3, 5), (5, 1), torch.float16)
    assert made == [((3, 5), (5, 1), torch.float16)]
    assert resources.empty((3, 5), (5, 1), torch.float16, torch.device("meta")).is_meta
    elsewhere: list[Any] = []
    monkeypatch.setattr(torch, "empty_strided", lambda shape, strides, **how: elsewhere.append(how["device"]))
    resources.empty((3, 5), (5, 1), torch.float16, torch.device("cuda", 0))
    assert elsewhere == [torch.device("cuda", 0)]
    assert len(made) == 1
