"""What products on a GPU start: chosen once for their shapes and dtypes, then started with the addresses of each call.

A call that finds its product here is checked for what its shapes and dtypes do not say, and takes a third of the time
that the checks of `arguments.check` and the choice of kernels take: with a few tokens, Python is slower than the GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import epilogue
from . import arguments, layout, packing, resources, table

_ACTIVATIONS = {name: number for number, name in enumerate(epilogue.ACTIVATIONS)}


class Launch(NamedTuple):
    """Of a kernel for some of the tokens, and what it takes beside addresses."""

    kernel: str
    grid: tuple[int, int]
    first: int
    tokens: int
    slice: int
    """Of the columns, in what the kernel counts them in."""
    sums: int = 0
    """Items of memory in which slices leave their sums; 0 where they leave none."""
    more: tuple[int, ...] = ()
    """What stands between the counters and the epilogue in the kernel's parameters."""
    cluster: int = 1
    """Blocks that share columns in a cluster; 1 for none."""
    early: bool = False
    """May it begin while the kernel before it ends?"""


class Product:
    """The launches of y = activation(x @ W.T * token_scale * row_scale + bias) + residual for one shape and dtype of each.

    Args:
        call: arguments like those that will come.
        launches: for its tokens.
    """

    __slots__ = (
        "_activation",
        "_bytes_of_item",
        "_columns",
        "_counters",
        "_device",
        "_dtype_of_sums",
        "_launches",
        "_nested",
        "_number",
        "_out",
        "_out_number",
        "_rows",
        "_shape",
        "_strides",
        "_sums",
        "_tokens",
        "_words",
    )

    def __init__(self, call: arguments.Arguments, launches: Sequence[Launch]) -> None:
        self._tokens, (self._rows, self._columns) = call.x.shape[0], call.packed.shape
        self._device, self._number = call.x.device, call.x.get_device()
        self._out, self._out_number = call.y.dtype, arguments.ITEMS.index(call.y.dtype)
        self._nested = False
        self._shape: tuple[int, ...] = (self._tokens, self._rows)
        self._strides: tuple[int, ...] = (self._rows, 1)
        self._words = packing.words_of(self._rows, self._columns)
        self._bytes_of_item = call.x.itemsize
        self._activation = _ACTIVATIONS[call.activation]
        self._launches = tuple(launches)
        self._sums = max(launch.sums for launch in launches)
        self._counters = max(launch.grid[0] for launch in launches)
        self._dtype_of_sums = call.sums

    def nested(self, leading: Sequence[int]) -> Product:
        """For x and residual with these axes before the last, as many tokens; they must be contiguous."""
        other = copy.copy(self)
        other._nested, other._shape = True, (*leading, self._rows)
        other._strides = resources.strides_of(other._shape)
        return other

    def run(self, call: arguments.Arguments) -> Tensor:
        """y of checked arguments."""
        self.start(*call.operands(), call.y)
        return call.y

    def multiplied(
        self,
        x: Tensor,
        values: Tensor,
        metadata: Tensor,
        bias: Tensor | None,
        row_scale: Tensor | None,
        token_scale: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor | None:
        """y; None where kernels cannot read what is given: `arguments.check` says why, or copies it.

        Shapes and dtypes of x and the weight are those of the product, and so is x's device.
        """
        rows, number = self._rows, self._number
        if not (
            packing._on_gpu(x)
            and (self._is_readable(x) if self._nested else arguments.is_readable(x))
            and packing.is_readable(values, metadata, self._words)
            and values.get_device() == number
            and metadata.get_device() == number
            and (bias is None or _is_vector(bias, rows, self._out, number))
            and (row_scale is None or _is_vector(row_scale, rows, torch.float32, number))
            and (token_scale is None or _is_vector(token_scale, self._tokens, torch.float32, number))
            and (
                residual is None
                or (
                    residual.shape == self._shape
                    and residual.dtype == self._out
                    and (residual.is_contiguous() if self._nested else residual.stride(1) == 1)
                    and residual.get_device() == number
                )
            )
        ):
            return None
        y = resources.empty(self._shape, self._strides, self._out, self._device)
        self.start(x, values, metadata, bias, row_scale, token_scale, residual, y)
        return y

    def _is_readable(self, x: Tensor) -> bool:
        """As `arguments.is_readable`, of x with leading axes."""
        return (
            x.is_contiguous()
            and x.data_ptr() % layout.ALIGNED == 0
            and (self._columns * self._bytes_of_item % layout.ALIGNED == 0 or self._tokens == 1)
        )

    def start(
        self,
        x: Tensor,
        values: Tensor,
        metadata: Tensor,
        bias: Tensor | None,
        row_scale: Tensor | None,
        token_scale: Tensor | None,
        residual: Tensor | None,
        y: Tensor,
    ) -> None:
        """Writes y, of arguments that were checked."""
        device, rows = self._device, self._rows
        partial = counters = 0
        if self._sums:
            memory = torch.empty(self._sums, dtype=self._dtype_of_sums, device=device)
            partial = memory.data_ptr()
            counted = resources.counters(device, self._counters)  # which lasts until all have started
            counters = counted.data_ptr()
        at_x, at_y, bytes_of_y = x.data_ptr(), y.data_ptr(), self._out.itemsize
        # A single row may lie at no multiple of 16 bytes from the next.
        to_next = self._bytes_of_item * (self._columns if self._nested else x.stride(0)) if self._tokens > 1 else 0
        at_tokens = 0 if token_scale is None else token_scale.data_ptr()
        at_residual = residual_items = 0
        if residual is not None:
            at_residual, residual_items = residual.data_ptr(), rows if self._nested else residual.stride(0)
        for kernel, grid, first, tokens, each, sums, more, cluster, early in self._launches:
            table.launch(
                kernel,
                grid,
                device,
                values.data_ptr(),
                metadata.data_ptr(),
                at_x + first * to_next,
                to_next,
                tokens,
                rows,
                self._columns,
                each,
                partial if sums else 0,
                counters if sums else 0,
                *more,
                0 if bias is None else bias.data_ptr(),
                0 if row_scale is None else row_scale.data_ptr(),
                at_tokens and at_tokens + 4 * first,
                at_residual and at_residual + first * residual_items * bytes_of_y,
                residual_items,
                self._activation,
                at_y + first * rows * bytes_of_y,
                rows,
                self._out_number,
                cluster=cluster,
                early=early,
            )


def _is_vector(tensor: Tensor, size: int, dtype: torch.dtype, number: int) -> bool:
    return (
        tensor.shape == (size,) and tensor.dtype == dtype and tensor.is_contiguous() and tensor.get_device() == number
    )
