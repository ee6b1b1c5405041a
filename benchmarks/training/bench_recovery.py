"""What training with 2:4 costs a small GPT, after pruning and from the start, against the dense model.

    python benchmarks/training/bench_recovery.py --data DATA --json benchmarks/results/<machine>/recovery.json

DATA is a folder with tinyshakespeare.txt, which is not part of the project. "again": the dense model, trained a second time
with the same schedule. "prune again": pruned by magnitude after the first time, then the same training with fixed masks; so
both have been trained equally long. The others start from the same random weights and take as many steps as "dense", whose
one-shot pruning is "pruned". Runs that the JSON has already are not made again.

On a GPU: --size gpt2 --device cuda --text wikitext2-valid.txt.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.kernels.bench_linear import commit
from benchmarks.training.gpt import (
    GPT,
    SIZES,
    Size,
    Text,
    learning_rate,
    loss_of,
    optimizer_of,
    validation_loss,
)

import twofour
from twofour.report.environment import environment
from twofour.training import Schedule

COMMAND = "python benchmarks/training/bench_recovery.py --data DATA"

FROM_SCRATCH = {
    "sr-ste 2:4": ("2:4", "sr-ste"),
    "fst 2:4t, dense tail": ("2:4t", "fst:83%, dense"),
    "fst 2:4t, mvue, dense tail": ("2:4t", "fst:83%, dense"),
    "s-ste 2:4": ("2:4", "s-ste"),
    "s-ste 2:4t": ("2:4t", "s-ste"),
}


def train(
    model: GPT, text: Text, size: Size, steps: int, seed: int, masks: Any = None, optimizer: Optimizer | None = None
) -> dict[str, Any]:
    """One schedule of training; the loss along the way."""
    optimizer = optimizer or optimizer_of(model, size)
    generator = torch.Generator().manual_seed(seed)
    curve, start = [], time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, size.learning_rate)
        optimizer.zero_grad()
        loss = loss_of(model, *text.batch(size.batch, generator))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % max(1, steps // 10) == 0:
            curve.append([step + 1, round(validation_loss(model, text, 256), 5)])
    found = {"loss": validation_loss(model, text), "curve": curve, "seconds": time.perf_counter() - start}
    if masks is not None and hasattr(masks, "curve"):
        rates = [point["flip_rate"] for point in masks.curve]
        piece = max(1, len(rates) // 20)
        found["flip rate"] = [
            [masks.curve[at]["step"], statistics.fmean(rates[at : at + piece])] for at in range(0, len(rates), piece)
        ]
    return found


def scratch(
    name: str, model: GPT, text: Text, size: Size, steps: int, seed: int, decay: float | None
) -> dict[str, Any]:
    """Sparse from the first step."""
    pattern, phases = FROM_SCRATCH[name]
    schedule = Schedule.parse(phases, steps=steps).with_options(decay=decay, mvue="mvue" in name or None)
    optimizer = optimizer_of(model, size)
    masks = twofour.training.move_masks(model, optimizer, pattern, schedule)
    found = train(model, text, size, steps, seed, masks, optimizer)
    sparse = masks.phase.is_sparse
    masks.finish()
    if sparse:
        twofour.check(model, pattern, include="blocks.*")  # raises where a weight does not hold it
    found |= {"schedule": str(schedule), "pattern": pattern, "sparse": sparse}
    found["loss"] = validation_loss(model, text)
    return found


def runs(
    name: str, text: Text, size: Size, steps: int, seed: int, decay: float | None, base: dict[int, GPT], device: str
) -> dict[str, Any]:
    """Makes one run; `base` holds the dense models that others go on from."""
    torch.manual_seed(seed)
    if name in FROM_SCRATCH:
        return scratch(name, GPT(size, len(text.alphabet)).to(device), text, size, steps, seed, decay)
    if name == "dense" or seed not in base:
        model = GPT(size, len(text.alphabet)).to(device)
        found = train(model, text, size, steps, seed)
        base[seed] = model
        if name == "dense":
            return found
    model = copy.deepcopy(base[seed])
    if name == "again":
        return train(model, text, size, steps, seed + 100)
    twofour.prune(model, "2:4")
    pruned = validation_loss(model, text)
    if name == "pruned":
        return {"loss": pruned}
    optimizer = optimizer_of(model, size)
    with twofour.training.keep_masks(model, optimizer):
        found = train(model, text, size, steps, seed + 100, None, optimizer)
    twofour.check(model, "2:4")
    return found


NAMES = ("dense", "again", "pruned", "prune again", *FROM_SCRATCH)


def main(
    data: Annotated[Path | None, typer.Option(help="Folder with the text; without it Python's own reference.")] = None,
    text: Annotated[str, typer.Option(help="File in DATA.")] = "tinyshakespeare.txt",
    json_path: Annotated[Path | None, typer.Option("--json", help="Where results go; what is there is kept.")] = None,
    seeds: Annotated[int, typer.Option()] = 3,
    steps: Annotated[int, typer.Option()] = 2500,
    size: Annotated[str, typer.Option(help=", ".join(SIZES))] = "small",
    only: Annotated[list[str] | None, typer.Option(help="Runs to make, by name.")] = None,
    decay: Annotated[float | None, typer.Option(help="Of sr-ste and fst.")] = None,
    device: Annotated[str, typer.Option()] = "cpu",
    threads: Annotated[int, typer.Option()] = 2,
    smallest: Annotated[bool, typer.Option(help="Seconds: to see that it runs.")] = False,
) -> None:
    """Trains, prunes, trains again; prints the loss against dense."""
    torch.set_num_threads(threads)
    if smallest:
        size, steps, seeds = "smallest", 20, 1
    chosen = SIZES[size]
    letters = Text(data / text if data else None, chosen.context, device)
    record: dict[str, Any] = {"runs": {}}
    if json_path is not None and json_path.exists():
        record = json.loads(json_path.read_text(encoding="utf-8"))
    base: dict[int, GPT] = {}
    for seed in range(seeds):
        for name in only or NAMES:
            own = record["runs"].setdefault(name, {})
            if str(seed) in own and own[str(seed)]["steps"] == steps:
                continue
            found = runs(name, letters, chosen, steps, seed, decay, base, device)
            own[str(seed)] = {**found, "steps": steps, "commit": commit()}
            record |= {
                "environment": environment(),
                "command": COMMAND,
                "size": vars(chosen),
                "text": text if data else "pydoc_data",
            }
            if json_path is not None:
                json_path.parent.mkdir(parents=True, exist_ok=True)
                json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            print(f"seed {seed}  {name:<28} {found['loss']:.4f}  {found.get('seconds', 0):.0f} s", flush=True)
        base.pop(seed, None)
    summary(record)


def summary(record: dict[str, Any]) -> None:
    """Mean losses, and what they lose, in percent, to the dense model that was trained as long from the same seeds."""
    for name, own in record["runs"].items():
        rivals = record["runs"].get("again" if name in ("again", "prune again") else "dense", {})
        seeds = [seed for seed in own if seed in rivals]
        if not seeds:
            continue
        loss, rival = (statistics.fmean(runs[seed]["loss"] for seed in seeds) for runs in (own, rivals))
        bar = {"prune again": 0.5}.get(name, 1.5 if name in FROM_SCRATCH else None)
        lost = 100 * (loss / rival - 1)
        verdict = "" if bar is None else "met" if lost <= bar else "MISSED"
        limit = "" if bar is None else f"at most {bar} %"
        print(f"{name:<28} {loss:.4f}  {lost:+.2f} %  {limit}  {verdict}  ({len(seeds)} seeds)")


if __name__ == "__main__":
    typer.run(main)
