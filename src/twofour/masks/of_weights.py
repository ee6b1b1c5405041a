"""Masks by magnitude, made again and again while a model trains: in one pass where C++ can."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..pattern import Pattern
from . import cpu
from .scores import magnitude
from .select import nm_mask


def magnitude_mask(weight: Tensor, pattern: Pattern | str) -> Tensor:
    """`nm_mask(magnitude(weight), pattern)`, bit for bit, without the scores in memory where C++ has the pattern.

    Args:
        weight: [out_features, in_features] as `nm_mask` asks, floating point.
    Returns:
        bool, shape and device of `weight`.
    Cost: "2:4t" of a 4096x1024 bfloat16 weight in 0.9 ms on a core of Zen 5.

    >>> magnitude_mask(torch.tensor([[3.0, -4.0, 1.0, 2.0]]), "2:4").tolist()
    [[True, True, False, False]]
    """
    pattern = Pattern.parse(pattern)
    direct = (pattern.keep, pattern.group) == (2, 4) and pattern.transposable and weight.ndim == 2
    if direct and weight.numel() and not any(size % 4 for size in weight.shape) and cpu.runs_weights(weight):
        return cpu.transposable_2_4(weight, magnitude=True)
    return nm_mask(magnitude(weight), pattern)


def differences(one: Tensor, other: Tensor) -> Tensor | int:
    """In how many places two masks of one shape differ; a tensor where they are not on the CPU."""
    other = other.to(one.device)
    if one.is_cpu and native.LOADED is not None:
        return cpu.differences(one.contiguous(), other.contiguous())
    return torch.count_nonzero(one ^ other)
