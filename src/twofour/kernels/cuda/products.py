"""y = x @ W.T and what follows it, on a GPU, by the kernels for as many tokens as there are."""

from __future__ import annotations

import torch
from torch import Tensor

from . import arguments, decode, gemm
from .packing import PackedMatrix

MOST_DECODED = decode.MOST_TOKENS
"""Tokens that one reading of the weight serves without a tile of the product."""


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
    """As `decode.linear`, arguments, result and errors, by its kernels up to MOST_DECODED tokens, by those of gemm above."""
    call = arguments.check(x, packed, bias, row_scale, token_scale, activation, residual, out_dtype)
    done = call.without_kernels()
    if done is not None:
        return done
    return decode.multiplied(call) if len(call.x) <= MOST_DECODED else gemm.multiplied(call)
