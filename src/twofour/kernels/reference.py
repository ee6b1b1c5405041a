"""The kernels in plain torch: the specification that every fast kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from ..format.pack import unpack, unpack_mask
from ..pattern import Pattern
from . import epilogue


def linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    pattern: Pattern,
    in_features: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """activation(x @ W.T + bias) + residual by way of the dense weight; in float32 (float64 for float64 x), rounded once.

    Args:
        x: [..., in_features] floating point.
        values, metadata: as in SparseMatrix; int8 and float8 values are taken as numbers, without a scale.
        bias: [out_features], or None.
        activation: a name of `epilogue.ACTIVATIONS`.
        residual: [..., out_features], or None.
    Returns:
        [..., out_features] of x's dtype. An input at a dropped place never reaches the output, not even NaN or infinity.
    Cost: a float32 product, and the dense weight made anew at each call.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _linear(x, values, metadata, bias, pattern, in_features, activation, residual)


def _linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    pattern: Pattern,
    in_features: int,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = to_dense(values, metadata, pattern, in_features).to(wide)
    rows = x.reshape(-1, in_features).to(wide)
    if bool(torch.isfinite(rows).all()):
        y = rows @ weight.T
    else:  # 0 * inf is NaN in a dense product; here a dropped place is not multiplied at all
        held = unpack_mask(metadata, (values.shape[0], in_features), pattern)
        y = torch.stack([torch.where(held, row * weight, weight.new_zeros(())).sum(-1) for row in rows])
    y = y if bias is None else y + bias.to(wide)
    y = epilogue.finish(y, activation, None if residual is None else residual.reshape(y.shape).to(wide))
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def linear_grad_input(grad: Tensor, values: Tensor, metadata: Tensor, pattern: Pattern, in_features: int) -> Tensor:
    """grad @ W by way of the dense weight; sums in float32 (float64 for float64 grad), rounded once.

    Args:
        grad: [..., out_features] floating point.
        values, metadata: as in SparseMatrix.
    Returns:
        [..., in_features] of grad's dtype. A gradient never reaches an input that its row of W drops.
    Cost: a float32 product, and the dense weight made anew at each call.
    """
    with torch.autocast(grad.device.type, enabled=False):
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        weight = to_dense(values, metadata, pattern, in_features).to(wide)
        rows = grad.reshape(-1, weight.shape[0]).to(wide)
        if bool(torch.isfinite(rows).all()):
            found = rows @ weight
        else:
            held = unpack_mask(metadata, (values.shape[0], in_features), pattern)
            found = torch.stack([torch.where(held, row[:, None] * weight, weight.new_zeros(())).sum(0) for row in rows])
        return found.to(grad.dtype).view(*grad.shape[:-1], in_features)


def linear_grad_values(grad: Tensor, x: Tensor, metadata: Tensor, pattern: Pattern, in_features: int) -> Tensor:
    """The gradient of the kept values: grad.T @ x at their places; sums in float32 (float64 for float64), rounded once.

    Args:
        grad: [..., out_features] floating point.
        x: [..., in_features] of the same tokens.
        metadata: as in SparseMatrix.
    Returns:
        [out_features, in_features·keep/group] of grad's dtype; zeros where there are no tokens.
    Cost: a float32 product of which only the kept places are used.
    """
    with torch.autocast(grad.device.type, enabled=False):
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        rows, inputs = grad.reshape(-1, grad.shape[-1]).to(wide), x.reshape(-1, in_features).to(wide)
        held = unpack_mask(metadata, (grad.shape[-1], in_features), pattern)
        return (rows.T @ inputs)[held].view(grad.shape[-1], -1).to(grad.dtype)


def to_dense(values: Tensor, metadata: Tensor, pattern: Pattern, in_features: int) -> Tensor:
    """The dense weight [out_features, in_features] in the dtype of `values`."""
    return unpack(values, metadata, (values.shape[0], in_features), pattern)


