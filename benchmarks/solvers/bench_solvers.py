"""One-shot solvers on one layer that has its Hessian: seconds, GFLOP/s, output error, beside the paper's loop.

    python benchmarks/solvers/bench_solvers.py --json benchmarks/results/<machine>/solvers.json

`paper` is SparseGPT's algorithm 1 written down as it stands (Frantar & Alistarh 2023): float32, blocks of 128 columns, the
inverse by two Cholesky factors, one outer product per column. Inputs are correlated and of different sizes, as a layer's
are. GFLOP/s count the products of the algorithm: out * in² for SparseGPT (two flops for each of out * in² / 2 updates), the
factor of the inverse apart.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.kernels.bench_linear import commit

from twofour.report.environment import environment
from twofour.solvers import Hessian, Recipe, solve
from twofour.solvers.hessian import DAMPING, output_error


def layer(out_features: int, in_features: int, tokens: int) -> tuple[Tensor, Hessian]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
    mix = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    sizes = torch.rand(in_features, generator=generator).mul(3).exp()
    hessian = Hessian(in_features)
    for _ in range(0, tokens, 1024):
        x = torch.randn(1024, in_features, generator=generator)
        hessian.add((x @ mix + 0.5 * x) * sizes)
    return weight, hessian


def paper(weight: Tensor, hessian: Hessian) -> Tensor:
    """SparseGPT, 2:4, as published."""
    w = weight.clone()
    h = (hessian.second / hessian.tokens).float()
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    columns = w.shape[1]
    for i1 in range(0, columns, 128):
        i2 = min(i1 + 128, columns)
        block, own = w[:, i1:i2].clone(), inverse[i1:i2, i1:i2]
        result, errors = torch.zeros_like(block), torch.zeros_like(block)
        dropped = torch.zeros_like(block, dtype=torch.bool)
        for i in range(i2 - i1):
            if i % 4 == 0:
                scores = block[:, i : i + 4] ** 2 / own.diagonal()[i : i + 4].reshape(1, -1) ** 2
                dropped.scatter_(1, i + torch.topk(scores, 2, dim=1, largest=False)[1], True)
            column = block[:, i]
            kept = column.clone()
            kept[dropped[:, i]] = 0
            result[:, i] = kept
            error = (column - kept) / own[i, i]
            block[:, i:] -= error.unsqueeze(1) @ own[i, i:].unsqueeze(0)
            errors[:, i] = error
        w[:, i1:i2] = result
        w[:, i2:] -= errors @ inverse[i1:i2, i2:]
    return w


def main(
    size: Annotated[list[int] | None, typer.Option(help="Features of square layers; may be repeated.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
    smallest: Annotated[bool, typer.Option("--smallest", help="One tiny layer, to see that it runs.")] = False,
) -> None:
    """Times SparseGPT, ADMM and the paper's loop."""
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    for features in [128] if smallest else size or [1024, 4096]:
        weight, hessian = layer(features, features, 2 * features)
        plain = hessian.second / hessian.tokens
        whole = output_error(weight, plain)

        def note(name: str, seconds: float, new: Tensor, features: int = features, weight: Tensor = weight,
                 plain: Tensor = plain, whole: float = whole) -> None:  # fmt: skip
            error = output_error(new - weight, plain) / whole
            rows.append(
                {
                    "solver": name,
                    "features": features,
                    "threads": threads,
                    "seconds": round(seconds, 3),
                    "gflops": round(features**3 / seconds / 1e9, 1) if "admm" not in name else None,
                    "error": error,
                }
            )
            print(f"{features:5} {name:10} {seconds:8.2f} s  error {100 * error:.3f} %", flush=True)

        for name, recipe in (("sparsegpt", Recipe("sparsegpt")), ("paper", None), ("admm", Recipe("admm"))):
            began = time.perf_counter()
            new = paper(weight, hessian) if recipe is None else solve(weight, hessian, "2:4", recipe).weight
            note(name, time.perf_counter() - began, new)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        record = {"rows": rows, "environment": environment(), "commit": commit(), "command": " ".join(sys.argv)}
        json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
