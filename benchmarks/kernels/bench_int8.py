"""int8 2:4 linear layers on the CPU against torch's int8 dynamic linear layers; inputs are quantized on both sides.

    python benchmarks/kernels/bench_int8.py --json benchmarks/results/<machine>/int8.json

The rivals are `torch.ops.quantized.linear_dynamic` with oneDNN and with FBGEMM, weights packed in advance, one scale per
output row, one scale for all inputs (twofour has one per token). `_int_mm`, without any quantization of inputs, is slower
than both. Everything runs in turn in the same loop; a time is the median, a ratio the median of the paired ratios. With
few tokens the weights are cold. twofour's results are compared with the reference bit for bit in the same run, the
rivals' with float64 up to their rounding of inputs.
"""

from __future__ import annotations

import json
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.kernels.bench_linear import COLD_BYTES, COLD_TOKENS, MOST_COPIES, commit, native_kernel, rotating
from benchmarks.shapes import LAYERS, SMALLEST, Layer
from benchmarks.turns import in_turns, ratios_to

from twofour import SparseMatrix
from twofour.kernels import int8, reference
from twofour.nn import quantize_rows
from twofour.report.environment import environment

TOKENS = (1, 4, 8, 16, 64, 128, 256, 1024)
ENGINES = ("onednn", "fbgemm")

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One layer, one number of tokens: medians in microseconds, ratios above 1 where twofour is faster."""

    layer: str
    out_features: int
    in_features: int
    tokens: int
    threads: int
    kernel: str
    copies: int
    repeats: int
    twofour_us: float
    rivals_us: dict[str, float]
    x_rivals: dict[str, float]
    x_strongest: float
    tops_dense_equivalent: float
    gigabytes_per_second: float

    def line(self) -> str:
        rivals = "  ".join(
            f"{name} {self.rivals_us[name]:9.1f} us {self.x_rivals[name]:5.2f} x" for name in self.rivals_us
        )
        return (
            f"{self.layer:22} {self.out_features:5}x{self.in_features:<5} {self.tokens:5} tokens {self.threads} thr"
            f" {self.kernel:20} {self.twofour_us:9.1f} us {self.tops_dense_equivalent:6.3f} TOP/s"
            f" {self.gigabytes_per_second:6.1f} GB/s | {rivals} | {self.x_strongest:5.2f} x"
        )


def sparse_linear(matrix: SparseMatrix, scales: Tensor, bias: Tensor) -> tuple[Linear, int]:
    """The kernel on a packed copy of its own, and the bytes of that copy."""
    values, metadata = int8.pack(matrix.values, matrix.metadata, matrix.out_features, matrix.in_features)

    def run(x: Tensor) -> Tensor:
        return int8.linear_cpu(x, values, metadata, scales, bias, matrix.out_features, matrix.in_features)

    return run, values.nbytes + metadata.nbytes


def dense_linear(weight: Tensor, scales: Tensor, bias: Tensor, engine: str) -> Linear:
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zeros = torch.zeros(len(scales), dtype=torch.long)
        quantized = torch._make_per_channel_quantized_tensor(weight, scales.double(), zeros, 0)
        packed = torch.ops.quantized.linear_prepack(quantized, bias)

    def run(x: Tensor) -> Tensor:
        torch.backends.quantized.engine = engine
        y: Tensor = torch.ops.quantized.linear_dynamic(x, packed, reduce_range=False)
        return y

    return run


def measure(layer: Layer, tokens: int, threads: int, repeats: int) -> Row:
    """Times all kernels in turn."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(layer.out_features, layer.in_features, generator=generator)
    matrix, scales = quantize_rows(SparseMatrix.from_dense(exact, "2:4", prune=True))
    weight = matrix.to_dense()
    bias = torch.randn(layer.out_features, generator=generator)
    x = torch.randn(tokens, layer.in_features, generator=generator)

    copies = min(-(-COLD_BYTES // weight.nbytes), MOST_COPIES) if tokens <= COLD_TOKENS else 1
    sparse = [sparse_linear(matrix, scales, bias) for _ in range(1 if copies == 1 else 2 * copies)]
    engines = [name for name in ENGINES if name in torch.backends.quantized.supported_engines]
    kernels: dict[str, Linear] = {"twofour": rotating([function for function, _ in sparse])}
    for engine in engines:
        kernels[engine] = rotating([dense_linear(weight, scales, bias, engine) for _ in range(copies)])

    rows = sorted({0, tokens // 2, tokens - 1})
    expected = reference.linear_int8(x[rows], matrix.values, matrix.metadata, scales, bias, matrix.pattern, x.shape[1])
    if not torch.equal(kernels["twofour"](x)[rows], expected):
        raise SystemExit(f"twofour is wrong on {list(weight.shape)} at {tokens} tokens")
    y64 = x[rows].double() @ (weight.double() * scales[:, None]).T + bias
    for engine in engines:
        if (kernels[engine](x)[rows] - y64).norm() > 0.05 * y64.norm():
            raise SystemExit(f"{engine} is wrong on {list(weight.shape)} at {tokens} tokens")
    kernel = native_kernel(kernels["twofour"], x)

    times = in_turns({name: partial(function, x) for name, function in kernels.items()}, repeats)
    seconds = statistics.median(times["twofour"])
    every_ratio = ratios_to("twofour", times)
    ratios = {name: every_ratio[name] for name in engines}
    return Row(
        layer=layer.name,
        out_features=layer.out_features,
        in_features=layer.in_features,
        tokens=tokens,
        threads=threads,
        kernel=kernel,
        copies=copies,
        repeats=repeats,
        twofour_us=seconds * 1e6,
        rivals_us={name: statistics.median(times[name]) * 1e6 for name in engines},
        x_rivals=ratios,
        x_strongest=min(ratios.values()),
        tops_dense_equivalent=2 * layer.out_features * layer.in_features * tokens / seconds / 1e12,
        gigabytes_per_second=sparse[0][1] / seconds / 1e9,
    )


def main(
    threads: Annotated[list[int] | None, typer.Option(help="Threads; repeat it for several. Default 1.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Numbers of tokens; default 1 to 1024.")] = None,
    layer: Annotated[str, typer.Option(help="Only layers whose name contains this.")] = "",
    repeats: Annotated[int, typer.Option(help="Timed rounds, at least 20 for numbers to publish.")] = 20,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    smallest: Annotated[bool, typer.Option("--smallest", help="A tiny case, in seconds.")] = False,
) -> None:
    """Measures int8 2:4 linear layers against torch's int8 dynamic linear."""
    known = LAYERS
    layers: Sequence[Layer] = [each for each in known if layer.lower() in each.name.lower()]
    chosen_tokens: Sequence[int] = tokens or TOKENS
    if smallest:
        layers, chosen_tokens, repeats = [SMALLEST], [1, 64], 3
    rows = []
    with torch.inference_mode():
        for number in threads or [1]:
            for each in layers:
                for count in chosen_tokens:
                    row = measure(each, count, number, repeats)
                    print(row.line(), flush=True)
                    rows.append(row)
    if json_path is not None:
        record = {
            **environment(),
            "isa": int8.isa(),
            "commit": commit(),
            "command": " ".join(["python", "benchmarks/kernels/bench_int8.py", *sys.argv[1:]]),
            "rows": [asdict(row) for row in rows],
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
