"""2:4 linear layers on the CPU against the dense kernels of torch.

    python benchmarks/kernels/bench_linear.py --threads 1 --threads 2 --json benchmarks/results/<machine>/linear.json

Every kernel of a row runs in turn in the same loop, so that all of them see the same machine; a time is the median, a
ratio the median of the paired ratios. With few tokens the weights are cold: each call takes the next of enough copies
to exceed the last-level cache. All results are compared with float64 in the same run.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.shapes import LAYERS, SMALLEST, TOKENS, Layer

from twofour import SparseMatrix
from twofour.kernels import cpu
from twofour.nn import onednn
from twofour.report.environment import environment

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLD_TOKENS = 16
"""Up to this many tokens the weights are cold."""
COLD_BYTES = 160 << 20
"""Bytes of weights that each kernel rotates through: several times a last-level cache."""

MOST_COPIES = 1000
"""Enough for every layer of a real model; the smallest case would need ten thousand."""

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One layer, one number of tokens: medians in microseconds, ratios above 1 where twofour is faster."""

    layer: str
    out_features: int
    in_features: int
    dtype: str
    tokens: int
    threads: int
    kernel: str
    copies: int
    repeats: int
    twofour_us: float
    f_linear_us: float
    onednn_us: float | None
    tflops_dense_equivalent: float
    gigabytes_per_second: float
    x_f_linear: float
    x_onednn: float | None

    def line(self) -> str:
        rival = "" if self.x_onednn is None else f"{self.onednn_us:10.1f} us  {self.x_onednn:5.2f} x oneDNN"
        return (
            f"{self.layer:22} {self.out_features:5}x{self.in_features:<5} {self.dtype} {self.tokens:5} tokens"
            f" {self.threads} thr {self.kernel:16} {self.twofour_us:10.1f} us {self.tflops_dense_equivalent:6.3f} TFLOP/s"
            f" {self.gigabytes_per_second:6.1f} GB/s | F.linear {self.f_linear_us:10.1f} us {self.x_f_linear:5.2f} x | {rival}"
        )


def rotating(functions: Sequence[Linear]) -> Linear:
    """Calls the next of the functions each time."""
    position = 0

    def run(x: Tensor) -> Tensor:
        nonlocal position
        position = (position + 1) % len(functions)
        return functions[position](x)

    return run


def sparse_linear(matrix: SparseMatrix, bias: Tensor) -> tuple[Linear, int]:
    """The kernel on a packed copy of its own, and the bytes of that copy."""
    values, metadata = cpu.pack(matrix.values, matrix.metadata, matrix.out_features, matrix.in_features)

    def run(x: Tensor) -> Tensor:
        return cpu.linear(x, values, metadata, bias, matrix.out_features, matrix.in_features)

    return run, values.nbytes + metadata.nbytes


def dense_linear(weight: Tensor, bias: Tensor) -> Linear:
    weight = weight.clone()
    return lambda x: torch.nn.functional.linear(x, weight, bias)


