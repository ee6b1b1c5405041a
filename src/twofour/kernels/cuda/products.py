"""y = x @ W.T and what follows it, on a GPU, by the kernels for as many tokens as there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ...errors import UnsupportedError
from . import arguments, decode, gemm
from .packing import PackedMatrix

Kernels = Literal["decode", "gemm"]
_MULTIPLIED: dict[str, Callable[[arguments.Arguments], Tensor]] = {
    "decode": decode.multiplied,
    "gemm": gemm.multiplied,
}

MOST_DECODED = decode.MOST_TOKENS
"""Tokens that one reading of the weight serves without a tile of the product."""
MOST_DECODED_E4M3 = 4 * decode.MOST_TOKENS
"""Likewise, in four readings, of an e4m3 weight. A reading is 0.625 bytes of each place of the
weight, four are 2.5. As 16 bits it costs 2.875: 0.625 read and 1.125 written to widen it, and those read again. A fifth
reading would make 3.125."""


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
    call = arguments.check(x, packed, bias, row_scale, token_scale, activation, residual, out_dtype)
    done = call.without_kernels()
    if done is not None:
        return done
    if kernels is None:
        kernels = "decode" if x.shape[0] <= (MOST_DECODED_E4M3 if call.is_e4m3 else MOST_DECODED) else "gemm"
    if kernels not in _MULTIPLIED:
        raise UnsupportedError(f"kernels is {kernels!r}: it must be {' or '.join(map(repr, _MULTIPLIED))}, or None.")
    return _MULTIPLIED[kernels](call)
