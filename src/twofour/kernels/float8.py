"""Linear layers of float8 (e4m3) 2:4 weights with a scale for each output row: their operations and the table.

Inputs are not rounded. `reference.linear_float8` is the specification. bfloat16 holds the numbers of float8: the kernels of the
CPU are its own with weights that are widened as they come (csrc/cpu/e4m3.inl.h). On a GPU few tokens read the bytes as they
are, many have the weight widened first (`cuda.products`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..format import SparseMatrix
from ..pattern import Pattern
from . import cpu, reference
from .cuda import backend as cuda
from .registry import Kernel, LinearSpec, cpu_why_slower
from .scaled import Backend, Kind, Operands, canonical, cuda_kernel, reference_kernel, to_dense_reference


def _linear_reference(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    pattern: str,
    out_features: int,
    in_features: int,
    activation: str = "none",
) -> Tensor:
    return reference.linear_float8(x, values, metadata, scales, bias, Pattern.parse(pattern), in_features, activation)


def _linear_cpu(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    pattern: str,
    out_features: int,
    in_features: int,
    activation: str = "none",
) -> Tensor:
    if x.dtype == torch.float64:
        canonical = cpu.unpack(values, metadata, out_features, in_features)
        return _linear_reference(x, *canonical, scales, bias, pattern, out_features, in_features, activation)
    rows = x if x.ndim == 2 else x.reshape(-1, in_features)
    rows = rows if x.dtype in (torch.float32, torch.bfloat16) else rows.to(torch.float32)
    if bias is not None and bias.dtype not in (torch.float32, torch.bfloat16):
        bias = bias.to(torch.float32)
    y = cpu.linear(rows, values, metadata, bias, out_features, in_features, activation=activation, scales=scales)
    y = y if y.dtype == x.dtype else y.to(x.dtype)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], out_features)


def _to_dense_cpu(values: Tensor, metadata: Tensor, pattern: str, out_features: int, in_features: int) -> Tensor:
    canonical = cpu.unpack(values, metadata, out_features, in_features)
    return reference.to_dense(*canonical, Pattern.parse(pattern), in_features)


def _cuda_why_not(spec: LinearSpec) -> str | None:
    shape = (spec.out_features, spec.in_features)
    return cuda.why_not(spec.pattern, spec.dtype, *shape, spec.device, (torch.float8_e4m3fn,))


def _cpu_why_not(spec: LinearSpec) -> str | None:
    if spec.device.type != "cpu":
        return f"the weight is on {spec.device}"
    if spec.out_features == 0 or spec.in_features == 0:
        return "the weight is empty"
    if (spec.pattern.keep, spec.pattern.group) != (2, 4):
        return f"pattern {spec.pattern} has no native kernel, only 2:4"
    return cpu.available()


def _cpu_pack(matrix: SparseMatrix) -> Operands:
    shared, order = cpu.row_order(matrix.metadata)
    return cpu.pack(matrix.values, matrix.metadata, matrix.out_features, matrix.in_features, shared, order)


KERNELS: dict[str, Kernel] = {
    "cpu": Kernel(
        "cpu",
        _cpu_why_not,
        _cpu_pack,
        lambda operands, spec: canonical(cpu.unpack(*operands, spec.out_features, spec.in_features), spec),
        lambda: f"cpu {cpu.isa()} float8",
        lambda operands, _: cpu.copy(*operands),
        why_slower=cpu_why_slower,
    ),
    "cuda": cuda_kernel("float8", _cuda_why_not),
    "reference": reference_kernel("float8"),
}
"""The kernels of float8 weights that have scales, fastest first."""

KIND = Kind(
    "float8",
    reference.quantize_rows_e4m3,
    KERNELS,
    {
        "cpu": Backend("CPU", _linear_cpu, _to_dense_cpu),
        "reference": Backend("CompositeExplicitAutograd", _linear_reference, to_dense_reference),
        "cuda": Backend("CUDA", cuda.linear_float8, cuda.to_dense),
    },
)
