"""The CPU kernels: 2:4 linear layers on the native module, torch tensors in and out.

The kernels read a layout of their own (`pack`, drawn in csrc/nm/layout.h), which holds the same bits as the canonical
format with the rows rounded up to whole tiles of 16. The instruction set is chosen at run time; `TWOFOUR_ISA` (baseline;
avx2, avx512, avx512bf16; neon, neonbf16) overrides the choice.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal, NoReturn

import torch
from torch import Tensor

from .. import native
from ..errors import ShapeError, UnsupportedError

TILE_ROWS = 16
"""Output rows of a tile of the CPU layout."""

Family = Literal["few", "many"]
"""Kernels for few tokens (output rows in the vector lanes) and for many (tokens in the lanes)."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_TYPES = {  # of the values and of x
    (torch.float32, torch.float32): 0,
    (torch.bfloat16, torch.bfloat16): 1,
    (torch.bfloat16, torch.float32): 2,
}
_HUGE_BYTES = 4 << 20  # below, hardly a whole huge page lies inside
_FAMILIES: dict[str | None, int] = {None: 0, "few": 1, "many": 2}
_ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
_SHARED = {TILE_ROWS // 2 // rows: rows for rows in (1, 2, 4)}  # by the bytes of metadata of a tile's group

_native = native.LOADED


def _why_unavailable() -> str | None:
    if _native is None:
        return native.MISSING
    try:
        _native.isa()
    except ValueError as error:
        return str(error)
    return None


_UNAVAILABLE = _why_unavailable()


def available() -> str | None:
    """None where the native kernels can run, otherwise the reason why they cannot. Found once, at import."""
    return _UNAVAILABLE


def isa() -> str:
    """The instruction set that runs by default: the best one of this machine, or the one TWOFOUR_ISA names.

    Raises:
        UnsupportedError: no native kernels in this build, or TWOFOUR_ISA names a set that this machine lacks.
    """
    try:
        name: str = _module().isa()
    except ValueError as error:
        raise UnsupportedError(str(error)) from None
    return name


def isas() -> list[str]:
    """The instruction sets that this build holds and this machine runs, plainest first."""
    names: list[str] = _module().isas()
    return names


def threads_source() -> str:
    """Where threads come from: "libgomp" (torch's own workers) or "pool"."""
    source: str = _module().threads_source()
    return source


def shared_rows(metadata: Tensor) -> int:
    """4, 2 or 1: how many neighbouring rows (0 ... 3, 4 ... 7, ...) have one mask everywhere in the canonical metadata.

    Two or four, and one load of an activation serves as many rows: "2:4x4" runs up to twice as fast as dense.
    """
    for rows in (4, 2):
        if metadata.shape[0] % rows == 0:
            blocks = metadata.view(-1, rows, metadata.shape[1])
            if torch.equal(blocks, blocks[:, :1].expand_as(blocks)):
                return rows
    return 1


def packed_shapes(
    out_features: int, in_features: int, dtype: torch.dtype, shared: int = 1
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the values and of the metadata (uint8) in the CPU layout; `shared` neighbouring rows have one mask.

    >>> packed_shapes(100, 64, torch.float32)
    ((7, 16, 2, 16), (7, 16, 8))
    >>> packed_shapes(100, 64, torch.bfloat16)
    ((7, 16, 16, 2), (7, 16, 8))
    >>> packed_shapes(100, 64, torch.float32, shared=4)
    ((7, 16, 2, 16), (7, 16, 2))
    """
    tiles, groups = -(-out_features // TILE_ROWS), in_features // 4
    tile = (TILE_ROWS, 2) if dtype == torch.bfloat16 else (2, TILE_ROWS)
    return (tiles, groups, *tile), (tiles, groups, TILE_ROWS // 2 // shared)


def pack(
    values: Tensor, metadata: Tensor, out_features: int, in_features: int, shared: int = 1
) -> tuple[Tensor, Tensor]:
    """The canonical values and metadata of a 2:4 matrix in the CPU layout.

    Args:
        values: [out_features, in_features / 2] float32 or bfloat16.
        metadata: [out_features, ceil(in_features / 8)] uint8, as in SparseMatrix.
        shared: 1, 2 or 4, at most `shared_rows(metadata)`: the mask of so many neighbouring rows is stored once.
    Returns:
        values and metadata of `packed_shapes`; the bits of every kept value as they were.
    Raises:
        ShapeError: tensors of other shapes, in_features not a multiple of 4.
        UnsupportedError: another dtype, a tensor that is not on the CPU.
    Cost: reads and writes the matrix once, on one thread.
    """
    native = _module()
    _require_weight(values, metadata, out_features, in_features)
    _require_shape("values", values, (out_features, in_features // 2))
    _require_shape("metadata", metadata, (out_features, -(-in_features // 8)))
    if shared not in (1, 2, 4) or (shared > 1 and shared_rows(metadata) % shared):
        raise ShapeError(
            f"shared={shared}: it must be 1, 2 or 4, and the masks of as many neighbouring rows equal; here"
            f" {shared_rows(metadata)} are. Pass shared=shared_rows(metadata)."
        )
    values, metadata = values.detach().contiguous(), metadata.contiguous()
    values_shape, metadata_shape = packed_shapes(out_features, in_features, values.dtype, shared)
    packed = empty(values_shape, values.dtype), empty(metadata_shape, torch.uint8)
    native.pack_linear(
        values.data_ptr(),
        metadata.data_ptr(),
        packed[0].data_ptr(),
        packed[1].data_ptr(),
        out_features,
        in_features,
        values.itemsize,
        shared,
    )
    return packed


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for packed weights: on huge pages where it is large and the system has them."""
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.nbytes >= _HUGE_BYTES:
        _module().ask_for_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def copy(values: Tensor, metadata: Tensor) -> tuple[Tensor, Tensor]:
    """Both, in memory as `pack` takes it."""
    return empty(tuple(values.shape), values.dtype).copy_(values), empty(tuple(metadata.shape), metadata.dtype).copy_(
        metadata
    )


def unpack(values: Tensor, metadata: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`: canonical values [out_features, in_features / 2] and metadata, bit for bit."""
    native = _module()
    shared = _require_packed(values, metadata, out_features, in_features)
    values, metadata = values.detach().contiguous(), metadata.contiguous()
    canonical = (
        torch.empty((out_features, in_features // 2), dtype=values.dtype),
        torch.empty((out_features, -(-in_features // 8)), dtype=torch.uint8),
    )
    native.unpack_linear(
        values.data_ptr(),
        metadata.data_ptr(),
        canonical[0].data_ptr(),
        canonical[1].data_ptr(),
        out_features,
        in_features,
        values.itemsize,
        shared,
    )
    return canonical


def linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    *,
    isa: str | None = None,
    kernel: Family | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """y = activation(x @ W.T + bias) + residual for a 2:4 matrix W in the CPU layout, on torch.get_num_threads() threads.

    Sums and functions are float32 and y is rounded once. inf and NaN in x at dropped positions do not reach y. The bits
    of y do not depend on the number of threads.

    Args:
        x: [tokens, in_features], dtype of `values`, or float32 with bfloat16 values; any strides, though only a
            contiguous last axis avoids a copy.
        values, metadata: what `pack` returned.
        bias: [out_features] float32 or bfloat16, or None.
        isa: instruction set, one of `isas()`; None for `isa()`.
        kernel: "few" or "many"; None for the faster one at this number of tokens.
        activation: "none", "relu", "gelu" (by erf), "gelu_tanh" or "silu".
        residual: [tokens, out_features] of x's dtype, or None; only a contiguous last axis avoids a copy.
    Returns:
        [tokens, out_features], contiguous, dtype of x.
    Raises:
        ShapeError: shapes that do not fit each other.
        UnsupportedError: another dtype or device; an instruction set that this machine lacks; no native kernels.
    """
    # One condition, so that a call that is right costs 3 us less than with the checks one by one.
    tiles, groups = -(-out_features // TILE_ROWS), in_features // 4
    types = _TYPES.get((values.dtype, x.dtype))
    shared = _SHARED.get(metadata.numel() // (tiles * groups or 1))
    if not (
        _native is not None
        and x.ndim == 2
        and x.shape[1] == in_features
        and types is not None
        and values.numel() == tiles * groups * 2 * TILE_ROWS
        and shared is not None
        and metadata.numel() * shared == tiles * groups * TILE_ROWS // 2
        and metadata.dtype == torch.uint8
        and values.is_contiguous()
        and metadata.is_contiguous()
        and x.is_cpu
        and values.is_cpu
        and metadata.is_cpu
        and (bias is None or (bias.is_cpu and bias.numel() == out_features and bias.dtype in _DTYPES))
    ):
        _explain(x, values, metadata, bias, out_features, in_features)
    if activation != "none" or residual is not None:
        _require_epilogue(x, activation, residual, out_features)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    tokens = x.shape[0]
    x_stride, inner = x.stride()
    if inner != 1 or (tokens > 1 and x_stride < in_features):
        x = x.contiguous()
        x_stride = in_features
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    y = torch.empty((tokens, out_features), dtype=x.dtype)
    try:
        _native.linear(
            x.data_ptr(),
            values.data_ptr(),
            metadata.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            tokens,
            out_features,
            in_features,
            x_stride,
            out_features,
            types,
            torch.get_num_threads(),
            _FAMILIES[kernel],
            isa,
            0 if bias is None else _DTYPES[bias.dtype],
            shared,
            _ACTIVATIONS[activation],
            0 if residual is None else residual.data_ptr(),
            0 if residual is None else residual.stride(0),
        )
    except ValueError as error:
        raise UnsupportedError(str(error)) from None
    return y


def _require_epilogue(x: Tensor, activation: str, residual: Tensor | None, out_features: int) -> None:
    if activation not in _ACTIVATIONS:
        raise UnsupportedError(f"activation {activation!r} is unknown: the kernels have {', '.join(_ACTIVATIONS)}.")
    if residual is None:
        return
    if tuple(residual.shape) != (x.shape[0], out_features):
        raise ShapeError(f"residual is {list(residual.shape)}: it must be [{x.shape[0]}, {out_features}], as y.")
    if residual.dtype != x.dtype or not residual.is_cpu:
        raise UnsupportedError(
            f"residual is {residual.dtype} on {residual.device}: it must be {x.dtype} on the CPU, as x."
        )


def _explain(
    x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, out_features: int, in_features: int
) -> NoReturn:
    """Raises the error that says what is wrong with the arguments of `linear`."""
    _module()
    _require_packed(values, metadata, out_features, in_features)
    if x.ndim != 2 or x.shape[1] != in_features:
        raise ShapeError(f"x is {list(x.shape)}: it must be [tokens, {in_features}]. Flatten it with x.flatten(0, -2).")
    if (values.dtype, x.dtype) not in _TYPES or x.device.type != "cpu":
        raise UnsupportedError(
            f"x is {x.dtype} on {x.device} and the weight {values.dtype} on the CPU: convert one with .to(...)."
        )
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ShapeError(f"bias is {list(bias.shape)}: it must be [{out_features}], one for each output.")
    assert bias is not None
    raise UnsupportedError(f"bias is {bias.dtype} on {bias.device}: it must be float32 or bfloat16 on the CPU.")


def _module() -> ModuleType:
    return native.module()


def _require_packed(values: Tensor, metadata: Tensor, out_features: int, in_features: int) -> int:
    """How many rows share a mask."""
    _require_weight(values, metadata, out_features, in_features)
    last = metadata.shape[-1] if metadata.ndim else 0
    shared = next((rows for rows in (4, 2) if last == TILE_ROWS // 2 // rows), 1)
    values_shape, metadata_shape = packed_shapes(out_features, in_features, values.dtype, shared)
    _require_shape("packed values", values, values_shape)
    _require_shape("packed metadata", metadata, metadata_shape)
    if not (values.is_contiguous() and metadata.is_contiguous()):
        raise ShapeError("packed values and metadata must be contiguous: pass what pack() returned.")
    return shared


def _require_weight(values: Tensor, metadata: Tensor, out_features: int, in_features: int) -> None:
    if out_features < 1 or in_features < 4 or in_features % 4:
        raise ShapeError(
            f"the weight is [{out_features}, {in_features}]: it needs an output, and in_features a multiple of 4."
        )
    if values.dtype not in _DTYPES or metadata.dtype != torch.uint8:
        raise UnsupportedError(
            f"values are {values.dtype}, metadata {metadata.dtype}: the CPU kernels take float32 or bfloat16, and uint8."
        )
    if values.device.type != "cpu" or metadata.device.type != "cpu":
        raise UnsupportedError(f"values are on {values.device}, metadata on {metadata.device}: move both to the CPU.")


def _require_shape(what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ShapeError(f"{what} are {list(tensor.shape)}: this weight needs {list(shape)}.")
