"""The kernels in plain torch: the specification that every fast kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from ..format.pack import unpack, unpack_mask
from ..pattern import Pattern


def linear(
    x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, pattern: Pattern, in_features: int
) -> Tensor:
    """x @ W.T + bias by way of the dense weight; sums and bias in float32 (float64 for float64 x), rounded once.

    Args:
        x: [..., in_features] floating point.
        values, metadata: as in SparseMatrix; int8 and float8 values are taken as numbers, without a scale.
        bias: [out_features], or None.
    Returns:
        [..., out_features] of x's dtype. An input at a dropped place never reaches the output, not even NaN or infinity.
    Cost: a float32 product, and the dense weight made anew at each call.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _linear(x, values, metadata, bias, pattern, in_features)


def _linear(
    x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, pattern: Pattern, in_features: int
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
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def to_dense(values: Tensor, metadata: Tensor, pattern: Pattern, in_features: int) -> Tensor:
    """The dense weight [out_features, in_features] in the dtype of `values`."""
    return unpack(values, metadata, (values.shape[0], in_features), pattern)
