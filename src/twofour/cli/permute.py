"""twofour permute"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import TwofourError
from ..workflows import permute
from . import models
from .inputs import PYTHON, calibration_batches
from .options import (
    DryRun,
    Dtype,
    Exclude,
    Html,
    Include,
    Json,
    Output,
    Overwrite,
    PatternText,
    Threads,
    parse_dtype,
    require_page,
    set_threads,
    show,
)

NAME = "permute"


def run(
    model: Annotated[Path, typer.Argument(help="A folder with a transformers config.json.")],
    output: Output,
    pattern: PatternText = "2:4",
    calibration: Annotated[
        str, typer.Option(help="Inputs: a text file, 'python' for Python's documentation, or a .safetensors file.")
    ] = PYTHON,
    magnitude: Annotated[
        bool, typer.Option("--magnitude", help="Rank weights by |w| alone, not by what they add to the outputs.")
    ] = False,
    samples: Annotated[int, typer.Option(min=1, help="Lines (or pieces of running text) taken of --calibration.")] = 64,
    length: Annotated[int, typer.Option(min=1, help="Most tokens of each.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Samples that run at once.")] = 32,
    include: Include = None,
    exclude: Exclude = None,
    dtype: Dtype = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    threads: Threads = None,
    json: Json = False,
    html: Html = None,
) -> None:
    """Reorder channels inside a model so that pruning keeps more; what the model computes stays the same.

    Example: twofour permute all-MiniLM-L6-v2 minilm-permuted --calibration sentences.txt
    """
    require_page(html)
    wanted = parse_dtype(dtype)
    if not model.is_dir():
        raise TwofourError(f"{model} is not a model folder: permute runs the model.")
    models.require_target(model, output, overwrite or dry_run)
    set_threads(threads)
    loaded = models.open_model(model, wanted)
    inputs = calibration_batches(model, loaded, calibration, samples, length, batch)
    report = permute(
        loaded,
        inputs,
        pattern,
        include=include,
        exclude=exclude,
        scores=None if magnitude else "inputs",
        dry_run=dry_run,
    )
    if not dry_run:
        models.write_dense(loaded, model, output, overwrite)
    show(report, json, html)
