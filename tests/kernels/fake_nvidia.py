"""A CPU model of what torch has of NVIDIA's kernels: it compresses, and multiplies from the compressed bytes alone.

It is as unkind as the real ones may be: its compressor takes -0.0 for a number, fills short groups with other places than
the format does, and hides its metadata; its products see no strides, want aligned memory and whole multiples, and refuse
the arguments that the modelled torch does not have.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import _calculate_meta_reordering_scatter_offsets

from twofour.kernels.vendor.torch_operations import Operations

OLD = frozenset({"compressed_A", "dense_B", "bias", "alpha", "out_dtype", "transpose_result", "alg_id"})
RENAMED = OLD | {"split_k", "split_k_one_kernel"}
NEW = OLD | {"split_k", "split_k_mode"}

_CARRIERS = {1: torch.uint8, 2: torch.int16}


@dataclass
class FakeNvidia:
    """Set what it is, read what it was asked in `calls`: (operation, tensors and arguments by name)."""

    cusparselt: int | None = 801
    cutlass: str | None = None
    capability: tuple[int, int] = (9, 0)
    capturing: bool = False
    arguments: frozenset[str] = NEW
    slack: int = 3
    order: Callable[[Tensor], Tensor] = lambda values: values
    """Of the kept values in the buffer; its own inverse."""
    found: tuple[Any, ...] = (7, 1, -1, 40)
    has_search: bool = True
    has_search_id: bool = True
    wrong: frozenset[int] = frozenset()
    """Algorithms whose sums are wrong."""
    refused: Callable[[int, int], bool] = lambda alg_id, tokens: False
    during_search: Callable[[], None] = lambda: None
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    searching: int = 0
    dead: bool = False
    """After a fault nothing runs any more."""

    def operations(self) -> Operations:
        return Operations(
            cusparselt=self.cusparselt,
            cutlass=self.cutlass,
            compress=self.compress,
            sparse_mm=self.sparse_mm,
            sparse_mm_arguments=self.arguments,
            search=self.search if self.has_search else None,
            search_id=self.search_id if self.has_search_id else None,
            cutlass_mm=self.cutlass_mm,
            cutlass_addmm=self.cutlass_addmm,
            capability=lambda device: self.capability,
            capturing=lambda: self.capturing,
        )

    def named(self, operation: str) -> list[dict[str, Any]]:
        return [arguments for name, arguments in self.calls if name == operation]

    def compress(self, dense: Tensor) -> Tensor:
        self.calls.append(("compress", {"dense": dense.clone()}))
        self._live()
        multiple = 32 if dense.itemsize == 1 else 16
        rows, columns = dense.shape
        assert rows % multiple == 0 == columns % multiple, "shape"
        assert dense.is_contiguous()
        bits = dense.view(_CARRIERS[dense.itemsize]).view(rows, columns // 4, 4)
        seen = bits != 0  # -0.0 has a bit
        assert int(seen.sum(-1).max()) <= 2, "not 2:4"
        rank = torch.where(seen, 0, 4) + torch.arange(4)  # what is seen first, then the lowest free places
        places = rank.argsort(-1)[..., :2].sort(-1).values
        values = self.order(bits.gather(-1, places).view(rows, columns // 2)).contiguous()
        nibbles = (places[..., 0] | places[..., 1] << 2).to(torch.uint8).flatten()
        hidden = ((nibbles[::2] | nibbles[1::2] << 4) ^ 0xA5).flip(0)
        size = values.numel() * dense.itemsize + hidden.numel() + self.slack
        width = -(-size // (rows * dense.itemsize))
        buffer = torch.full((rows * width * dense.itemsize,), 0xEE, dtype=torch.uint8)
        buffer[: values.numel() * dense.itemsize] = values.view(torch.uint8).flatten()
        buffer[values.numel() * dense.itemsize :][: hidden.numel()] = hidden
        return buffer.view(dense.dtype).view(rows, width)

    def decompressed(self, buffer: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Values [rows, columns / 2] in float64, and their columns."""
        rows, taken = buffer.shape[0], buffer.shape[0] * columns // 2 * buffer.itemsize
        flat = buffer.contiguous().view(torch.uint8).flatten()
        values = self.order(flat[:taken].view(_CARRIERS[buffer.itemsize]).view(rows, columns // 2)).contiguous()
        metadata = flat[taken : taken + rows * columns // 8].flip(0) ^ 0xA5
        nibbles = torch.stack([metadata & 15, metadata >> 4], -1).view(rows, columns // 4)
        return values.view(buffer.dtype).double(), _columns(nibbles)

    def sparse_mm(
        self, compressed: Tensor, dense: Tensor, bias: Tensor | None = None, alpha: Tensor | None = None, **named: Any
    ) -> Tensor:
        self.calls.append(("sparse_mm", {"compressed": compressed, "dense": dense, "bias": bias} | named))
        unknown = set(named) - self.arguments
        if unknown:
            raise TypeError(f"unexpected arguments {unknown}")
        self._fault(dense)
        return self._sparse_mm(compressed, dense, bias, **named)

    def _sparse_mm(
        self,
        compressed: Tensor,
        dense: Tensor,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        transpose_result: bool = False,
        alg_id: int = 0,
        **split: Any,
    ) -> Tensor:
        columns, tokens = dense.shape
        if self.refused(alg_id, tokens):
            raise RuntimeError("CUDA error: operation not supported when calling cusparseLtMatmulPlanInit")
        assert compressed.ndim == 2
        assert compressed.data_ptr() % 16 == 0
        assert compressed.dtype == dense.dtype
        _assert_activations(dense)
        assert columns % (32 if dense.itemsize == 1 else 16) == 0, "columns"
        if bias is not None:
            assert bias.dtype == dense.dtype
            assert bias.shape == (compressed.shape[0],)
            assert bias.is_contiguous()
            assert dense.itemsize == 2, "bias of 8 bits"
        y = _product(*self.decompressed(compressed, columns), dense)
        if alg_id in self.wrong:
            y[1] += 1
        y = y if bias is None else y + bias.double()[:, None]
        y = y.to(out_dtype or dense.dtype)
        return y.t().contiguous() if transpose_result else y

    def search(
        self,
        compressed: Tensor,
        dense: Tensor,
        bias: Tensor | None,
        alpha: Tensor | None,
        out_dtype: torch.dtype | None,
        transpose_result: bool,
    ) -> tuple[Any, ...]:
        self.calls.append(("search", {"tokens": dense.shape[1], "out_dtype": out_dtype}))
        assert alpha is None
        assert transpose_result
        _assert_activations(dense)
        self._fault(dense)
        self.searching += 1
        assert self.searching == 1, "two searches at once"
        self.during_search()
        self.searching -= 1
        return self.found

    def search_id(self, *arguments: Any) -> int:
        self.calls.append(("search_id", {}))
        self._fault(arguments[1])
        return int(self.found[0])

    def _live(self) -> None:
        if self.dead:
            raise RuntimeError("CUDA error: an illegal instruction was encountered")

    def _fault(self, dense: Tensor) -> None:
        """What float16 does on compute capability 9.x with 0.8.0."""
        self.dead |= (self.cusparselt, self.capability[0], dense.dtype) == (800, 9, torch.float16)
        self._live()

    def cutlass_mm(
        self, values: Tensor, words: Tensor, dense: Tensor, *, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        self.calls.append(("cutlass_mm", {"dense": dense, "out_dtype": out_dtype}))
        return self._cutlass(values, words, dense).to(out_dtype or dense.dtype)

    def cutlass_addmm(self, bias: Tensor, values: Tensor, words: Tensor, dense: Tensor) -> Tensor:
        self.calls.append(("cutlass_addmm", {"dense": dense, "bias": bias}))
        assert bias.shape == values.shape[:1]
        assert bias.dtype == dense.dtype
        return (self._cutlass(values, words, dense) + bias.double()[:, None]).to(dense.dtype)

    def _cutlass(self, values: Tensor, words: Tensor, dense: Tensor) -> Tensor:
        rows, columns = values.shape[0], dense.shape[0]
        assert self.capability[0] == 8, "Supported only on GPUs with compute capability 8.x"
        _assert_activations(dense)
        assert words.dtype == (torch.int32 if dense.itemsize == 1 else torch.int16)
        row_multiple, column_multiple = (16, 128) if dense.itemsize == 1 else (32, 64)
        assert rows % row_multiple == 0 == columns % column_multiple, "shape"
        assert values.shape[1] * 2 == columns
        places = _calculate_meta_reordering_scatter_offsets(rows, words.shape[1], words.dtype, words.device)
        plain = words.contiguous().view(-1).gather(0, places).view(torch.uint8)
        nibbles = torch.stack([plain & 15, plain >> 4], -1).view(rows, columns // 4)
        return _product(values.double(), _columns(nibbles), dense)


def _assert_activations(dense: Tensor) -> None:
    """As they are read: by address, as the transpose of a contiguous matrix."""
    assert dense.ndim == 2
    assert not dense.is_contiguous()
    assert dense.t().is_contiguous()
    assert dense.data_ptr() % 16 == 0
    assert dense.shape[1] % (16 if dense.itemsize == 1 else 8) == 0, "tokens"


def _columns(nibbles: Tensor) -> Tensor:
    first, second = nibbles.long() & 3, nibbles.long() >> 2
    assert bool((first < second).all()), "metadata out of order"
    start = 4 * torch.arange(nibbles.shape[1])
    return torch.stack([first + start, second + start], -1).flatten(1)


def _product(values: Tensor, columns: Tensor, dense: Tensor) -> Tensor:
    """[rows, tokens] in float64; what is not kept is not read."""
    x = dense.double()
    return torch.stack([(row[:, None] * x[at]).sum(0) for row, at in zip(values, columns, strict=True)])


class Barrier:
    """Lets the threads that search wait for each other, and fails where a second one gets in."""

    def __init__(self) -> None:
        self.inside = threading.Event()
        self.leave = threading.Event()

    def __call__(self) -> None:
        self.inside.set()
        assert self.leave.wait(30)
