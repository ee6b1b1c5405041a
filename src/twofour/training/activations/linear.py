"""The linear layer after a squared ReLU, on a kernel that skips what is dropped of the activations.

A kernel of the table multiplies x by a packed 2:4 weight. Here the activations are the packed matrix, and the weight is
what they are multiplied with, in all three products, Y = m max(x, 0)²:

    out.T = W Y.T             the kernel for a layer's output
    dW    = dout.T Y          its gradient of the inputs
    dY    = dout W where Y    its gradient of the kept values

All are exact: the products along the tokens need no pattern of their own there.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from ...errors import ShapeError, UnsupportedError
from ...kernels import cpu, ops
from ...masks import nm_mask
from ...pattern import Pattern
from .squared_relu import require_of_tokens, rows_at_once, squared_relu, times_slope

_LEAST_NUMBERS = 1 << 18
_LEAST_OUTPUTS = 256


def squared_relu_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pattern: Pattern | str | None = "2:4",
    *,
    backend: str | None = None,
) -> Tensor:
    """`linear(squared_relu(x, pattern), weight, bias)`: the second half of a feed-forward block.

    Where `why_dense` has no objection, activations are packed and all three products, forward and backward, skip what is
    dropped; elsewhere it is that composition itself. The result is the same but for the order of sums, and for weights
    that are NaN or infinite, which do not meet what is dropped. Packed, 17/32 of y are kept for the backward pass, in
    bfloat16 18/32. Differentiable any number of times.

    In a model, with its layers and state dict as they are:

        def forward(self, x):
            return squared_relu_linear(self.up(x), self.down.weight, self.down.bias, self.pattern)

    Args:
        x: [..., in_features], before the activation.
        weight: [out_features, in_features]; bias: [out_features] or None.
        pattern: as in `squared_relu`.
        backend: "cpu" for the kernel, "dense" for the composition, None for the kernel where it pays.
    Returns:
        [..., out_features] of x's dtype; under autocast that of a Linear.
    Raises:
        ShapeError: x and weight do not fit, or no whole groups.
        PatternError: as in `squared_relu`.
        UnsupportedError: backend="cpu" where it cannot run; says why.
    Cost: 4096 -> 1024 features, 2048 tokens, one thread of a 2-core AMD EPYC (Zen 5) that others kept busy, in turns with
        `linear(x.relu().square(), weight, bias)`. float32: 0.44 of its time forward and backward (499 ms against 1141), 0.40
        forward, and there 0.76 of the time of oneDNN with its packing. bfloat16: 0.82 forward and backward (269 ms against
        329), but 1.15 forward. Packing is 32 ms of each. Smaller shapes lose a third and more in bfloat16, so that
        there the kernel runs on request only.
    Source: Haziza et al. 2025, arXiv:2503.16672, who make activations 2:4 a second time for the weight gradient, along the
        tokens; here it is exact.

    >>> x, weight = torch.tensor([[1., 3., -5., 2.]]), torch.ones(1, 4)
    >>> squared_relu_linear(x, weight).tolist(), why_dense(x, weight)
    ([[13.0]], '4 features are not a multiple of 8')
    """
    parsed = require_of_tokens(pattern)
    if backend not in (None, "cpu", "dense"):
        raise UnsupportedError(f"unknown backend {backend!r}: squared_relu_linear has 'cpu' and 'dense'.")
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"x is {list(x.shape)} and weight {list(weight.shape)}: they must be [..., in_features] and"
            " [out_features, in_features]."
        )
    reason = _why_not(x, weight, bias, parsed)
    if backend == "cpu" and reason is not None:
        raise UnsupportedError(f"backend 'cpu' cannot run this: {reason}. backend=None takes what can.")
    if backend == "cpu" or (backend is None and reason is None and _why_slower(x, weight) is None):
        rows = x.reshape(-1, x.shape[-1])
        turned = ops.linear("cpu", weight, _Pack.apply(rows), None, "2:4", *rows.shape)
        out = turned.t().contiguous().view(*x.shape[:-1], len(weight))
        return out if bias is None else out + bias
    return functional.linear(squared_relu(x, parsed), weight, bias)


def why_dense(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, pattern: Pattern | str | None = "2:4"
) -> str | None:
    """Why `squared_relu_linear` multiplies the zeros too; None where it skips them."""
    return _why_not(x, weight, bias, require_of_tokens(pattern)) or _why_slower(x, weight)


def _why_not(x: Tensor, weight: Tensor, bias: Tensor | None, pattern: Pattern | None) -> str | None:
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if pattern != Pattern(2, 4):
        return f"the kernel is for 2:4, not for {'dense activations' if pattern is None else pattern}"
    if not all(tensor.is_cpu for tensor in tensors):
        return f"x is on {x.device}, the weight on {weight.device}: the kernel runs on CPUs"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses the dtype of the product"
    if any(tensor.dtype != x.dtype for tensor in tensors) or x.dtype not in (torch.float32, torch.bfloat16):
        return f"x is {x.dtype}, the weight {weight.dtype}: the kernel runs float32 or bfloat16, one for all"
    if not all(_is_plain(tensor) for tensor in tensors) or forward_ad._current_level >= 0:
        return "a compiler, a transform of torch.func or a subclass of Tensor watches"
    if x.shape[-1] % 8:
        return f"{x.shape[-1]} features are not a multiple of 8"
    if not x.numel() or not weight.numel():
        return "there is nothing to multiply"
    if sys.byteorder != "little":
        return "packing is written for little-endian machines"
    return cpu.available()


def _why_slower(x: Tensor, weight: Tensor) -> str | None:
    if x.dtype == torch.bfloat16:
        return "in bfloat16 packing costs what the kernel gains, or more: backend='cpu' takes it all the same"
    if x.numel() < _LEAST_NUMBERS:
        return f"x has {x.numel()} numbers: below {_LEAST_NUMBERS} packing costs what the kernel gains"
    if len(weight) < _LEAST_OUTPUTS:
        return f"{len(weight)} outputs: below {_LEAST_OUTPUTS} packing costs what the kernel gains"
    return None


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


class _Pack(torch.autograd.Function):
    """[tokens, features] -> squared_relu(.., "2:4") in the layout of the kernel, values and metadata; keeps no more."""

    apply: Callable[..., tuple[Tensor, Tensor]]

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
        values, metadata = cpu.pack(*_compressed(rows), *rows.shape)
        ctx.save_for_backward(values, metadata)
        ctx.mark_non_differentiable(metadata)
        ctx.shape = rows.shape
        return values, metadata

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        values, metadata = ctx.saved_tensors
        return _Spread.apply(times_slope(grads[0], values), metadata, ctx.shape)


class _Spread(torch.autograd.Function):
    """Values and metadata in the layout of the kernel -> the dense matrix."""

    apply: Callable[..., Tensor]

    @staticmethod
    def forward(ctx: Any, values: Tensor, metadata: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(metadata)
        ctx.shape = shape
        dense = values.new_zeros(shape)
        for part, its_values, codes in _in_parts(dense, *cpu.unpack(values, metadata, *shape)):
            part.view(-1).index_copy_(0, _places(_tables()[2], codes.long(), torch.int64), its_values.reshape(-1))
        return dense

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Gather.apply(grads[0], *ctx.saved_tensors), None, None


class _Gather(torch.autograd.Function):
    """The inverse of `_Spread`: what is at the kept places of a dense matrix, in the layout of the kernel."""

    apply: Callable[..., Tensor]

    @staticmethod
    def forward(ctx: Any, dense: Tensor, metadata: Tensor) -> Tensor:
        ctx.save_for_backward(metadata)
        ctx.shape = dense.shape
        tokens, features = dense.shape
        values = dense.new_zeros(cpu.packed_shapes(tokens, features, dense.dtype)[0])
        codes = cpu.unpack(values, metadata, tokens, features)[1]
        places = _places(_tables()[2], codes.long(), torch.int64)
        return cpu.pack(dense.reshape(-1).index_select(0, places).view(tokens, -1), codes, tokens, features)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Spread.apply(grads[0], *ctx.saved_tensors, ctx.shape), None


def _compressed(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The canonical values and metadata of squared_relu(rows, "2:4")."""
    tokens, features = rows.shape
    values = rows.new_empty(tokens, features // 2)
    metadata = rows.new_empty(tokens, features // 8, dtype=torch.uint8)
    of_places, of_metadata = _tables()[:2]
    for part, its_values, its_metadata in _in_parts(rows, values, metadata):
        root = part.relu().contiguous()
        # Eight bytes of 0 and 1 become the bits of one.
        bits = (
            nm_mask(root, "2:4").view(torch.int64).mul_(0x0102040810204080).bitwise_right_shift_(56).bitwise_and_(255)
        )
        torch.take(of_metadata, bits, out=its_metadata)
        kept = root.view(-1).index_select(0, _places(of_places, bits, torch.int32))
        torch.square(kept.view_as(its_values), out=its_values)
    return values, metadata


def _in_parts(dense: Tensor, values: Tensor, metadata: Tensor) -> Any:
    """All three in pieces of rows that stay in the cache."""
    rows = rows_at_once(dense)
    return zip(dense.split(rows), values.split(rows), metadata.split(rows), strict=True)


def _places(table: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the four kept of each eight are, counted from the first of all."""
    offsets = torch.take(table, codes).view(torch.uint8).view(-1, 4).to(dtype)
    return offsets.add_(torch.arange(0, 8 * len(offsets), 8, dtype=dtype, device="cpu")[:, None]).view(-1)


@cache
def _tables() -> tuple[Tensor, Tensor, Tensor]:
    """For two neighbouring groups, places and metadata by the byte of their mask, and places by the byte of their metadata.

    Four places of 0 ... 7 are the four bytes of an int32, the first in the lowest.
    """
    with torch.inference_mode(False):
        by_mask, by_metadata = torch.zeros(2, 256, dtype=torch.int32, device="cpu")
        metadata = torch.zeros(256, dtype=torch.uint8, device="cpu")
        pairs = list(itertools.combinations(range(4), 2))
        for (a, b), (c, d) in itertools.product(pairs, pairs):
            mask = 1 << a | 1 << b | 1 << c + 4 | 1 << d + 4
            metadata[mask] = code = a | b << 2 | c << 4 | d << 6
            by_mask[mask] = by_metadata[code] = a | b << 8 | c + 4 << 16 | d + 4 << 24
    return by_mask, metadata, by_metadata
