"""twofour measure"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..errors import TwofourError
from ..workflows import compress, measure
from . import models
from .inputs import one_batch
from .options import Dtype, Html, Json, Model, Threads, parse_counts, parse_dtype, require_page, set_threads, show

NAME = "measure"


def run(
    model: Model,
    against: Annotated[
        Path | None,
        typer.Option(help="The dense model to compare with; default: the same weights written out dense."),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, one row each, as in 1,8.")] = "1,8",
    length: Annotated[int, typer.Option(min=1, help="Tokens in each sequence.")] = 64,
    text: Annotated[
        Path | None,
        typer.Option(help="A text file whose lines are the inputs; default: Python's own documentation."),
    ] = None,
    backward: Annotated[
        bool, typer.Option("--backward", help="Time a training step: forward, and backward to all parameters.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each model per batch.")] = 21,
    dtype: Dtype = None,
    threads: Threads = None,
    json: Json = False,
    html: Html = None,
) -> None:
    """Time a compressed model against a dense one, in turns, and compare bytes and outputs.

    A folder's model is run whole, on text (or random pixels for a vision model). A .safetensors file has no model to
    run: each of its layers is timed alone, at the token counts that --batch and --length give.

    Example: twofour measure minilm-small --against all-MiniLM-L6-v2
    """
    require_page(html)
    sizes, wanted = parse_counts(batch, "--batch"), parse_dtype(dtype)
    set_threads(threads)
    models.require_model(model)
    if against is not None:
        models.require_model(against)
        if against.is_dir() != model.is_dir():
            raise TwofourError(
                f"{model} and {against} are not of one kind: compare two folders, or leave out --against."
            )
    loaded = models.open_model(model, wanted)
    if not model.is_dir():
        if against is not None or text is not None or backward:
            raise TwofourError(
                f"{model} is a file without a model to run: --against, --text and --backward need a folder."
            )
        found = compress(loaded, tokens=[size * length for size in sizes], dry_run=True, remeasure=True)
        timed = [row for row in found.rows if "speedup" in row]
        dense_us, sparse_us = (sum(row[key] for row in timed) for key in ("dense_us", "sparse_us"))
        summary = {"layers timed": len(timed), "speedup, all layers": dense_us / sparse_us}
        sums = ", in sum" if len(sizes) > 1 else ""
        note = f"each layer was timed alone, at {' and '.join(str(size * length) for size in sizes)} tokens{sums}"
        report = replace(found, verb="measure", summary=summary, notes=(note,))
    else:
        dense = models.open_model(against, wanted) if against is not None else None
        inputs = [one_batch(model, loaded, size, length, text) for size in sizes]
        report = measure(loaded, inputs, against=dense, backward=backward, repeats=repeats)
    show(models.with_guess(report, model), json, html)
