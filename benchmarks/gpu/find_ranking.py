"""How torch's 4x4 pruning on GPUs ranks weights: by size, or by signed value?

    python benchmarks/gpu/find_ranking.py --json build/gpu/ranking.json

Of N(0, 1) a ranking by magnitude keeps as many negative weights as positive ones; one by value keeps few. Found with torch
2.11 on an H200, in cuSPARSELt's layout and in CUTLASS's: the default and "largest_values_greedy" rank by signed value (25.7 %
negative, 54.0 % of the sum of |w|), "largest_abs_values_greedy" by magnitude (50.1 %, 69.2 %); the best mask keeps 70.3 %.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import cases, record

from twofour.masks import nm_mask

ALGORITHMS = ("", "largest_values_greedy", "largest_abs_values_greedy")
FEW_NEGATIVE = 0.3


def finding(weight: torch.Tensor, algorithm: str, cutlass: bool) -> dict[str, Any]:
    """Shares of negative numbers, and of |w|, among those kept."""
    rows, columns = weight.shape
    packed = torch._sparse_semi_structured_tile(weight, algorithm=algorithm, use_cutlass=cutlass)[0]
    kept = packed.flatten()[: rows * columns // 2].double()  # cuSPARSELt's metadata lie behind the values
    negative = float((kept < 0).sum() / (kept != 0).sum())
    share = float(kept.abs().sum() / weight.double().abs().sum())
    return {"negative": negative, "kept": share, "ranks": "signed values" if negative < FEW_NEGATIVE else "magnitudes"}


def main(device: cases.Device = "cuda", json_path: cases.Json = None, smallest: cases.Smallest = False) -> None:
    """Looks at what is kept of random weights."""
    chosen = cases.chosen_device(device)
    part = record.Part(json_path)
    weight = cases.normal((128, 128) if smallest else (1024, 1024), torch.bfloat16, chosen)
    best = weight.float().abs()
    found: dict[str, Any] = {"best mask": {"kept": float(best[nm_mask(best, "2:4t")].sum() / best.sum())}}
    for cutlass in (False, True):
        for algorithm in ALGORITHMS:
            name = f"{algorithm or 'default'}, {'CUTLASS' if cutlass else 'cuSPARSELt'}"
            try:
                found[name] = finding(weight, algorithm, cutlass)
            except (RuntimeError, NotImplementedError) as error:
                found[name] = {"missing": str(error).strip().splitlines()[0][:200]}
            print(f"{name:40} {found[name]}", flush=True)
            part.tell(torch_ranking=found)


if __name__ == "__main__":
    with torch.inference_mode():
        typer.run(main)
