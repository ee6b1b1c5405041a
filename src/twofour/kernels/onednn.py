"""The dense row of the table: oneDNN with the weight in its own blocked layout; zeros are multiplied as any number.

The strongest dense kernel that torch has on a CPU, and what torch.compile's freezing would run. `F.linear` in float32 goes
to MKL, which takes a slow path on some processors, and in bfloat16 it reorders the weight at each call.

oneDNN's layout depends on the processor, and torch hides it in an opaque tensor that cannot be copied, pickled, compiled
or exported. So a layer holds two plain tensors: `values`, a view of the opaque tensor's own memory, and `metadata`, the
canonical metadata followed by oneDNN's description of the layout. The weight is in memory once, dense.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import ShapeError, UnsupportedError
from ..format import SparseMatrix
from ..format import pack as packing
from ..pattern import Pattern
from . import epilogue

_owners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""Address of the packed weight -> what keeps its memory: lives as long as a tensor on that memory."""

_adopted: Any = WeakTensorKeyDictionary()
"""Values that came from elsewhere (a copy, an exported program that was loaded) -> their packed twin."""


@cache
def why_not(dtype: torch.dtype) -> str | None:
    """None where oneDNN can run prepacked Linears of this dtype; otherwise why it cannot. Found once."""
    if not torch._C._has_mkldnn:
        return "this build of torch has no oneDNN"
    if not dtype.is_floating_point or dtype.itemsize not in (2, 4):
        return f"oneDNN runs float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    try:
        with torch.inference_mode():
            packed = _prepack(torch.ones(16, 16, dtype=dtype))
            _address(packed), _description(packed)
            _run(torch.ones(2, 16, dtype=dtype), packed, None)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return f"oneDNN refuses {str(dtype).removeprefix('torch.')}: {str(error).splitlines()[0]}"
    return None


def prepacked_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x -> x @ weight.T + bias with a copy of `weight` in oneDNN's blocked layout. Inference only."""
    packed = _prepack(weight.detach())
    bias = None if bias is None else bias.detach()
    return lambda x: _run(x, packed, bias)


def pack(matrix: SparseMatrix) -> tuple[Tensor, Tensor]:
    """The matrix written out dense in oneDNN's layout.

    Returns:
        values: flat, the matrix's dtype, on memory that oneDNN owns (out_features and in_features rounded up to its
            blocks); metadata: uint8, flat, the canonical metadata and the description of the layout.
    Cost: writes the weight out dense, and reorders it.
    """
    dense = matrix.to_dense()
    packed = _prepack(dense)
    metadata = torch.cat([matrix.metadata.flatten(), _description(packed)])
    return _view(packed, dense.dtype), metadata


def unpack(values: Tensor, metadata: Tensor, pattern: Pattern, out_features: int, in_features: int) -> SparseMatrix:
    """The inverse of `pack`, bit for bit."""
    dense = to_dense(values, metadata, pattern, out_features, in_features)
    shape = (out_features, in_features)
    canonical = _canonical(metadata, pattern, shape).clone()
    kept, _ = packing.pack(dense, packing.unpack_mask(canonical, shape, pattern), pattern)
    return SparseMatrix(kept, canonical, pattern, shape)


def copy(
    values: Tensor, metadata: Tensor, pattern: Pattern, out_features: int, in_features: int
) -> tuple[Tensor, Tensor]:
    """The same layout on memory of its own."""
    packed = _prepack(to_dense(values, metadata, pattern, out_features, in_features))
    return _view(packed, values.dtype), metadata.clone()


def linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    pattern: Pattern | str,
    out_features: int,
    in_features: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """activation(x @ W.T + bias) + residual; the activation in float32, rounded; the residual is added after rounding.

    An infinity or NaN at a dropped place of x does reach y, as NaN: the zeros are multiplied, as in an nn.Linear. Looking
    for such numbers would cost 3 to 10 percent of a call, as much as this kernel wins.

    Args:
        x: [..., in_features] of the values' dtype; any strides.
        values, metadata: what `pack` returned.
        bias: [out_features] or None.
        activation: a name of `epilogue.ACTIVATIONS`; oneDNN's own.
        residual: [..., out_features] of x's dtype, or None.
    Raises:
        UnsupportedError: values that another kind of processor laid out.
    """
    packed = _packed(values, metadata, pattern, out_features, in_features)
    late = None if bias is None or bias.dtype == x.dtype else bias
    rows = x if x.ndim == 2 else x.reshape(-1, in_features)
    if rows.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], out_features)
    rows = rows if rows.is_contiguous() else rows.contiguous()
    if late is None:
        y = _run(rows, packed, bias, activation)
    else:  # a bias of another dtype than the layer's
        y = epilogue.finish(_run(rows, packed, None).float() + late.float(), activation, None).to(x.dtype)
    y = y if x.ndim == 2 else y.view(*x.shape[:-1], out_features)
    return y if residual is None else y.add_(residual)


def to_dense(values: Tensor, metadata: Tensor, pattern: Pattern | str, out_features: int, in_features: int) -> Tensor:
    """The dense weight [out_features, in_features], bit for bit."""
    dense: Tensor = _packed(values, metadata, pattern, out_features, in_features).to_dense()
    return dense


def _prepack(weight: Tensor) -> Tensor:
    # The batch size that may be given here made no difference from 16 to 1024 tokens (torch 2.13).
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return packed


_POINTWISE = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
}
"""Activations as oneDNN's post-operations are called: attribute and algorithm."""


def _run(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    attribute, algorithm = _POINTWISE[activation]
    y: Tensor = _linear_pointwise()(x, packed, bias, attribute, [], algorithm)
    return y


@cache
def _linear_pointwise() -> Callable[..., Tensor]:
    operation: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default  # half a microsecond to look up
    return operation


def _address(packed: Tensor) -> tuple[int, int]:
    """Where the packed weight lies, and its bytes."""
    return torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)


def _description(packed: Tensor) -> Tensor:
    """oneDNN's own description of the layout, uint8; equal for equal shapes, dtypes and processors."""
    description: Tensor = torch.ops.mkldnn._get_mkldnn_serialized_md(packed)
    return description


def _view(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """A plain, flat tensor on the packed weight's memory, which keeps it alive."""
    address, size = _address(packed)
    owner: Any = (ctypes.c_uint8 * size).from_address(address)
    owner.packed = packed
    _owners[address] = owner
    return torch.frombuffer(owner, dtype=dtype)


def _packed(values: Tensor, metadata: Tensor, pattern: Pattern | str, out_features: int, in_features: int) -> Tensor:
    """The opaque tensor that `values` is a view of, or a twin of it where they are a copy."""
    owner = _owners.get(values.data_ptr())
    if owner is not None and len(owner) == values.nbytes:
        found: Tensor = owner.packed
        return found
    if values not in _adopted:
        _adopted[values] = _adopt(values, metadata, Pattern.parse(pattern), (out_features, in_features))
    twin: Tensor = _adopted[values]
    return twin


def _adopt(values: Tensor, metadata: Tensor, pattern: Pattern, shape: tuple[int, int]) -> Tensor:
    packed = _prepack(torch.zeros(shape, dtype=values.dtype))
    address, size = _address(packed)
    canonical_bytes = _canonical_bytes(pattern, shape)
    if values.nbytes != size or not torch.equal(metadata[canonical_bytes:], _description(packed)):
        raise UnsupportedError(
            "a layer on the dense kernel 'onednn' was laid out for another kind of processor, or by another torch:"
            " export it here, or from a layer made with backend='cpu', whose layout is the same everywhere."
        )
    values = values.contiguous()
    ctypes.memmove(address, values.data_ptr(), size)
    return packed


def _canonical_bytes(pattern: Pattern, shape: tuple[int, int]) -> int:
    rows, row_bytes = packing.packed_shapes(shape, pattern)[1]
    return rows * row_bytes


def _canonical(metadata: Tensor, pattern: Pattern, shape: tuple[int, int]) -> Tensor:
    size = _canonical_bytes(pattern, shape)
    if metadata.ndim != 1 or metadata.numel() < size:
        raise ShapeError(f"metadata are {list(metadata.shape)}: this weight needs what pack() returned.")
    return metadata[:size].view(packing.packed_shapes(shape, pattern)[1])
