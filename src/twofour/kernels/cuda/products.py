"""y = x @ W.T and what follows it, on a GPU, by the kernels for as many tokens as there are."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ...errors import ShapeError, UnsupportedError
from . import arguments, decode, gemm, prepared
from .packing import PackedMatrix

Kernels = Literal["decode", "gemm"]
MOST_DECODED = decode.MOST_TOKENS
"""Tokens that one reading of the weight serves without a tile of the product."""
MOST_DECODED_E4M3 = 4 * decode.MOST_TOKENS
"""Likewise, in four readings, of an e4m3 weight. A reading is 0.625 bytes of each place of the
weight, four are 2.5. As 16 bits it costs 2.875: 0.625 read and 1.125 written to widen it, and those read again. A fifth
reading would make 3.125."""

_MOST_PREPARED = 4096
_prepared: dict[tuple[object, ...], prepared.Product] = {}
"""By what `linear` looks for. Where there are too many, all go, and those in use come back."""


def linear(
    x: Tensor,
    packed: PackedMatrix,
    bias: Tensor | None = None,
    *,
    row_scale: Tensor | None = None,
    token_scale: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    kernels: Kernels | None = None,
) -> Tensor:
    """activation(x @ W.T * token_scale * row_scale + bias) + residual: sums in float32 (int32 for int8), rounded once.

    Results do not depend on which block ran first.

    Args:
        x: [..., columns] bfloat16, float16, int8, or where the GPU multiplies it float8_e4m3fn, on the GPU of `packed`;
            tokens are all that its leading axes hold; only rows that begin at multiples of 16 bytes avoid a copy.
        packed: of a [rows, columns] weight of x's dtype; or of float8_e4m3fn, whose numbers 16 bits hold exactly, where x
            has 16: `packing.quantize` makes one, and its row_scale.
        bias: [rows] of the dtype of the result, or None.
        row_scale, token_scale: [rows] and [tokens] float32 that sums are multiplied with, or None.
        activation: a name of `epilogue.ACTIVATIONS`.
        residual: [..., rows] of the dtype of the result, rows any distance apart; or None.
        out_dtype: of the result, one of `arguments.ITEMS`; None for that of x, bfloat16 for 8 bits.
        kernels: "decode", made for few tokens: 64 at a time, each time reading the weight. "gemm", which reads it about once
            for all of them. None: decode up to MOST_DECODED tokens (MOST_DECODED_E4M3 for e4m3 weights), gemm above.
    Returns:
        [..., rows], contiguous.
    Raises:
        ShapeError, UnsupportedError: as the arguments say; no driver or compiler.
        torch.OutOfMemoryError, DeviceError: no memory, for torch or for the driver; nothing is kept of the call.
    """
    values, metadata, (rows, columns) = packed.values, packed.metadata, packed.shape
    key = (x.shape, x.dtype, x.get_device(), values.dtype, rows, columns, activation, out_dtype, kernels)
    product = _prepared.get(key)
    if product is not None:
        y = product.multiplied(x, values, metadata, bias, row_scale, token_scale, residual)
        if y is not None:
            return y
    if x.ndim in (0, 2) or x.shape[-1] != columns:
        call = arguments.check(x, packed, bias, row_scale, token_scale, activation, residual, out_dtype)
        return _multiplied(call, kernels, key)
    leading, tokens = x.shape[:-1], math.prod(x.shape[:-1])
    if residual is not None and residual.shape != (*leading, rows):
        raise ShapeError(f"residual is {list(residual.shape)}: it must be {[*leading, rows]}, as y.")
    flat = x.reshape(tokens, columns)
    y = linear(
        flat,
        packed,
        bias,
        row_scale=row_scale,
        token_scale=token_scale,
        activation=activation,
        residual=None if residual is None else residual.reshape(tokens, rows),
        out_dtype=out_dtype,
        kernels=kernels,
    )
    of_flat = _prepared.get((flat.shape, *key[1:]))
    if product is None and of_flat is not None:
        _keep(key, of_flat.nested(leading))
    return y.view(*leading, rows)


def again(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    rows: int,
    columns: int,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
) -> Tensor | None:
    """`linear` of 16 bits where one of these shapes and dtypes was before, and kernels can read what is given; None otherwise.

    Nothing else needs to be checked of the arguments, but that the weight is one of [rows, columns].
    """
    dtype = x.dtype
    if dtype != values.dtype or dtype.itemsize != 2:
        return None
    product = _prepared.get((x.shape, dtype, x.get_device(), dtype, rows, columns, activation, None, None))
    return None if product is None else product.multiplied(x, values, metadata, bias, None, None, residual)


def _multiplied(call: arguments.Arguments, kernels: Kernels | None, key: tuple[object, ...]) -> Tensor:
    done = call.without_kernels()
    if done is not None:
        return done
    if kernels is None:
        kernels = "decode" if call.x.shape[0] <= (MOST_DECODED_E4M3 if call.is_e4m3 else MOST_DECODED) else "gemm"
    if kernels not in get_args(Kernels):
        known = " or ".join(map(repr, get_args(Kernels)))
        raise UnsupportedError(f"kernels is {kernels!r}: it must be {known}, or None.")
    if kernels == "gemm" and call.is_e4m3:  # its weight is made anew for each call
        return gemm.multiplied(call)
    product = _prepared.get(key)  # it is there where something had to be copied
    if product is None:
        product = prepared.Product(call, decode.launches(call) if kernels == "decode" else gemm.launches(call))
        product.run(call)
        _keep(key, product)
        return call.y
    return product.run(call)


def _keep(key: tuple[object, ...], product: prepared.Product) -> None:
    if len(_prepared) >= _MOST_PREPARED:
        _prepared.clear()
    _prepared[key] = product
