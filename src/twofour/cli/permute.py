"""twofour permute"""

from __future__ import annotations

from typing import Annotated

import typer

from ..workflows import permute
from . import models
from .inputs import PYTHON, calibration_batches
from .options import (
    BatchSize,
    Calibration,
    DryRun,
    Dtype,
    Exclude,
    Folder,
    Html,
    Include,
    Json,
    Length,
    Output,
    Overwrite,
    PatternText,
    Samples,
    Threads,
    parse_dtype,
    require_page,
    set_threads,
    show,
)

NAME = "permute"


def run(
    model: Folder,
    output: Output,
    pattern: PatternText = "2:4",
    calibration: Calibration = PYTHON,
    magnitude: Annotated[
        bool, typer.Option("--magnitude", help="Rank weights by |w| alone, not by what they add to the outputs.")
    ] = False,
    samples: Samples = 64,
    length: Length = 128,
    batch: BatchSize = 32,
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
    models.require_folder(model, "permute runs the model")
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
