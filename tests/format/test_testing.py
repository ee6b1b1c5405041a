"""The shipped checks notice what they say they notice."""

from __future__ import annotations

import pytest
import torch

from twofour import SparseMatrix
from twofour.format.pack import VALUE_DTYPES
from twofour.testing import (
    assert_same_bits,
    assert_within_bound,
    hostile_tensor,
    hostile_values,
    integer_tensor,
    sizes_around,
)

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", [*VALUE_DTYPES, torch.float64, torch.uint8])
def test_hostile_values_are_hostile(dtype: torch.dtype) -> None:
    values = hostile_values(dtype)
    assert values.dtype == dtype
    wide = values.double()
    assert (wide == 1).sum() > 1
    assert bool((wide == 0).any())
    if dtype.is_floating_point:
        assert bool(wide.isnan().any())
        assert bool(((wide == 0) & wide.signbit()).any())
        smallest = wide[wide > 0].min()
        assert 0 < smallest < torch.finfo(dtype).smallest_normal
        assert not bool(hostile_values(dtype, finite=True).double().isnan().any())
        if dtype != torch.float8_e4m3fn:
            assert bool(wide.isinf().any())
    if dtype.is_signed:
        assert (
            0.4
            <= float((wide.signbit() & ~wide.isnan()).double().mean()) + float(wide.isnan().double().mean()) / 2
            <= 0.6
        )


def test_two_nans_differ_in_their_bits() -> None:
    values = hostile_values(torch.float32)
    assert len(set(values[values.isnan()].view(torch.int32).tolist())) == 2


def test_tensors_are_the_same_for_the_same_seed() -> None:
    for make in (hostile_tensor, integer_tensor):
        assert_same_bits(make((9, 7), torch.bfloat16, seed=5), make((9, 7), torch.bfloat16, seed=5))
        assert make((0, 7), torch.float8_e5m2).shape == (0, 7)
    whole = integer_tensor((64, 64), torch.int8)
    assert whole.unique().tolist() == list(range(-4, 5))


def test_sizes_are_legal() -> None:
    assert sizes_around(8, 16, multiple=4, smallest=6) == (8, 12, 16, 20, 28, 32, 36)
    assert sizes_around(2) == (1, 2, 3, 4, 5)


def test_same_bits_tells_zeros_and_nans_apart() -> None:
    nan = torch.tensor([NAN])
    assert_same_bits(nan, nan.clone())
    with pytest.raises(
        AssertionError,
        match=r"1 of 1 differ, the first at \[0\]: found nan \(0x7fc00000\), expected nan \(0x7fc00001\)",
    ):
        assert_same_bits(nan, (nan.view(torch.int32) | 1).view(torch.float32))
    left, right = torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.bfloat16)
    right[1, 2] = -0.0
    with pytest.raises(
        AssertionError, match=r"1 of 6 differ, the first at \[1, 2\]: found 0.0 \(0x0000\), expected -0.0 \(0x8000\)"
    ):
        assert_same_bits(left, right)
    with pytest.raises(AssertionError, match=r"found torch.bfloat16 \[2, 3\], expected torch.float32 \[2, 3\]"):
        assert_same_bits(left, left.float())
    with pytest.raises(AssertionError, match=r"\[2, 3\], expected torch.bfloat16 \[6\]"):
        assert_same_bits(left, left.flatten())
    assert_same_bits(left.T, torch.zeros(3, 2, dtype=torch.bfloat16))
    assert_same_bits(torch.tensor(True), torch.tensor(True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_honest_products_pass(dtype: torch.dtype) -> None:
    x, w, bias = torch.randn(5, 7, 64).to(dtype), torch.randn(48, 64).to(dtype), torch.randn(48).to(dtype)
    y = torch.nn.functional.linear(x.float(), w.float(), bias.float()).to(dtype)
    assert_within_bound(y, x, w, bias)
    assert_within_bound(y[:0], x[:0], w, bias)


def test_a_sum_in_bfloat16_fails_where_float32_is_promised() -> None:
    x, w = torch.rand(1, 4096).bfloat16(), torch.rand(1, 4096).bfloat16()
    y = torch.zeros(1, 1, dtype=torch.bfloat16)
    for product in (x[0] * w[0]).split(64):
        y += product.sum()
    with pytest.raises(
        AssertionError, match=r"1 of 1 outside the bound, the first at \[0, 0\]: found .*, expected .*, off by"
    ):
        assert_within_bound(y, x, w)


@pytest.mark.parametrize("fault", ["index", "sign", "tail", "bias"])
def test_small_faults_fail(fault: str) -> None:
    x, w, bias = torch.randn(3, 36), torch.randn(8, 36), torch.randn(8)
    y = torch.nn.functional.linear(x, w, bias)
    if fault == "index":
        y[1, 2] += x[1, 4] * (w[2, 5] - w[2, 4])
    elif fault == "sign":
        y[1, 2] -= 2 * x[1, 4] * w[2, 4]
    elif fault == "tail":
        y[1, 2] -= x[1, 35] * w[2, 35]
    else:
        y[1, 2] -= bias[2]
    with pytest.raises(AssertionError, match=r"1 of 24 outside the bound, the first at \[1, 2\]"):
        assert_within_bound(y, x, w, bias)


def test_overflow_and_subnormals_of_the_output() -> None:
    x, w = torch.tensor([[60000.0, 60000]]), torch.tensor([[1.0, 1], [2**-40, 0]])
    assert_within_bound(torch.tensor([[INF, 2**-24]]).half(), x, w)  # 2**-40 * 60000 rounds to the smallest subnormal
    with pytest.raises(AssertionError, match=r"\[0, 0\]: found -inf, expected 120000.0"):
        assert_within_bound(torch.tensor([[-INF, 2**-24]]).half(), x, w)
    with pytest.raises(AssertionError, match=r"\[0, 0\]: found inf, expected 120000.0"):
        assert_within_bound(torch.tensor([[INF, 0.0]]), x, w)
    with pytest.raises(AssertionError, match=r"\[0, 1\]: found 1\.19"):
        assert_within_bound(torch.tensor([[INF, 2**-23]]).half(), x, w)
    assert_within_bound(torch.tensor([[INF, 2**-23]]).half(), x, w, absolute=2**-23)


def test_dropped_places_take_no_part() -> None:
    matrix = SparseMatrix.from_dense(torch.tensor([[1.0, 2, 0, 0], [0, 0, 1, 1]]))
    x = torch.tensor([[1.0, 1, INF, NAN], [INF, -INF, 1, 1]])
    assert_within_bound(torch.tensor([[3, NAN], [NAN, 2]]), x, matrix)
    with pytest.raises(AssertionError, match=r"\[0, 0\]: found nan, expected 3"):
        assert_within_bound(torch.tensor([[NAN, NAN], [NAN, 2]]), x, matrix)
    with pytest.raises(AssertionError, match=r"\[0, 0\]: found 3.0, expected nan"):
        assert_within_bound(torch.tensor([[3, NAN], [NAN, 2]]), x, matrix.to_dense())


def test_shapes_are_compared() -> None:
    with pytest.raises(AssertionError, match=r"y is \[2, 3\], expected \[2, 4\]"):
        assert_within_bound(torch.zeros(2, 3), torch.zeros(2, 8), torch.zeros(4, 8))
