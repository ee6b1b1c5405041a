"""What the CPU kernels are to reach against oneDNN prepacked, and whether the JSON says they do.

The bars are those of a Zen 5 core with AVX-512-BF16. Where oneDNN refuses the dtype there is no rival worth a bar: such rows
count as not measured.

python benchmarks/bars.py benchmarks/results/<machine>/linear.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

MANY = (256, 512, 1024, 2048, 4096)
SMALL = ("MiniLM attention", "MiniLM mlp up", "MiniLM mlp down")


class Bar(NamedTuple):
    """The least ratio to oneDNN over the rows it names (one thread)."""

    layers: tuple[str, ...]
    dtype: str
    pattern: str
    tokens: tuple[int, ...]
    least: float


BARS = (
    Bar(("square",), "bf16", "2:4", MANY, 1.30),
    Bar(("square",), "fp32", "2:4", MANY, 1.45),
    Bar(("square",), "fp32", "2:4x4", MANY, 1.80),
    Bar(("square",), "bf16", "2:4x4", MANY, 1.70),
    Bar(("big square",), "bf16", "2:4", (1,), 1.65),
    Bar(("big square",), "fp32", "2:4", (1,), 1.70),
    Bar(("big square",), "bf16", "2:4", (4,), 1.40),
    Bar(("big square",), "bf16", "2:4", (16,), 1.20),
    Bar(SMALL, "fp32", "2:4", (128,), 1.20),
    Bar(SMALL, "bf16", "2:4", (128,), 1.20),
)
TWO_THREADS = 1.90
"""Two threads against one, the square at 512 tokens."""
NEVER_BELOW = 0.97


def main(path: Path) -> None:
    """Prints a line per bar: the ratios of its rows, the least of them, met or not."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    for bar in BARS:
        found = [
            row["x_onednn"]
            for row in rows
            if row["x_onednn"] is not None
            and row["layer"] in bar.layers
            and (row["dtype"], row["pattern"], row["threads"]) == (bar.dtype, bar.pattern, 1)
            and row["tokens"] in bar.tokens
        ]
        wanted = len(bar.layers) * len(bar.tokens)
        say(f"{', '.join(bar.layers)}, {bar.dtype} {bar.pattern}, {bar.tokens} tokens", found, bar.least, wanted)
    for dtype in ("fp32", "bf16"):
        found = [
            row["x_one_thread"]
            for row in rows
            if (row["layer"], row["dtype"], row["pattern"], row["tokens"]) == ("square", dtype, "2:4", 512)
            and row["threads"] == 2
            and row.get("x_one_thread") is not None  # older benchmarks have none
        ]
        say(f"two threads against one, square, {dtype}, 512 tokens", found, TWO_THREADS)
    worst = min(rows, key=_against_best)
    least = _against_best(worst)
    say(
        f"worst of {len(rows)} rows ({worst['layer']}, {worst['dtype']}, {worst['tokens']} tokens)",
        [least],
        NEVER_BELOW,
    )


def _against_best(row: dict[str, Any]) -> float:
    return min(ratio for ratio in (row["x_onednn"], row["x_f_linear"]) if ratio is not None)


def verdict(found: list[float], least: float, wanted: int = 1) -> str:
    """ "met" only where every row is there."""
    if any(not ratio >= least for ratio in found):  # NaN too
        return "MISSED"
    return "met" if len(found) == wanted else "not measured"


def say(what: str, found: list[float], least: float, wanted: int = 1) -> None:
    """One line."""
    print(f"{verdict(found, least, wanted):12} {least:.2f}  {' '.join(f'{ratio:.2f}' for ratio in found):32} {what}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
