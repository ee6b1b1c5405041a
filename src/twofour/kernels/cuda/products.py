"""y = x @ W.T and what follows it, on a GPU, by the kernels for as many tokens as there are."""

from __future__ import annotations

import torch
from torch import Tensor

from . import arguments, decode, gemm
from .packing import PackedMatrix

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
) -> Tensor:
    """As `decode.linear`, arguments, result and errors, by its kernels up to MOST_DECODED tokens (MOST_DECODED_E4M3 for e4m3
    weights), by those of gemm above."""
    call = arguments.check(x, packed, bias, row_scale, token_scale, activation, residual, out_dtype)
    done = call.without_kernels()
    if done is not None:
        return done
    most = MOST_DECODED_E4M3 if call.is_e4m3 else MOST_DECODED
    return decode.multiplied(call) if call.x.shape[0] <= most else gemm.multiplied(call)
