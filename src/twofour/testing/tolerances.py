"""Comparisons that a wrong kernel cannot pass: same bits, or a bound for every single output."""

from __future__ import annotations

import torch
from torch import Tensor

from ..format import SparseMatrix

_CARRIER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """Raises AssertionError unless both have the same shape, dtype and bits: -0.0 is not 0.0, and NaN payloads count.

    >>> assert_same_bits(torch.tensor([1., -0.]), torch.tensor([1., 0.]))
    Traceback (most recent call last):
    AssertionError: 1 of 2 differ, the first at [1]: found -0.0 (0x80000000), expected 0.0 (0x00000000)
    """
    _require_alike(found, expected)
    width = found.dtype.itemsize
    ours, theirs = (t.detach().cpu().contiguous().view(_CARRIER[width]) for t in (found, expected))
    differs = ours != theirs
    if bool(differs.any()):
        place, count = _first(differs)
        shown = []
        for tensor, bits in ((found, ours), (expected, theirs)):
            pattern = int(bits[place]) & (1 << 8 * width) - 1
            shown.append(f"{_number(tensor[place])} (0x{pattern:0{2 * width}x})")
        raise AssertionError(
            f"{count} of {differs.numel()} differ, the first at {list(place)}: found {shown[0]}, expected {shown[1]}"
        )


def assert_within_bound(
    y: Tensor,
    x: Tensor,
    w: Tensor | SparseMatrix,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    accumulator: torch.dtype = torch.float32,
    absolute: float = 0.0,
) -> None:
    """Raises AssertionError unless y = x @ w.T + bias, each output within what rounding can explain.

    |y - y64| <= u_out·|y64| + k·u_acc·(|x|·|w|ᵀ + |bias|), where y64 is the float64 result, u_out and u_acc are half
    the eps of the dtypes, and k = in_features + 1 counts the roundings of one output, in any order of summation.
    Outputs may also miss by half the smallest subnormal of `out_dtype`, and overflow to infinity where the bound
    reaches beyond its largest number. Where NaN or infinities decide the result, y must hold the same one; where
    |x|·|w|ᵀ overflows the accumulator, nothing is asked.

    Args:
        y: [..., out_features], the result to check.
        x: [..., in_features], before any rounding that the kernel does on purpose.
        w: dense [out_features, in_features] or a SparseMatrix, whose dropped places are not multiplied at all.
        bias: [out_features] or None.
        out_dtype: the floating point dtype that outputs are rounded to; y's own by default.
        accumulator: the dtype of the sums; float64 for integer kernels, whose sums are exact.
        absolute: further absolute error, for hardware that flushes subnormals:
            in_features · smallest normal · largest |x| or |w|.
    Cost: a float64 product on the CPU; much slower when x or w hold NaN or infinities.

    >>> x, w = torch.ones(1, 4), torch.ones(2, 4)
    >>> assert_within_bound(torch.tensor([[4., 4.5]]), x, w)
    Traceback (most recent call last):
    AssertionError: 1 of 2 outside the bound, the first at [0, 1]: found 4.5, expected 4.0, off by 0.5, allowed 1.43e-06
    """
    out_dtype = out_dtype or y.dtype
    dense = w.to_dense() if isinstance(w, SparseMatrix) else w
    held = w.mask().cpu() if isinstance(w, SparseMatrix) else torch.ones(dense.shape, dtype=torch.bool)
    shape = (*x.shape[:-1], dense.shape[0])
    if tuple(y.shape) != shape:
        raise AssertionError(f"y is {list(y.shape)}, expected {list(shape)}")
    ours, x64, w64 = (t.detach().cpu().double() for t in (y, x, dense))
    x64 = x64.reshape(-1, dense.shape[1])
    expected = _product(x64, w64, held)
    size = _product(x64.abs(), w64.abs(), held)
    if bias is not None:
        expected = expected + bias.detach().cpu().double()
        size = size + bias.detach().cpu().double().abs()
    expected, size = expected.view(shape), size.view(shape)

    out = torch.finfo(out_dtype)
    u_out, u_acc = out.eps / 2, torch.finfo(accumulator).eps / 2
    sums = (dense.shape[1] + 1) * u_acc * size
    # The output is rounded from the sum as it came out, hence 1 + u_out.
    allowed = u_out * expected.abs() + (1 + u_out) * sums + out.smallest_normal * out.eps / 2 + absolute
    error = (ours - expected).abs()
    overflow = (ours.isinf() & (ours.sign() == expected.sign())) & (expected.abs() + allowed >= out.max)
    same = (ours.isnan() & expected.isnan()) | (ours == expected)
    unknown = expected.isfinite() & (size >= torch.finfo(accumulator).max)
    bad = ~(torch.where(expected.isfinite(), (error <= allowed) | overflow, same) | unknown)
    if bool(bad.any()):
        place, count = _first(bad)
        raise AssertionError(
            f"{count} of {bad.numel()} outside the bound, the first at {list(place)}: found {_number(y[place])},"
            f" expected {float(expected[place])}, off by {float(error[place]):.3g}, allowed {float(allowed[place]):.3g}"
        )


def _product(x: Tensor, w: Tensor, held: Tensor) -> Tensor:
    if bool(x.isfinite().all()) and bool(w.isfinite().all()):
        return x @ w.T
    # 0 * inf is NaN in a product; a dropped place takes no part in it.
    rows = [torch.where(held, row * w, 0.0).sum(-1) for row in x]
    return torch.stack(rows) if rows else x.new_zeros(0, w.shape[0])


def _require_alike(found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise AssertionError(
            f"found {found.dtype} {list(found.shape)}, expected {expected.dtype} {list(expected.shape)}"
        )


def _first(bad: Tensor) -> tuple[tuple[int, ...], int]:
    places = bad.nonzero()
    return tuple(int(i) for i in places[0]), len(places)


def _number(value: Tensor) -> str:
    return repr(value.detach().cpu().double().item()) if value.dtype.is_floating_point else repr(value.item())
