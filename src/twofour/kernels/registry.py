"""The table: which kernels there are for a linear layer, where each applies, and why not where it does not.

Decided once per layer, stored in the layer, printable (`twofour.explain`). A slow path is allowed, a silent one is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..errors import UnsupportedError
from ..format import SparseMatrix
from ..masks.rows import WINDOW_ROWS
from ..pattern import Pattern
from . import cpu, onednn, vendor
from .cuda import backend as cuda
from .cuda import layout as cuda_layout

Operands = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """What a kernel must know of a weight to say whether it can run it."""

    out_features: int
    in_features: int
    pattern: Pattern
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(matrix: SparseMatrix) -> LinearSpec:
        """The spec of a matrix."""
        return LinearSpec(matrix.out_features, matrix.in_features, matrix.pattern, matrix.dtype, matrix.device)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One row of the table.

    `why_not(spec)` is None where the kernel applies. `pack` makes the kernel's own layout from the canonical matrix and
    `unpack` gives the matrix back, bit for bit, so that a layer needs to hold only one of them; `copy` gives the same
    layout on memory of its own. `why_slower` tells what keeps a packed matrix from the speed that its pattern allows, None if
    nothing does. A `dense` kernel holds and multiplies the zeros: `choose` never picks it by itself, but
    `twofour.compress` does where it measures it faster. One for GPUs is not spoken of where the weight is elsewhere.
    """

    backend: str
    why_not: Callable[[LinearSpec], str | None]
    pack: Callable[[SparseMatrix], Operands]
    unpack: Callable[[Operands, LinearSpec], SparseMatrix]
    label: Callable[[], str]
    copy: Callable[[Operands, LinearSpec], Operands] = lambda operands, _: (operands[0].clone(), operands[1].clone())
    dense: bool = False
    why_slower: Callable[[Operands, LinearSpec], str | None] = lambda operands, spec: None
    on_gpu: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel that serves a spec, and why each faster one in the table does not: ((backend, reason), ...)."""

    kernel: Kernel
    rejected: tuple[tuple[str, str], ...]

    @property
    def reason(self) -> str:
        """The rejections as one line; empty where the fastest kernel runs."""
        return "; ".join(f"{backend}: {reason}" for backend, reason in self.rejected)


_CPU_DTYPES = (torch.float32, torch.bfloat16)


def _cpu_why_not(spec: LinearSpec) -> str | None:
    if spec.device.type != "cpu":
        return f"the weight is on {spec.device}"
    if spec.out_features == 0 or spec.in_features == 0:
        return "the weight is empty"
    if (spec.pattern.keep, spec.pattern.group) != (2, 4):
        return f"pattern {spec.pattern} has no native kernel, only 2:4"
    if spec.dtype not in _CPU_DTYPES:
        return f"{str(spec.dtype).removeprefix('torch.')} has no native kernel, only float32 and bfloat16"
    return cpu.available()


def _cpu_pack(matrix: SparseMatrix) -> Operands:
    # Who shares a mask shows in the numbers, and a tracer has none.
    traced = torch.compiler.is_compiling() or isinstance(matrix.metadata, FakeTensor)
    shared, order = (1, None) if traced else cpu.row_order(matrix.metadata)
    values, metadata = torch.ops.twofour.pack_linear_cpu(
        matrix.values, matrix.metadata, matrix.out_features, matrix.in_features, shared, order
    )
    return values, metadata


def cpu_why_slower(operands: Operands, spec: LinearSpec) -> str | None:
    """What keeps a weight in the CPU layout from the speed of rows that share a mask."""
    together = math.gcd(spec.pattern.rows, 4)
    shared = cpu.packed_sharing(operands[1], spec.out_features, spec.in_features)
    if shared >= together:
        return None
    return (
        f"not all rows that share a mask lie inside windows of {WINDOW_ROWS} rows: a load of an activation serves {shared}"
        f" of them, not {together}"
    )


def _cpu_unpack(operands: Operands, spec: LinearSpec) -> SparseMatrix:
    values, metadata = cpu.unpack(*operands, spec.out_features, spec.in_features)
    return SparseMatrix(values, metadata, spec.pattern, (spec.out_features, spec.in_features))


def _cuda_why_not(spec: LinearSpec) -> str | None:
    return cuda.why_not(spec.pattern, spec.dtype, spec.out_features, spec.in_features, spec.device)


def _cuda_pack(matrix: SparseMatrix) -> Operands:
    return cuda.pack(matrix.values, matrix.metadata, matrix.out_features, matrix.in_features)


def _cuda_unpack(operands: Operands, spec: LinearSpec) -> SparseMatrix:
    canonical = cuda_layout.unpack(*operands, spec.out_features, spec.in_features)
    return SparseMatrix(*canonical, spec.pattern, (spec.out_features, spec.in_features))


def _vendor_why_not(spec: LinearSpec) -> str | None:
    missing = cuda.missing() if spec.device.type == "cuda" else None
    return vendor.why_not(spec) if missing is None else missing


def _vendor_unpack(operands: Operands, spec: LinearSpec) -> SparseMatrix:
    return vendor.unpack(*operands, spec.pattern, spec.out_features, spec.in_features)


def _onednn_why_not(spec: LinearSpec) -> str | None:
    if spec.device.type != "cpu":
        return f"the weight is on {spec.device}"
    if spec.out_features == 0 or spec.in_features == 0:
        return "the weight is empty"
    return onednn.why_not(spec.dtype)


def _onednn_unpack(operands: Operands, spec: LinearSpec) -> SparseMatrix:
    return onednn.unpack(*operands, spec.pattern, spec.out_features, spec.in_features)


def _onednn_copy(operands: Operands, spec: LinearSpec) -> Operands:
    return onednn.copy(*operands, spec.pattern, spec.out_features, spec.in_features)


def _cpu_copy(operands: Operands, spec: LinearSpec) -> Operands:
    return cpu.copy(*operands)


def _reference_why_not(spec: LinearSpec) -> str | None:
    return None


def _reference_pack(matrix: SparseMatrix) -> Operands:
    return matrix.values, matrix.metadata


def _reference_unpack(operands: Operands, spec: LinearSpec) -> SparseMatrix:
    return SparseMatrix(*operands, spec.pattern, (spec.out_features, spec.in_features))


KERNELS: dict[str, Kernel] = {
    "cpu": Kernel(
        "cpu", _cpu_why_not, _cpu_pack, _cpu_unpack, lambda: f"cpu {cpu.isa()}", _cpu_copy, False, cpu_why_slower
    ),
    "cuda": Kernel("cuda", _cuda_why_not, _cuda_pack, _cuda_unpack, cuda.label, on_gpu=True),
    "vendor": Kernel("vendor", _vendor_why_not, vendor.pack, _vendor_unpack, vendor.label, on_gpu=True),
    "reference": Kernel("reference", _reference_why_not, _reference_pack, _reference_unpack, lambda: "reference"),
    "onednn": Kernel(
        "onednn", _onednn_why_not, onednn.pack, _onednn_unpack, lambda: "onednn (dense)", _onednn_copy, dense=True
    ),
}
"""All kernels: those that hold the weight compressed, fastest first, then those that hold it dense."""


def told_of(kernel: Kernel, device: torch.device) -> bool:
    """Is a row worth a word about a weight on this device?"""
    return device.type == "cuda" or not kernel.on_gpu


def choose(spec: LinearSpec, backend: str | None = None, kernels: Mapping[str, Kernel] | None = None) -> Choice:
    """The first kernel of the table that applies and holds the weight compressed, or the one asked for.

    Args:
        kernels: another table than KERNELS.

    Raises:
        UnsupportedError: an unknown backend, or one that does not apply; says why.
    """
    table = KERNELS if kernels is None else kernels
    if backend is not None:
        if backend not in table:
            raise UnsupportedError(f"unknown backend {backend!r}: the kernels are {', '.join(table)}.")
        reason = table[backend].why_not(spec)
        if reason is not None:
            raise UnsupportedError(
                f"backend {backend!r} cannot run this layer: {reason}. backend=None picks one that can."
            )
        return Choice(table[backend], ())
    rejected: list[tuple[str, str]] = []
    for kernel in table.values():
        if kernel.dense or not told_of(kernel, spec.device):
            continue
        reason = kernel.why_not(spec)
        if reason is None:
            return Choice(kernel, tuple(rejected))
        rejected.append((kernel.backend, reason))
    raise UnsupportedError("no kernel applies: " + "; ".join(f"{name}: {reason}" for name, reason in rejected))
