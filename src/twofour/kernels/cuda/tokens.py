"""Inputs as int8 with a scale for each token, by the kernels of csrc/cuda/tokens.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ShapeError, UnsupportedError
from . import layout, packing, resources, table

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_MOST_TOKENS = 2**31 - 1  # blocks of a grid


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.quantize_tokens`, the same bits.

    Args:
        x: [tokens, columns] float32, bfloat16 or float16 on a GPU, any strides.
    Returns:
        int8 [tokens, columns], its rows at multiples of 16 bytes, and float32 scales [tokens].
    Raises:
        ShapeError, UnsupportedError: as the argument says; no driver or compiler.
    """
    if x.ndim != 2:
        raise ShapeError(f"x is {list(x.shape)}: it must be [tokens, columns]. Flatten it with x.flatten(0, -2).")
    if x.dtype not in _NAMES:
        known = ", ".join(str(each).removeprefix("torch.") for each in _NAMES)
        raise UnsupportedError(f"{str(x.dtype).removeprefix('torch.')} is not quantized by a GPU kernel: {known} are.")
    if not packing._on_gpu(x):
        raise UnsupportedError(f"x is on {x.device}: put it on a GPU, or take reference.quantize_tokens.")
    tokens, columns = x.shape
    if tokens > _MOST_TOKENS:
        raise ShapeError(
            f"x is {list(x.shape)}: at most {_MOST_TOKENS} tokens are quantized at once. Do it part by part."
        )
    x = x.detach() if x.requires_grad else x
    x = x if columns < 2 or x.stride(1) == 1 else x.contiguous()
    wide = -(-columns // layout.ALIGNED) * layout.ALIGNED
    q = resources.empty((tokens, wide), (max(wide, 1), 1), torch.int8, x.device)
    scales = resources.empty((tokens,), (1,), torch.float32, x.device)
    if columns == 0:
        scales.zero_()
    elif tokens:
        table.launch(
            f"quantize_tokens_{_NAMES[x.dtype]}",
            (tokens,),
            x.device,
            x.data_ptr(),
            x.stride(0),
            columns,
            q.data_ptr(),
            wide,
            scales.data_ptr(),
        )
    return q if wide == columns else q[:, :columns], scales
