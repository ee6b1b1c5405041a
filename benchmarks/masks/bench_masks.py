"""Choosing masks on the CPU, against a copy of the matrix and against plain torch.

    python benchmarks/masks/bench_masks.py --json benchmarks/results/<machine>/masks.json

`copy` is `y.copy_(x)` into memory that is there: what reading and writing the matrix takes. `torch` is twofour without its
C++, `90 masks` the other way to choose 2:4t in torch: every mask of a block as a dot product, then the largest. All run in
turn in the same loop; a time is the median, a ratio the median of the paired ratios, `best_ms` the least of the times: on a
machine with other work it is nearer to what a quiet one shows. Masks are compared bit for bit in the
same run (`90 masks` by what they keep). Of transposable masks other than 2:4t each row also says which share of the sum of
|w| the best mask keeps, and how far below it (as a share of it) entropic_mask, timed once, and its rounding alone are.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.kernels.bench_linear import commit
from benchmarks.turns import in_turns, ratios_to

from twofour import Pattern, native
from twofour.masks import keep_best, nm_mask
from twofour.masks.entropic import entropic_mask
from twofour.masks.select import best_of_groups
from twofour.masks.transposable import best_of_90
from twofour.report.environment import environment

GROUPS = ("2:4", "1:4", "4:8", "8:16", "16:32", "2:4x2", "2:4x4")
SOLVED = ("1:4t", "4:8t", "8:16t", "16:32t")


@dataclass(frozen=True)
class Row:
    """One choice: medians in milliseconds, and how many times as long as twofour the others took."""

    what: str
    rows: int
    columns: int
    threads: int
    repeats: int
    twofour_ms: float
    others_ms: dict[str, float]
    x_others: dict[str, float]
    best_ms: dict[str, float]
    kept: float | None = None
    gaps: dict[str, float] = field(default_factory=dict)
    entropic_ms: dict[str, float] = field(default_factory=dict)

    def line(self) -> str:
        others = "  ".join(
            f"{name} {self.others_ms[name]:8.1f} ms {self.x_others[name]:7.2f} x" for name in self.others_ms
        )
        gaps = "  ".join(
            f"{name} {gap:.2e} below in {self.entropic_ms[name]:.0f} ms" for name, gap in self.gaps.items()
        )
        kept = f"  keeps {self.kept:.4f}  {gaps}" if self.kept is not None else ""
        return (
            f"{self.what:14} {self.rows:5}x{self.columns:<5} {self.threads} thr {self.twofour_ms:8.2f} ms"
            f" (best {self.best_ms['twofour']:7.2f}) | {others}{kept}"
        )


def of_90(scores: Tensor) -> Tensor:
    """2:4t by a dot product for each of the 90 masks."""
    pairs = [tuple(int(i in pair) for i in range(4)) for pair in itertools.combinations(range(4), 2)]
    masks = [b for b in itertools.product(pairs, repeat=4) if all(sum(c) == 2 for c in zip(*b, strict=True))]
    every = torch.tensor(masks, dtype=scores.dtype).view(-1, 16)
    rows, columns = scores.shape[0] // 4, scores.shape[1] // 4
    blocks = scores.view(rows, 4, columns, 4).transpose(1, 2).reshape(-1, 16)
    best = torch.cat([(part @ every.T).argmax(1) for part in blocks.split(1 << 16)])
    return every.bool()[best].view(rows, columns, 4, 4).transpose(1, 2).reshape(scores.shape)


def measure(what: str, scores: Tensor, kernels: dict[str, Callable[[], object]], repeats: int) -> Row:
    times = in_turns(kernels, repeats)
    ratios = ratios_to("twofour", times)
    others = [name for name in kernels if name != "twofour"]
    medians = {name: statistics.median(times[name]) * 1e3 for name in kernels}
    return Row(
        what,
        *scores.shape,
        threads=torch.get_num_threads(),
        repeats=repeats,
        twofour_ms=medians["twofour"],
        others_ms={name: medians[name] for name in others},
        x_others={name: ratios[name] for name in others},
        best_ms={name: min(times[name]) * 1e3 for name in kernels},
    )


def require(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"{what}: the masks differ")


def measure_all(size: int, solved_size: int, repeats: int) -> list[Row]:
    """Every row; scores are |w| of a normal distribution."""
    scores = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).abs()
    target = torch.empty_like(scores)
    kernels: dict[str, Callable[[], object]]
    rows = []

    def add(row: Row) -> None:
        print(row.line(), flush=True)
        rows.append(row)

    def copy() -> Tensor:
        return target.copy_(scores)

    kernels = {"twofour": lambda: nm_mask(scores, "2:4t"), "copy": copy}
    kernels |= {"torch": lambda: best_of_90(scores), "90 masks": lambda: of_90(scores)}
    best, others = nm_mask(scores, "2:4t"), of_90(scores)
    require(torch.equal(best, best_of_90(scores)), "2:4t")
    sums = [float(scores[mask].double().sum()) for mask in (best, others)]
    require(sums[0] * (1 - 1e-6) <= sums[1] <= sums[0] * (1 + 1e-12), "2:4t by 90 masks")
    add(measure("2:4t", scores, kernels, repeats))
    for text in GROUPS:
        pattern = Pattern.parse(text)
        require(torch.equal(nm_mask(scores, text), best_of_groups(scores, pattern)), text)
        kernels = {"twofour": lambda t=text: nm_mask(scores, t), "copy": copy}  # type: ignore[misc]
        kernels |= {"torch": lambda p=pattern: best_of_groups(scores, p)}  # type: ignore[misc]
        add(measure(text, scores, kernels, repeats))
    kept = torch.where(nm_mask(scores, "2:4"), scores, 0)
    require(torch.equal(keep_best(scores, "2:4"), kept), "keep_best")
    other = torch.empty_like(scores)
    kernels = {"twofour": lambda: keep_best(scores, "2:4", out=other), "copy": copy}
    kernels |= {"torch": lambda: torch.where(best_of_groups(scores.abs(), Pattern(2, 4)), scores, 0)}
    add(measure("2:4 keep_best", scores, kernels, repeats))

    scores = scores[:solved_size, :solved_size].contiguous()
    target = torch.empty_like(scores)
    for text in SOLVED:
        kernels = {"twofour": lambda t=text: nm_mask(scores, t), "copy": copy}  # type: ignore[misc]
        row = measure(text, scores, kernels, repeats)
        total, best_sum = float(scores.double().sum()), float(scores[nm_mask(scores, text)].double().sum())
        gaps, entropic_ms = {}, {}
        for name, steps in (("entropic", 100), ("rounding", 0)):
            start = time.perf_counter()
            mask = entropic_mask(scores, text, steps=steps)
            entropic_ms[name] = (time.perf_counter() - start) * 1e3
            gaps[name] = 1 - float(scores[mask].double().sum()) / best_sum
        require(all(gap >= 0 for gap in gaps.values()), text)
        add(replace(row, kept=best_sum / total, gaps=gaps, entropic_ms=entropic_ms))
    return rows


def main(
    threads: Annotated[list[int] | None, typer.Option(help="Threads; repeat it for several. Default 1.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed rounds, at least 20 for numbers to publish.")] = 20,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    smallest: Annotated[bool, typer.Option("--smallest", help="A tiny case, in seconds.")] = False,
) -> None:
    """Measures how long masks take to choose."""
    rows: list[Row] = []
    for number in threads or [1]:
        torch.set_num_threads(number)
        with torch.inference_mode():
            rows += measure_all(64, 32, 3) if smallest else measure_all(4096, 2048, repeats)
    if json_path is not None:
        record = {
            **environment(),
            "isas": native.module().masks_isas(),
            "commit": commit(),
            "command": " ".join(["python", "benchmarks/masks/bench_masks.py", *sys.argv[1:]]),
            "rows": [asdict(row) for row in rows],
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
