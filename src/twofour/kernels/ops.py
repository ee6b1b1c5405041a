"""The operations as torch knows them: schemas, shapes for tracing, gradients.

One operation has one name in six places: here, in reference.py, in csrc/cpu, in csrc/cuda, in tests/kernels and in
benchmarks/kernels. `define` + `impl` on a Library costs 2 us a call, `custom_op` 4 to 7 (torch 2.13), hence this form. The
gradient belongs to the operation: an autograd.Function around it would be cheaper, but exported programs would lose it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import ShapeError, UnsupportedError
from ..pattern import Pattern
from . import cpu, direct, epilogue, onednn, reference, vendor
from .cuda import backend as cuda
from .cuda import products as cuda_products
from .ops_grad import GRAD_INPUT, GRAD_VALUES

_LIBRARY = torch.library.Library("twofour", "DEF")  # kept alive: operations vanish with it

_BOTH = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that inputs can have, and weights be converted to."""

_BACKENDS = ("reference", "cpu", "cuda", "vendor", "onednn")
for _backend in _BACKENDS:
    _LIBRARY.define(
        f"linear_{_backend}(Tensor x, Tensor values, Tensor metadata, Tensor? bias, str pattern, int out_features,"
        " int in_features, str activation='none', Tensor? residual=None) -> Tensor"
    )
    _LIBRARY.define(
        f"to_dense_{_backend}(Tensor values, Tensor metadata, str pattern, int out_features, int in_features) -> Tensor"
    )
_LIBRARY.define(
    "pack_linear_cpu(Tensor values, Tensor metadata, int out_features, int in_features, int shared=1, Tensor? order=None)"
    " -> (Tensor, Tensor)"
)


def _linear_reference(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    pattern: str,
    out_features: int,
    in_features: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    return reference.linear(x, values, metadata, bias, Pattern.parse(pattern), in_features, activation, residual)


def _linear_cpu(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    pattern: str,
    out_features: int,
    in_features: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    rows = x
    if x.ndim != 2:
        rows = x.reshape(-1, in_features)
        residual = None if residual is None else residual.reshape(-1, out_features)
    y = cpu.linear(rows, values, metadata, bias, out_features, in_features, activation=activation, residual=residual)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], out_features)


