"""twofour prune"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import TwofourError
from ..solvers import Recipe
from ..workflows import prune
from . import models
from .inputs import calibration_batches
from .interrupted import telling
from .options import (
    BatchSize,
    DryRun,
    Dtype,
    Exclude,
    Html,
    Include,
    Json,
    Length,
    Model,
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

NAME = "prune"


def run(
    model: Model,
    output: Output,
    pattern: PatternText = "2:4",
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Inputs that the outputs are kept for: a text file, 'python' for Python's documentation, or a .safetensors"
            " file of input tensors by name. Without it weights are chosen by magnitude, and quality suffers."
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="admm (default with --calibration), sparsegpt, wanda, ria, or magnitude (default without)."),
    ] = None,
    samples: Samples = 512,
    length: Length = 256,
    batch: BatchSize = 32,
    random_tokens: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="The calibration comes a second time with this share of its tokens drawn at random, so that words it"
            " lacks are not paid for; 0: once. Default: 0.5 for admm, 0 for the others.",
        ),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            help="What each layer's outputs should be: those of the 'dense' model, so that it makes up for what layers before"
            " it have lost, or what its old weights give behind the 'pruned' ones: faster. Default: dense for admm, pruned"
            " for the others.",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A folder that keeps finished layers: a run that was killed goes on where it was."),
    ] = None,
    threads: Threads = None,
    include: Include = None,
    exclude: Exclude = None,
    dtype: Dtype = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    json: Json = False,
    html: Html = None,
) -> None:
    """Set weights to zero so that every layer holds the pattern. The result is still dense; compress comes next.

    With --calibration the weights that stay get new values, so that each layer's outputs change as little as they can.
    It takes a folder, whose model can run.

    Example: twofour prune all-MiniLM-L6-v2 minilm-2of4 --calibration sentences.txt
    """
    require_page(html)
    if targets is not None and calibration is None:
        raise TwofourError(
            f"--targets {targets} is about the outputs on --calibration: name that too, or leave it out."
        )
    recipe = method if targets is None else Recipe(method or "admm", targets=targets)
    wanted = parse_dtype(dtype)
    models.require_target(model, output, overwrite or dry_run)
    loaded = models.open_model(model, wanted)
    set_threads(threads)
    inputs = None
    if calibration is not None:
        models.require_folder(model, "--calibration runs the model")
        inputs = calibration_batches(model, loaded, calibration, samples, length, batch)
    kept = "nothing was written; with --checkpoint FOLDER, finished layers are kept for the next run."
    if checkpoint is not None:
        kept = f"{checkpoint} keeps the layers that are finished: the same command goes on behind them."
    with telling(lambda: kept):
        report = prune(
            loaded,
            pattern,
            calibration=inputs,
            method=recipe,
            include=include,
            exclude=exclude,
            checkpoint=checkpoint,
            random_tokens=random_tokens,
            dry_run=dry_run,
        )
    if not dry_run:
        models.write_dense(loaded, model, output, overwrite)
    show(models.with_guess(report, model), json, html)
