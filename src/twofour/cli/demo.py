"""twofour demo"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Threads

NAME = "demo"


def run(
    output: Annotated[Path, typer.Option(help="Folder for the page, the JSON and the compressed model.")] = Path(
        "demo-output"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sentences and queries.")] = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Prune, compress, save, load and measure a real sentence encoder (all-MiniLM-L6-v2) on this machine.

    Needs pip install 'twofour[demo]'. Takes two minutes and writes one page that opens offline.
    """
    from ..demo import run as run_demo

    def progress(line: str) -> None:
        typer.echo(line, err=json)

    result = run_demo(output, quick=quick, threads=threads, progress=progress)
    if json:
        typer.echo(result.json_path.read_text(encoding="utf-8"))
    else:
        typer.echo(f"\npage: {result.html_path}\njson: {result.json_path}")
