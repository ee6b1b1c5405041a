"""Linear layers of int8 2:4 weights: the native kernels, their operations and the table.

Inputs are quantized inside, symmetrically, each token by itself; sums are exact int32. `reference.linear_int8` is the
specification, and the native kernels give the same bits (csrc/cpu/linear_int8.h has the rules and draws the layout).
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ..errors import ShapeError, UnsupportedError
from ..pattern import Pattern
from . import cpu, reference, vendor
from .cuda import backend as cuda
from .registry import Kernel, LinearSpec
from .scaled import Backend, Kind, Operands, canonical, cuda_kernel, reference_kernel, require_input, to_dense_reference

MOST_INPUTS = 1 << 18
"""in_features up to which every sum of products fits an int32."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def isa() -> str:
    """The instruction set of the int8 kernels: the best one here, at most what TWOFOUR_ISA names.

    Raises:
        UnsupportedError: no native kernels in this build, or TWOFOUR_ISA names a set that this machine lacks.
    """
    try:
        name: str = cpu._module().int8_isa()
    except ValueError as error:
        raise UnsupportedError(str(error)) from None
    return name


def isas() -> list[str]:
    """The instruction sets with int8 kernels that this machine runs, plainest first."""
    names: list[str] = cpu._module().int8_isas()
    return names


def why_not(in_features: int, pattern: Pattern, device: torch.device) -> str | None:
    """None where the native kernels run such a weight, otherwise why they do not."""
    if device.type != "cpu":
        return f"the weight is on {device}"
    if (pattern.keep, pattern.group) != (2, 4):
        return f"pattern {pattern} has no native kernel, only 2:4"
    if not 0 < in_features <= MOST_INPUTS:
        return f"in_features {in_features} is not in 1 .. {MOST_INPUTS}"
    return cpu.available()


