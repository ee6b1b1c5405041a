"""y = x @ W.T and what follows it, on a GPU, by the kernels for as many tokens as there are."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...errors import UnsupportedError
from . import arguments, decode, gemm, prepared
from .packing import PackedMatrix

Kernels = Literal["decode", "gemm"]
_KINDS = ("decode", "gemm")
MOST_DECODED = decode.MOST_TOKENS
"""Tokens that one reading of the weight serves without a tile of the product."""
MOST_DECODED_E4M3 = 4 * decode.MOST_TOKENS
"""Likewise, in four readings, of an e4m3 weight. A reading is 0.625 bytes of each place of the
weight, four are 2.5. As 16 bits it costs 2.875: 0.625 read and 1.125 written to widen it, and those read again. A fifth
reading would make 3.125."""

_MOST_PREPARED = 4096
_prepared: dict[tuple[object, ...], prepared.Product] = {}
"""By what `linear` looks for; products of the shapes that came last."""


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
        x: [tokens, columns] bfloat16, float16, int8, or where the GPU multiplies it float8_e4m3fn, on the GPU of `packed`;
            only rows that begin at multiples of 16 bytes avoid a copy.
        packed: of a [rows, columns] weight of x's dtype; or of float8_e4m3fn, whose numbers 16 bits hold exactly, where x
            has 16: `packing.quantize` makes one, and its row_scale.
        bias: [rows] of the dtype of the result, or None.
        row_scale, token_scale: [rows] and [tokens] float32 that sums are multiplied with, or None.
        activation: a name of `epilogue.ACTIVATIONS`.
        residual: [tokens, rows] of the dtype of the result, rows any distance apart; or None.
        out_dtype: of the result, one of `arguments.ITEMS`; None for that of x, bfloat16 for 8 bits.
        kernels: "decode", made for few tokens: 64 at a time, each time reading the weight. "gemm", which reads it about once
            for all of them. None: decode up to MOST_DECODED tokens (MOST_DECODED_E4M3 for e4m3 weights), gemm above.
    Returns:
        [tokens, rows], contiguous.
    Raises:
        ShapeError, UnsupportedError: as the arguments say; no driver or compiler.
        torch.OutOfMemoryError, DeviceError: no memory, for torch or for the driver; nothing is kept of the call.
    """
    key = (x.shape, x.dtype, x.get_device(), packed.values.dtype, packed.shape, activation, out_dtype, kernels)
    product = _prepared.get(key)
    if product is not None:
        y = product.multiplied(x, packed, bias, row_scale, token_scale, residual)
        if y is not None:
            return y
    call = arguments.check(x, packed, bias, row_scale, token_scale, activation, residual, out_dtype)
    done = call.without_kernels()
    if done is not None:
        return done
    if kernels is None:
        kernels = "decode" if x.shape[0] <= (MOST_DECODED_E4M3 if call.is_e4m3 else MOST_DECODED) else "gemm"
    if kernels not in _KINDS:
        raise UnsupportedError(f"kernels is {kernels!r}: it must be {' or '.join(map(repr, _KINDS))}, or None.")
    if kernels == "gemm" and call.is_e4m3:  # its weight is made anew for each call
        return gemm.multiplied(call)
    product = prepared.Product(call, decode.launches(call) if kernels == "decode" else gemm.launches(call))
    product.start(*call.operands(), call.y)
    if len(_prepared) >= _MOST_PREPARED:
        _prepared.clear()
    _prepared[key] = product
    return call.y