SMALLEST_QUANTIZED = 2.0**-119
"""A token whose largest input is smaller counts as zero: its scale would not be a normal float32."""


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each token of x as int8 with one scale, symmetrically: q = round(x * (127 / largest)), scale = largest / 127.

    Args:
        x: [tokens, in_features] floating point; taken as float32.
    Returns:
        int8 [tokens, in_features] in -127 .. 127, ties to even, and float32 scales [tokens]. A token that is zero, or
        whose largest input is below 2**-119, has scale 0; one with NaN or infinity anywhere has scale NaN and zeros.
    """
    wide = x.to(torch.float32)
    largest = wide.abs().amax(1)
    finite = torch.isfinite(wide).all(1)
    used = finite & (largest >= SMALLEST_QUANTIZED)
    safe = torch.where(used, largest, 1.0)
    factor = torch.full_like(safe, 127.0) / safe  # `127.0 / safe` would round twice
    scales = torch.where(used, safe / torch.full_like(safe, 127.0), 0.0)
    scales = torch.where(finite, scales, torch.nan)
    q = torch.where(used[:, None], torch.round(wide * factor[:, None]), 0.0)
    return q.to(torch.int8), scales


LARGEST_E4M3 = 448.0


def quantize_rows_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of x as float8_e4m3fn with one scale, symmetrically: q = e4m3(x * (448 / largest)), scale = largest / 448.

    Args:
        x: [rows, columns] floating point; taken as float32.
    Returns:
        float8_e4m3fn [rows, columns], ties to even, and float32 scales [rows]. NaN is no largest and stays NaN; beside an
        infinity numbers become 0 and it NaN. A row whose largest is below 2**-119 has scale 0 and zeros.
    """
    wide = x.to(torch.float32)
    largest = torch.where(wide.isnan(), 0.0, wide.abs()).amax(1)
    used = largest >= SMALLEST_QUANTIZED
    safe = torch.where(used, largest, 1.0)
    factor = torch.where(used, torch.full_like(safe, LARGEST_E4M3) / safe, 0.0)
    scales = torch.where(used, safe / torch.full_like(safe, LARGEST_E4M3), 0.0)
    return (wide * factor[:, None]).to(torch.float8_e4m3fn), scales


def linear_float8(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    pattern: Pattern,
    in_features: int,
    activation: str = "none",
) -> Tensor:
    """activation(x @ W.T, scaled, + bias): (sum * scale) + bias in float32 (float64 for float64 x), rounded to x's dtype once.

    Args:
        x: [..., in_features] floating point.
        values, metadata: as in SparseMatrix, float8_e4m3fn.
        scales: float32 [out_features].
        bias: [out_features], or None.
        activation: a name of `epilogue.ACTIVATIONS`.
    Returns:
        [..., out_features] of x's dtype. An input at a dropped place never reaches the output, not even NaN or infinity.
    Cost: as `linear`.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = linear(x.to(wide), values, metadata, None, pattern, in_features) * scales.to(wide)
    y = y if bias is None else y + bias.to(wide)
    return epilogue.finish(y, activation, None).to(x.dtype)


def linear_int8(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    pattern: Pattern,
    in_features: int,
    activation: str = "none",
) -> Tensor:
    """activation(quantized(x) @ W.T, scaled, + bias): ((sum * x_scale) * scale) + bias, each rounded once in float32.

    Args:
        x: [..., in_features] floating point; see `quantize_tokens`.
        values, metadata: as in SparseMatrix, int8.
        scales: float32 [out_features].
        bias: [out_features], or None.
        activation: a name of `epilogue.ACTIVATIONS`, of float32.
    Returns:
        [..., out_features] of x's dtype. Sums are exact for in_features up to 2**18. A token with NaN or infinity at
        any place, dropped ones too, is NaN in every output.
    """
    with torch.autocast(x.device.type, enabled=False):
        weight = to_dense(values, metadata, pattern, in_features)
        q, x_scales = quantize_tokens(x.reshape(-1, in_features))
        sums = (q.double() @ weight.double().T).float()  # exact in float64, then rounded once
        y = sums * x_scales[:, None] * scales
        y = y if bias is None else y + bias.to(torch.float32)
        return epilogue.finish(y, activation, None).to(x.dtype).view(*x.shape[:-1], weight.shape[0])
