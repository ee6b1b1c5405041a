"""What the kernels for GPUs are to reach on an H200, and whether a result says they do, and is of the code as it is.

python benchmarks/gpu/bars.py benchmarks/results/<gpu>/<date>.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.bars import verdict
from benchmarks.gpu import record

FEW = (1, 2, 4, 8, 16, 32)


class Bar(NamedTuple):
    """Of the rows of a case: the most microseconds of ours, the least ratio to the best of some rivals."""

    title: str
    what: str
    shape: tuple[int, int]
    dtype: str
    tokens: tuple[int | None, ...] = (None,)
    most_us: float | None = None
    rivals: tuple[str, ...] = ()
    least: float | None = None

    def rows(self, rows: list[record.Row]) -> list[record.Row]:
        """Those that it is about, in the order of its tokens."""
        case = (self.what, *self.shape, self.dtype)
        found = {
            row.get("tokens"): row
            for row in rows
            if (row["what"], row["out_features"], row["in_features"], row["dtype"]) == case
        }
        return [found[each] for each in self.tokens if each in found]

    def values(self, rows: list[record.Row]) -> tuple[list[float], list[float]]:
        """Microseconds, and ratios to the fastest rival that was there; NaN where ours was wrong."""
        here = [row for row in self.rows(rows) if "twofour" in row["us"]]
        wrong = [float("nan") if not record.is_right(row) else 0.0 for row in here]
        us = [row["us"]["twofour"] + nan for row, nan in zip(here, wrong, strict=True)]
        ratios = [
            min(ratio for name, ratio in row["x"].items() if name in self.rivals) + nan
            for row, nan in zip(here, wrong, strict=True)
            if set(self.rivals) & set(row["x"])
        ]
        return us, ratios


BARS = (
    Bar("few tokens", "few tokens", (8192, 8192), "bf16", FEW, 20, ("cuBLAS",), 1.5),
    Bar("few tokens", "few tokens", (28672, 8192), "bf16", FEW, 64, ("cuBLAS",), 1.5),
    Bar(
        "prune, pack both ways",
        "prune both",
        (8192, 8192),
        "bf16",
        (None,),
        75,
        ("torch tile", "torch tile, CUTLASS", "torch tile, magnitudes", "torch tile, magnitudes, CUTLASS"),
        1.4,
    ),
    Bar("pack 2:4 one way", "compress", (8192, 8192), "bf16", (None,), 55, ("cuSPARSELt",), 1.2),
    Bar("prune, pack one way", "prune", (8192, 8192), "fp8", (None,), 30),
)


def lines(result: dict[str, Any]) -> list[str]:
    """A line for each bar: met, MISSED or not measured; the bar; what was measured; of what."""
    found = []
    for bar in BARS:
        rows = bar.rows(result["rows"])
        us, ratios = bar.values(result["rows"])
        stale = sum(record.state(row) != "fresh" for row in rows)
        of = f"{bar.title}, {bar.shape[0]}x{bar.shape[1]}, {bar.dtype}" + (
            f", {bar.tokens} tokens" if bar.tokens[0] else ""
        )
        of += f"  ({stale} of {len(rows)} rows stale)" if stale else ""
        if bar.most_us is not None:
            said = verdict([bar.most_us / each for each in us], 1.0, len(bar.tokens))
            found.append(f"{said:12} <= {bar.most_us:3.0f} us   {' '.join(f'{each:6.1f}' for each in us):44} {of}")
        if bar.least is not None:
            said = verdict(ratios, bar.least, len(bar.tokens))
            against = " and ".join(bar.rivals)
            found.append(
                f"{said:12} >= {bar.least:.2f} x   {' '.join(f'{each:6.2f}' for each in ratios):44} {of}: {against}"
            )
    return found


if __name__ == "__main__":
    print("\n".join(lines(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
