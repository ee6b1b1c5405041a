"""A training step of a feed-forward block, 1024 -> 4096 -> 1024: sparse products against dense, bfloat16.

    python benchmarks/training/bench_step.py --json benchmarks/results/<machine>/step.json

A step is forward, backward to inputs and weights, plain SGD, and what the rule does after it: a new mask (or, between two,
none), and packing both ways. Dense is torch's own layer, which runs oneDNN. Both run in turns, in one process. "mask and
pack" is held against two copies of the weight, with the caches warm and cold; like them, and as in training, it packs into
memory that is there already.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.kernels.bench_linear import commit
from benchmarks.turns import in_turns, ratios_to

import twofour
from twofour.kernels import cpu
from twofour.masks.of_weights import magnitude_mask
from twofour.report.environment import environment
from twofour.training import Phase

COMMAND = "python benchmarks/training/bench_step.py"


def block(width: int, hidden: int, dtype: torch.dtype) -> nn.Sequential:
    """Two layers and what is between them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width)).to(dtype)


class Stepper:
    """Forward, backward and a step of a block, after which its weights are packed anew."""

    def __init__(self, width: int, hidden: int, tokens: int, dtype: torch.dtype, phase: Phase | None) -> None:
        self.model = block(width, hidden, dtype)
        self.x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
        self.grad = torch.randn(tokens, width, dtype=dtype)
        if phase is not None:
            self.masks = twofour.training.move_masks(self.model, None, "2:4t", phase, products="sparse")
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-6)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.x.grad = None
        self.model(self.x).backward(self.grad)
        self.optimizer.step()


def copies(weight: Tensor) -> Callable[[], None]:
    """Two copies of a weight."""
    first, second = torch.empty_like(weight), torch.empty_like(weight)

    def run() -> None:
        first.copy_(weight)
        second.copy_(weight)

    return run


def milliseconds(function: Callable[[], object], repeats: int, between: Callable[[], object] | None = None) -> float:
    """The median; `between` runs before each."""
    times = []
    for repeat in range(repeats + 2):
        if between is not None:
            between()
        start = time.perf_counter()
        function()
        if repeat >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def packing(hidden: int, width: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Mask and pack of W and W.T, against two copies of W."""
    weight = torch.randn(hidden, width).to(dtype)
    mask = magnitude_mask(weight, "2:4t")
    wash = torch.zeros(32 << 20)
    memory = cpu.PackedMemory()
    found: dict[str, Any] = {"shape": [hidden, width], "dtype": str(dtype).removeprefix("torch.")}
    for name, between in (("warm", None), ("cold", lambda: wash.add_(1))):
        two = milliseconds(copies(weight), repeats, between)
        choose = milliseconds(lambda: magnitude_mask(weight, "2:4t"), repeats, between)
        pack = milliseconds(lambda: cpu.pack_masked(weight, mask, both_ways=True, memory=memory), repeats, between)
        found[name] = {
            "two copies ms": two,
            "mask ms": choose,
            "pack both ways ms": pack,
            "mask and pack / two copies": (choose + pack) / two,
        }
    return found


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Where results go.")] = None,
    repeats: Annotated[int, typer.Option()] = 20,
    threads: Annotated[list[int] | None, typer.Option(help="Default: 1 and 2.")] = None,
    smallest: Annotated[bool, typer.Option(help="Seconds: to see that it runs.")] = False,
) -> None:
    """Prints times and ratios."""
    width, hidden, tokens = (64, 128, 96) if smallest else (1024, 4096, 2048)
    repeats = 2 if smallest else repeats
    rows, packs = [], []
    for count in threads or ((1,) if smallest else (1, 2)):
        torch.set_num_threads(count)
        for dtype in (torch.bfloat16, torch.float32):
            steppers = {
                "dense": Stepper(width, hidden, tokens, dtype, None),
                "fst, a mask each step": Stepper(width, hidden, tokens, dtype, Phase("fst", refresh=1)),
                "fst, a mask each 40 steps": Stepper(width, hidden, tokens, dtype, Phase("fst", refresh=40)),
                "s-ste": Stepper(width, hidden, tokens, dtype, Phase("s-ste")),
            }
            times = in_turns(dict(steppers), repeats)
            ratios = ratios_to("dense", times)
            for name, seconds in times.items():
                row = {
                    "dtype": str(dtype).removeprefix("torch."),
                    "threads": count,
                    "step": name,
                    "ms": statistics.median(seconds) * 1e3,
                    "times dense": 1 / ratios[name],
                }
                rows.append(row)
                print(
                    f"{row['dtype']:<9} {count} threads  {name:<28} {row['ms']:8.1f} ms  {row['times dense']:.3f} x dense"
                )
    torch.set_num_threads(1)
    for shape in ((hidden, width),) if smallest else ((hidden, width), (14336, 4096)):
        for dtype in (torch.bfloat16, torch.float32):
            packs.append(packing(*shape, dtype, repeats))
            for name in ("warm", "cold"):
                times_ = ", ".join(f"{key} {value:.2f}" for key, value in packs[-1][name].items())
                print(f"{packs[-1]['dtype']:<9} {shape[0]}x{shape[1]} {name}: {times_}")
    if json_path is not None:
        record = {
            "environment": environment(),
            "commit": commit(),
            "command": COMMAND,
            "block": [width, hidden, width],
            "tokens": tokens,
            "rows": rows,
            "packing": packs,
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
