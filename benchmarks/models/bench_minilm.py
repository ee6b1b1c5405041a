"""all-MiniLM-L6-v2 from end to end: what `twofour demo` measures, kept as JSON.

python benchmarks/models/bench_minilm.py --json benchmarks/results/<machine>/minilm.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.kernels.bench_linear import commit

from twofour.demo import run


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the record here.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads; default what torch uses.")] = None,
    smallest: Annotated[bool, typer.Option("--smallest", help="A small case, for CI.")] = False,
) -> None:
    """Runs the demo in a temporary folder and keeps its record."""
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), quick=smallest, threads=threads, progress=lambda line: print(line, flush=True))
        record = json.loads(result.json_path.read_text(encoding="utf-8"))
    record = {
        "commit": commit(),
        "command": " ".join(["python", "benchmarks/models/bench_minilm.py", *sys.argv[1:]]),
    } | record
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
