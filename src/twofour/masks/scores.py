"""How much each weight matters."""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """|weight| as numbers: float8 and int8 are compared by value, not by byte.

    Args:
        weight: any shape; floating point (float8 included) or int8.
    Returns:
        floating point, same shape and device: float64 and float32 keep their dtype, all others become float32 (exact).
        NaN stays NaN, -0.0 becomes 0.0.
    Source: Han et al. 2015, arXiv:1506.02626.
    """
    wide = weight.detach()
    if wide.dtype not in (torch.float32, torch.float64):
        wide = wide.to(torch.float32)
    return wide.abs()
