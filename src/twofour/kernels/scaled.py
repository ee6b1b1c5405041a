"""Weights of eight bits with a scale for each output row: their operations as torch knows them, and what layers ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import ShapeError, UnsupportedError
from ..format import SparseMatrix
from ..pattern import Pattern
from . import direct, epilogue, reference
from .cuda import backend as cuda
from .cuda import layout
from .registry import Kernel, LinearSpec

Operands = tuple[Tensor, Tensor]
Quantize = Callable[[Tensor], tuple[Tensor, Tensor]]
_LIBRARY = torch.library.Library("twofour", "FRAGMENT")  # kept alive: operations vanish with it


@dataclass(frozen=True, slots=True)
class Backend:
    """One row of the table of a kind, as operations.

    Args:
        key: the dispatch key it is registered for.
        linear: of (x, values, metadata, scales, bias, pattern, out_features, in_features, activation), [..., out_features]
            of x's dtype.
        to_dense: of (values, metadata, pattern, out_features, in_features), the weight without its scales.
    """

    key: str
    linear: Callable[..., Tensor]
    to_dense: Callable[..., Tensor]


def canonical(operands: Operands, spec: LinearSpec) -> SparseMatrix:
    """The matrix whose canonical values and metadata these are."""
    return SparseMatrix(*operands, spec.pattern, (spec.out_features, spec.in_features))


def to_dense_reference(values: Tensor, metadata: Tensor, pattern: str, out_features: int, in_features: int) -> Tensor:
    """`Backend.to_dense` of canonical operands."""
    return reference.to_dense(values, metadata, Pattern.parse(pattern), in_features)


def cuda_kernel(name: str, why_not: Callable[[LinearSpec], str | None]) -> Kernel:
    """The row of our kernels for GPUs, the same for each kind but for what it runs."""
    return Kernel(
        "cuda",
        why_not,
        lambda matrix: cuda.pack(matrix.values, matrix.metadata, matrix.out_features, matrix.in_features),
        lambda operands, spec: canonical(layout.unpack(*operands, spec.out_features, spec.in_features), spec),
        lambda: f"{cuda.label()} {name}",
        on_gpu=True,
    )


def reference_kernel(name: str) -> Kernel:
    """The row of plain torch, the last one of each kind."""
    return Kernel(
        "reference",
        lambda spec: None,
        lambda matrix: (matrix.values, matrix.metadata),
        canonical,
        lambda: f"reference {name}",
    )


class Kind:
    """int8 or float8: how weights are rounded, the kernels that run them, fastest first, and their operations.

    Args:
        name: as `twofour.compress(weights=)` has it.
        quantize: float32 [rows, n] to values and float32 scales [rows], for finite numbers.
        kernels: the table.
        backends: the operations of each row of the table.
    """

    def __init__(
        self, name: str, quantize: Quantize, kernels: dict[str, Kernel], backends: Mapping[str, Backend]
    ) -> None:
        self.name = name
        self.quantize = quantize
        self.kernels = kernels
        self._linear = {backend: _register(name, backend, row) for backend, row in backends.items()}
        self._direct = {backend: row.linear for backend, row in backends.items()}

    def linear(
        self,
        backend: str,
        x: Tensor,
        operands: Operands,
        scales: Tensor,
        bias: Tensor | None,
        pattern: str,
        out_features: int,
        in_features: int,
        activation: str = "none",
    ) -> Tensor:
        """activation(x @ W.T, scaled, + bias) through one backend; gradients of x go straight through where x is rounded.

        With gradients torch's own function follows what the kernel writes, rounded to x's dtype.

        Args:
            backend: a row of the table; `operands` are what its `pack` makes of a matrix.
            x: [..., in_features], any floating dtype.
            scales: float32 [out_features].
            bias: [out_features] or None.
            pattern: "2:4", "4:8", ...
            activation: as `ops.linear`.
        Returns:
            [..., out_features] of x's dtype.
        Raises:
            ShapeError, UnsupportedError, TypeError: an input that does not fit, or that has a tangent.
        """
        direct.require_tensors(x, bias)
        require_input(x, scales, bias, out_features, in_features)
        if forward_ad._current_level >= 0 and _has_tangent(x, bias):
            raise UnsupportedError(
                f"layers with {self.name} weights have no forward-mode derivative: take the reverse mode, or layer.to_linear()."
            )
        if operands[0].device != x.device:
            raise UnsupportedError(f"x is on {x.device} and the weight on {operands[0].device}: move one of them.")
        given = (x, *operands, scales, bias, pattern, out_features, in_features)
        if activation != "none":
            epilogue.require(x, activation, None, out_features)
            if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
                return epilogue.finish(cast(Tensor, self._linear[backend](*given)), activation, None)
        unheard = not torch.compiler.is_compiling() and direct.applies(x, operands[0], bias, scales)
        run = self._direct[backend] if unheard else self._linear[backend]
        return cast(Tensor, run(*given, activation))


def _has_tangent(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def require_input(x: Tensor, scales: Tensor, bias: Tensor | None, out_features: int, in_features: int) -> None:
    """Raises unless x, scales and bias fit a weight and each other."""
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ShapeError(f"x is {list(x.shape)}: its last axis must be in_features {in_features}.")
    for name, tensor in (("scales", scales), ("bias", bias)):
        if tensor is not None and tuple(tensor.shape) != (out_features,):
            raise ShapeError(f"{name} is {list(tensor.shape)}: it must be [{out_features}], one for each output.")
    if not x.dtype.is_floating_point:
        raise UnsupportedError(f"x is {x.dtype}: kernels take floating point inputs. Convert it with x.float().")
    for name, tensor in (("weight", scales), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise UnsupportedError(f"x is on {x.device} and the {name} on {tensor.device}: move one of them.")


def _register(kind: str, backend: str, row: Backend) -> Any:
    """The operation linear_<kind>_<backend>, its gradient, and to_dense_<kind>_<backend>, which that needs."""
    linear, to_dense = f"linear_{kind}_{backend}", f"to_dense_{kind}_{backend}"
    _LIBRARY.define(
        f"{linear}(Tensor x, Tensor values, Tensor metadata, Tensor scales, Tensor? bias, str pattern,"
        " int out_features, int in_features, str activation='none') -> Tensor"
    )
    _LIBRARY.define(
        f"{to_dense}(Tensor values, Tensor metadata, str pattern, int out_features, int in_features) -> Tensor"
    )
    _LIBRARY.impl(linear, row.linear, row.key)
    _LIBRARY.impl(to_dense, row.to_dense, row.key)
    torch.library.register_fake(f"twofour::{linear}", _linear_fake, lib=_LIBRARY)
    torch.library.register_fake(f"twofour::{to_dense}", _to_dense_fake, lib=_LIBRARY)
    operation = getattr(torch.ops.twofour, linear).default
    torch.library.register_autograd(
        f"twofour::{linear}",
        _backward(operation, getattr(torch.ops.twofour, to_dense).default),
        setup_context=_setup_context,
        lib=_LIBRARY,
    )
    return operation


def _linear_fake(
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
    return x.new_empty(*x.shape[:-1], out_features)


def _to_dense_fake(values: Tensor, metadata: Tensor, pattern: str, out_features: int, in_features: int) -> Tensor:
    return values.new_empty(out_features, in_features)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, metadata, scales, bias, *arguments, activation = inputs
    activated = activation != "none"
    ctx.save_for_backward(values, metadata, scales, x if activated else None, bias if activated else None)
    ctx.arguments = tuple(arguments)
    ctx.activation = activation
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(
    linear: Callable[..., Tensor], to_dense: Callable[..., Tensor]
) -> Callable[..., tuple[Tensor | None, ...]]:
    """Straight through: the gradient of x is that of the layer without the rounding of x; weights are constants.

    What came before an activation is computed again, as in `ops._backward`.
    """

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, metadata, scales, x, bias = ctx.saved_tensors
        if ctx.activation != "none":
            grad = epilogue.grad_before(ctx.activation, grad, linear(x, values, metadata, scales, bias, *ctx.arguments))
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = to_dense(values, metadata, *ctx.arguments).to(torch.float32) * scales[:, None]
            grad_x = (grad.to(torch.float32) @ weight).to(grad.dtype)
        if ctx.needs_input_grad[4]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, None, None, None, grad_bias, None, None, None, None

    return backward
