"""What may follow a linear layer in the same pass, in plain torch: the specification of the fused forms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ShapeError, UnsupportedError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
    "silu": functional.silu,
}
"""Name -> function. "gelu" is torch's default, by erf."""


def finish(y: Tensor, activation: str, residual: Tensor | None) -> Tensor:
    """activation(y) + residual in y's dtype, as torch rounds it after each step."""
    y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


def grad_before(activation: str, grad: Tensor, y: Tensor) -> Tensor:
    """The gradient of y, given that of activation(y); differentiable in both."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward.default(grad, y, 0)  # type: ignore[no-any-return]
    if activation in ("gelu", "gelu_tanh"):
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        return torch.ops.aten.gelu_backward.default(grad, y, approximate=approximate)  # type: ignore[no-any-return]
    return torch.ops.aten.silu_backward.default(grad, y) if activation == "silu" else grad


def require(x: Tensor, activation: str, residual: Tensor | None, out_features: int) -> None:
    """Raises unless `activation` is known and `residual` is [..., out_features] as y will be, of x's dtype and device."""
    if activation not in ACTIVATIONS:
        raise UnsupportedError(f"activation {activation!r} is unknown: the kernels have {', '.join(ACTIVATIONS)}.")
    if residual is None:
        return
    shape = (*x.shape[:-1], out_features)
    if tuple(residual.shape) != shape:
        raise ShapeError(
            f"residual is {list(residual.shape)}: it must be {list(shape)}, as y. Use residual.expand(...)."
        )
    if residual.dtype != x.dtype or residual.device != x.device:
        raise UnsupportedError(
            f"residual is {residual.dtype} on {residual.device}, x {x.dtype} on {x.device}: pass residual.to(x)."
        )
