"""The row "cuda" of the table: a weight of 16 bits in the CUDA layout, its products, and what is asked of the machine."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ...pattern import Pattern
from .. import epilogue
from ..tracing import constant
from . import arguments, compiler, driver, layout, packing, products, tokens
from .packing import PackedMatrix

DTYPES = (torch.bfloat16, torch.float16)
"""Of weights without scales."""


def why_not(
    pattern: Pattern,
    dtype: torch.dtype,
    out_features: int,
    in_features: int,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> str | None:
    """None where the kernels run such a weight, whose dtype must be one of `dtypes`; otherwise why they do not."""
    if device.type != "cuda":
        return f"the weight is on {device}"
    if out_features == 0 or in_features == 0:
        return "the weight is empty"
    if (pattern.keep, pattern.group) != (2, 4):
        return f"pattern {pattern} has no GPU kernel, only 2:4"
    if dtype not in dtypes:
        names = [str(each).removeprefix("torch.") for each in (dtype, *dtypes)]
        return f"{names[0]} has no GPU kernel, only {' and '.join(names[1:])}"
    return unusable(device)


@constant
def unusable(device: torch.device) -> str | None:
    """Why no kernel of csrc/cuda can run on a GPU of this machine; None where they can."""
    reason = driver.why_not() or compiler.why_not() or missing()
    if reason is not None:
        return reason
    major, minor = _capability(device)
    if (major, minor) < compiler.OLDEST:
        return f"{torch.cuda.get_device_name(device)} ({major}.{minor}) has no sparse tensor cores: they begin at 8.0"
    return compiler.why_not_for((major, minor))


def missing() -> str | None:
    """Why torch has no GPU; None where it has."""
    if torch.cuda.is_available():
        return None
    return "torch sees no GPU" if torch.version.cuda else "this build of torch has no CUDA"


def label() -> str:
    """ "cuda sm_90a", of the current GPU."""
    if not torch.cuda.is_available():
        return "cuda"
    return f"cuda {compiler.architecture_of(_capability(torch.device('cuda')))}"


def pack(values: Tensor, metadata: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """The canonical format in the CUDA layout, by torch's own operations: once for a layer, on any device."""
    return layout.pack(values, metadata, out_features, in_features)


def linear(
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
    """activation(x @ W.T + bias) + residual, as `ops.linear` says."""
    packed = PackedMatrix(values, metadata, (out_features, in_features))
    if bias is None or bias.dtype == x.dtype:
        bias = None if bias is None else bias.contiguous()
        return products.linear(x, packed, bias, activation=activation, residual=residual)
    # A bias that x's dtype cannot hold is added before anything is rounded.
    y = products.linear(x, packed, out_dtype=torch.float32) + bias.float()
    return epilogue.finish(y, activation, None if residual is None else residual.float()).to(x.dtype)


def linear_int8(
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
    """`reference.linear_int8`, the same bits without GELU and SiLU."""
    packed = PackedMatrix(values, metadata, (out_features, in_features))
    rows = x if x.ndim == 2 else x.reshape(-1, in_features)
    q, x_scales = tokens.quantize(rows.float() if x.dtype == torch.float64 else rows)
    fits = x.dtype in arguments.ITEMS and (bias is None or bias.dtype == x.dtype)
    y = products.linear(
        q,
        packed,
        None if bias is None else (bias if fits else bias.float()).contiguous(),
        row_scale=scales.contiguous(),
        token_scale=x_scales,
        activation=activation,
        out_dtype=x.dtype if fits else torch.float32,
    )
    y = y if y.dtype == x.dtype else y.to(x.dtype)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], out_features)


def linear_float8(
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
    """`reference.linear_float8` for x of 16 bits.

    For wider x the weight is written out and multiplied by torch's dense product: tensor cores would round x. What is not
    finite in such x reaches every output of its token.
    """
    packed = PackedMatrix(values, metadata, (out_features, in_features))
    if x.dtype in DTYPES:
        fits = bias is None or bias.dtype == x.dtype
        y = products.linear(
            x,
            packed,
            None if bias is None else (bias if fits else bias.float()).contiguous(),
            row_scale=scales.contiguous(),
            activation=activation,
            out_dtype=x.dtype if fits else torch.float32,
        )
    else:
        y = x @ packing.expand(packed).to(x.dtype).t() * scales.to(x.dtype)
        y = y if bias is None else y + bias.to(x.dtype)
        y = epilogue.finish(y, activation, None)
    return y if y.dtype == x.dtype else y.to(x.dtype)


def to_dense(values: Tensor, metadata: Tensor, pattern: str, out_features: int, in_features: int) -> Tensor:
    """[out_features, in_features], dropped places +0.0."""
    return packing.expand(PackedMatrix(values, metadata, (out_features, in_features)))


def grad_input(
    grad: Tensor, values: Tensor, metadata: Tensor, pattern: str, out_features: int, in_features: int
) -> Tensor:
    """grad @ W, by torch's dense product with the weight written out.

    Unlike the other backends, what is not finite in grad reaches every input of its token: 0 * inf is NaN in a dense
    product, and to look for it would make the GPU wait.
    """
    return grad @ to_dense(values, metadata, pattern, out_features, in_features)


def grad_values(grad: Tensor, x: Tensor, metadata: Tensor, pattern: str, out_features: int, in_features: int) -> Tensor:
    """grad.T @ x, by torch's product, of which the kept places are taken, in the CUDA layout."""
    whole = grad.reshape(-1, out_features).T @ x.reshape(-1, in_features)
    shape, _ = layout.packed_shapes(out_features, in_features, whole.dtype)
    like = PackedMatrix(whole.new_empty(shape), metadata, (out_features, in_features))
    return packing.take(whole, like)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
