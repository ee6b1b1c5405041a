"""Products with a weight that NVIDIA's kernels hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import ShapeError, UnsupportedError
from ...pattern import Pattern
from .. import epilogue, reference
from . import packing, search, support, torch_operations

_ALIGNMENT = 16  # bytes that the kernels load at once

_OUT_DTYPES = {
    torch.int8: (torch.int32, torch.float16, torch.bfloat16),
    torch.float8_e4m3fn: (torch.float32, torch.float16, torch.bfloat16),
}


def linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    pattern: Pattern | str,
    out_features: int,
    in_features: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """activation(x @ W.T + bias) + residual; sums in float32, rounded to x's dtype before the activation.

    An input at a dropped place never reaches y, not even NaN or infinity: tensor cores do not read it. The bias is added
    before rounding where it has x's dtype. cuSPARSELt writes the result as it is returned; CUTLASS writes its transpose,
    which costs a copy, and so do out_features that are no multiple of `packing.multiples`.

    Args:
        x: [..., in_features] float16 or bfloat16, the values' dtype; any strides.
        values, metadata: what `pack` returned.
        bias: [out_features] or None; of another dtype than x it is added in float32.
        activation: a name of `epilogue.ACTIVATIONS`.
        residual: [..., out_features] of x's dtype, or None.
    Raises:
        ShapeError: operands of another weight, x of another width.
        UnsupportedError: dtypes or devices that differ.
    """
    if x.dtype != values.dtype or x.dtype not in support.LAYER_DTYPES:
        raise UnsupportedError(
            f"x is {x.dtype}, the weight {values.dtype}: NVIDIA's kernels take float16 or bfloat16, the same for both."
            f" Pass x.to({values.dtype}), or make the layer with backend='reference'."
        )
    late = None if bias is None or bias.dtype == x.dtype else bias
    y = _product(x, values, metadata, None if late is not None else bias, out_features, in_features, None)
    if late is not None:
        y = epilogue.finish(y.float() + late.float(), activation, None).to(x.dtype)
        activation = "none"
    return epilogue.finish(y, activation, residual)


def products(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    out_features: int,
    in_features: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x @ W.T of numbers of 8 bits, unscaled.

    Args:
        x: [..., in_features] int8 or float8_e4m3fn, as the values.
        values, metadata: what `pack` returned.
        out_dtype: int32, float16 or bfloat16 for int8, float32, float16 or bfloat16 for float8; None is the first. On
            CUTLASS int32 only.
    Returns:
        [..., out_features] of out_dtype. int32 is exact.
    Raises:
        ShapeError: operands of another weight, x of another width.
        UnsupportedError: dtypes or devices that differ, another out_dtype.
    """
    known = _OUT_DTYPES.get(x.dtype)
    if known is None or x.dtype != values.dtype:
        raise UnsupportedError(
            f"x is {x.dtype}, the weight {values.dtype}: products() takes int8 or float8_e4m3fn, the same for both."
        )
    out_dtype = known[0] if out_dtype is None else out_dtype
    if out_dtype not in (known if packing.library_of(metadata) == "cuSPARSELt" else known[:1]):
        raise UnsupportedError(
            f"{x.dtype} products are not written as {out_dtype} by {packing.library_of(metadata)}: out_dtype=None is."
        )
    return _product(x, values, metadata, None, out_features, in_features, out_dtype)


def linear_int8(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    pattern: Pattern | str,
    out_features: int,
    in_features: int,
    activation: str = "none",
) -> Tensor:
    """`reference.linear_int8`, the same bits: exact sums by `products`, all else in torch."""
    with torch.autocast(x.device.type, enabled=False):
        q, x_scales = reference.quantize_tokens(x.reshape(-1, in_features))
        y = products(q, values, metadata, out_features, in_features).float() * x_scales[:, None] * scales
        y = y if bias is None else y + bias.float()
        return epilogue.finish(y, activation, None).to(x.dtype).view(*x.shape[:-1], out_features)


def _product(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """[..., out_features], contiguous."""
    packing.require(values, metadata, (out_features, in_features))
    _require(x, values, metadata, bias, out_features, in_features)
    library = packing.library_of(metadata)
    rows, columns = packing.padded((out_features, in_features), library, values.dtype)
    tokens = x.numel() // in_features
    if tokens == 0:
        return x.new_empty(*x.shape[:-1], out_features, dtype=out_dtype)
    dense = _fitted(x.reshape(-1, in_features), packing.multiples(library, values.dtype).tokens, columns).t()
    if bias is not None:
        bias = functional.pad(bias, (0, rows - out_features)) if rows != out_features else _aligned(bias)
    run = _cusparselt if library == "cuSPARSELt" else _cutlass
    y = run(rows, _aligned(values), _aligned(metadata), dense, bias, out_dtype)[:tokens, :out_features].contiguous()
    return y if x.ndim == 2 else y.view(*x.shape[:-1], out_features)


def _cusparselt(
    rows: int, values: Tensor, metadata: Tensor, dense: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None
) -> Tensor:
    """[tokens, rows]: the sparse matrix must come first, and its result is written in the order of its columns."""
    run = torch_operations.installed().sparse_mm
    key = search.key_of(rows, values, dense, bias, out_dtype)
    chosen = search.arguments(search.algorithm(key, values, dense, bias))
    named: dict[str, Any] = {"bias": bias, "out_dtype": out_dtype}
    named = {name: value for name, value in named.items() if value is not None} | {"transpose_result": True}
    if not chosen:
        return run(values, dense, **named)
    try:
        return run(values, dense, **named, **chosen)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        y = run(values, dense, **named)  # raises again where the algorithm is not to blame
        search.give_up(key)
        return y


def _cutlass(
    rows: int, values: Tensor, metadata: Tensor, dense: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None
) -> Tensor:
    operations = torch_operations.installed()
    if bias is not None:
        return operations.cutlass_addmm(bias, values, metadata, dense).t()
    named = {} if out_dtype is None else {"out_dtype": out_dtype}
    return operations.cutlass_mm(values, metadata, dense, **named).t()


def _fitted(rows: Tensor, multiple: int, columns: int) -> Tensor:
    """[tokens up to a multiple, columns], zeros beyond `rows`; contiguous and aligned, since the kernels see no strides."""
    tokens, width = rows.shape
    height = -(-tokens // multiple) * multiple
    if (height, columns) == (tokens, width):
        return _aligned(rows)
    fitted = rows.new_zeros(height, columns)
    fitted[:tokens, :width] = rows
    return fitted


def _aligned(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _require(
    x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, out_features: int, in_features: int
) -> None:
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ShapeError(f"x is {list(x.shape)}: its last axis must be in_features {in_features}.")
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ShapeError(f"bias is {list(bias.shape)}: it must be [{out_features}], one for each output.")
    for name, tensor in (("values", values), ("metadata", metadata), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise UnsupportedError(f"x is on {x.device}, {name} on {tensor.device}: put them on one device.")
