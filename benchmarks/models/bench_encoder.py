"""The encoder of all-MiniLM-L6-v2 at 32 x 128 tokens: sparse, and sparse with fused activations, against four dense rivals.

    python benchmarks/models/bench_encoder.py --json benchmarks/results/<machine>/encoder.json

Dense: as torch runs it (eager), torch.compile with frozen weights, oneDNN with prepacked weights, and the same with
activations fused by twofour. All models have the same pruned weights and take turns in one process; the outputs of the
sparse ones are compared with the eager one's in the same run.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.kernels.bench_linear import commit

import twofour
from twofour import SparseLinear
from twofour.demo.model import fresh
from twofour.nn.swap import replace_module
from twofour.report.environment import environment

LAYERS = ["*encoder.layer.*"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DENSE = ("eager", "compile", "oneDNN", "oneDNN, fused")


def models(dtype: torch.dtype, compiled: bool) -> dict[str, Any]:
    """The rivals by name, on the same pruned weights."""
    eager = fresh(dtype)[0].auto_model
    twofour.prune(eager, include=LAYERS)
    sparse = copy.deepcopy(eager)
    twofour.compress(sparse, force=True, include=LAYERS, progress=False)
    packed = copy.deepcopy(sparse)
    for module in list(packed.modules()):
        if isinstance(module, SparseLinear):
            replace_module(packed, module, SparseLinear(module.matrix, module.bias, backend="onednn"))
    found: dict[str, nn.Module] = {"eager": eager}
    if compiled:
        torch._inductor.config.freezing = True
        found["compile"] = torch.compile(copy.deepcopy(eager))
    found |= {"oneDNN": packed, "oneDNN, fused": copy.deepcopy(packed)}
    found |= {"sparse": sparse, "sparse, fused": copy.deepcopy(sparse)}
    for name in ("oneDNN, fused", "sparse, fused"):
        twofour.fuse(found[name])
    return found


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    threads: Annotated[int, typer.Option(help="Threads.")] = 1,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 20,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32 or bf16; default both.")] = None,
    smallest: Annotated[
        bool, typer.Option("--smallest", help="Without torch.compile, few tokens, two rounds.")
    ] = False,
) -> None:
    """Times the encoder in float32 and bfloat16."""
    torch.set_num_threads(threads)
    batch, length, rounds = (2, 16, 2) if smallest else (32, 128, rounds)
    ids = torch.randint(1000, 20000, (batch, length), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rows = []
    for dtype_name in dtype or DTYPES:
        torch_dtype = DTYPES[dtype_name]
        rivals = models(torch_dtype, compiled=not smallest)
        with torch.no_grad():
            outputs = {name: model(**inputs).last_hidden_state.float() for name, model in rivals.items()}
            scale = float(outputs["eager"].abs().max())
            for name, output in outputs.items():
                apart = float((output - outputs["eager"]).abs().max()) / scale
                if not apart < (1e-4 if torch_dtype == torch.float32 else 0.1):
                    raise SystemExit(f"{name} in {dtype_name} is {apart:.1e} of the largest output away from eager")
            times: dict[str, list[float]] = {name: [] for name in rivals}
            for turn in range(rounds + 1):
                for name, model in rivals.items():
                    start = time.perf_counter()
                    model(**inputs)
                    if turn:
                        times[name].append(1e3 * (time.perf_counter() - start))
        ms = {name: statistics.median(found) for name, found in times.items()}
        best = min((name for name in DENSE if name in ms), key=ms.__getitem__)
        torchs = min(ms[name] for name in ("eager", "compile") if name in ms)
        row = {"dtype": dtype_name, "batch": batch, "length": length, "threads": threads, "rounds": rounds, "ms": ms}
        row |= {
            "best_dense": best,
            "x_best_dense": ms[best] / ms["sparse, fused"],
            "x_torch": torchs / ms["sparse, fused"],
        }
        rows.append(row)
        print(dtype_name, " ".join(f"{name} {value:.0f} ms" for name, value in ms.items()))
        print(f"  fused sparse: {row['x_torch']:.2f} x torch's better, {row['x_best_dense']:.2f} x the best ({best})")
    if json_path is not None:
        record = {**environment(), "commit": commit(), "command": " ".join(["python", *sys.argv]), "rows": rows}
        json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
