"""Masks chosen in C++ (csrc/cpu/masks.h): the bits of select.py and transposable.py, many times as fast."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..pattern import Pattern


def runs(scores: Tensor) -> bool:
    """True where C++ can choose: the build has it, and the scores are plain float32 or float64 in a CPU's memory.

    What a tracer or a compiler watches, or a subclass stands for, is left to torch.
    """
    return runs_weights(scores) and scores.dtype != torch.bfloat16


def runs_weights(scores: Tensor) -> bool:
    """As `runs`, also for bfloat16, which `transposable_2_4` ranks."""
    return (
        native.LOADED is not None
        and type(scores) in (Tensor, torch.nn.Parameter)
        and scores.device.type == "cpu"
        and scores.layout == torch.strided
        and scores.dtype in (torch.float32, torch.float64, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(scores)
    )


def transposable_2_4(scores: Tensor, *, magnitude: bool = False, isa: str | None = None) -> Tensor:
    """The mask of `transposable_mask` for "2:4t".

    Args:
        scores: [rows, columns] that `runs` took, or bfloat16, both multiples of 4.
        magnitude: rank |scores|.
        isa: one of `native.module().masks_isas()`; None takes the best.
    Returns:
        bool [rows, columns].
    """
    scores = _dense_rows(scores)
    rows, columns = scores.shape
    mask = native.empty((rows, columns), torch.bool)
    native.module().transposable_2_4(
        scores.data_ptr(),
        mask.data_ptr(),
        rows,
        columns,
        scores.stride(0),
        scores.dtype.itemsize,
        magnitude,
        torch.get_num_threads(),
        isa,
    )
    return mask


def soft_threshold(weight: Tensor, scale: float, transposable: bool, *, isa: str | None = None) -> Tensor:
    """`soft_threshold` for "2:4" or "2:4t", times `scale`, in float64 and rounded once.

    Args:
        weight: [rows, columns] float32 or bfloat16 that `runs_weights` took; columns a multiple of 4, and rows for "2:4t".
    Returns:
        float32 [rows, columns].
    """
    weight = _dense_rows(weight)
    rows, columns = weight.shape
    soft = native.empty((rows, columns), torch.float32)
    native.module().soft_threshold(
        weight.data_ptr(),
        soft.data_ptr(),
        rows,
        columns,
        weight.stride(0),
        weight.itemsize,
        scale,
        transposable,
        torch.get_num_threads(),
        isa,
    )
    return soft


def differences(one: Tensor, other: Tensor) -> int:
    """In how many places two masks, bool, of one shape, without gaps in a CPU's memory, differ."""
    found: int = native.module().count_differences(
        one.data_ptr(), other.data_ptr(), one.numel(), torch.get_num_threads()
    )
    return found


def transposable_blocks(scores: Tensor, pattern: Pattern) -> Tensor:
    """The mask of `transposable_mask` for any pattern but "2:4t", of [rows, columns] that `runs` took."""
    scores = _dense_rows(scores)
    rows, columns = scores.shape
    mask = native.empty((rows, columns), torch.bool)
    native.module().transposable_blocks(
        scores.data_ptr(),
        mask.data_ptr(),
        rows,
        columns,
        scores.stride(0),
        scores.dtype.itemsize,
        pattern.keep,
        pattern.group,
        torch.get_num_threads(),
    )
    return mask


def best_of_groups(scores: Tensor, pattern: Pattern, *, isa: str | None = None) -> Tensor:
    """The mask of `nm_mask` for a pattern that is not transposable, along the last axis.

    Args:
        scores: [..., in_features] that `runs` took; a matrix for a shared pattern.
        isa: one of `native.module().masks_isas()`; None takes the best.
    Returns:
        bool, the shape of `scores`.
    """
    rows = _dense_rows(scores.reshape(-1, scores.shape[-1]) if scores.numel() else scores.new_empty(0, pattern.group))
    mask = native.empty(tuple(scores.shape), torch.bool)
    _best_of_groups(rows, mask.data_ptr(), None, pattern, False, isa)
    return mask


def keep_best(x: Tensor, pattern: Pattern, out: Tensor, *, isa: str | None = None) -> None:
    """Writes `keep_best` of a matrix into `out`, of the shape and dtype of `x`; its rows are dense, and it may be `x`."""
    _best_of_groups(_dense_rows(x), 0, out, pattern, True, isa)


def _best_of_groups(
    rows: Tensor, mask: int, kept: Tensor | None, pattern: Pattern, magnitude: bool, isa: str | None
) -> None:
    native.module().best_of_groups(
        rows.data_ptr(),
        mask,
        0 if kept is None else kept.data_ptr(),
        rows.shape[0],
        rows.shape[1],
        rows.stride(0),
        0 if kept is None else kept.stride(0),
        rows.dtype.itemsize,
        pattern.keep,
        pattern.group,
        pattern.rows,
        magnitude,
        torch.get_num_threads(),
        isa,
    )


def has_dense_rows(matrix: Tensor) -> bool:
    """True where neighbours in a row are neighbours in memory, and rows do not overlap."""
    rows, columns = matrix.shape
    return (columns <= 1 or matrix.stride(1) == 1) and (rows <= 1 or matrix.stride(0) >= columns)


def _dense_rows(scores: Tensor) -> Tensor:
    scores = scores.detach()
    return scores if has_dense_rows(scores) else scores.contiguous()
