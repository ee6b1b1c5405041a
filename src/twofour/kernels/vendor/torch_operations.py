"""What this torch has of NVIDIA's kernels: the one place that names its private operations, and that tests replace."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.backends import cusparselt


@dataclass(frozen=True, slots=True)
class Operations:
    """Operations and facts of one torch.

    Args:
        cusparselt: version that torch was built with, 100·minor + patch of 0.minor.patch; None without.
        cutlass: None where torch has CUTLASS's kernels, else why not.
        compress: dense [rows, columns] -> compressed buffer.
        sparse_mm: (compressed, dense, bias=, out_dtype=, transpose_result=, alg_id=, ...) -> product.
        sparse_mm_arguments: the names `sparse_mm` takes: split_k and its mode came after alg_id, and were renamed.
        search: (compressed, dense, bias, alpha, out_dtype, transpose_result) -> (alg_id, split_k, split_k mode, most);
            None in torch that has none.
        search_id: the same arguments -> alg_id; what was there before.
        cutlass_mm: (values, words, dense, out_dtype=) -> product.
        cutlass_addmm: (bias, values, words, dense) -> product + bias.
        capability: of a device.
        capturing: is the current stream being captured into a CUDA graph?
    """

    cusparselt: int | None
    cutlass: str | None
    compress: Callable[[Tensor], Tensor]
    sparse_mm: Callable[..., Tensor]
    sparse_mm_arguments: frozenset[str]
    search: Callable[..., tuple[Any, ...]] | None
    search_id: Callable[..., int] | None
    cutlass_mm: Callable[..., Tensor]
    cutlass_addmm: Callable[..., Tensor]
    capability: Callable[[torch.device], tuple[int, int]]
    capturing: Callable[[], bool]


@cache
def installed() -> Operations:
    """Those of the torch that runs."""
    aten = torch.ops.aten
    sparse_mm = aten._cslt_sparse_mm.default
    bindings = getattr(torch._C, "_cusparselt", None)
    search_id = getattr(aten, "_cslt_sparse_mm_search", None)
    return Operations(
        cusparselt=None if torch.version.hip else cusparselt.version(),
        cutlass=_cutlass(),
        compress=aten._cslt_compress.default,
        sparse_mm=sparse_mm,
        sparse_mm_arguments=frozenset(argument.name for argument in sparse_mm._schema.arguments),
        search=_on_device(getattr(bindings, "mm_search", None)),
        search_id=None if search_id is None else search_id.default,
        cutlass_mm=aten._sparse_semi_structured_mm.default,
        cutlass_addmm=aten._sparse_semi_structured_addmm.default,
        capability=torch.cuda.get_device_capability,
        capturing=torch.cuda.is_current_stream_capturing,
    )


def _cutlass() -> str | None:
    if torch.version.hip:
        return "torch is built for ROCm"
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    return "torch has none on Windows" if sys.platform == "win32" else None


def _on_device(search: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """`search` on the device of its operands: it is a binding, not an operation, so torch does not switch for it."""
    if search is None:
        return None

    def run(compressed: Tensor, *rest: Any) -> Any:
        with torch.cuda.device(compressed.device) if compressed.is_cuda else nullcontext():
            return search(compressed, *rest)

    return run
