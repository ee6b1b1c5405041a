"""What 2:4 costs a small convolutional network on scikit-learn's digits: train, prune by magnitude, train again.

    python benchmarks/training/bench_digits.py --json benchmarks/results/<machine>/digits.json

1,000 images to train on, 797 to judge by. "again": the dense network, trained a second time with the same schedule; "prune
again": pruned after the first time, then the same training with fixed masks, so that both have been trained equally long.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.kernels.bench_linear import commit
from benchmarks.training.gpt import learning_rate

import twofour
from twofour.report.environment import environment

COMMAND = "python benchmarks/training/bench_digits.py"
AT_MOST = 0.3
"""Points of accuracy."""


def network() -> nn.Sequential:
    """Three convolutions and two layers; the first convolution has one channel, so that it stays dense."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int, masked: bool) -> None:
    """AdamW, batches of 50."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    masks = twofour.training.keep_masks(model, optimizer) if masked else None
    generator = torch.Generator().manual_seed(seed)
    steps, step = epochs * -(-len(images) // 50), 0
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(50):
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 2e-3)
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            step += 1
    if masks is not None:
        masks.remove()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100 * float((model(images).argmax(1) == labels).double().mean())


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Where results go.")] = None,
    seeds: Annotated[int, typer.Option()] = 3,
    epochs: Annotated[int, typer.Option()] = 30,
    threads: Annotated[int, typer.Option()] = 1,
    smallest: Annotated[bool, typer.Option(help="Seconds: to see that it runs.")] = False,
) -> None:
    """Prints accuracies and what pruning costs."""
    torch.set_num_threads(threads)
    if smallest:
        seeds, epochs = 1, 1
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    fit, rest = order[:1000], order[1000:]
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        dense = network()
        train(dense, images[fit], labels[fit], epochs, seed, masked=False)
        again, pruned = copy.deepcopy(dense), copy.deepcopy(dense)
        train(again, images[fit], labels[fit], epochs, seed + 100, masked=False)
        twofour.prune(pruned)
        row = {"seed": seed, "dense": accuracy(dense, images[rest], labels[rest])}
        row["again"] = accuracy(again, images[rest], labels[rest])
        row["pruned"] = accuracy(pruned, images[rest], labels[rest])
        train(pruned, images[fit], labels[fit], epochs, seed + 100, masked=True)
        twofour.check(pruned)
        row["prune again"] = accuracy(pruned, images[rest], labels[rest])
        rows.append(row)
        print("  ".join(f"{name} {value:.2f}" if name != "seed" else f"seed {value}" for name, value in row.items()))
    lost = statistics.fmean(row["again"] - row["prune again"] for row in rows)
    print(f"lost {lost:+.2f} points, at most {AT_MOST}: {'met' if lost <= AT_MOST else 'MISSED'}")
    if json_path is not None:
        record = {
            "environment": environment(),
            "commit": commit(),
            "command": COMMAND,
            "epochs": epochs,
            "lost": lost,
            "at most": AT_MOST,
            "rows": rows,
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
