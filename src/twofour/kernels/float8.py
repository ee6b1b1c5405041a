"""Linear layers of float8 (e4m3) 2:4 weights with a scale for each output row: their operations and the table.

Inputs are not rounded. `reference.linear_float8` is the specification. On a GPU few tokens read the bytes as they are, many
have the weight widened to 16 bits first (`cuda.products`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..format import SparseMatrix
from ..pattern import Pattern
from . import reference
from .cuda import backend as cuda
from .cuda import layout
from .registry import Kernel, LinearSpec
from .scaled import Backend, Kind, Operands


def _linear_reference(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    pattern: str,
    out_features: int,
    in_features: int,
) -> Tensor:
    return reference.linear_float8(x, values, metadata, scales, bias, Pattern.parse(pattern), in_features)


def _to_dense_reference(values: Tensor, metadata: Tensor, pattern: str, out_features: int, in_features: int) -> Tensor:
    return reference.to_dense(values, metadata, Pattern.parse(pattern), in_features)


def _canonical(operands: Operands, spec: LinearSpec) -> SparseMatrix:
    return SparseMatrix(*operands, spec.pattern, (spec.out_features, spec.in_features))


def _cuda_why_not(spec: LinearSpec) -> str | None:
    shape = (spec.out_features, spec.in_features)
    return cuda.why_not(spec.pattern, spec.dtype, *shape, spec.device, (torch.float8_e4m3fn,))


def _why_slower(operands: Operands, spec: LinearSpec) -> str | None:
    return "float8 weights have native kernels on NVIDIA GPUs alone" if spec.device.type != "cuda" else None


KERNELS: dict[str, Kernel] = {
    "cuda": Kernel(
        "cuda",
        _cuda_why_not,
        lambda matrix: cuda.pack(matrix.values, matrix.metadata, matrix.out_features, matrix.in_features),
        lambda operands, spec: _canonical(layout.unpack(*operands, spec.out_features, spec.in_features), spec),
        lambda: f"{cuda.label()} float8",
        on_gpu=True,
    ),
    "reference": Kernel(
        "reference",
        lambda spec: None,
        lambda matrix: (matrix.values, matrix.metadata),
        _canonical,
        lambda: "reference float8",
        why_slower=_why_slower,
    ),
}
"""The kernels of float8 weights that have scales, fastest first."""

KIND = Kind(
    "float8",
    reference.quantize_rows_e4m3,
    KERNELS,
    {
        "reference": Backend("CompositeExplicitAutograd", _linear_reference, _to_dense_reference),
        "cuda": Backend("CUDA", cuda.linear_float8, cuda.to_dense),
    },
)
