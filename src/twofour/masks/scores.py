"""How much each weight matters."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError


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


def wanda(weight: Tensor, mean_square: Tensor) -> Tensor:
    """|weight| times the root mean square of the input it is multiplied with.

    Args:
        weight: [out_features, in_features], as in `magnitude`.
        mean_square: [in_features], mean of x² over tokens, not negative.
    Returns:
        floating point, shape and device of `weight`; float64 stays, all others become float32.
    Raises:
        ShapeError: another number of inputs.
    Source: Sun et al. 2023, arXiv:2306.11695.
    """
    scores = magnitude(weight)
    return scores * _root(scores, mean_square)


def ria(weight: Tensor, mean_square: Tensor, power: float = 0.5) -> Tensor:
    """Relative importance and activations: |weight| as a share of its row and of its column, times rms(input)^power.

    Rows and columns of zeros score zero.

    Args:
        weight, mean_square: as in `wanda`.
        power: of the root mean square of the input.
    Returns, Raises: as in `wanda`.
    Source: Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models".
    """
    scores = magnitude(weight)
    rms = _root(scores, mean_square)
    rows, columns = scores.sum(1, keepdim=True), scores.sum(0, keepdim=True)
    relative = scores / torch.where(rows > 0, rows, 1) + scores / torch.where(columns > 0, columns, 1)
    return relative * rms**power


def _root(scores: Tensor, mean_square: Tensor) -> Tensor:
    if scores.ndim != 2 or tuple(mean_square.shape) != (scores.shape[1],):
        raise ShapeError(
            f"weight is {list(scores.shape)} and mean_square {list(mean_square.shape)}: a matrix and one number for each"
            " of its columns are needed."
        )
    return mean_square.to(scores.device).sqrt().to(scores.dtype)
