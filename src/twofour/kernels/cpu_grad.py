"""The CPU kernels of the gradients of a 2:4 linear layer, torch tensors in and out; layouts as in cpu.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError, UnsupportedError
from ..native import empty
from . import cpu


def grad_input(
    grad: Tensor, values: Tensor, metadata: Tensor, out_features: int, in_features: int, *, isa: str | None = None
) -> Tensor:
    """grad @ W for a 2:4 matrix W in the CPU layout, on torch.get_num_threads() threads.

    Sums are float32 and rounded once. inf and NaN in grad reach only the inputs whose places are kept. The bits do not
    depend on the number of threads.

    Args:
        grad: [tokens, out_features], dtype of `values`; any strides, though only a contiguous last axis avoids a copy.
        values, metadata: what `cpu.pack` returned.
        isa: instruction set, one of `cpu.isas()`; None for `cpu.isa()`.
    Returns:
        [tokens, in_features], contiguous, dtype of `values`.
    Raises:
        ShapeError: shapes that do not fit each other.
        UnsupportedError: another dtype or device; an instruction set that this machine lacks; no native kernels.
    Cost: sorts the rows of each group anew at each call: a byte of memory for each four weights of the dense matrix, and
        3 to 4 ms for 4096x4096 on one core, which is most of the time below 64 tokens.
    """
    native = cpu._module()
    cpu._require_packed(values, metadata, out_features, in_features)
    grad, stride = _rows("grad", grad, out_features, values.dtype)
    metadata, grad, stride = _arranged(metadata, grad, stride, out_features, in_features)
    grad_x = empty((grad.shape[0], in_features), grad.dtype)
    try:
        native.grad_input(
            grad.data_ptr(),
            values.data_ptr(),
            metadata.data_ptr(),
            grad_x.data_ptr(),
            grad.shape[0],
            out_features,
            in_features,
            stride,
            in_features,
            cpu._DTYPES[grad.dtype],
            torch.get_num_threads(),
            isa,
        )
    except ValueError as error:
        raise UnsupportedError(str(error)) from None
    return grad_x


def grad_values(
    grad: Tensor, x: Tensor, metadata: Tensor, out_features: int, in_features: int, *, isa: str | None = None
) -> Tensor:
    """The gradient of the kept values, (grad.T @ x) at their places, in the CPU layout.

    Sums are float32 and rounded once; rows that only fill a tile get zeros. inf and NaN in x reach only the values
    whose places are kept. The bits do not depend on the number of threads.

    Args:
        grad: [tokens, out_features] float32 or bfloat16; any strides, as in `grad_input`.
        x: [tokens, in_features] of the same dtype; any strides.
        metadata: what `cpu.pack` returned.
        isa: instruction set, one of `cpu.isas()`; None for `cpu.isa()`.
    Returns:
        `cpu.packed_shapes(...)[0]`, dtype of grad; zeros where there are no tokens.
    Raises:
        ShapeError, UnsupportedError: as `grad_input`.
    Cost: some hundred tokens of x and grad are held transposed; bfloat16 with many tokens holds its sums in float32.
    """
    native = cpu._module()
    if metadata.dtype != torch.uint8 or not metadata.is_cpu:
        raise UnsupportedError(f"metadata are {metadata.dtype} on {metadata.device}: pass what cpu.pack() returned.")
    shared = cpu.packed_sharing(metadata, out_features, in_features)
    values_shape, metadata_shape = cpu.packed_shapes(out_features, in_features, grad.dtype, shared, metadata.ndim == 1)
    cpu._require_shape("packed metadata", metadata, metadata_shape)
    if x.shape[:-1] != grad.shape[:-1]:
        raise ShapeError(f"x is {list(x.shape)} and grad {list(grad.shape)}: both must have the same tokens.")
    grad, grad_stride = _rows("grad", grad, out_features, grad.dtype)
    x, x_stride = _rows("x", x, in_features, grad.dtype)
    metadata, grad, grad_stride = _arranged(metadata, grad, grad_stride, out_features, in_features)
    found = empty(values_shape, grad.dtype)
    try:
        native.grad_values(
            grad.data_ptr(),
            x.data_ptr(),
            metadata.data_ptr(),
            found.data_ptr(),
            grad.shape[0],
            out_features,
            in_features,
            grad_stride,
            x_stride,
            cpu._DTYPES[grad.dtype],
            torch.get_num_threads(),
            isa,
        )
    except ValueError as error:
        raise UnsupportedError(str(error)) from None
    return found


def _arranged(
    metadata: Tensor, grad: Tensor, stride: int, out_features: int, in_features: int
) -> tuple[Tensor, Tensor, int]:
    """Packed metadata with a nibble for every row, and the gradient with its columns as the rows lie in the layout.

    These kernels gain nothing from masks that rows share, and know nothing of an order.
    """
    shared = cpu.packed_sharing(metadata, out_features, in_features)
    metadata, rows = cpu.held_order(metadata, out_features)
    if rows is not None:
        grad, stride = grad.index_select(1, rows), out_features
        metadata = metadata.view(-(-out_features // cpu.TILE_ROWS), in_features // 4, cpu.TILE_ROWS // 2 // shared)
    return _of_each_row(metadata).contiguous(), grad, stride


def _of_each_row(metadata: Tensor) -> Tensor:
    if metadata.shape[-1] == cpu.TILE_ROWS // 8:  # four rows share a nibble: double it
        metadata = torch.stack([(metadata & 15) * 17, (metadata >> 4) * 17], -1).flatten(-2)
    if metadata.shape[-1] == cpu.TILE_ROWS // 4:  # two rows: the words of the even and of the odd rows are the same
        metadata = torch.cat([metadata, metadata], -1)
    return metadata


def _rows(what: str, tensor: Tensor, columns: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """The checked [tokens, columns] tensor with a contiguous last axis, and the stride of its rows."""
    if tensor.ndim != 2 or tensor.shape[1] != columns:
        raise ShapeError(f"{what} is {list(tensor.shape)}: it must be [tokens, {columns}].")
    if tensor.dtype != dtype or tensor.dtype not in cpu._DTYPES or not tensor.is_cpu:
        raise UnsupportedError(
            f"{what} is {tensor.dtype} on {tensor.device}: the CPU kernels take float32 or bfloat16 on the CPU,"
            f" and one dtype ({dtype}) for all."
        )
    stride, inner = tensor.stride()
    if (inner != 1 and columns > 1) or (tensor.shape[0] > 1 and stride < columns):
        tensor = tensor.contiguous()
        stride = columns
    return tensor, stride
