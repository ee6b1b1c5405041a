"""Masks chosen in C++ (csrc/cpu/masks.h): the bits of select.py and transposable.py, many times as fast."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native


def runs(scores: Tensor) -> bool:
    """True where C++ can choose: the build has it, and the scores are plain float32 or float64 in a CPU's memory.

    What a tracer or a compiler watches, or a subclass stands for, is left to torch.
    """
    return (
        native.LOADED is not None
        and type(scores) in (Tensor, torch.nn.Parameter)
        and scores.device.type == "cpu"
        and scores.layout == torch.strided
        and scores.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(scores)
    )


def transposable_2_4(scores: Tensor, *, isa: str | None = None) -> Tensor:
    """The mask of `transposable_mask` for "2:4t".

    Args:
        scores: [rows, columns] that `runs` took, both multiples of 4.
        isa: one of `native.module().masks_isas()`; None takes the best.
    Returns:
        bool [rows, columns].
    """
    scores = _dense_rows(scores)
    rows, columns = scores.shape
    mask = torch.empty(rows, columns, dtype=torch.bool)
    native.module().transposable_2_4(
        scores.data_ptr(),
        mask.data_ptr(),
        rows,
        columns,
        scores.stride(0),
        scores.dtype.itemsize,
        torch.get_num_threads(),
        isa,
    )
    return mask


def _dense_rows(scores: Tensor) -> Tensor:
    """`scores`, or a copy where neighbours in a row are not neighbours in memory, or rows overlap."""
    scores = scores.detach()
    if (scores.shape[-1] > 1 and scores.stride(-1) != 1) or (
        scores.shape[0] > 1 and scores.stride(0) < scores.shape[-1]
    ):
        return scores.contiguous()
    return scores
