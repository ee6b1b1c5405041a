"""The search for channel permutations against the published one, on uniform scores.

    python benchmarks/masks/bench_permute.py --json benchmarks/results/<machine>/permute.json

The rival is stripe_groups.py beside this file: exhaustive rearrangement of all tuples of stripes, in torch, on the same
threads. Efficacy is counted by the same function for both; seconds are the least of `repeats` runs of ours, on the same
matrices in the same process. "then" is what the rival still gains when it starts from our order.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.kernels.bench_linear import commit
from benchmarks.masks import stripe_groups

from twofour import kernels
from twofour.masks import efficacy, kept_score, search_permutation
from twofour.report.environment import environment


@dataclass(frozen=True)
class Row:
    """One shape, one method: means over the matrices."""

    out_features: int
    in_features: int
    matrices: int
    threads: int
    method: str
    efficacy: float
    least_efficacy: float
    kept_share: float
    seconds: float

    def line(self) -> str:
        return (
            f"{self.out_features:5}x{self.in_features:<5} {self.matrices:3} matrices {self.threads} thr {self.method:28}"
            f" efficacy {self.efficacy:6.2f} (least {self.least_efficacy:6.2f})  kept {100 * self.kept_share:7.3f} %"
            f" {self.seconds:8.3f} s"
        )


def measure(
    name: str, search: Callable[[Tensor], Tensor], matrices: list[Tensor], threads: int, repeats: int
) -> tuple[Row, list[Tensor]]:
    """Runs one method on all matrices."""
    torch.set_num_threads(threads)
    found, seconds = [], []
    for scores in matrices:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            permutation = search(scores)
            times.append(time.perf_counter() - start)
        found.append(permutation)
        seconds.append(min(times))
    figures = [efficacy(scores, permutation) for scores, permutation in zip(matrices, found, strict=True)]
    kept = [
        kept_score(scores[:, permutation]) / float(scores.double().sum())
        for scores, permutation in zip(matrices, found, strict=True)
    ]
    rows, columns = matrices[0].shape
    row = Row(
        out_features=rows,
        in_features=columns,
        matrices=len(matrices),
        threads=threads,
        method=name,
        efficacy=statistics.mean(figures),
        least_efficacy=min(figures),
        kept_share=statistics.mean(kept),
        seconds=statistics.mean(seconds),
    )
    return row, found


def uniform(rows: int, columns: int, count: int) -> list[Tensor]:
    return [torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def main(
    threads: Annotated[int, typer.Option(help="Threads of both.")] = 1,
    repeats: Annotated[int, typer.Option(help="Runs of ours, of which the fastest counts.")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    smallest: Annotated[bool, typer.Option("--smallest", help="A tiny case, in seconds.")] = False,
) -> None:
    """Measures the search for channel permutations against stripe groups."""
    rows: list[Row] = []
    measured = commit()  # before minutes in which files may change

    def run(name: str, search: Callable[[Tensor], Tensor], matrices: list[Tensor], times: int = 1) -> list[Tensor]:
        row, found = measure(name, search, matrices, threads, times)
        print(row.line(), flush=True)
        rows.append(row)
        return found

    cases = [(16, 32, 2, (8,))] if smallest else [(128, 64, 20, (8, 12)), (512, 512, 2, (8,))]
    for out_features, in_features, count, windows in cases:
        matrices = uniform(out_features, in_features, count)
        for sweeps in (200, 2000, 8000):
            found = run(
                f"twofour, {sweeps} sweeps", lambda w, n=sweeps: search_permutation(w, sweeps=n), matrices, repeats
            )
        for window in windows:
            run(f"stripe groups of {window}", lambda w, n=window: stripe_groups.search(w, n), matrices)
        ordered = [scores[:, order] for scores, order in zip(matrices, found, strict=True)]
        polished = [
            order[stripe_groups.search(scores, windows[0])] for order, scores in zip(found, ordered, strict=True)
        ]
        again = iter(polished)
        run(f"twofour, then groups of {windows[0]}", lambda _w, orders=again: next(orders), matrices)
    if json_path is not None:
        record = {
            **environment(),
            "isa": kernels.cpu.isa(),
            "commit": measured,
            "command": " ".join(["python", "benchmarks/masks/bench_permute.py", *sys.argv[1:]]),
            "rows": [asdict(row) for row in rows],
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
