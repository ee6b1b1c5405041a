"""float8 weights on the native kernels: every set of instructions, both families, masks that rows share, in any order.

bfloat16 holds the numbers of float8, so outputs have the bits of the kernels for bfloat16, scaled.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from twofour import SparseMatrix
from twofour.errors import ShapeError, UnsupportedError
from twofour.kernels import cpu, float8, reference
from twofour.kernels.epilogue import ACTIVATIONS
from twofour.pattern import Pattern
from twofour.testing import assert_same_bits, assert_within_bound

if os.environ.get("TWOFOUR_NO_NATIVE"):
    pytest.skip("TWOFOUR_NO_NATIVE leaves the native kernels out", allow_module_level=True)

pytestmark = pytest.mark.of_cpu
E4M3 = torch.float8_e4m3fn
FAMILIES: tuple[cpu.Family, ...] = ("few", "many")

every_kernel = pytest.mark.parametrize(
    ("isa", "family", "dtype"),
    [(isa, family, dtype) for isa in cpu.isas() for family in FAMILIES for dtype in (torch.float32, torch.bfloat16)],
    ids=lambda value: str(value).removeprefix("torch."),
)


def matrix_of(out_features: int, in_features: int, pattern: str = "2:4") -> SparseMatrix:
    """Every number of float8, NaN apart."""
    bits = torch.arange(out_features * in_features).mul(37).remainder(256)
    bits = torch.where(bits % 128 == 127, 0, bits).to(torch.uint8).view(out_features, in_features)
    scores = torch.rand(out_features, in_features)
    rows = Pattern.parse(pattern).rows
    shared = scores.view(-1, rows, in_features)[:, :1].expand(-1, rows, -1).reshape(out_features, in_features)
    mask = torch.zeros(out_features, in_features // 4, 4, dtype=torch.bool)
    mask.scatter_(-1, shared.view(out_features, -1, 4).topk(2).indices, True)
    mask = mask.view(out_features, in_features)
    order = torch.randperm(out_features) if rows > 1 and out_features <= 64 else torch.arange(out_features)
    return SparseMatrix.from_dense(bits.view(E4M3), pattern, mask=mask[order])


def packed(matrix: SparseMatrix, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """By the sharing and the order that its masks allow."""
    shared, order = cpu.row_order(matrix.metadata)
    return cpu.pack(matrix.values.to(dtype), matrix.metadata, matrix.out_features, matrix.in_features, shared, order)


@every_kernel
@pytest.mark.parametrize("pattern", ["2:4", "2:4x2", "2:4x4"])
@pytest.mark.parametrize("tokens", [1, 7, 50, 130])
def test_bits_are_those_of_bfloat16(
    isa: str, family: cpu.Family, dtype: torch.dtype, pattern: str, tokens: int
) -> None:
    matrix = matrix_of(60, 260, pattern)
    shape = (matrix.out_features, matrix.in_features)
    x, residual = torch.randn(tokens, 260).to(dtype), torch.randn(tokens, 60).to(dtype)
    bias, scales = torch.randn(60), torch.randn(60)
    narrow, wide = packed(matrix, E4M3), packed(matrix, torch.bfloat16)
    assert cpu.packed_sharing(narrow[1], *shape) == Pattern.parse(pattern).rows
    found = cpu.linear(x, *narrow, None, *shape, isa=isa, kernel=family)
    assert_same_bits(found, cpu.linear(x, *wide, None, *shape, isa=isa, kernel=family))
    if dtype == torch.float32:  # which no sum is rounded to
        scaled = found * scales + bias
        assert_same_bits(cpu.linear(x, *narrow, bias, *shape, isa=isa, kernel=family, scales=scales), scaled)
    y = cpu.linear(
        x, *narrow, bias, *shape, isa=isa, kernel=family, scales=scales, activation="relu", residual=residual
    )
    weight = matrix.to_dense().double() * scales.double()[:, None]
    assert_within_bound(cpu.linear(x, *narrow, bias, *shape, isa=isa, kernel=family, scales=scales), x, weight, bias)
    wanted = (x.double() @ weight.T + bias).relu() + residual.double()
    torch.testing.assert_close(y.double(), wanted, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-1)


@pytest.mark.parametrize(
    ("shape", "pattern"),
    [
        ((1, 4), "2:4"),
        ((17, 12), "2:4"),
        ((100, 60), "2:4"),
        ((4, 4), "2:4x4"),
        ((100, 60), "2:4x4"),
        ((64, 64), "2:4x4"),
    ],
    ids=str,
)
def test_packing_comes_back_bit_for_bit(shape: tuple[int, int], pattern: str) -> None:
    matrix = matrix_of(*shape, pattern)
    values, metadata = cpu.unpack(*packed(matrix, E4M3), *shape)
    assert_same_bits(values, matrix.values)
    assert torch.equal(metadata, matrix.metadata)


def test_bits_do_not_depend_on_threads() -> None:
    matrix = matrix_of(1100, 516)
    operands, scales = packed(matrix, E4M3), torch.rand(1100)
    before = torch.get_num_threads()
    try:
        for tokens in (1, 5, 200):
            x = torch.randn(tokens, 516).bfloat16()
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(cpu.linear(x, *operands, None, 1100, 516, scales=scales))
            assert_same_bits(found[1], found[0])
            assert_same_bits(found[2], found[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("of_bias", [None, torch.float32, torch.float16, torch.float64], ids=str)
def test_the_operation_is_the_reference(dtype: torch.dtype, of_bias: torch.dtype | None) -> None:
    matrix, scales = matrix_of(40, 100), torch.rand(40)
    bias = None if of_bias is None else torch.randn(40).to(of_bias)
    operands = float8.KERNELS["cpu"].pack(matrix)
    for shape in ((100,), (0, 100), (2, 3, 100), (70, 100)):
        x = torch.randn(shape).to(dtype)
        found = float8.KIND.linear("cpu", x, operands, scales, bias, "2:4", 40, 100)
        wanted = reference.linear_float8(x, matrix.values, matrix.metadata, scales, bias, Pattern(), 100)
        assert found.dtype == dtype
        near = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(found, wanted, rtol=near, atol=near * 4000)  # of sums about that large


@pytest.mark.parametrize("name", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_activations_are_those_of_the_reference(dtype: torch.dtype, name: str) -> None:
    matrix = matrix_of(40, 100)
    dense = matrix.values.float()
    scales, bias = 1 / dense.square().mean(1).sqrt() / 10, torch.randn(40)  # outputs of about 1
    operands = float8.KERNELS["cpu"].pack(matrix)
    for shape in ((2, 3, 100), (70, 100)):
        x = torch.randn(shape).to(dtype)
        found = float8.KIND.linear("cpu", x, operands, scales, bias, "2:4", 40, 100, name)
        wide = x if dtype == torch.float64 else x.float()
        before = reference.linear_float8(wide, matrix.values, matrix.metadata, scales, bias, Pattern(), 100)
        wanted = ACTIVATIONS[name](before).to(dtype)
        near = max(2 * torch.finfo(dtype).eps, 2.0**-20 if dtype != torch.float64 else 0)
        torch.testing.assert_close(found, wanted, rtol=near, atol=near)
        for other in set(ACTIVATIONS) - {name}:
            away = (ACTIVATIONS[other](before).to(dtype) - wanted).abs().max()
            assert away > 2.0**-14 if {other, name} == {"gelu", "gelu_tanh"} else away > 2.0**-4
        plain = reference.linear_float8(x, matrix.values, matrix.metadata, scales, bias, Pattern(), 100, name)
        torch.testing.assert_close(plain, wanted)


def test_dropped_places_take_no_part_and_nan_is_seen() -> None:
    matrix = SparseMatrix.from_dense(torch.tensor([[0, 1, 0, 2] * 16] * 16).to(E4M3))
    x = torch.ones(3, 64)
    x[:, 0::4] = float("nan")
    x[:, 2::4] = float("inf")
    for isa in cpu.isas():
        for family in FAMILIES:
            y = cpu.linear(x, *packed(matrix, E4M3), None, 16, 64, isa=isa, kernel=family)
            assert torch.equal(y, torch.full((3, 16), 48.0))
    bits = torch.zeros(32, 64, dtype=torch.uint8)
    bits[3, 5], bits[19, 60] = 0x7F, 0xFF
    damaged = SparseMatrix.from_dense(bits.view(E4M3), mask=torch.tensor([True, True, False, False]).repeat(32, 16))
    for isa in cpu.isas():
        for family in FAMILIES:
            y = cpu.linear(torch.ones(40, 64), *packed(damaged, E4M3), None, 32, 64, isa=isa, kernel=family)
            assert y.isnan().any(0).nonzero().flatten().tolist() == [3, 19]


def test_wrong_arguments_are_named() -> None:
    matrix = matrix_of(17, 12)
    operands = packed(matrix, E4M3)
    x = torch.randn(3, 12)
    with pytest.raises(ShapeError, match=r"scales are torch.float32 \[16\] on cpu: they must be float32 \[17\]"):
        cpu.linear(x, *operands, None, 17, 12, scales=torch.ones(16))
    with pytest.raises(ShapeError, match=r"scales are torch.bfloat16 \[17\]"):
        cpu.linear(x, *operands, None, 17, 12, scales=torch.ones(17).bfloat16())
    with pytest.raises(UnsupportedError, match=r"x is torch.float16 on cpu and the weight torch.float8_e4m3fn"):
        cpu.linear(x.half(), *operands, None, 17, 12)
    with pytest.raises(UnsupportedError, match="values are torch.float8_e5m2"):
        cpu.pack(matrix.values.to(torch.float8_e5m2), matrix.metadata, 17, 12)
