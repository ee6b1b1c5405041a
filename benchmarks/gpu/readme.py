"""The README's lines on GPUs, from results that are fresh: measured with the kernels as they are, and right.

    python benchmarks/gpu/readme.py           which results are fresh, and the lines
    python benchmarks/gpu/readme.py --write   puts the lines into README.md

A kernel that has changed since it was measured loses its line until it has run again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import bars, record

README = record.ROOT / "README.md"
FIRST, LAST = "<!-- benchmarks/gpu/readme.py writes from here -->", "<!-- to here -->"
NOT_RUN = "not yet run on hardware"
NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp8": "float8", "int8": "int8"}


class Claim(NamedTuple):
    """A line: what it is about, and the rivals that it names."""

    text: str
    what: str
    shape: tuple[int, int]
    dtype: str
    tokens: tuple[int | None, ...] = (None,)
    rivals: tuple[tuple[str, str], ...] = ()


CLAIMS = (
    Claim("1 to 32 tokens, weights from memory", "few tokens", (8192, 8192), "bf16", bars.FEW, (("cuBLAS", "cuBLAS"),)),
    Claim("1, 16 and 64 tokens, weights from memory", "few tokens", (8192, 8192), "int8", (1, 16, 64)),
    Claim(
        "pruned and packed, W and W.T at once",
        "prune both",
        (8192, 8192),
        "bf16",
        (None,),
        (
            ("torch tile", "`torch._sparse_semi_structured_tile`"),
            ("torch tile, magnitudes", 'its "largest_abs_values_greedy"'),
        ),
    ),
    Claim("pruned and packed", "prune", (8192, 8192), "bf16"),
    Claim("pruned and packed", "prune", (8192, 8192), "fp8"),
    Claim("2:4 already, packed", "compress", (8192, 8192), "bf16", (None,), (("cuSPARSELt", "cuSPARSELt"),)),
)


def line(claim: Claim, fresh: Sequence[tuple[Path, record.Row]], root: Path = record.ROOT) -> str:
    """A line of Markdown: numbers where every row of the claim is fresh, and all of one GPU."""
    out, inner = claim.shape
    head = f"- {out}×{inner}, {NAMES[claim.dtype]}, {claim.text}: "
    for gpu in sorted({row["gpu"] for _, row in fresh}):
        own = [(path, row) for path, row in fresh if row["gpu"] == gpu]
        bar = bars.Bar("", claim.what, claim.shape, claim.dtype, claim.tokens)
        rows = bar.rows([row for _, row in own])
        if len(rows) != len(claim.tokens) or any("twofour" not in row["us"] for row in rows):
            continue
        parts = [f"{_range([row['us']['twofour'] for row in rows], 1)} µs"]
        for rival, name in claim.rivals:
            if all(rival in row["x"] for row in rows):
                parts.append(f"{_range([row['x'][rival] for row in rows], 2)}× {name}")
        paths = sorted({path for path, row in own if any(row is each for each in rows)})
        files = ", ".join(f"[JSON]({path.relative_to(root).as_posix()})" for path in paths)
        return f"{head}**{', '.join(parts)}** on an {gpu} ({files})."
    return f"{head}{NOT_RUN}."


def _range(numbers: Sequence[float], digits: int) -> str:
    low, high = (f"{each:.{digits}f}" for each in (min(numbers), max(numbers)))
    return low if low == high else f"{low} to {high}"


def block(folder: Path = record.RESULTS, root: Path = record.ROOT) -> str:
    """The lines between the marks, marks included."""
    fresh = record.fresh_rows(folder)
    lines = [line(claim, fresh, root) for claim in CLAIMS]
    if all(each.endswith(f": {NOT_RUN}.") for each in lines):
        lines = [f"- Pruning, packing and products: {_before(folder, root)}{NOT_RUN}."]
    return "\n".join([FIRST, *lines, LAST])


def _before(folder: Path, root: Path) -> str:
    """What ran last, and has changed since; nothing where nothing has."""
    for path, result in reversed(record.results(folder)):
        if not result.get("dry") and any(record.state(row) != "fresh" for row in result["rows"]):
            file = path.relative_to(root).as_posix()
            return f"changed since they ran on an {result['gpu']} ([JSON]({file})); as they are now "
    return ""


def shown(readme: str) -> str:
    """What a README has between the marks, marks included.

    Raises:
        ValueError: it has no marks.
    """
    return readme[readme.index(FIRST) : readme.index(LAST) + len(LAST)]


def states(folder: Path = record.RESULTS) -> list[str]:
    """A line for each result, and for each of its rows that is not fresh."""
    found = []
    for path, result in record.results(folder):
        told = [record.state(row) for row in result["rows"]]
        found.append(f"{path}: {told.count('fresh')} of {len(told)} rows are fresh")
        for row, state in zip(result["rows"], told, strict=True):
            if state != "fresh":
                case = " ".join(str(row[key]) for key in record.CASE if key in row)
                found.append(f"  {case}: {state}")
    return found or [f"no result of a GPU in {folder}"]


def main(arguments: Sequence[str]) -> None:
    """Prints, or writes."""
    new = block()
    print("\n".join(states()))
    print(new)
    if "--write" in arguments:
        text = README.read_text(encoding="utf-8")
        README.write_text(text.replace(shown(text), new), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