def check(name: str, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Compares a few rows with float64, component by component."""
    rows = sorted({0, x.shape[0] // 2, x.shape[0] - 1})
    x64, weight64 = x[rows].double(), weight.double()
    expected = x64 @ weight64.T + bias.double()
    magnitude = x64.abs() @ weight64.abs().T + bias.double().abs()
    unit = 2.0**-8 if y.dtype == torch.bfloat16 else 2.0**-24
    bound = 1.01 * unit * expected.abs() + 2 * weight.shape[1] * 2.0**-24 * magnitude
    if not bool(((y[rows].double() - expected).abs() <= bound).all()):
        raise SystemExit(f"{name} is wrong on {list(weight.shape)} at {x.shape[0]} tokens")


def measure(layer: Layer, dtype_name: str, tokens: int, threads: int, repeats: int) -> Row:
    """Times the three kernels in turn."""
    torch.set_num_threads(threads)
    dtype = DTYPES[dtype_name]
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(layer.out_features, layer.in_features, generator=generator).to(dtype)
    matrix = SparseMatrix.from_dense(dense, "2:4", prune=True)
    weight = matrix.to_dense()
    bias = torch.randn(layer.out_features, generator=generator).to(dtype)
    x = torch.randn(tokens, layer.in_features, generator=generator).to(dtype)

    copies = min(-(-COLD_BYTES // weight.nbytes), MOST_COPIES) if tokens <= COLD_TOKENS else 1
    # The packed copies are smaller: more of them, so that they are as cold.
    sparse = [sparse_linear(matrix, bias) for _ in range(1 if copies == 1 else 2 * copies)]
    kernels: dict[str, Linear] = {
        "twofour": rotating([function for function, _ in sparse]),
        "F.linear": rotating([dense_linear(weight, bias) for _ in range(copies)]),
    }
    if onednn.why_not(dtype) is None:
        kernels["oneDNN"] = rotating([onednn.prepacked_linear(weight, bias) for _ in range(copies)])

    for name, function in kernels.items():
        check(name, function(x), x, weight, bias)
    kernel = native_kernel(kernels["twofour"], x)
    times: dict[str, list[float]] = {name: [] for name in kernels}
    for repeat in range(repeats + 2):
        for name, function in kernels.items():
            start = time.perf_counter()
            function(x)
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)

    median = {name: statistics.median(values) for name, values in times.items()}
    own = times["twofour"]
    ratio = {
        name: statistics.median(rival / mine for rival, mine in zip(times[name], own, strict=True)) for name in kernels
    }
    seconds = median["twofour"]
    return Row(
        layer=layer.name,
        out_features=layer.out_features,
        in_features=layer.in_features,
        dtype=dtype_name,
        tokens=tokens,
        threads=threads,
        kernel=kernel,
        copies=copies,
        repeats=repeats,
        twofour_us=seconds * 1e6,
        f_linear_us=median["F.linear"] * 1e6,
        onednn_us=median["oneDNN"] * 1e6 if "oneDNN" in median else None,
        tflops_dense_equivalent=2 * layer.out_features * layer.in_features * tokens / seconds / 1e12,
        gigabytes_per_second=sparse[0][1] / seconds / 1e9,
        x_f_linear=ratio["F.linear"],
        x_onednn=ratio.get("oneDNN"),
    )


def native_kernel(function: Linear, x: Tensor) -> str:
    """Which kernel serves x, as "isa/family"."""
    from twofour import _native

    function(x)
    return _native.last_kernel()


def commit() -> str:
    """The commit that was measured, with "+" where measured files differ from it; "unknown" outside a repository."""
    root = Path(__file__).resolve().parents[2]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    if head.returncode != 0:
        return "unknown"
    measured = ["src", "csrc", "CMakeLists.txt", "benchmarks/kernels", "benchmarks/models"]
    status = ["git", "status", "--porcelain", "--", *measured]
    changed = subprocess.run(status, cwd=root, capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def main(
    threads: Annotated[list[int] | None, typer.Option(help="Threads; repeat it for several. Default 1.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32 or bf16; default both.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Numbers of tokens; default 1 to 2048.")] = None,
    layer: Annotated[str, typer.Option(help="Only layers whose name contains this.")] = "",
    repeats: Annotated[int, typer.Option(help="Timed rounds, at least 20 for numbers to publish.")] = 20,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    smallest: Annotated[bool, typer.Option("--smallest", help="A tiny case, in seconds.")] = False,
) -> None:
    """Measures 2:4 linear layers against F.linear and prepacked oneDNN."""
    layers: Sequence[Layer] = [each for each in LAYERS if layer.lower() in each.name.lower()]
    chosen_tokens: Sequence[int] = tokens or TOKENS
    if smallest:
        layers, chosen_tokens, repeats = [SMALLEST], [1, 64], 3
    rows = []
    with torch.inference_mode():
        for number in threads or [1]:
            for dtype_name in dtype or list(DTYPES):
                for each in layers:
                    for count in chosen_tokens:
                        row = measure(each, dtype_name, count, number, repeats)
                        print(row.line(), flush=True)
                        rows.append(row)
    if json_path is not None:
        record = {
            **environment(),
            "isa": cpu.isa(),
            "commit": commit(),
            "command": " ".join(["python", "benchmarks/kernels/bench_linear.py", *sys.argv[1:]]),
            "rows": [asdict(row) for row in rows],
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
