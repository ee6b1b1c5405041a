"""What the products on a GPU take: all that can be wrong with it is said here.

`prepared.Product` asks again only for what may have changed since, in the words of this file: where they change, it does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ShapeError, UnsupportedError
from .. import epilogue
from . import layout, table
from .packing import PackedMatrix, _on_gpu, require_layout

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}
"""Of x and a weight of its dtype, as kernels are called."""
NAMES_OF_E4M3 = {torch.bfloat16: "e4m3_bf16", torch.float16: "e4m3_fp16", torch.float8_e4m3fn: "e4m3"}
"""Of x, where the weight is float8_e4m3fn."""
E4M3 = torch.float8_e4m3fn
ITEMS = (torch.bfloat16, torch.float16, torch.float32)
"""Of the result, in the order of csrc/cuda/epilogue.h."""
MOST_COLUMNS = {
    torch.bfloat16: 2**30 - 1,
    torch.float16: 2**30 - 1,
    torch.float8_e4m3fn: 2**30 - 1,
    torch.int8: 2**18,
}
"""Of x: kernels count the bytes of a token, as 16 bits each, in an int32, and one has the sum of so many products of int8."""
_MOST_ITEMS = 2**31 - 1


class Arguments(NamedTuple):
    """Of y = activation(x @ W.T * token_scale * row_scale + bias) + residual, which fit each other; kernels can read them."""

    x: Tensor
    packed: PackedMatrix
    bias: Tensor | None
    row_scale: Tensor | None
    token_scale: Tensor | None
    activation: str
    residual: Tensor | None
    y: Tensor

    @property
    def name(self) -> str:
        return _name(self.x.dtype, self.packed.values.dtype) or ""

    @property
    def sums(self) -> torch.dtype:
        return torch.int32 if self.x.dtype == torch.int8 else torch.float32

    @property
    def is_e4m3(self) -> bool:
        """Has the weight a dtype that only the kernels for few tokens take?"""
        return self.packed.values.dtype == E4M3

    def widened(self) -> Arguments:
        """With weight and x of 16 bits."""
        x = _readable(self.x.to(torch.float16)) if self.x.dtype == E4M3 else self.x
        values, metadata = layout.widen(self.packed.values, self.packed.metadata, x.dtype)
        return self._replace(x=x, packed=PackedMatrix(values, metadata, self.packed.shape))

    def operands(
        self,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """x, values, metadata, bias, row_scale, token_scale, residual."""
        packed = self.packed
        scales = self.row_scale, self.token_scale
        return self.x, packed.values, packed.metadata, self.bias, *scales, self.residual

    def without_kernels(self) -> Tensor | None:
        """y where there is nothing to multiply; None where there is."""
        if self.y.numel() and self.x.shape[1]:
            return None
        with torch.no_grad():
            wide = torch.zeros_like(self.y, dtype=torch.float32)
            wide = wide if self.bias is None else wide + self.bias
            residual = None if self.residual is None else self.residual.float()
            return self.y.copy_(epilogue.finish(wide, self.activation, residual))


def check(
    x: Tensor,
    packed: PackedMatrix,
    bias: Tensor | None,
    row_scale: Tensor | None,
    token_scale: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Arguments:
    """The arguments of a product, with an empty y. x and residual are copied where kernels cannot read them.

    Raises:
        ShapeError, UnsupportedError: they do not fit.
    """
    rows, columns = packed.shape
    if _name(x.dtype, packed.values.dtype) is None:
        raise UnsupportedError(
            f"x is {x.dtype}, the weight {packed.values.dtype}: one of {_of(NAMES)}, the same for both, or"
            f" a weight of float8_e4m3fn and x of {_of(NAMES_OF_E4M3)}."
        )
    require_layout(packed)
    if x.ndim != 2 or x.shape[1] != columns:
        raise ShapeError(f"x is {list(x.shape)}: a weight of [{rows}, {columns}] takes [..., {columns}].")
    tokens = x.shape[0]  # len(x) takes a microsecond
    if columns > MOST_COLUMNS[x.dtype] or rows > _MOST_ITEMS or tokens > _MOST_ITEMS:
        raise ShapeError(
            f"x is {list(x.shape)}, the weight [{rows}, {columns}]: at most {_MOST_ITEMS} tokens and rows and"
            f" {MOST_COLUMNS[x.dtype]} columns of {_of([x.dtype])}, as kernels count and add them in 32 bits. Multiply part"
            " by part."
        )
    if out_dtype is None:
        out_dtype = torch.bfloat16 if x.itemsize == 1 else x.dtype
    if out_dtype not in ITEMS:
        raise UnsupportedError(f"out_dtype is {out_dtype}: sums are rounded to {_of(ITEMS)}.")
    epilogue.require(x, activation, None, rows)
    if bias is not None or row_scale is not None or token_scale is not None or residual is not None:
        _require_beside(x, rows, bias, row_scale, token_scale, residual, out_dtype)
    if not _on_gpu(x) or x.device != packed.values.device:
        raise UnsupportedError(f"x is on {x.device}, the weight on {packed.values.device}: put both on one GPU.")
    reason = table.why_not("decode_e4m3_8", x.device) if x.dtype == E4M3 else None
    if reason is not None:
        raise UnsupportedError(f"x is {x.dtype}, and {reason}: give it as x.half(), which holds its numbers.")
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    y = torch.empty(tokens, rows, dtype=out_dtype, device=x.device)
    x = x.detach() if x.requires_grad else x
    return Arguments(_readable(x), packed, bias, row_scale, token_scale, activation, residual, y)


def _require_beside(
    x: Tensor,
    rows: int,
    bias: Tensor | None,
    row_scale: Tensor | None,
    token_scale: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Raises unless what stands beside x and the weight fits them."""
    tokens = x.shape[0]
    for name, vector, size, dtype in (
        ("bias", bias, rows, out_dtype),
        ("row_scale", row_scale, rows, torch.float32),
        ("token_scale", token_scale, tokens, torch.float32),
    ):
        if vector is not None and (vector.shape != (size,) or vector.dtype != dtype or not vector.is_contiguous()):
            raise ShapeError(f"{name} is {list(vector.shape)} {vector.dtype}: it must be [{size}] {dtype}, contiguous.")
    if residual is not None and (residual.shape != (tokens, rows) or residual.dtype != out_dtype):
        raise ShapeError(
            f"residual is {list(residual.shape)} {residual.dtype}: it must be [{tokens}, {rows}] {out_dtype}, as y."
        )
    for name, tensor in (
        ("bias", bias),
        ("row_scale", row_scale),
        ("token_scale", token_scale),
        ("residual", residual),
    ):
        if tensor is not None and tensor.device != x.device:
            raise UnsupportedError(f"x is on {x.device}, {name} on {tensor.device}: put them on one device.")


def _name(x: torch.dtype, weight: torch.dtype) -> str | None:
    """Of the kernels; None where there are none."""
    if weight == E4M3:
        return NAMES_OF_E4M3.get(x)
    return NAMES.get(x) if x == weight else None


def is_readable(x: Tensor) -> bool:
    """Can kernels read x [tokens, columns]? Rows begin at multiples of 16 bytes; what lies behind their ends is not read."""
    to_next, step = x.stride()
    return (
        step == 1
        and x.data_ptr() % layout.ALIGNED == 0
        and (to_next * x.itemsize % layout.ALIGNED == 0 or x.shape[0] == 1)
    )


def _readable(x: Tensor) -> Tensor:
    """x, or a copy."""
    if is_readable(x):
        return x
    items = layout.ALIGNED // x.itemsize
    wide = x.new_empty(x.shape[0], -(-x.shape[1] // items) * items)
    return wide[:, : x.shape[1]].copy_(x)


def _of(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(each).removeprefix("torch.") for each in dtypes)
