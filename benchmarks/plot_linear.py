"""Draws the speed of 2:4 linear layers against oneDNN prepacked, from the JSON that bench_linear.py wrote.

python benchmarks/plot_linear.py benchmarks/results/<machine>/linear.json docs/speed.svg
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from twofour.report import plots

COMPUTE_IDEAL = {"half the products": 2.0}
DTYPES, PATTERNS = ("fp32", "bf16"), ("2:4", "2:4x4")
"""What is drawn; the others were measured at a few tokens only."""


def main(
    source: Annotated[Path, typer.Argument(help="The JSON of bench_linear.py.")],
    target: Annotated[Path, typer.Argument(help="The SVG to write.")],
    layer: Annotated[list[str] | None, typer.Option(help="Layers by name; default the square and MiniLM's.")] = None,
    threads: Annotated[int, typer.Option(help="Rows of this many threads.")] = 1,
) -> None:
    """One line per layer and dtype: how many times faster than the best dense kernel, by number of tokens."""
    wanted = layer or ["square", "MiniLM mlp up"]
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in json.loads(source.read_text(encoding="utf-8"))["rows"]:
        pattern = row.get("pattern", "2:4")
        drawn = row["dtype"] in DTYPES and pattern in PATTERNS and row["threads"] == threads
        if drawn and row["layer"] in wanted and row["x_onednn"] is not None:
            shared = "" if pattern == "2:4" else f" {pattern}"
            name = f"{row['dtype']} {row['out_features']}x{row['in_features']}{shared}"
            lines.setdefault(name, []).append((row["tokens"], row["x_onednn"]))
    lines = {name: sorted(points) for name, points in lines.items()}
    svg = plots.ratio_lines(lines, x_title="tokens", y_title="speed against oneDNN prepacked", ideals=COMPUTE_IDEAL)
    target.parent.mkdir(parents=True, exist_ok=True)
    plots.svg_file(target, svg)


if __name__ == "__main__":
    typer.run(main)
