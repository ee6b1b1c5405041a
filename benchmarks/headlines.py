"""The README's numbers, written from the JSON files; tests/test_readme.py checks that the README has these lines.

python benchmarks/headlines.py benchmarks/results/<machine>           with AVX-512-BF16
python benchmarks/headlines.py benchmarks/results/<machine> --avx2    without AVX-512
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def headlines(folder: Path, shown: str) -> list[str]:
    """Three lines of Markdown.

    Args:
        folder: holds linear.json (bench_linear.py) and minilm.json (bench_minilm.py).
        shown: the folder as the README links to it.
    """
    linear = json.loads((folder / "linear.json").read_text(encoding="utf-8"))
    minilm = json.loads((folder / "minilm.json").read_text(encoding="utf-8"))
    batch = _row(linear, "fp32", 512)
    decode = _row(linear, "bf16", 1)
    speed = {(row["dtype"], row["batch"]): row for row in minilm["speed"]}
    size = {(row["dtype"], row["what"]): row for row in minilm["size"]}
    small = size["bfloat16", "encoder Linears in the file"]
    full, half = (speed[dtype, 64]["against_best"] for dtype in ("float32", "bfloat16"))
    return [
        f"- **{batch['x_onednn']:.2f}× the best dense kernel** for a 4096×4096 layer, float32, 512 tokens, one thread:"
        f" oneDNN with prepacked weights; {batch['x_f_linear']:.1f}× `F.linear` ([JSON]({shown}/linear.json)).",
        f"- **{decode['x_onednn']:.2f}× at one token**, bfloat16, weights cold in memory;"
        f" {decode['x_f_linear']:.1f}× `F.linear` ([JSON]({shown}/linear.json)).",
        f"- **all-MiniLM-L6-v2, whole model, two threads, batch 64**: {full:.2f}× the best dense sentences per second in"
        f" float32, {half:.2f}× in bfloat16; its pruned layers take {100 * small['share']:.1f} % of their bytes at 16 bits"
        f" ([JSON]({shown}/minilm.json)).",
    ]


def headline_avx2(folder: Path, shown: str) -> str:
    """One line of Markdown on a processor without AVX-512.

    Args:
        folder: holds linear.json, int8.json and encoder.json.
        shown: the folder as the README links to it.
    """
    linear, int8, encoder = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("linear", "int8", "encoder")
    )
    plain, shared = _row(linear, "fp32", 512), _row(linear, "fp32", 512, "2:4x4")
    eight = next(row for row in int8["rows"] if (row["layer"], row["tokens"], row["threads"]) == ("square", 256, 1))
    model = next(row for row in encoder["rows"] if row["dtype"] == "fp32")
    return (
        f"- **With AVX2 alone** (a Zen 4 core, no AVX-512), one thread: {plain['x_onednn']:.2f}× oneDNN for the same layer,"
        f" {shared['x_onednn']:.2f}× as 2:4x4 ([JSON]({shown}/linear.json)); int8, 256 tokens, {eight['x_strongest']:.2f}×"
        f" the better of torch's int8 kernels ([JSON]({shown}/int8.json)); the MiniLM encoder {model['x_best_dense']:.2f}×"
        f" the best dense one in float32 ([JSON]({shown}/encoder.json))."
    )


def _row(record: dict[str, Any], dtype: str, tokens: int, pattern: str = "2:4") -> dict[str, Any]:
    wanted = ("square", dtype, tokens, 1)
    for row in record["rows"]:
        if (
            row.get("pattern", "2:4") == pattern
            and (row["layer"], row["dtype"], row["tokens"], row["threads"]) == wanted
        ):
            return dict(row)
    raise SystemExit(f"no row {wanted} in the JSON: run bench_linear.py whole")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    avx2 = sys.argv[2:] == ["--avx2"]
    print(headline_avx2(folder, str(folder)) if avx2 else "\n".join(headlines(folder, str(folder))))
