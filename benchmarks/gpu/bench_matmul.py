"""Many tokens on a GPU: cuBLAS, cuSPARSELt, and every kernel of the table of ours that applies.

    python benchmarks/gpu/bench_matmul.py --json build/gpu/matmul.json

Inputs and weights are N(0, 1), weights pruned to 2:4 by magnitude for all. Where the table has no kernel that skips zeros
on GPUs, the one for few tokens stands in for it up to 256 tokens. Every result is compared with float64 in the same run.
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

from benchmarks.gpu import bench_decode, cases, record, timing

from twofour import SparseMatrix, kernels
from twofour.kernels import KERNELS, LinearSpec

SHAPES = ((8192, 8192), (4096, 4096))
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
FEW = 256
MOST_COPIES = 8


def backends(matrix: SparseMatrix) -> list[str]:
    """Rows of the table that hold this matrix compressed, the plain one aside; where it is all there is, that one on a CPU."""
    spec = LinearSpec.of(matrix)
    found = [name for name, row in KERNELS.items() if not row.dense and row.why_not(spec) is None]
    return [name for name in found if name != "reference"] or (found if matrix.device.type == "cpu" else [])


class Layer:
    """A weight in each form that a rival takes."""

    def __init__(self, shape: tuple[int, int], dtype: str, device: torch.device) -> None:
        self.shape, self.name, self.device = shape, dtype, device
        self.weight = cases.pruned(cases.normal(shape, cases.DTYPES[dtype], device))
        copies = min(timing.copies_for(self.weight.nbytes // 2, device), MOST_COPIES)
        self.dense = [self.weight, *(self.weight.clone() for _ in range(copies - 1))]
        self.matrices = [SparseMatrix.from_dense(self.weight) for _ in range(copies)]
        self.packed = [cases.compress(self.weight) for _ in range(copies)]
        self.missing: dict[str, str] = {}
        found = cases.tried("cuSPARSELt", lambda: [partial(cases.cslt_compressed, self.weight)] * copies, self.missing)
        self.compressed = [call() for call in found.get("cuSPARSELt", [])]

    def row(self, tokens: int, rounds: int) -> record.Row:
        """All rivals in turns."""
        x = cases.normal((tokens, self.shape[1]), self.weight.dtype, self.device, tokens)
        missing = dict(self.missing)
        found = self._ours(x, missing)
        found |= cases.tried("cuBLAS", lambda: [partial(F.linear, x, w) for w in self.dense], missing)
        found |= bench_decode.cslt(x, self.compressed, self.shape[0], missing)
        errors, right = bench_decode.checked(found, x, self.weight)
        row = cases.measured(
            found,
            self.device,
            rounds=rounds,
            calls=len(self.dense) if tokens <= FEW else 4,
            bench="matmul",
            what="linear",
            out_features=self.shape[0],
            in_features=self.shape[1],
            dtype=self.name,
            tokens=tokens,
            missing=missing,
            errors=errors,
            right=right,
        )
        products = 2 * self.shape[0] * self.shape[1] * tokens
        row["tflops_dense_equivalent"] = {name: products / us / 1e6 for name, us in row["us"].items()}
        return row

    def _ours(self, x: Tensor, missing: dict[str, str]) -> dict[str, Sequence[timing.Call]]:
        """The first that applies as "twofour", others as "twofour BACKEND"."""
        found: dict[str, Sequence[timing.Call]] = {}
        for backend in backends(self.matrices[0]):
            name = "twofour" if "twofour" not in found else f"twofour {backend}"
            run = partial(kernels.linear, x, backend=backend)
            found |= cases.tried(name, lambda run=run: [partial(run, each) for each in self.matrices], missing)
        if not found and len(x) <= FEW:
            found = cases.tried(
                "twofour", lambda: [partial(cases.few_tokens, x, each) for each in self.packed], missing
            )
        elif not found:
            missing.setdefault("twofour", "no kernel for many tokens")
        return found


def main(
    device: cases.Device = "cuda", json_path: cases.Json = None, rounds: int = 20, smallest: cases.Smallest = False
) -> None:
    """Measures many tokens."""
    chosen = cases.chosen_device(device)
    shapes: Sequence[tuple[int, int]] = SHAPES
    tokens: Sequence[int] = TOKENS
    if smallest:
        shapes, tokens, rounds = [(64, 128)], (64,), 2
    todo: list[tuple[str, Callable[[], record.Row]]] = []
    for shape in shapes:
        layer = cache(partial(Layer, shape, "bf16", chosen))  # made with its first row
        for count in tokens:
            todo.append((f"linear {shape} {count}", lambda layer=layer, count=count: layer().row(count, rounds)))
    cases.measure_all("matmul", json_path, todo)


if __name__ == "__main__":
    with torch.inference_mode():
        typer.run(main)
