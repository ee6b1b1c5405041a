"""2:4 linear layers on the CPU against the dense kernels of torch.

    python benchmarks/kernels/bench_linear.py --threads 1 --threads 2 --json benchmarks/results/<machine>/linear.json

Every kernel of a row runs in turn in the same loop, so that all of them see the same machine; a time is the median, a
ratio the median of the paired ratios. A rival that takes more than twice twofour's time takes part in every fifth round
only, and its ratio is that of the medians. What several threads gain is measured in a loop of its own. With few tokens
the weights are cold: each call takes the next of enough copies to exceed the last-level cache. All results are compared
with float64 in the same run.

The JSON is written after every row. Rows of the same commit that are there already are not measured again, so a run that
was stopped (--budget does) goes on where it was. A row whose quartiles lie far apart is measured once more, and marked.

Percent of the bound: the time that a perfect kernel of the format would take, over the time taken. It does half the
products at the speed of oneDNN's best dense product here, or reads the compressed weights at the speed at which torch
sums 512 MiB; the longer of the two.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.shapes import LAYERS, SMALLEST, TOKENS, Layer
from benchmarks.turns import in_turns, ratios_to, seconds_of

from twofour import SparseMatrix
from twofour.kernels import cpu
from twofour.nn import onednn
from twofour.report.environment import environment

DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16 weights": (torch.bfloat16, torch.float32),
    "float8 weights": (torch.float8_e4m3fn, torch.bfloat16),
}
"""dtypes of the sparse weight, and of everything else."""
CSR_TOKENS = (1, 64, 512)
CSR_WEIGHTS = 4096 * 4096
"""torch.sparse CSR is timed in float32 at these tokens and up to this size, in three rounds: it is that slow."""
DISTURBED = 1.15
"""Third quartile over first, of twofour's times, oneDNN's or the gains of threads, from which a row is suspicious."""
COLD_TOKENS = 16
"""Up to this many tokens the weights are cold."""
COLD_BYTES = 160 << 20
"""Bytes of weights that each kernel rotates through: several times a last-level cache."""

MEASURED = ("kernels", "models", "shapes.py", "turns.py")
"""What else than twofour itself decides the numbers."""

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
    pattern: str
    tokens: int
    threads: int
    kernel: str
    copies: int
    repeats: int
    twofour_us: float
    f_linear_us: float
    onednn_us: float | None
    csr_us: float | None
    tflops_dense_equivalent: float
    gigabytes_per_second: float
    percent_of_bound: float
    x_f_linear: float
    x_onednn: float | None
    x_csr: float | None
    x_one_thread: float | None
    disturbed: bool

    def line(self) -> str:
        onednn = "" if self.x_onednn is None else f"{self.onednn_us:10.1f} us {self.x_onednn:5.2f} x oneDNN"
        csr = "" if self.x_csr is None else f" | {self.x_csr:5.1f} x CSR"
        alone = "" if self.x_one_thread is None else f" | {self.x_one_thread:4.2f} x one thread"
        return (
            f"{self.layer:21} {self.out_features:5}x{self.in_features:<5} {self.dtype:12} {self.pattern:5} {self.tokens:5}"
            f" tokens {self.threads} thr {self.kernel:16} {self.twofour_us:10.1f} us"
            f" {self.tflops_dense_equivalent:6.3f} TFLOP/s {self.gigabytes_per_second:5.1f} GB/s"
            f" {self.percent_of_bound:3.0f} % | F.linear {self.f_linear_us:10.1f} us {self.x_f_linear:5.2f} x | "
            f"{onednn}{csr}{alone}{'  (disturbed)' if self.disturbed else ''}"
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
    """The kernel on a packed copy of its own, and the bytes of that copy; with scales of 1 where values have 8 bits."""
    shared = cpu.shared_rows(matrix.metadata)
    assert shared == matrix.pattern.rows
    values, metadata = cpu.pack(matrix.values, matrix.metadata, matrix.out_features, matrix.in_features, shared)

    scales = torch.ones(matrix.out_features) if matrix.dtype.itemsize == 1 else None

    def run(x: Tensor) -> Tensor:
        return cpu.linear(x, values, metadata, bias, matrix.out_features, matrix.in_features, scales=scales)

    return run, values.nbytes + metadata.nbytes


def gains_of_threads(function: Linear, x: Tensor, repeats: int) -> list[float]:
    """How many times as long the call takes on one thread, for each of `repeats` pairs.

    Each call follows one like it that is not timed: a core that stood idle while the other one worked needs milliseconds
    to reach its clock (a Zen 5 took 750, 650, 635, 600 us for work that takes 565).
    """
    threads = torch.get_num_threads()
    ratios = []
    call = partial(function, x)
    for _ in range(repeats):
        call()
        several = seconds_of(call)
        torch.set_num_threads(1)
        try:
            call()
            ratios.append(seconds_of(call) / several)
        finally:
            torch.set_num_threads(threads)
    return ratios


def dense_linear(weight: Tensor, bias: Tensor) -> Linear:
    weight = weight.clone()
    return lambda x: torch.nn.functional.linear(x, weight, bias)


def csr_linear(weight: Tensor, bias: Tensor) -> Linear:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "beta state"
        csr = weight.to_sparse_csr()
    return lambda x: (csr @ x.T).T + bias


@cache
def peaks(dtype: torch.dtype, threads: int) -> tuple[float, float]:
    """Of this machine: multiply-adds per second of the best dense product, and bytes per second that are read."""
    x = torch.randn(1024, 1024).to(dtype)
    dense: Linear = lambda x: x @ x  # noqa: E731
    if onednn.why_not(dtype) is None:
        dense = onednn.prepacked_linear(x, None)
    memory = torch.ones(128 << 20)

    def best(function: Callable[[], object]) -> float:
        times = []
        for _ in range(12):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return min(times)

    return 1024**3 / best(lambda: dense(x)), memory.nbytes / best(memory.sum)


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


def measure(layer: Layer, dtype_name: str, pattern: str, tokens: int, threads: int, repeats: int) -> Row:
    """Times the kernels in turn."""
    torch.set_num_threads(threads)
    held, dtype = DTYPES[dtype_name]
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(layer.out_features, layer.in_features, generator=generator).to(held)
    matrix = SparseMatrix.from_dense(dense, pattern, prune=True)
    weight = matrix.to_dense().to(dtype)
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

    few_rounds = set()
    if dtype_name == "fp32" and pattern == "2:4" and tokens in CSR_TOKENS and weight.numel() <= CSR_WEIGHTS:
        kernels["CSR"] = csr_linear(weight, bias)
        few_rounds.add("CSR")

    for name, function in kernels.items():
        check(name, function(x), x, weight, bias)
    kernel = native_kernel(kernels["twofour"], x)
    calls = {name: partial(function, x) for name, function in kernels.items()}
    for attempt in range(2):
        times = in_turns(calls, repeats, few_rounds)
        gains = gains_of_threads(kernels["twofour"], x, repeats) if threads > 1 else []
        spreads = [spread(times[name]) for name in ("twofour", "oneDNN") if name in times] + [spread(gains)]
        disturbed = max(spreads) > DISTURBED
        if not disturbed or sum(map(sum, times.values())) > 10 or attempt:
            break

    median = {name: statistics.median(values) for name, values in times.items()}
    ratio = ratios_to("twofour", times)
    seconds = median["twofour"]
    products, bandwidth = peaks(dtype, threads)
    weight_bytes = sparse[0][1]
    compute = layer.out_features * layer.in_features / 2 * tokens / products
    reading = weight_bytes / bandwidth if copies > 1 else 0.0
    return Row(
        layer=layer.name,
        out_features=layer.out_features,
        in_features=layer.in_features,
        dtype=dtype_name,
        pattern=pattern,
        tokens=tokens,
        threads=threads,
        kernel=kernel,
        copies=copies,
        repeats=repeats,
        twofour_us=seconds * 1e6,
        f_linear_us=median["F.linear"] * 1e6,
        onednn_us=median["oneDNN"] * 1e6 if "oneDNN" in median else None,
        tflops_dense_equivalent=2 * layer.out_features * layer.in_features * tokens / seconds / 1e12,
        csr_us=median["CSR"] * 1e6 if "CSR" in median else None,
        gigabytes_per_second=weight_bytes / seconds / 1e9,
        percent_of_bound=100 * max(compute, reading) / seconds,
        x_f_linear=ratio["F.linear"],
        x_onednn=ratio.get("oneDNN"),
        x_csr=ratio.get("CSR"),
        x_one_thread=statistics.median(gains) if gains else None,
        disturbed=disturbed,
    )


def spread(times: list[float]) -> float:
    """Third quartile over first."""
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else (1.0, 1.0, 1.0)
    return high / low


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
    measured = ["src", "csrc", "CMakeLists.txt", *(f"benchmarks/{name}" for name in MEASURED)]
    status = ["git", "status", "--porcelain", "--", *measured]
    changed = subprocess.run(status, cwd=root, capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


class Results:
    """The rows of a JSON file, written after each; those of this commit that it holds already are kept."""

    def __init__(self, path: Path | None, again: bool) -> None:
        self.path, self.rows, self.commit = path, [], commit()
        self._head = {**environment(), "isa": cpu.isa(), "commit": self.commit}
        if path is not None and path.exists() and not again and not self.commit.endswith("+"):
            record = json.loads(path.read_text(encoding="utf-8"))
            if all(record.get(key) == self._head[key] for key in ("commit", "isa")):
                self.rows = record["rows"]

    def has(self, **wanted: object) -> bool:
        return any(all(row[key] == value for key, value in wanted.items()) for row in self.rows)

    def add(self, row: Row) -> None:
        self.rows.append(asdict(row))
        if self.path is not None:
            record = {
                **self._head,
                "command": "python benchmarks/kernels/bench_linear.py, see Makefile",
                "rows": self.rows,
            }
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            partial.replace(self.path)


def main(
    threads: Annotated[list[int] | None, typer.Option(help="Threads; repeat it for several. Default 1.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="fp32, bf16, 'bf16 weights' or 'float8 weights'; default the first two.")
    ] = None,
    pattern: Annotated[list[str] | None, typer.Option(help="2:4, 2:4x2 or 2:4x4; default 2:4.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Numbers of tokens; default 1 to 4096.")] = None,
    layer: Annotated[str, typer.Option(help="Only the layer of this name, or those whose name contains it.")] = "",
    repeats: Annotated[int, typer.Option(help="Timed rounds, at least 20 for numbers to publish.")] = 20,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure rows again that the JSON has.")] = False,
    budget: Annotated[float, typer.Option(help="Seconds after which no row is begun; run again to go on.")] = 1e9,
    smallest: Annotated[bool, typer.Option("--smallest", help="A tiny case, in seconds.")] = False,
) -> None:
    """Measures 2:4 linear layers against F.linear and prepacked oneDNN."""
    named = [each for each in LAYERS if each.name.lower() == layer.lower()]
    layers: Sequence[Layer] = named or [each for each in LAYERS if layer.lower() in each.name.lower()]
    chosen_tokens: Sequence[int] = tokens or TOKENS
    if smallest:
        layers, chosen_tokens, repeats, pattern = [SMALLEST], [1, 64], 3, ["2:4", "2:4x4"]
        dtype = list(DTYPES)
    results, began = Results(json_path, again), time.monotonic()
    cases = [
        (each, dtype_name, shared, count, number)
        for number in threads or [1]
        for shared in pattern or ["2:4"]
        for dtype_name in dtype or ["fp32", "bf16"]
        for each in layers
        for count in chosen_tokens
    ]
    todo = [
        case
        for case in cases
        if not results.has(layer=case[0].name, dtype=case[1], pattern=case[2], tokens=case[3], threads=case[4])
    ]
    with torch.inference_mode():
        for done, case in enumerate(todo):
            if time.monotonic() - began > budget:
                print(f"{len(todo) - done} of {len(cases)} rows are left: run again to go on")
                return
            row = measure(*case, repeats)
            print(f"[{len(cases) - len(todo) + done + 1}/{len(cases)}] {row.line()}", flush=True)
            results.add(row)


if __name__ == "__main__":
    typer.run(main)
