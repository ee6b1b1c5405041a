"""What one-shot pruning costs a real sentence encoder: all-MiniLM-L6-v2, its 36 encoder Linears, STS-B dev.

    python benchmarks/quality/bench_minilm.py --data DATA --json benchmarks/results/<machine>/quality.json

DATA is a folder with stsb-train.tsv, stsb-dev.tsv (STS benchmark) and wikitext2-valid.txt (WikiText-2), which are not part
of the project. A quality is Spearman's correlation x 100 between cosine similarities and human scores; a delta is against
the dense model in the same run. Calibration is 1,024 sentences without labels: of STS-B's training part (the domain of the
test), of WikiText-2 (another), or of the language reference that Python carries (a third). Cases that the JSON has already
are not run again.

One run says little: other sentences, or the same ones added up in another order, move a delta by 0.1 to 0.3, that of
"2:4x4" on foreign texts by 0.5. So the cases with a bar run on several draws of sentences, and the mean counts.
"""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.kernels.bench_linear import commit

import twofour
from twofour.demo import model as minilm
from twofour.demo import text
from twofour.report.environment import environment
from twofour.solvers import Recipe

Pair = tuple[float, str, str]


@dataclass(frozen=True)
class Case:
    """One way to prune, and the least its delta may be ("at least") where there is a bar.

    `alone`: on the texts alone, without a partly random copy, and with targets="pruned": solvers are compared on the same
    inputs and the same targets.
    """

    pattern: str
    method: str
    calibration: str
    at_least: float | None = None
    draws: int = 1
    alone: bool = False

    @property
    def key(self) -> str:
        return f"{self.pattern} {self.method} {self.calibration}" + (" alone" if self.alone else "")


COMMAND = "benchmarks/quality/bench_minilm.py --data DATA"

CASES = (
    Case("2:4", "admm", "STS-B", 0.0, draws=3),
    Case("2:4x4", "admm", "WikiText-2", -2.5, draws=3),
    Case("2:4", "admm", "WikiText-2", -0.5, draws=3),
    Case("2:4", "wanda", "Python", draws=3),
    Case("2:4", "admm", "Python", draws=3),
    Case("2:4x2", "admm", "STS-B", -0.6),
    Case("2:4x4", "admm", "STS-B", -1.0),
    Case("2:4", "magnitude", "none"),
    Case("2:4", "wanda", "STS-B"),
    Case("2:4", "sparsegpt", "STS-B"),
    Case("2:4", "sparsegpt", "WikiText-2"),
    Case("2:4", "sparsegpt", "Python"),
    Case("2:4", "admm", "STS-B", alone=True),
    Case("2:4", "admm", "WikiText-2", alone=True),
    Case("2:4", "admm", "Python", alone=True),
)


