"""Few tokens on a GPU: our kernel against cuBLAS and cuSPARSELt, with weights that come from memory.

    python benchmarks/gpu/bench_decode.py --json build/gpu/decode.json

Inputs and weights are N(0, 1), weights pruned to 2:4 by magnitude for all. cuSPARSELt is called plainly, and after it has
measured its algorithms ("searched"). "fp8" are bfloat16 inputs and e4m3 weights with a scale for each row; cuBLAS has the
same weights as bfloat16, and torch._scaled_mm as e4m3, with inputs that are e4m3 before the clock starts. "twofour, early"
are calls that begin while the kernel before them ends, which here is another of them. Every result is compared with float64
in the same run.

"layer" is a SparseLinear as a model calls it, beside an nn.Linear: there `host_us` tells whether Python or the GPU is what a
model waits for that no graph captured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import cases, record, timing

from twofour import SparseLinear, SparseMatrix
from twofour.kernels.cuda import packing

SHAPES = ((8192, 8192), (28672, 8192))
TOKENS = (1, 2, 4, 8, 16, 32, 64)
FEWER = (1, 16, 64)
LAYERS = ((1024, 1024), (4096, 4096))
MOST_COPIES = 8
SCALED = "torch._scaled_mm"
STARTED_EARLY = ("bf16", "fp8")


class Layer:
    """A weight in each form that a rival takes: copies that exceed the caches, made once for all numbers of tokens."""

    def __init__(self, shape: tuple[int, int], dtype: str, device: torch.device) -> None:
        self.shape, self.name, self.dtype, self.device = shape, dtype, cases.DTYPES[dtype], device
        self.weight = cases.pruned(cases.normal(shape, self.dtype, device))
        dense = min(timing.copies_for(self.weight.nbytes, device), MOST_COPIES)
        packed = min(timing.copies_for(self.weight.nbytes * 9 // 16, device), 2 * MOST_COPIES)
        self.dense = [self.weight, *(self.weight.clone() for _ in range(dense - 1))]
        self.packed = [cases.compress(self.weight) for _ in range(packed)]
        self.missing: dict[str, str] = {}
        found = cases.tried("cuSPARSELt", lambda: [partial(cases.cslt_compressed, self.weight)] * packed, self.missing)
        self.compressed = [call() for call in found.get("cuSPARSELt", [])]

    def row(self, tokens: int, rounds: int) -> record.Row:
        """All rivals in turns."""
        x = cases.normal((tokens, self.shape[1]), self.dtype, self.device, tokens)
        missing = dict(self.missing)
        kernels = cases.tried("twofour", lambda: self.ours(x), missing)
        if self.name in STARTED_EARLY:
            kernels |= cases.tried("twofour, early", lambda: self.early(x), missing)
        kernels |= self.rivals(x, missing)
        errors, right = checked(kernels, x, self.weight)
        of_item = self.packed[0].values.itemsize
        nbytes = self.shape[0] * self.shape[1] * of_item // 2 + self.shape[0] * self.shape[1] // 8
        return cases.measured(
            kernels,
            self.device,
            rounds=rounds,
            calls=max(8, len(self.packed)),
            nbytes=nbytes,
            bench="decode",
            what="few tokens",
            out_features=self.shape[0],
            in_features=self.shape[1],
            dtype=self.name,
            tokens=tokens,
            missing=missing,
            errors=errors,
            right=right,
        )

    def ours(self, x: Tensor) -> list[timing.Call]:
        """A call for each copy."""
        return [partial(cases.few_tokens, x, each) for each in self.packed]

    def early(self, x: Tensor) -> list[timing.Call]:
        """Likewise, each beginning while the one before it ends."""
        return [cases.few_tokens_early(x, each) for each in self.packed]

    def rivals(self, x: Tensor, missing: dict[str, str]) -> dict[str, Sequence[timing.Call]]:
        """Theirs, of those that can run; `missing` is told of the others."""
        kernels: dict[str, Sequence[timing.Call]] = {}
        if self.dtype == torch.int8:
            missing["cuBLAS"] = "torch._int_mm takes 17 tokens at least"
            if len(x) > 16:
                del missing["cuBLAS"]
                kernels |= cases.tried(
                    "cuBLAS", lambda: [partial(torch._int_mm, x, w.t()) for w in self.dense], missing
                )
        else:
            kernels |= cases.tried("cuBLAS", lambda: [partial(F.linear, x, w) for w in self.dense], missing)
        return kernels | cslt(x, self.compressed, self.shape[0], missing)


class ScaledLayer(Layer):
    """A weight as e4m3 with a scale for each row; inputs are bfloat16."""

    def __init__(self, shape: tuple[int, int], dtype: str, device: torch.device) -> None:
        self.shape, self.name, self.dtype, self.device = shape, dtype, torch.bfloat16, device
        (packed, self.row_scale) = cases.quantize(cases.normal(shape, torch.bfloat16, device))
        q = cases.expand(packed)
        self.weight = q.double() * self.row_scale.double()[:, None]
        copies = min(timing.copies_for(packed.values.nbytes * 5 // 4, device), 2 * MOST_COPIES)
        self.packed = [
            packing.PackedMatrix(packed.values.clone(), packed.metadata.clone(), shape) for _ in range(copies)
        ]
        dense = min(timing.copies_for(2 * q.nbytes, device), MOST_COPIES)
        self.dense = [self.weight.to(torch.bfloat16) for _ in range(dense)]
        self.narrow = [q.clone() for _ in range(min(timing.copies_for(q.nbytes, device), MOST_COPIES))]
        self.compressed = []
        self.missing = {"cuSPARSELt": "it multiplies e4m3 by e4m3 alone"}

    def ours(self, x: Tensor) -> list[timing.Call]:
        return [partial(cases.few_tokens, x, each, self.row_scale) for each in self.packed]

    def early(self, x: Tensor) -> list[timing.Call]:
        return [cases.few_tokens_early(x, each, self.row_scale) for each in self.packed]

    def rivals(self, x: Tensor, missing: dict[str, str]) -> dict[str, Sequence[timing.Call]]:
        found = super().rivals(x, missing)
        return found | cases.tried(
            SCALED, lambda: [cases.scaled_linear(x, each, self.row_scale) for each in self.narrow], missing
        )


def layer_row(shape: tuple[int, int], tokens: int, device: torch.device, rounds: int) -> record.Row:
    """Layers of a bfloat16 weight that stays in the cache."""
    weight = cases.pruned(cases.normal(shape, torch.bfloat16, device))
    x = cases.normal((tokens, shape[1]), torch.bfloat16, device, tokens)
    dense = torch.nn.Linear(shape[1], shape[0], bias=False, device="meta")
    dense.weight = torch.nn.Parameter(weight, requires_grad=False)
    backend = "cuda" if weight.is_cuda else None
    sparse = SparseLinear(SparseMatrix.from_dense(weight), backend=backend)
    kernels: dict[str, Sequence[timing.Call]] = {"twofour": [partial(sparse, x)], "nn.Linear": [partial(dense, x)]}
    errors, right = checked(kernels, x, weight)
    return cases.measured(
        kernels,
        device,
        rounds=rounds,
        calls=32,
        bench="decode",
        what="layer",
        out_features=shape[0],
        in_features=shape[1],
        dtype="bf16",
        tokens=tokens,
        missing={},
        errors=errors,
        right=right,
    )


def cslt(
    x: Tensor, compressed: Sequence[Tensor], features: int, missing: dict[str, str]
) -> dict[str, Sequence[timing.Call]]:
    """cuSPARSELt with and without a search, one search for all copies."""
    if not compressed:
        return {}

    def made(search: bool) -> list[timing.Call]:
        found = cases.cslt_searched(x, compressed[0]) if search else {}
        return [cases.cslt_linear(x, each, features, found) for each in compressed]

    plain = cases.tried("cuSPARSELt", partial(made, False), missing)
    return plain | cases.tried("cuSPARSELt, searched", partial(made, True), missing)


def checked(
    kernels: dict[str, Sequence[timing.Call]], x: Tensor, weight: Tensor
) -> tuple[dict[str, dict[str, float]], dict[str, bool]]:
    """Errors of each, and whether ours is within its bound, others near enough to be the same product."""
    errors, right = {}, {}
    exact = cases.Exact(x, weight)
    for name, calls in kernels.items():
        y = calls[-1]()
        assert isinstance(y, Tensor)
        y = y.to(torch.bfloat16) if not y.dtype.is_floating_point else y
        errors[name] = exact.error(y)
        ours = name.startswith("twofour")
        near = 0.05 if name == SCALED else 0.02  # whose inputs are e4m3 too
        right[name] = errors[name]["of_bound"] <= 1 if ours else errors[name]["relative"] < near
    return errors, right


def main(
    device: cases.Device = "cuda", json_path: cases.Json = None, rounds: int = 25, smallest: cases.Smallest = False
) -> None:
    """Measures few tokens."""
    chosen = cases.chosen_device(device)
    shapes: Sequence[tuple[int, int]] = SHAPES
    tokens: Sequence[int] = TOKENS
    fewer: Sequence[int] = FEWER
    if smallest:
        shapes, tokens, fewer, rounds = [(64, 128)], (1, 8), (17,), 2
    todo: list[tuple[str, Callable[[], record.Row]]] = []
    # Should a rival take the GPU from the process, then after the rows that bars are about.
    for dtype, counts in (("bf16", tokens), ("fp8", tokens), ("fp16", fewer), ("int8", fewer)):
        for shape in shapes:
            kind = ScaledLayer if dtype == "fp8" else Layer
            layer = cache(partial(kind, shape, dtype, chosen))  # made with its first row
            for count in counts:
                name = f"few tokens {shape} {dtype} {count}"
                todo.append((name, lambda layer=layer, count=count: layer().row(count, rounds)))
    for shape in shapes if smallest else LAYERS:
        todo.append((f"layer {shape}", lambda shape=shape: layer_row(shape, 1, chosen, rounds)))
    cases.measure_all("decode", json_path, todo)


if __name__ == "__main__":
    with torch.inference_mode():
        typer.run(main)