def packed_shapes(out_features: int, in_features: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the values (int8) and of the metadata (uint8) in the int8 layout.

    >>> packed_shapes(100, 60)
    ((7, 8, 16, 4), (7, 2, 16, 4))
    """
    tiles, steps = -(-out_features // cpu.TILE_ROWS), -(-in_features // 8)
    return (tiles, steps, cpu.TILE_ROWS, 4), (tiles, -(-steps // 4), cpu.TILE_ROWS, 4)


def pack(values: Tensor, metadata: Tensor, out_features: int, in_features: int) -> Operands:
    """The canonical int8 values and metadata of a 2:4 matrix in the int8 layout.

    Raises:
        ShapeError: tensors of other shapes.
        UnsupportedError: another dtype, a tensor that is not on the CPU, no native kernels.
    """
    native = cpu._module()
    _require_weight(values, metadata, out_features, in_features)
    cpu._require_shape("values", values, (out_features, in_features // 2))
    cpu._require_shape("metadata", metadata, (out_features, -(-in_features // 8)))
    values, metadata = values.contiguous(), metadata.contiguous()
    values_shape, metadata_shape = packed_shapes(out_features, in_features)
    packed = cpu.empty(values_shape, torch.int8), cpu.empty(metadata_shape, torch.uint8)
    native.pack_linear_int8(*(t.data_ptr() for t in (values, metadata, *packed)), out_features, in_features)
    return packed


def unpack(values: Tensor, metadata: Tensor, out_features: int, in_features: int) -> Operands:
    """The inverse of `pack`, bit for bit."""
    native = cpu._module()
    _require_packed(values, metadata, out_features, in_features)
    canonical = (
        torch.empty((out_features, in_features // 2), dtype=torch.int8),
        torch.empty((out_features, -(-in_features // 8)), dtype=torch.uint8),
    )
    native.unpack_linear_int8(*(t.data_ptr() for t in (values, metadata, *canonical)), out_features, in_features)
    return canonical


def linear_cpu(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    *,
    isa: str | None = None,
    kernel: cpu.Family | None = None,
    activation: str = "none",
) -> Tensor:
    """`reference.linear_int8` on the native kernels and torch.get_num_threads() threads, the same bits without GELU and SiLU.

    Args:
        x: [tokens, in_features] float32 or bfloat16.
        values, metadata: what `pack` returned.
        scales: float32 [out_features].
        bias: [out_features] float32 or bfloat16, or None.
        isa: one of `isas()`; None for `isa()`.
        kernel: "few" (up to 8 tokens; more run "many"), "many", or None for the faster one.
        activation: as for `cpu.linear`, and as near to the exact function.
    Returns:
        [tokens, out_features], contiguous, of x's dtype.
    Raises:
        ShapeError, UnsupportedError: arguments that do not fit.
    """
    tiles, steps = -(-out_features // cpu.TILE_ROWS), -(-in_features // 8)
    if not (
        cpu._native is not None
        and x.ndim == 2
        and x.shape[1] == in_features
        and in_features % 4 == 0
        and in_features <= MOST_INPUTS
        and x.dtype in _DTYPES
        and values.dtype == torch.int8
        and metadata.dtype == torch.uint8
        and scales.dtype == torch.float32
        and values.numel() == tiles * steps * 4 * cpu.TILE_ROWS
        and metadata.numel() == tiles * -(-steps // 4) * 4 * cpu.TILE_ROWS
        and scales.numel() == out_features
        and values.is_contiguous()
        and metadata.is_contiguous()
        and x.is_cpu
        and values.is_cpu
        and metadata.is_cpu
        and scales.is_cpu
        and (bias is None or (bias.is_cpu and bias.numel() == out_features and bias.dtype in _DTYPES))
    ):
        _explain(x, values, metadata, scales, bias, out_features, in_features)
    if activation != "none":
        cpu._require_epilogue(x, activation, None, out_features)
    if bias is not None and not (bias.dtype == torch.float32 and bias.is_contiguous()):
        bias = bias.to(torch.float32).contiguous()
    scales = scales.contiguous()
    tokens = x.shape[0]
    x_stride, inner = x.stride()
    if inner != 1 or (tokens > 1 and x_stride < in_features):
        x = x.contiguous()
        x_stride = in_features
    y = cpu.empty((tokens, out_features), x.dtype)
    try:
        cpu._native.linear_int8(
            x.data_ptr(),
            values.data_ptr(),
            metadata.data_ptr(),
            scales.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            tokens,
            out_features,
            in_features,
            x_stride,
            out_features,
            _DTYPES[x.dtype],
            torch.get_num_threads(),
            cpu._FAMILIES[kernel],
            isa,
            cpu._ACTIVATIONS[activation],
        )
    except ValueError as error:
        raise UnsupportedError(str(error)) from None
    return y


def _require_weight(values: Tensor, metadata: Tensor, out_features: int, in_features: int) -> None:
    if out_features < 1 or in_features < 4 or in_features % 4 or in_features > MOST_INPUTS:
        raise ShapeError(
            f"the weight is [{out_features}, {in_features}]: it needs an output, and in_features a multiple of 4 up to"
            f" {MOST_INPUTS}."
        )
    if values.dtype != torch.int8 or metadata.dtype != torch.uint8:
        raise UnsupportedError(f"values are {values.dtype}, metadata {metadata.dtype}: they must be int8 and uint8.")
    if values.device.type != "cpu" or metadata.device.type != "cpu":
        raise UnsupportedError(f"values are on {values.device}, metadata on {metadata.device}: move both to the CPU.")


def _require_packed(values: Tensor, metadata: Tensor, out_features: int, in_features: int) -> None:
    _require_weight(values, metadata, out_features, in_features)
    values_shape, metadata_shape = packed_shapes(out_features, in_features)
    cpu._require_shape("packed values", values, values_shape)
    cpu._require_shape("packed metadata", metadata, metadata_shape)
    if not (values.is_contiguous() and metadata.is_contiguous()):
        raise ShapeError("packed values and metadata must be contiguous: pass what pack() returned.")


def _explain(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
) -> NoReturn:
    """Raises the error that says what is wrong with the arguments of `linear_cpu`."""
    cpu._module()
    _require_packed(values, metadata, out_features, in_features)
    require_input(x, scales, bias, out_features, in_features)
    if x.ndim != 2:
        raise ShapeError(f"x is {list(x.shape)}: it must be [tokens, {in_features}]. Flatten it with x.flatten(0, -2).")
    raise UnsupportedError(
        f"x is {x.dtype}, scales {scales.dtype}, bias {None if bias is None else bias.dtype}: x and bias must be float32"
        " or bfloat16, scales float32, all on the CPU."
    )


# ---- the operations ------------------------------------------------------------------------------------------------


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
    return reference.linear_int8(x, values, metadata, scales, bias, Pattern.parse(pattern), in_features, activation)


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
    rows = x if x.ndim == 2 else x.reshape(-1, in_features)
    if x.dtype not in _DTYPES:  # float16, float64: computed in float32 as the reference does
        rows = rows.to(torch.float32)
    if bias is not None and bias.dtype not in _DTYPES:
        bias = bias.to(torch.float32)
    y = linear_cpu(rows, values, metadata, scales, bias, out_features, in_features, activation=activation)
    y = y if y.dtype == x.dtype else y.to(x.dtype)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], out_features)


def _to_dense_cpu(values: Tensor, metadata: Tensor, pattern: str, out_features: int, in_features: int) -> Tensor:
    return reference.to_dense(*unpack(values, metadata, out_features, in_features), Pattern.parse(pattern), in_features)


# ---- the rows of the table ------------------------------------------------------------------------------------------


def _spec_why_not(spec: LinearSpec) -> str | None:
    reason = why_not(spec.in_features, spec.pattern, spec.device)
    return "the weight is empty" if reason is None and spec.out_features == 0 else reason


def _cuda_why_not(spec: LinearSpec) -> str | None:
    if spec.in_features > MOST_INPUTS:
        return f"in_features {spec.in_features} is not in 1 .. {MOST_INPUTS}"
    shape = (spec.out_features, spec.in_features)
    return cuda.why_not(spec.pattern, spec.dtype, *shape, spec.device, (torch.int8,))


def _vendor_why_not(spec: LinearSpec) -> str | None:
    if spec.in_features > MOST_INPUTS:
        return f"in_features {spec.in_features} is not in 1 .. {MOST_INPUTS}"
    missing = cuda.missing() if spec.device.type == "cuda" else None
    return vendor.why_not(spec, torch.int8) if missing is None else missing


KERNELS: dict[str, Kernel] = {
    "cpu": Kernel(
        "cpu",
        _spec_why_not,
        lambda matrix: pack(matrix.values, matrix.metadata, matrix.out_features, matrix.in_features),
        lambda operands, spec: canonical(unpack(*operands, spec.out_features, spec.in_features), spec),
        lambda: f"cpu {isa()} int8",
    ),
    "cuda": cuda_kernel("int8", _cuda_why_not),
    "vendor": Kernel(
        "vendor",
        _vendor_why_not,
        vendor.pack,
        lambda operands, spec: vendor.unpack(*operands, spec.pattern, spec.out_features, spec.in_features),
        lambda: f"{vendor.label()} int8",
        on_gpu=True,
    ),
    "reference": reference_kernel("int8"),
}
"""The kernels of int8 weights that have scales, fastest first."""

KIND = Kind(
    "int8",
    reference.quantize_tokens,  # a row of the weight is quantized as a token is
    KERNELS,
    {
        "reference": Backend("CompositeExplicitAutograd", _linear_reference, to_dense_reference),
        "cpu": Backend("CPU", _linear_cpu, _to_dense_cpu),
        "cuda": Backend("CUDA", cuda.linear_int8, cuda.to_dense),
        "vendor": Backend("CUDA", vendor.linear_int8, vendor.to_dense),
    },
)
linear = KIND.linear