def _linear_onednn(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    pattern: str,
    out_features: int,
    in_features: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    return onednn.linear(x, values, metadata, bias, pattern, out_features, in_features, activation, residual)


def _to_dense_reference(values: Tensor, metadata: Tensor, pattern: str, out_features: int, in_features: int) -> Tensor:
    return reference.to_dense(values, metadata, Pattern.parse(pattern), in_features)


def _to_dense_cpu(values: Tensor, metadata: Tensor, pattern: str, out_features: int, in_features: int) -> Tensor:
    canonical = cpu.unpack(values, metadata, out_features, in_features)
    return reference.to_dense(*canonical, Pattern.parse(pattern), in_features)


def _to_dense_onednn(values: Tensor, metadata: Tensor, pattern: str, out_features: int, in_features: int) -> Tensor:
    return onednn.to_dense(values, metadata, Pattern.parse(pattern), out_features, in_features)


def _linear_fake(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    pattern: str,
    out_features: int,
    in_features: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _to_dense_fake(values: Tensor, metadata: Tensor, pattern: str, out_features: int, in_features: int) -> Tensor:
    return values.new_empty(out_features, in_features)


def _pack_fake(
    values: Tensor,
    metadata: Tensor,
    out_features: int,
    in_features: int,
    shared: int = 1,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    values_shape, metadata_shape = cpu.packed_shapes(out_features, in_features, values.dtype, shared, order is not None)
    return values.new_empty(values_shape), metadata.new_empty(metadata_shape)


_LIBRARY.impl("linear_reference", _linear_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("to_dense_reference", _to_dense_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_cpu", _linear_cpu, "CPU")
_LIBRARY.impl("to_dense_cpu", _to_dense_cpu, "CPU")
_LIBRARY.impl("linear_cuda", cuda.linear, "CUDA")
_LIBRARY.impl("to_dense_cuda", cuda.to_dense, "CUDA")
_LIBRARY.impl("linear_vendor", vendor.linear, "CUDA")
_LIBRARY.impl("to_dense_vendor", vendor.to_dense, "CUDA")
_LIBRARY.impl("linear_onednn", _linear_onednn, "CPU")
_LIBRARY.impl("to_dense_onednn", _to_dense_onednn, "CPU")
_LIBRARY.impl("pack_linear_cpu", cpu.pack, "CPU")
for _backend in _BACKENDS:
    torch.library.register_fake(f"twofour::linear_{_backend}", _linear_fake, lib=_LIBRARY)
    torch.library.register_fake(f"twofour::to_dense_{_backend}", _to_dense_fake, lib=_LIBRARY)
torch.library.register_fake("twofour::pack_linear_cpu", _pack_fake, lib=_LIBRARY)

_LINEAR = {name: getattr(torch.ops.twofour, f"linear_{name}").default for name in _BACKENDS}
_DIRECT: dict[str, Callable[..., Tensor]] = {
    "reference": _linear_reference,
    "cpu": _linear_cpu,
    "cuda": cuda.linear,
    "vendor": vendor.linear,
    "onednn": _linear_onednn,
}
"""What the dispatcher would call in the end, for calls that need nothing else of it."""
_TO_DENSE = {name: getattr(torch.ops.twofour, f"to_dense_{name}").default for name in _BACKENDS}
"""The weight written out."""
TRAINABLE = frozenset(GRAD_VALUES)
"""Backends that have a gradient of the values."""


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, metadata, bias, *arguments, activation, _ = inputs
    # Each gradient is held by what it needs alone: constant values do not keep the inputs alive.
    activated = activation != "none"
    needs_x = activated or ctx.needs_input_grad[1]
    ctx.save_for_backward(values, metadata, x if needs_x else None, bias if activated else None)
    ctx.arguments = tuple(arguments)
    ctx.activation = activation
    ctx.bias_dtype = None if bias is None else bias.dtype


def _converted(values: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """Values of float32 as bfloat16 or the other way, in the layout that the backend has for the dtype."""
    if backend == "cpu":  # [.., 2, 16] in float32, [.., 16, 2] in bfloat16
        values = values.transpose(-1, -2)
    return values.to(dtype).contiguous()


def _backward(backend: str) -> Callable[..., tuple[Tensor | None, ...]]:
    """Gradients of x, the kept values (in their layout), the bias and the residual.

    What came before an activation is computed again. `linear` below keeps it instead; this is for programs, exported or
    compiled without gradients, that call the operation itself.
    """

    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        values, metadata, x, bias = ctx.saved_tensors
        grad = outer
        if ctx.activation != "none":
            before = _LINEAR[backend](x, values, metadata, bias, *ctx.arguments)
            grad = epilogue.grad_before(ctx.activation, outer, before)
        grad_x = grad_values = grad_bias = None
        mixed = backend in GRAD_INPUT and grad.dtype != values.dtype  # bfloat16 values among float32
        if ctx.needs_input_grad[0] and backend in GRAD_INPUT:
            wide = _converted(values, grad.dtype, backend) if mixed else values
            grad_x = GRAD_INPUT[backend](grad, wide, metadata, *ctx.arguments)
        elif ctx.needs_input_grad[0]:
            grad_x = grad @ _TO_DENSE[backend](values, metadata, *ctx.arguments).to(grad.dtype)
        if ctx.needs_input_grad[1] and backend not in GRAD_VALUES:
            raise UnsupportedError(
                f"backend {backend!r} has no gradient of the values: train with backend='cpu', or 'cuda' on a GPU."
            )
        if ctx.needs_input_grad[1]:
            grad_values = GRAD_VALUES[backend](grad, x, metadata, *ctx.arguments)
            grad_values = _converted(grad_values, values.dtype, backend) if mixed else grad_values
        if ctx.needs_input_grad[3]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, grad_values, None, grad_bias, None, None, None, None, outer if _needs_residual(ctx) else None

    return backward


def _needs_residual(ctx: Any) -> bool:
    return len(ctx.needs_input_grad) > 8 and bool(ctx.needs_input_grad[8])


def _over_batches(backend: str) -> Callable[..., tuple[Tensor, int]]:
    """vmap over x and the residual: the batch is one more leading axis."""

    def rule(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
        residual_dim = in_dims[8] if len(in_dims) > 8 else None
        if (in_dims[0] is None and residual_dim is None) or any(dim is not None for dim in in_dims[1:8]):
            raise UnsupportedError(
                "vmap runs over the inputs of a sparse linear layer only, not over weights or biases."
            )

        def batched(tensor: Tensor, dim: int | None) -> Tensor:
            return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

        if len(rest) == 8 and rest[7] is not None:
            rest = (*rest[:7], batched(rest[7], residual_dim))
        return _LINEAR[backend](batched(x, in_dims[0]), *rest), 0

    return rule


for _backend in _LINEAR:
    torch.library.register_autograd(
        f"twofour::linear_{_backend}", _backward(_backend), setup_context=_setup_context, lib=_LIBRARY
    )
    torch.library.register_vmap(f"twofour::linear_{_backend}", _over_batches(_backend), lib=_LIBRARY)


def linear(
    backend: str,
    x: Tensor,
    operands: tuple[Tensor, Tensor],
    bias: Tensor | None,
    pattern: str,
    out_features: int,
    in_features: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """activation(x @ W.T + bias) + residual through one backend, differentiable in x, the values, bias and residual.

    Without gradients all of it is one pass of the kernel. With them, what precedes the activation is kept for the way
    back, rounded to x's dtype, and torch's own functions follow.

    Args:
        backend: a row of the table; `operands` must be that backend's layout (registry: `Kernel.pack`).
        pattern: `pattern_text(...)`.
        x: [..., in_features] of the values' dtype, or float32 where they are bfloat16 (the reference takes any floating
            dtype where they are int8 or float8).
        bias: [out_features] or None.
        activation: "none", "relu", "gelu" (by erf), "gelu_tanh" or "silu".
        residual: [..., out_features] of x's dtype, or None.
    Returns:
        [..., out_features] of x's dtype.
    Raises:
        ShapeError, UnsupportedError: an input that does not fit.
    """
    values, metadata = operands
    try:
        unheard = not torch.compiler.is_compiling() and direct.applies(x, values, bias, residual)
    except TypeError:
        unheard = False
    if unheard and backend == "cuda":
        y = cuda_products.again(x, values, metadata, out_features, in_features, bias, activation, residual)
        if y is not None:
            return y
    if not unheard:
        direct.require_tensors(x, bias, residual)
    _require_input(backend, x, values, bias, out_features, in_features)
    if activation != "none" or residual is not None:
        epilogue.require(x, activation, residual, out_features)
    if unheard:
        return _DIRECT[backend](x, values, metadata, bias, pattern, out_features, in_features, activation, residual)
    if activation != "none" or residual is not None:
        return _finished(backend, x, operands, bias, pattern, out_features, in_features, activation, residual)
    run = _LINEAR[backend]
    if forward_ad._current_level >= 0:  # operations of a Library would drop tangents without a word
        (x, tangent), (bias, bias_tangent) = forward_ad.unpack_dual(x), _unpack_dual(bias)
        values, values_tangent = forward_ad.unpack_dual(values)
        y = run(x, values, metadata, bias, pattern, out_features, in_features)
        if tangent is None and bias_tangent is None and values_tangent is None:
            return cast(Tensor, y)
        tangent = torch.zeros_like(x) if tangent is None else tangent
        moved = run(tangent, values, metadata, bias_tangent, pattern, out_features, in_features)
        if values_tangent is not None:
            moved = moved + run(x, values_tangent, metadata, None, pattern, out_features, in_features)
        return cast(Tensor, forward_ad.make_dual(y, moved))
    return cast(Tensor, run(x, values, metadata, bias, pattern, out_features, in_features))


def _finished(
    backend: str,
    x: Tensor,
    operands: tuple[Tensor, Tensor],
    bias: Tensor | None,
    pattern: str,
    out_features: int,
    in_features: int,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    values, metadata = operands
    differentiated = forward_ad._current_level >= 0 or (
        torch.is_grad_enabled()
        and any(tensor is not None and tensor.requires_grad for tensor in (x, values, bias, residual))
    )
    if differentiated:
        y = linear(backend, x, operands, bias, pattern, out_features, in_features)
        return epilogue.finish(y, activation, residual)
    run = _LINEAR[backend]
    return cast(Tensor, run(x, values, metadata, bias, pattern, out_features, in_features, activation, residual))


def to_dense(
    backend: str, operands: tuple[Tensor, Tensor], pattern: str, out_features: int, in_features: int
) -> Tensor:
    """[out_features, in_features]: the weight of a backend's layout, dropped places +0.0, as an operation that traces.

    Constant: no gradient flows to the values.
    """
    with torch.no_grad():
        return cast(Tensor, _TO_DENSE[backend](*operands, pattern, out_features, in_features))


def _unpack_dual(tensor: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if tensor is None else tuple(forward_ad.unpack_dual(tensor))


def pattern_text(pattern: Pattern) -> str:
    """ "2:4", "4:8", "2:4t", ...: what operations are told of a pattern; who shares a mask shows in a kernel's layout."""
    return f"{pattern.keep}:{pattern.group}" + ("t" if pattern.transposable else "")


def _may_mix(backend: str, x: Tensor, values: Tensor) -> bool:
    """May x have another dtype than the values? CPU kernels widen 16 bits to float32, and read 8 bits as numbers."""
    narrow = values.dtype.itemsize == 1 or (
        x.dtype == torch.float32 and values.dtype in (torch.bfloat16, torch.float16)
    )
    return narrow and x.dtype.is_floating_point and backend in ("cpu", "reference")


def _require_input(
    backend: str, x: Tensor, values: Tensor, bias: Tensor | None, out_features: int, in_features: int
) -> None:
    if (
        x.ndim > 0
        and x.shape[-1] == in_features
        and (x.dtype == values.dtype or _may_mix(backend, x, values))
        and x.device == values.device
        and (bias is None or (bias.shape == (out_features,) and bias.device == x.device))
    ):
        return
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ShapeError(f"x is {list(x.shape)}: its last axis must be in_features {in_features}.")
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ShapeError(f"bias is {list(bias.shape)}: it must be [{out_features}], one for each output.")
    if not x.dtype.is_floating_point:
        raise UnsupportedError(f"x is {x.dtype}: kernels take floating point inputs. Convert it with x.float().")
    if x.dtype != values.dtype:
        rule = (
            ", or x float32 and the weight 16 bits" if backend in ("cpu", "reference") else f" for backend {backend!r}"
        )
        other = f", or convert the weight with matrix.to({x.dtype})" if x.dtype in _BOTH else ""
        raise UnsupportedError(
            f"x is {x.dtype} and the weight {values.dtype}: both must have one dtype{rule}. Pass x.to({values.dtype}){other}."
        )
    for name, tensor in (("weight", values), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise UnsupportedError(f"x is on {x.device} and the {name} on {tensor.device}: move one of them.")
