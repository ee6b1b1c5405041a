"""The gradients of the linear layer as torch knows them: operations of their own, so that they trace, batch and nest.

    linear_grad_input_*(grad, values, ..)   grad @ W                          gradient of x
    linear_grad_values_*(grad, x, ..)       grad.T @ x at the kept places     gradient of the values, in their layout

With `linear` they are closed: each is linear in two tensors, and its gradients are the other two. Hence gradients of
any order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import UnsupportedError
from ..format import SparseMatrix
from ..pattern import Pattern
from . import cpu, cpu_grad, reference
from .cuda import backend as cuda
from .cuda import layout

_LIBRARY = torch.library.Library("twofour", "FRAGMENT")  # kept alive: operations vanish with it
_BACKENDS = ("reference", "cpu", "cuda")

for _backend in _BACKENDS:
    _LIBRARY.define(
        f"linear_grad_input_{_backend}(Tensor grad, Tensor values, Tensor metadata, str pattern, int out_features,"
        " int in_features) -> Tensor"
    )
    _LIBRARY.define(
        f"linear_grad_values_{_backend}(Tensor grad, Tensor x, Tensor metadata, str pattern, int out_features,"
        " int in_features) -> Tensor"
    )


def _input_reference(
    grad: Tensor, values: Tensor, metadata: Tensor, pattern: str, out_features: int, in_features: int
) -> Tensor:
    return reference.linear_grad_input(grad, values, metadata, Pattern.parse(pattern), in_features)


def _input_cpu(
    grad: Tensor, values: Tensor, metadata: Tensor, pattern: str, out_features: int, in_features: int
) -> Tensor:
    rows = grad if grad.ndim == 2 else grad.reshape(-1, out_features)
    turned = _transposed(values, metadata, pattern, out_features, in_features)
    if turned is not None:
        found = cpu.linear(rows, *turned, None, in_features, out_features)
    else:
        found = cpu_grad.grad_input(rows, values, metadata, out_features, in_features)
    return found if grad.ndim == 2 else found.view(*grad.shape[:-1], in_features)


def _values_reference(
    grad: Tensor, x: Tensor, metadata: Tensor, pattern: str, out_features: int, in_features: int
) -> Tensor:
    return reference.linear_grad_values(grad, x, metadata, Pattern.parse(pattern), in_features)


def _values_cpu(grad: Tensor, x: Tensor, metadata: Tensor, pattern: str, out_features: int, in_features: int) -> Tensor:
    rows, inputs = grad.reshape(-1, out_features), x.reshape(-1, in_features)
    return cpu_grad.grad_values(rows, inputs, metadata, out_features, in_features)


# ---- transposed copies ---------------------------------------------------------------------------------------------

Turned = tuple[Tensor, Tensor]
_turned: dict[int, tuple[StorageWeakRef, int, Turned | None]] = {}
"""Storage of values -> itself, the version of the values, the transposed matrix in the CPU layout (None: they change)."""


def _transposed(values: Tensor, metadata: Tensor, pattern: str, out_features: int, in_features: int) -> Turned | None:
    """W.T in the CPU layout, faster than sorting, for a transposable pattern and constant values.

    4096x4096, 512 tokens: 1.24 times as fast in float32 (a Zen 4 core without AVX-512).
    Made at the first gradient (a second at 4096x4096), kept as long as the values live and do not change: as many bytes
    again as the weight. Values that are trained change at each step: they are never transposed.
    """
    if not pattern.endswith("t") or values.requires_grad:
        return None
    storage = StorageWeakRef(values.untyped_storage())
    version = 0 if values.is_inference() else values._version
    kept = _turned.get(storage.cdata)
    if kept is not None and not kept[0].expired() and kept[1] == version:
        return kept[2]
    if kept is not None and not kept[0].expired():  # not constant after all
        _turned[storage.cdata] = (storage, version, None)
        return None
    for key in [key for key, (other, _, _) in _turned.items() if other.expired()]:
        del _turned[key]
    canonical = cpu.unpack(values, metadata, out_features, in_features)
    matrix = SparseMatrix(*canonical, Pattern.parse(pattern), (out_features, in_features)).transposed()
    turned = cpu.pack(matrix.values, matrix.metadata, in_features, out_features)
    _turned[storage.cdata] = (storage, version, turned)
    return turned


# ---- shapes, batches, gradients ------------------------------------------------------------------------------------


def _input_fake(
    grad: Tensor, values: Tensor, metadata: Tensor, pattern: str, out_features: int, in_features: int
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


def _values_fake_reference(
    grad: Tensor, x: Tensor, metadata: Tensor, pattern: str, out_features: int, in_features: int
) -> Tensor:
    parsed = Pattern.parse(pattern)
    return grad.new_empty(out_features, in_features // parsed.group * parsed.keep)


def _values_fake_cuda(
    grad: Tensor, x: Tensor, metadata: Tensor, pattern: str, out_features: int, in_features: int
) -> Tensor:
    return grad.new_empty(layout.packed_shapes(out_features, in_features, grad.dtype)[0])


def _values_fake_cpu(
    grad: Tensor, x: Tensor, metadata: Tensor, pattern: str, out_features: int, in_features: int
) -> Tensor:
    return grad.new_empty(cpu.packed_shapes(out_features, in_features, grad.dtype)[0])


_LIBRARY.impl("linear_grad_input_reference", _input_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_grad_values_reference", _values_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_grad_input_cpu", _input_cpu, "CPU")
_LIBRARY.impl("linear_grad_values_cpu", _values_cpu, "CPU")
_LIBRARY.impl("linear_grad_input_cuda", cuda.grad_input, "CUDA")
_LIBRARY.impl("linear_grad_values_cuda", cuda.grad_values, "CUDA")
torch.library.register_fake("twofour::linear_grad_values_reference", _values_fake_reference, lib=_LIBRARY)
torch.library.register_fake("twofour::linear_grad_values_cpu", _values_fake_cpu, lib=_LIBRARY)
torch.library.register_fake("twofour::linear_grad_values_cuda", _values_fake_cuda, lib=_LIBRARY)

GRAD_INPUT = {name: getattr(torch.ops.twofour, f"linear_grad_input_{name}").default for name in _BACKENDS}
GRAD_VALUES = {name: getattr(torch.ops.twofour, f"linear_grad_values_{name}").default for name in _BACKENDS}


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, metadata, *arguments = inputs
    ctx.save_for_backward(first, second, metadata)
    ctx.arguments = arguments


def _register(backend: str) -> None:
    def linear(x: Tensor, values: Tensor, metadata: Tensor, arguments: list[Any]) -> Tensor:
        run: Callable[..., Tensor] = getattr(torch.ops.twofour, f"linear_{backend}").default
        return run(x, values, metadata, None, *arguments)

    def input_backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        grad, values, metadata = ctx.saved_tensors
        of_grad = linear(outer, values, metadata, ctx.arguments) if ctx.needs_input_grad[0] else None
        of_values = GRAD_VALUES[backend](grad, outer, metadata, *ctx.arguments) if ctx.needs_input_grad[1] else None
        return of_grad, of_values, None, None, None, None

    def values_backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        grad, x, metadata = ctx.saved_tensors
        pattern, *shape = ctx.arguments
        outer = outer.contiguous()
        of_grad = linear(x, outer, metadata, ctx.arguments) if ctx.needs_input_grad[0] else None
        of_x = None
        if ctx.needs_input_grad[1]:  # `outer` stands for the weight and lives once: not worth transposing
            of_x = GRAD_INPUT[backend](grad, outer, metadata, pattern.rstrip("t"), *shape)
        return of_grad, of_x, None, None, None, None

    def input_batches(info: Any, in_dims: tuple[int | None, ...], grad: Tensor, *rest: Any) -> tuple[Tensor, int]:
        if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):
            raise UnsupportedError("vmap runs over the gradients of a sparse linear layer only, not over its weights.")
        return GRAD_INPUT[backend](grad.movedim(in_dims[0], 0), *rest), 0

    def values_batches(
        info: Any, in_dims: tuple[int | None, ...], grad: Tensor, x: Tensor, *rest: Any
    ) -> tuple[Tensor, int]:
        grads, inputs = (
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in ((grad, in_dims[0]), (x, in_dims[1]))
        )
        return torch.stack([GRAD_VALUES[backend](g, i, *rest) for g, i in zip(grads, inputs, strict=True)]), 0

    for name, backward, batches in (
        ("input", input_backward, input_batches),
        ("values", values_backward, values_batches),
    ):
        operation = f"twofour::linear_grad_{name}_{backend}"
        torch.library.register_autograd(operation, backward, setup_context=_setup_context, lib=_LIBRARY)
        torch.library.register_vmap(operation, batches, lib=_LIBRARY)
    torch.library.register_fake(f"twofour::linear_grad_input_{backend}", _input_fake, lib=_LIBRARY)


for _backend in _BACKENDS:
    _register(_backend)
