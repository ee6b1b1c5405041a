"""The table of products for training: which backend multiplies by a weight under a mask, forward and for its input gradient.

A layer that trains packs its weight anew after each step, so packing is part of the bargain: from the dense weight and its
mask, and where the mask is transposable the transpose in the same pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..masks import of_weights
from ..pattern import Pattern
from . import cpu
from .cuda import backend as cuda
from .cuda import packing
from .registry import KERNELS, LinearSpec, Operands, told_of


@dataclass(frozen=True, slots=True)
class Products:
    """One row of the table.

    `why_not(spec)` is None where it applies. `pack(weight, mask, both_ways, memory)` makes the operands of W and, with
    both_ways, of W.T from a dense weight and a bool mask, on `memory`. `linear(x, operands, bias, out_features, in_features)`
    is x @ W.T + bias, x of any number of axes; with the operands of W.T and the features exchanged it is the input gradient.
    """

    backend: str
    why_not: Callable[[LinearSpec], str | None]
    pack: Callable[[Tensor, Tensor, bool, cpu.PackedMemory], tuple[Operands, Operands | None]]
    linear: Callable[[Tensor, Operands, Tensor | None, int, int], Tensor]
    label: Callable[[], str]


def _cpu_pack(
    weight: Tensor, mask: Tensor, both_ways: bool, memory: cpu.PackedMemory
) -> tuple[Operands, Operands | None]:
    return cpu.pack_masked(weight, mask, both_ways=both_ways, memory=memory)


def packed_memory() -> cpu.PackedMemory:
    """One for all layers that train at a time; it goes with the last of them."""
    found = _MEMORY.get("cpu")
    if found is None:
        found = _MEMORY["cpu"] = cpu.PackedMemory()
    return found


_MEMORY: weakref.WeakValueDictionary[str, cpu.PackedMemory] = weakref.WeakValueDictionary()


def _cpu_linear(x: Tensor, operands: Operands, bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    rows = x.reshape(-1, in_features)
    return cpu.linear(rows, *operands, bias, out_features, in_features).view(*x.shape[:-1], out_features)


def _cuda_pack(
    weight: Tensor, mask: Tensor, both_ways: bool, memory: cpu.PackedMemory
) -> tuple[Operands, Operands | None]:
    """On torch's own memory for GPUs, which keeps what was let go of."""
    if both_ways:
        own, turned = packing.keep_both(weight, mask.contiguous(), check=False)
        return (own.values, own.metadata), (turned.values, turned.metadata)
    own = packing.compress(torch.where(mask, weight.detach(), 0), check=False)
    return (own.values, own.metadata), None


def _cuda_linear(x: Tensor, operands: Operands, bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    return cuda.linear(x, *operands, bias, "2:4", out_features, in_features)


PRODUCTS: tuple[Products, ...] = (
    Products("cpu", KERNELS["cpu"].why_not, _cpu_pack, _cpu_linear, KERNELS["cpu"].label),
    Products("cuda", KERNELS["cuda"].why_not, _cuda_pack, _cuda_linear, KERNELS["cuda"].label),
)
"""Fastest first."""


def find_products(spec: LinearSpec) -> tuple[Products | None, tuple[tuple[str, str], ...]]:
    """The first row that applies, or None, and why those before it do not: ((backend, reason), ...)."""
    rejected: list[tuple[str, str]] = []
    for row in PRODUCTS:
        if not told_of(KERNELS[row.backend], spec.device):
            continue
        reason = row.why_not(spec)
        if reason is None:
            return row, tuple(rejected)
        rejected.append((row.backend, reason))
    return None, tuple(rejected)


def magnitude_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """That of `masks.of_weights`, bit for bit; transposable ones of weights on a GPU by our kernel where it runs."""
    if (
        packing._on_gpu(weight)
        and (pattern.keep, pattern.group, pattern.transposable) == (2, 4, True)
        and weight.dtype in packing.MASK_NAMES
        and not any(size % 4 for size in weight.shape)
        and is_plain(weight)
        and cuda.unusable(weight.device) is None
    ):
        return packing.mask_both(weight)
    return of_weights.magnitude_mask(weight, pattern)


def is_plain(tensor: Tensor) -> bool:
    """True for numbers in memory: nothing that a tracer or compiler watches, no subclass."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )
