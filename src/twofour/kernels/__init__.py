"""The same maths as `format`, fast: one table of kernels, one function that runs them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..format import SparseMatrix
from . import float8 as float8
from . import int8 as int8
from . import ops
from . import reference as reference
from .registry import KERNELS as KERNELS
from .registry import Choice as Choice
from .registry import Kernel as Kernel
from .registry import LinearSpec as LinearSpec
from .registry import choose as choose
from .registry import told_of as told_of
from .scaled import Kind as Kind

SCALED: dict[torch.dtype, Kind] = {torch.int8: int8.KIND, torch.float8_e4m3fn: float8.KIND}
"""What runs weights of eight bits that have a scale for each output row."""


def linear(
    x: Tensor,
    matrix: SparseMatrix,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = activation(x @ W.T + bias) + residual, skipping the zeros of W; without gradients, in one pass.

    Args:
        x: [..., in_features], any strides, of the matrix's dtype (any floating dtype for int8 and float8 matrices).
        matrix: the weight, [out_features, in_features].
        bias: [out_features], or None.
        activation: "none", "relu", "gelu" (by erf, torch's default), "gelu_tanh" or "silu".
        residual: [..., out_features] of x's dtype, any strides, or None.
        backend: "cpu", "cuda", "vendor" (cuSPARSELt or CUTLASS), "reference", or None for the first that applies;
            `kernels.choose` tells which and why.
    Returns:
        [..., out_features] of x's dtype, accumulated in float32. An input at a dropped place never reaches y, not even
        NaN or infinity. Differentiable in x, bias and residual.
    Raises:
        ShapeError: x, bias or residual of another size.
        UnsupportedError: dtypes or devices that differ, a backend that cannot run this matrix.
    Cost: the first call packs the matrix for the backend and keeps the packed copy with it; SparseLinear keeps one only.

    >>> matrix = SparseMatrix.from_dense(torch.tensor([[0., 3., 0., -1.]]))
    >>> linear(torch.tensor([[1., 2., 3., 4.]]), matrix).tolist()
    [[2.0]]
    """
    if not isinstance(matrix, SparseMatrix):
        raise UnsupportedError(
            f"matrix is a {type(matrix).__name__}: make one with SparseMatrix.from_dense(weight, '2:4')."
        )
    kernel = choose(LinearSpec.of(matrix), backend).kernel
    operands = matrix.prepared.get(kernel.backend)
    if operands is None:
        with torch.inference_mode(False):  # what is kept must serve training too
            operands = kernel.pack(matrix)
        if type(operands[0]) is Tensor:  # not the stand-ins of a tracer
            matrix.prepared[kernel.backend] = operands
    return ops.linear(
        kernel.backend,
        x,
        operands,
        bias,
        ops.pattern_text(matrix.pattern),
        matrix.out_features,
        matrix.in_features,
        activation,
        residual,
    )
