"""Gradients of 2:4 linear layers on the CPU against the dense gradients of torch.

    python benchmarks/kernels/bench_backward.py --json benchmarks/results/<machine>/backward.json

Two gradients a row. Input: grad @ W; rivals hold a dense W that costs them nothing (torch's matmul, and oneDNN with W.T
packed beforehand, which training could not keep). Values: grad.T @ x at the kept places; rivals make the dense gradient
(torch's matmul, and oneDNN with its packing, which it needs at each call) and pick the kept places. Every kernel of a
row runs in turn in the same loop; a time is the median, a ratio the median of the paired ratios. All results are
compared with float64 in the same run.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.kernels.bench_linear import DTYPES, commit
from benchmarks.shapes import LAYERS, SMALLEST, Layer
from benchmarks.turns import in_turns, ratios_to

from twofour import SparseMatrix
from twofour.kernels import cpu, cpu_grad
from twofour.nn import onednn
from twofour.report.environment import environment

TOKENS = (64, 512, 2048)

Gradient = Callable[[], Tensor]


@dataclass(frozen=True)
class Row:
    """One gradient of one layer: medians in microseconds, ratios above 1 where twofour is faster."""

    gradient: str
    layer: str
    out_features: int
    in_features: int
    dtype: str
    tokens: int
    threads: int
    repeats: int
    twofour_us: float
    transposed_us: float | None
    torch_us: float
    onednn_us: float | None
    tflops_dense_equivalent: float
    x_torch: float
    x_onednn: float | None

    def line(self) -> str:
        other = "" if self.transposed_us is None else f" (transposed {self.transposed_us:.1f} us)"
        rival = "" if self.x_onednn is None else f" | oneDNN {self.onednn_us:10.1f} us {self.x_onednn:5.2f} x"
        return (
            f"{self.gradient:6} {self.layer:22} {self.out_features:5}x{self.in_features:<5} {self.dtype}"
            f" {self.tokens:5} tokens {self.threads} thr {self.twofour_us:10.1f} us{other}"
            f" {self.tflops_dense_equivalent:6.3f} TFLOP/s | torch {self.torch_us:10.1f} us {self.x_torch:5.2f} x{rival}"
        )


def check(name: str, found: Tensor, expected: Tensor, magnitude: Tensor, terms: int) -> None:
    """Compares component by component: one rounding for each product and sum, one of the result."""
    unit = 2.0**-8 if found.dtype == torch.bfloat16 else 2.0**-24
    bound = 1.01 * unit * expected.abs() + 2 * terms * 2.0**-24 * magnitude
    if not bool(((found.double() - expected).abs() <= bound).all()):
        raise SystemExit(f"{name} is wrong")


def measure(layer: Layer, dtype_name: str, tokens: int, threads: int, repeats: int) -> list[Row]:
    """Times both gradients of a layer with a transposable weight, so that all of the kernels apply to it."""
    torch.set_num_threads(threads)
    dtype = DTYPES[dtype_name][0]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(layer.out_features, layer.in_features, generator=generator).to(dtype)
    matrix = SparseMatrix.from_dense(weight, "2:4t", prune=True)
    dense, shape = matrix.to_dense(), matrix.shape
    values, metadata = cpu.pack(matrix.values, matrix.metadata, *shape)
    turned = matrix.transposed()
    turned_operands = cpu.pack(turned.values, turned.metadata, *turned.shape)
    grad = torch.randn(tokens, layer.out_features, generator=generator).to(dtype)
    x = torch.randn(tokens, layer.in_features, generator=generator).to(dtype)
    has_onednn = onednn.why_not(dtype) is None

    of_input: dict[str, Gradient] = {
        "twofour": lambda: cpu_grad.grad_input(grad, values, metadata, *shape),
        "transposed": lambda: cpu.linear(grad, *turned_operands, None, *turned.shape),
        "torch": lambda: grad @ dense,
    }
    kept = matrix.mask().flatten().nonzero().flatten()
    of_values: dict[str, Gradient] = {
        "twofour": lambda: cpu_grad.grad_values(grad, x, metadata, *shape),
        "torch": lambda: (grad.T @ x).flatten()[kept],
    }
    if has_onednn:
        prepacked = onednn.prepacked_linear(dense.T.contiguous(), None)
        of_input["oneDNN"] = lambda: prepacked(grad)
        of_values["oneDNN"] = lambda: onednn.prepacked_linear(x.T.contiguous(), None)(grad.T.contiguous()).flatten()[
            kept
        ]

    rows = sorted({0, tokens // 2, tokens - 1})
    g64, dense64 = grad[rows].double(), dense.double()
    for name, function in of_input.items():
        check(name, function()[rows], g64 @ dense64, g64.abs() @ dense64.abs(), layer.out_features)
    top = min(16, layer.out_features)
    g64, x64, held = grad[:, :top].double().T, x.double(), matrix.mask()[:top]
    for name, function in of_values.items():
        found = function()
        canonical = cpu.unpack(found, metadata, *shape)[0] if name == "twofour" else found.view(matrix.values.shape)
        check(name, canonical[:top].flatten(), (g64 @ x64)[held], (g64.abs() @ x64.abs())[held], tokens)

    lines = []
    for gradient, functions in (("input", of_input), ("values", of_values)):
        times = in_turns(functions, repeats)
        median = {name: statistics.median(seconds) for name, seconds in times.items()}
        ratio = ratios_to("twofour", times)
        lines.append(
            Row(
                gradient=gradient,
                layer=layer.name,
                out_features=layer.out_features,
                in_features=layer.in_features,
                dtype=dtype_name,
                tokens=tokens,
                threads=threads,
                repeats=repeats,
                twofour_us=median["twofour"] * 1e6,
                transposed_us=median["transposed"] * 1e6 if "transposed" in median else None,
                torch_us=median["torch"] * 1e6,
                onednn_us=median["oneDNN"] * 1e6 if has_onednn else None,
                tflops_dense_equivalent=2 * layer.out_features * layer.in_features * tokens / median["twofour"] / 1e12,
                x_torch=ratio["torch"],
                x_onednn=ratio.get("oneDNN"),
            )
        )
    return lines


def main(
    threads: Annotated[list[int] | None, typer.Option(help="Threads; repeat it for several. Default 1.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32 or bf16; default both.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Numbers of tokens; default 64, 512, 2048.")] = None,
    layer: Annotated[str, typer.Option(help="Only layers whose name contains this.")] = "",
    repeats: Annotated[int, typer.Option(help="Timed rounds, at least 20 for numbers to publish.")] = 20,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    smallest: Annotated[bool, typer.Option("--smallest", help="A tiny case, in seconds.")] = False,
) -> None:
    """Measures the gradients of 2:4 linear layers against torch's matmul and oneDNN."""
    layers: Sequence[Layer] = [each for each in LAYERS if layer.lower() in each.name.lower()]
    chosen_tokens: Sequence[int] = tokens or TOKENS
    if smallest:
        layers, chosen_tokens, repeats = [SMALLEST], [1, 64], 3
    rows = []
    with torch.inference_mode():
        for number in threads or [1]:
            for dtype_name in dtype or ["fp32", "bf16"]:
                for each in layers:
                    for count in chosen_tokens:
                        for row in measure(each, dtype_name, count, number, repeats):
                            print(row.line(), flush=True)
                            rows.append(row)
    if json_path is not None:
        record = {
            **environment(),
            "isa": cpu.isa(),
            "commit": commit(),
            "command": " ".join(["python", "benchmarks/kernels/bench_backward.py", *sys.argv[1:]]),
            "rows": [asdict(row) for row in rows],
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