def pairs(path: Path) -> list[Pair]:
    rows = (line.rstrip("\n").split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return [(float(row[4]), row[5], row[6]) for row in rows if len(row) >= 7]


def sentences(data: Path, calibration: str, count: int, draw: int) -> list[str]:
    """`count` of the texts at random, the same for the same `draw`."""
    texts = texts_of(data, calibration)
    return [texts[i] for i in torch.randperm(len(texts), generator=torch.Generator().manual_seed(draw))[:count]]


def texts_of(data: Path, calibration: str) -> list[str]:
    if calibration == "STS-B":
        return sorted({each for _, *both in pairs(data / "stsb-train.tsv") for each in both})
    if calibration == "Python":
        return sorted({part for whole in text.paragraphs() for part in text.sentences_of(whole) if len(part) > 20})
    lines = (data / "wikitext2-valid.txt").read_text(encoding="utf-8").splitlines()
    cut = [
        part
        for line in lines
        if line.strip() and not line.strip().startswith("=")
        for part in re.split(r"(?<= \.) ", line.strip())
    ]
    return [part for part in cut if len(part.split()) >= 5]


def spearman(a: Tensor, b: Tensor) -> float:
    def ranks(x: Tensor) -> Tensor:
        _, which, counts = torch.unique(x.double(), return_inverse=True, return_counts=True)
        return (counts.cumsum(0) - (counts - 1) / 2)[which]

    return 100 * float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def quality(encoder: Any, dev: list[Pair]) -> float:
    texts = sorted({each for _, *both in dev for each in both})
    where = {each: i for i, each in enumerate(texts)}
    vectors = minilm.encode(encoder, texts, 64).double()
    first, second = ([where[pair[i]] for pair in dev] for i in (1, 2))
    return spearman((vectors[first] * vectors[second]).sum(1), torch.tensor([pair[0] for pair in dev]))


def run(case: Case, data: Path, dev: list[Pair], dense: float, count: int) -> dict[str, Any]:
    """All draws of a case: means, and each draw's delta."""
    runs = [run_draw(case, data, dev, dense, count, draw) for draw in range(case.draws)]
    row = {**asdict(case), **runs[0]}
    for key in ("spearman", "delta", "error", "seconds", "solving_seconds"):
        if runs[0][key] is not None:
            row[key] = sum(one[key] for one in runs) / len(runs)
    row["deltas"] = [one["delta"] for one in runs]
    return row


def run_draw(case: Case, data: Path, dev: list[Pair], dense: float, count: int, draw: int) -> dict[str, Any]:
    encoder = minilm.fresh(torch.float32)
    batches = None
    if case.calibration != "none":
        texts = sorted(sentences(data, case.calibration, count, draw), key=len)
        batches = [minilm.features(encoder, texts[i : i + 64]) for i in range(0, len(texts), 64)]
    recipe = Recipe(case.method, targets="pruned" if case.alone else None)
    began = time.perf_counter()
    report = twofour.prune(
        encoder,
        case.pattern,
        calibration=batches,
        method=recipe,
        include=minilm.ENCODER,
        random_tokens=0.0 if case.alone else None,
        progress=False,
    )
    seconds = time.perf_counter() - began
    done = report.where(action="pruned")
    found = quality(encoder, dev)
    errors = [row["error"] for row in done if "error" in row]
    return {
        "layers": len(done),
        "dense": round(dense, 3),
        "spearman": round(found, 3),
        "delta": round(found - dense, 3),
        "error": sum(errors) / len(errors) if errors else None,
        "errors": {row["layer"]: row["error"] for row in done if "error" in row},
        "seconds": round(seconds, 1),
        "solving_seconds": round(sum(row.get("seconds", 0.0) for row in done), 1),
        "threads": torch.get_num_threads(),
    }


def line(row: dict[str, Any]) -> str:
    bar = (
        ""
        if row["at_least"] is None
        else f"  bar {row['at_least']:+.1f}: {'met' if row['delta'] >= row['at_least'] else 'MISSED'}"
    )
    alone = " alone" if row["alone"] else ""
    error = "" if row["error"] is None else f"  error {100 * row['error']:.2f} %"
    name = f"{row['pattern']:6} {row['method']:10} {row['calibration'] + alone:16}"
    draws = f"  [{', '.join(f'{delta:+.2f}' for delta in row['deltas'])}]" if row["draws"] > 1 else ""
    return f"{name} {row['delta']:+6.2f} ({row['spearman']:.2f}){error}  {row['seconds']:.0f} s{bar}{draws}"


def main(
    data: Annotated[Path, typer.Option(help="Folder with stsb-train.tsv, stsb-dev.tsv and wikitext2-valid.txt.")],
    json_path: Annotated[Path | None, typer.Option("--json", help="Where results go; what is there is kept.")] = None,
    only: Annotated[str | None, typer.Option(help="Only cases with these words, as in '2:4 admm'.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Calibration sentences.")] = 1024,
) -> None:
    """Prunes the encoder in every way and prints what each costs."""
    record: dict[str, Any] = {"rows": {}}
    if json_path is not None and json_path.exists():
        record = json.loads(json_path.read_text(encoding="utf-8"))
    rows = record["rows"]
    dev = pairs(data / "stsb-dev.tsv")
    dense = quality(minilm.fresh(torch.float32), dev)
    print(f"dense: {dense:.2f}, {len(dev)} pairs")
    for case in CASES:
        if case.key in rows or (only is not None and only not in case.key):
            continue
        rows[case.key] = run(case, data, dev, dense, count)
        print(line(rows[case.key]), flush=True)
        record |= {"environment": environment(), "commit": commit(), "command": COMMAND, "sentences": count}
        if json_path is not None:
            json_path.parent.mkdir(parents=True, exist_ok=True)
            json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print()
    for row in rows.values():
        print(line(row))
    if all(f"2:4 {method} Python" in rows for method in ("admm", "wanda")):
        ours, wanda = (rows[f"2:4 {method} Python"]["delta"] for method in ("admm", "wanda"))
        print(f"on a small foreign text admm is {ours - wanda:+.2f} from Wanda (bar: not below)")
    for domain in ("STS-B", "WikiText-2"):
        if all(key in rows for key in (f"2:4 admm {domain} alone", f"2:4 sparsegpt {domain}")):
            ours, plain = rows[f"2:4 admm {domain} alone"], rows[f"2:4 sparsegpt {domain}"]
            each = [ours["errors"][name] / plain["errors"][name] for name in ours["errors"]]
            print(
                f"output error of admm against SparseGPT, {domain}: mean {ours['error'] / plain['error']:.3f},"
                f" layer by layer {sum(each) / len(each):.3f} (bar 0.62; both on the texts alone, the same targets)"
            )


if __name__ == "__main__":
    typer.run(main)
