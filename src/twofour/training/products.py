"""A training step on sparse kernels: forward and input gradient multiply by the kept weights alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.choices import bucket
from ..kernels.products import Products, find_products, is_plain
from ..kernels.registry import LinearSpec, Operands
from ..nn.survey import dtype_name
from ..pattern import Pattern
from .estimate import mvue

Wanted = Literal["auto", "sparse", "dense"]
_ROUNDS = 3


@dataclass(frozen=True)
class StepTime:
    """What forward and input gradient of a layer took, packing included, in microseconds: the least of some rounds."""

    tokens: int
    dense_us: float
    sparse_us: float

    @property
    def pays(self) -> bool:
        """True where the sparse kernels are faster."""
        return self.sparse_us < self.dense_us


@dataclass(eq=False)
class LayerProducts:
    """How one layer multiplies: what was asked for, what was measured, and the weight packed for this step.

    Args:
        wanted: "auto" measures at the first batch of each size and takes what is faster, or dense where torch is told to be
            deterministic; "sparse" wherever a kernel applies; "dense".
        times: the measurements, by dtype, tokens, threads and whether inputs need gradients.
        why_dense: why no sparse kernel applies, once that is known.
    """

    wanted: Wanted = "auto"
    times: dict[tuple[Any, ...], StepTime] = field(default_factory=dict)
    why_dense: str | None = None
    _packed: tuple[tuple[Any, ...], Tensor | None, Packed] | None = None

    def forget(self) -> None:
        """The weight has changed, or may have."""
        self._packed = None

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pattern: Pattern,
        kept: Callable[[], tuple[Tensor, Tensor]],
        token: Tensor | None,
        *,
        scale: float,
        estimate: bool,
    ) -> Tensor | None:
        """The layer's output by sparse kernels; None where dense ones are to be taken.

        Args:
            x: [..., in_features].
            weight: [out_features, in_features], the parameter: it gets the gradient, times `scale`.
            kept: gives a dense tensor like `weight` and the mask, bool, under which it counts; called when they are packed.
            token: packed anew where it is another one; so for every change of `weight`.
            estimate: make the weight gradient of a 2:4 estimate of the output gradient.
        """
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else weight.dtype
        if self.wanted == "dense" or (x.dtype != dtype and not autocast) or not (is_plain(x) and is_plain(weight)):
            return None
        if x.device != weight.device or x.shape[-1:] != weight.shape[1:] or not x.dtype.is_floating_point:
            return None  # F.linear says what is wrong
        row, rejected = find_products(LinearSpec(weight.shape[0], weight.shape[1], pattern, dtype, weight.device))
        if row is None:
            self.why_dense = "; ".join(f"{backend}: {reason}" for backend, reason in rejected)
            return None
        if x.numel() == 0:
            return None
        x = x.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        packed = self._pack(row, weight, kept, token, dtype, pattern.transposable)
        if self.wanted == "auto" and not self._pays(row, x, packed, bias):
            return None
        with torch.autocast(x.device.type, enabled=False):
            found: Tensor = _SparseLinear.apply(x, weight, bias, packed, scale, estimate)  # type: ignore[no-untyped-call]
        return found

    def _pack(
        self,
        row: Products,
        weight: Tensor,
        kept: Callable[[], tuple[Tensor, Tensor]],
        token: Tensor | None,
        dtype: torch.dtype,
        both_ways: bool,
    ) -> Packed:
        version = None if weight.is_inference() else weight._version
        key = (weight.data_ptr(), version, dtype, both_ways)
        if self._packed is not None and self._packed[0] == key and self._packed[1] is token and version is not None:
            return self._packed[2]
        with torch.no_grad():
            values, mask = kept()
            values = values.detach().to(dtype)
        packed = Packed(row, *row.pack(values, mask, both_ways), values, mask)
        self._packed = (key, token, packed)
        return packed

    def _pays(self, row: Products, x: Tensor, packed: Packed, bias: Tensor | None) -> bool:
        """Measures once for each kind of batch: on its own inputs, in turns."""
        if torch.are_deterministic_algorithms_enabled():
            return False
        tokens = bucket(x.numel() // x.shape[-1])
        key = (dtype_name(x.dtype), tokens, torch.get_num_threads(), x.requires_grad)
        if key not in self.times:
            with torch.no_grad():
                self.times[key] = _measured(row, x.detach(), packed, bias, x.requires_grad)
        return self.times[key].pays

    def state(self) -> list[list[Any]]:
        """The measurements, for a checkpoint: a run that goes on takes the same kernels."""
        return [[*key, time.tokens, time.dense_us, time.sparse_us] for key, time in self.times.items()]

    def load(self, state: list[list[Any]]) -> None:
        """Takes the measurements of `state`."""
        self.times = {tuple(entry[:-3]): StepTime(*entry[-3:]) for entry in state}
        self.forget()


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as its products want it.

    Args:
        turned: of the transpose; None where the mask is not transposable.
        kept: the dense weight of which it was made: its values count only where `mask` keeps them.
    """

    row: Products
    own: Operands
    turned: Operands | None
    kept: Tensor
    mask: Tensor

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x @ W.T + bias."""
        return self.row.linear(x, self.own, bias, *self.kept.shape)

    def grad_input(self, grad: Tensor) -> Tensor:
        """grad @ W."""
        if self.turned is None:
            return grad @ torch.where(self.mask, self.kept, 0.0)
        return self.row.linear(grad, self.turned, None, self.kept.shape[1], self.kept.shape[0])


def _measured(row: Products, x: Tensor, packed: Packed, bias: Tensor | None, with_gradient: bool) -> StepTime:
    grad = x.new_ones(*x.shape[:-1], packed.kept.shape[0])  # no random numbers: they would shift those of the training
    dense = torch.where(packed.mask, packed.kept, 0.0)

    def by_dense() -> None:
        F.linear(x, dense, bias)
        if with_gradient:
            _ = grad @ dense

    def by_sparse() -> None:
        again = Packed(row, *row.pack(packed.kept, packed.mask, packed.turned is not None), packed.kept, packed.mask)
        again.linear(x, bias)
        if with_gradient:
            again.grad_input(grad)

    best = [float("inf"), float("inf")]
    for repeat in range(_ROUNDS + 1):
        for i, run in enumerate((by_dense, by_sparse)):
            start = perf_counter()
            run()
            if repeat:
                best[i] = min(best[i], perf_counter() - start)
    return StepTime(x.numel() // x.shape[-1], best[0] * 1e6, best[1] * 1e6)


class _SparseLinear(torch.autograd.Function):
    """y = x @ W.T + b and the gradient of x by the packed weight; the weight's own gradient is dense, of all places."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, packed: Packed, scale: float, estimate: bool
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.packed, ctx.scale, ctx.estimate, ctx.dtype = packed, scale, estimate, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return packed.linear(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        of_x = ctx.packed.grad_input(grad) if ctx.needs_input_grad[0] else None
        rows = grad.reshape(-1, grad.shape[-1])
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = weight_gradient(rows, x.reshape(-1, x.shape[-1]), ctx.estimate).to(ctx.dtype)
            if ctx.scale != 1.0:
                of_weight = of_weight * ctx.scale
        of_bias = rows.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias, None, None, None


def weight_gradient(grad: Tensor, x: Tensor, estimate: bool) -> Tensor:
    """grad.T @ x of [tokens, out_features] and [tokens, in_features]; with `estimate` of `mvue` of grad along tokens."""
    if estimate:
        grad = mvue(F.pad(grad, (0, 0, 0, -len(grad) % 4)), dim=0)[: len(grad)]
    return grad.T @ x
