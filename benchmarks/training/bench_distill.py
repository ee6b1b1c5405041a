"""What ten minutes of distillation give back: all-MiniLM-L6-v2, pruned by magnitude in one shot, then taught by its dense self.

    python benchmarks/training/bench_distill.py --data DATA --json benchmarks/results/<machine>/distill.json

DATA is a folder with stsb-train.tsv, stsb-dev.tsv (STS benchmark) and wikitext2-valid.txt (WikiText-2), which are not part
of the project. The text has no labels: the sentences of STS-B's training part without their scores, sentences of WikiText-2,
and the language reference that Python carries. Sentences of the dev part are taken out wherever they stand. A quality is
Spearman's correlation x 100 between cosine similarities and human scores.

A thirtieth of the text is held out: the losses before and after are those of it. The learning
rate was chosen by the loss of held-out text alone, after 100 steps; nothing else was searched, and nothing by dev scores.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.kernels.bench_linear import commit
from benchmarks.quality.bench_minilm import pairs, quality, texts_of

import twofour
from twofour.demo import model as minilm
from twofour.report.environment import environment
from twofour.training import Distillation, distill

COMMAND = "benchmarks/training/bench_distill.py --data DATA"
SOURCES = ("STS-B", "WikiText-2", "Python")
AT_MOST = 0.5
"""Points of STS-B dev that may be missing after recovery."""
LETTERS = 400
"""Longer texts are left out: a few of them would take most of the time."""
HELD_OUT = 30


def corpus(data: Path, seed: int) -> tuple[dict[str, list[str]], list[str]]:
    """(source -> texts to learn from, texts held out), without any sentence of the dev part."""
    dev = {_plain(each) for _, *both in pairs(data / "stsb-dev.tsv") for each in both}
    learn: dict[str, list[str]] = {}
    held: list[str] = []
    for number, source in enumerate(SOURCES):
        texts = [
            text for text in dict.fromkeys(texts_of(data, source)) if len(text) <= LETTERS and _plain(text) not in dev
        ]
        order = torch.randperm(
            len(texts), generator=torch.Generator().manual_seed(seed * len(SOURCES) + number)
        ).tolist()
        cut = len(texts) // HELD_OUT
        held += [texts[i] for i in order[:cut]]
        learn[source] = [texts[i] for i in order[cut:]]
    return learn, held


def _plain(text: str) -> str:
    """Letters alone: a sentence that differs in spaces or marks is the same."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def batches(encoder: Any, texts: list[str], size: int, seed: int) -> list[tuple[dict[str, torch.Tensor]]]:
    """`size` texts of about one length each, in random order."""
    ordered = sorted(texts, key=len)
    parts = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [minilm.features(encoder, parts[i]) for i in order]


def small_corpus() -> tuple[dict[str, list[str]], list[str]]:
    """Sentences of Python's reference, for a run without data."""
    from twofour.demo import text

    found = text.sentences(160)
    return {"Python": found[::2]}, found[1::2]


def run(data: Path | None, seconds: float, steps: int | None, size: int, seed: int, lr: float | None) -> dict[str, Any]:
    """Prunes, teaches, and scores what came of it."""
    torch.manual_seed(seed)
    encoder = minilm.fresh(torch.float32)
    learn, held = small_corpus() if data is None else corpus(data, seed)
    scored = {} if data is None else {part: pairs(data / f"stsb-{part}.tsv") for part in ("dev", "train")}
    began = time.perf_counter()
    inputs = batches(encoder, [text for texts in learn.values() for text in texts], size, seed)
    tokenized = time.perf_counter() - began
    apart = batches(encoder, held, size, seed)
    teacher = copy.deepcopy(encoder)
    twofour.prune(encoder, include=minilm.ENCODER, method="magnitude", progress=False)
    distillation = Distillation(encoder, teacher)

    def scores(model: Any) -> dict[str, float]:
        return {part: round(quality(model, rows), 3) for part, rows in scored.items()}

    dense, pruned = scores(teacher), scores(encoder)
    before = distillation.evaluate(apart)
    print(f"dense {dense}, pruned {pruned}, loss of held-out text {before:.4f}", flush=True)
    report = distill(encoder, distillation, inputs, seconds=seconds, steps=steps, lr=lr)
    after = distillation.evaluate(apart)
    recovered = scores(encoder)
    holds = bool(twofour.check(encoder, include=minilm.ENCODER).summary["holds"])
    return {
        "model": minilm.NAME,
        "layers": len(minilm.encoder_linears(encoder)),
        "pattern": "2:4",
        "holds": holds,
        "seed": seed,
        "texts": {source: len(texts) for source, texts in learn.items()},
        "held_out_texts": len(held),
        "batch": size,
        "tokens": sum(int(batch["attention_mask"].sum()) for (batch,) in inputs),
        "lr": max(row["lr"] for row in report.rows),
        "terms": distillation.labels,
        "spearman": {"dense": dense, "pruned": pruned, "recovered": recovered},
        "lost": {
            part: {"pruned": round(dense[part] - pruned[part], 3), "recovered": round(dense[part] - recovered[part], 3)}
            for part in scored
        },
        "held_out_loss": {"pruned": before, "recovered": after},
        "steps": report.summary["steps"],
        "passes": round(report.summary["steps"] / len(inputs), 2),
        "tokenizing_seconds": round(tokenized, 1),
        "seconds": report.summary["seconds"],
        "threads": torch.get_num_threads(),
        "curve": [dict(row) for row in report.rows],
    }


def main(
    data: Annotated[
        Path | None, typer.Option(help="Folder of stsb-train.tsv, stsb-dev.tsv, wikitext2-valid.txt.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Where results go; those of other seeds stay.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of held-out texts and the order of batches.")] = 0,
    seconds: Annotated[float, typer.Option(min=1, help="Of distillation.")] = 580,
    batch: Annotated[int, typer.Option(min=1, help="Texts per step.")] = 64,
    lr: Annotated[float | None, typer.Option(help="Learning rate; the default of distill without.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    smallest: Annotated[
        bool, typer.Option("--smallest", help="A few steps on a few sentences, to see that it runs.")
    ] = False,
) -> None:
    """Distils the pruned encoder and prints what it has lost before and after."""
    torch.set_num_threads(threads)
    if smallest:
        found = run(None, 60, 4, 16, seed, lr)
        print(f"held-out loss {found['held_out_loss']}, 2:4 holds: {found['holds']}")
        return
    if data is None:
        raise typer.BadParameter("needed, but for --smallest", param_hint="--data")
    found = run(data, seconds, None, batch, seed, lr)
    lost = found["lost"]
    verdict = "met" if lost["dev"]["recovered"] <= AT_MOST else "MISSED"
    print(
        f"{found['steps']} steps in {found['seconds']:.0f} s: STS-B dev lost {lost['dev']['pruned']:.2f} -> "
        f"{lost['dev']['recovered']:.2f} points (bar {AT_MOST}: {verdict}), train {lost['train']['pruned']:.2f} -> "
        f"{lost['train']['recovered']:.2f}; held-out loss {found['held_out_loss']}; 2:4 holds: {found['holds']}"
    )
    if json_path is not None:
        record: dict[str, Any] = {"rows": {}}
        if json_path.exists():
            record = json.loads(json_path.read_text(encoding="utf-8"))
        record["rows"][f"2:4 magnitude, seed {seed}"] = found | {"commit": commit()}
        record |= {"environment": environment(), "at_most": AT_MOST, "command": COMMAND}
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
