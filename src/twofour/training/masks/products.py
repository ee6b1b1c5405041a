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

from ...kernels.choices import bucket
from ...kernels.cpu import PackedMemory
from ...kernels.products import Products, find_products, is_plain, packed_memory
from ...kernels.registry import LinearSpec, Operands
from ...nn.survey import dtype_name
from ...pattern import Pattern
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
    """How one layer multiplies: what was asked for, and what was measured.

    The weight is packed in every forward pass. Packed weights that are kept would have to know of every change, and torch does
    not tell of all: not of `weight.data.copy_`, as many an EMA swaps weights in.

    Args:
        wanted: "auto" measures at the first batch of each size and takes what is faster, or dense where torch is told to be
            deterministic; "sparse" wherever a kernel applies; "dense".
        times: the measurements, by dtype, tokens, threads and whether inputs need gradients.
        why_dense: why no sparse kernel applies, once that is known.
        memory: of packed weights.
    """

    wanted: Wanted = "auto"
    times: dict[tuple[Any, ...], StepTime] = field(default_factory=dict)
    why_dense: str | None = None
    memory: PackedMemory = field(default_factory=packed_memory, repr=False)

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pattern: Pattern,
        kept: Callable[[], tuple[Tensor, Tensor]],
        *,
        scale: float,
        estimate: bool,
    ) -> Tensor | None:
        """The layer's output by sparse kernels; None where dense ones are to be taken.

        Args:
            x: [..., in_features].
            weight: [out_features, in_features], the parameter: it gets the gradient, times `scale`.
            kept: gives a dense tensor like `weight` and the mask, bool, under which it counts.
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
        key = (dtype_name(dtype), bucket(x.numel() // x.shape[-1]), torch.get_num_threads(), x.requires_grad)
        if self.wanted == "auto" and torch.are_deterministic_algorithms_enabled():
            return None
        if self.wanted == "auto" and key in self.times and not self.times[key].pays:
            return None
        if self.wanted == "auto" and key not in self.times and _is_captured(x.device):
            self.why_dense = "a CUDA graph was captured before a step had been measured"
            return None
        with torch.no_grad():
            values, mask = kept()
            values = values.detach().to(dtype)
        if self.wanted == "auto" and key not in self.times:
            with torch.no_grad():
                self.times[key] = _measured(
                    row, x.detach(), values, mask, bias, pattern.transposable, x.requires_grad, self.memory
                )
            if not self.times[key].pays:
                return None
        with torch.autocast(x.device.type, enabled=False):
            found: Tensor = _SparseLinear.apply(  # type: ignore[no-untyped-call]
                x, weight, bias, values, mask, row, pattern.transposable, scale, estimate, self.memory
            )
        return found

    def state(self) -> list[list[Any]]:
        """The measurements, for a checkpoint: a run that goes on takes the same kernels."""
        return [[*key, time.tokens, time.dense_us, time.sparse_us] for key, time in self.times.items()]

    def load(self, state: list[list[Any]]) -> None:
        """Takes the measurements of `state`."""
        self.times = {tuple(entry[:-3]): StepTime(*entry[-3:]) for entry in state}


def _grad_input(row: Products, grad: Tensor, turned: Operands | None, shape: torch.Size, *of_dense: Tensor) -> Tensor:
    """grad @ W, W of `shape`: by the packed transpose, or, where the mask has none, dense from the values and the mask."""
    if turned is None:
        values, mask = of_dense
        return grad @ torch.where(mask, values, 0.0)
    return row.linear(grad, turned, None, shape[1], shape[0])


def _now(device: torch.device) -> float:
    """Seconds, when what was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def _is_captured(device: torch.device) -> bool:
    """Is a CUDA graph made of what runs? Then nothing can be waited for."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _measured(
    row: Products,
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    both_ways: bool,
    with_gradient: bool,
    memory: PackedMemory,
) -> StepTime:
    """On its own inputs, in turns."""
    grad = x.new_ones(*x.shape[:-1], len(values))  # no random numbers: they would shift those of the training
    dense = torch.where(mask, values, 0.0)

    def by_dense() -> None:
        F.linear(x, dense, bias)
        if with_gradient:
            _ = grad @ dense

    def by_sparse() -> None:
        own, turned = row.pack(values, mask, both_ways, memory)
        row.linear(x, own, bias, *values.shape)
        if with_gradient:
            _grad_input(row, grad, turned, values.shape, values, mask)

    best = [float("inf"), float("inf")]
    for repeat in range(_ROUNDS + 1):
        for i, run in enumerate((by_dense, by_sparse)):
            start = _now(x.device)
            run()
            if repeat:
                best[i] = min(best[i], _now(x.device) - start)
    return StepTime(x.numel() // x.shape[-1], best[0] * 1e6, best[1] * 1e6)


class _SparseLinear(torch.autograd.Function):
    """y = x @ W.T + b and the gradient of x by the packed weight; the weight's own gradient is dense, of all places.

    Where the mask has no transpose the weight itself is saved, and autograd raises if it has changed by the backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        mask: Tensor,
        row: Products,
        both_ways: bool,
        scale: float,
        estimate: bool,
        memory: PackedMemory,
    ) -> Tensor:
        own, ctx.turned = row.pack(values, mask, both_ways, memory)
        ctx.save_for_backward(x, *(() if both_ways else (values, mask)))
        ctx.row, ctx.scale, ctx.estimate, ctx.dtype = row, scale, estimate, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.shape = values.shape
        return row.linear(x, own, bias, *values.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *of_dense = ctx.saved_tensors
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = _grad_input(ctx.row, grad, ctx.turned, ctx.shape, *of_dense)
        rows = grad.reshape(-1, grad.shape[-1])
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = weight_gradient(rows, x.reshape(-1, x.shape[-1]), ctx.estimate).to(ctx.dtype)
            if ctx.scale != 1.0:
                of_weight = of_weight * ctx.scale
        of_bias = rows.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return (of_x, of_weight, of_bias, *[None] * 7)


def weight_gradient(grad: Tensor, x: Tensor, estimate: bool) -> Tensor:
    """grad.T @ x of [tokens, out_features] and [tokens, in_features]; with `estimate` of `mvue` of grad along tokens."""
    if estimate:
        grad = mvue(F.pad(grad, (0, 0, 0, -len(grad) % 4)), dim=0)[: len(grad)]
    return grad.T @ x
