"""twofour compress"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal, cast

import typer

from ..workflows import compress
from . import models
from .options import (
    DryRun,
    Dtype,
    Exclude,
    Html,
    Include,
    Json,
    Model,
    Output,
    Overwrite,
    PatternText,
    Threads,
    parse_counts,
    parse_dtype,
    require_page,
    set_threads,
    show,
)

NAME = "compress"


def run(
    model: Model,
    output: Output,
    pattern: PatternText = "2:4",
    tokens: Annotated[str, typer.Option(help="Token counts to time each layer at, as in 1,128.")] = "1,128",
    force: Annotated[
        bool, typer.Option("--force", help="Run every layer that can be compressed, without timing.")
    ] = False,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="Time again what was timed on this machine before.")
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(help="Round the kept values: bfloat16, or int8 or float8 with a scale for each output row."),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    dtype: Dtype = None,
    threads: Threads = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    json: Json = False,
    html: Html = None,
) -> None:
    """Store every layer that holds the pattern compressed, and note which run faster on the sparse kernel here.

    A folder gets model.twofour.safetensors beside its config; twofour's own commands read it again.

    Example: twofour compress minilm-2of4 minilm-small --dtype bfloat16
    """
    require_page(html)
    counts, wanted = parse_counts(tokens, "--tokens"), parse_dtype(dtype)
    set_threads(threads)
    models.require_target(model, output, overwrite or dry_run)
    loaded = models.open_model(model, wanted)
    report = compress(
        loaded,
        pattern=pattern,
        tokens=counts,
        force=force,
        remeasure=remeasure,
        weights=cast(Literal["int8", "float8", "bfloat16"] | None, weights),  # compress refuses any other
        include=include,
        exclude=exclude,
        dry_run=dry_run,
    )
    if not dry_run:
        saved = models.write_compressed(loaded, model, output, overwrite, pattern).summary
        written = {"weights stored compressed": saved["compressed weights"], "file bytes": saved["file bytes"]}
        report = replace(report, summary={**report.summary, **written})
    show(models.with_guess(report, model), json, html)
