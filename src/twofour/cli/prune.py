"""twofour prune"""

from __future__ import annotations

from typing import Annotated

import typer

from ..workflows import prune
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
    parse_dtype,
    require_page,
    show,
)

NAME = "prune"


def run(
    model: Model,
    output: Output,
    pattern: PatternText = "2:4",
    method: Annotated[str, typer.Option(help="How weights are chosen: magnitude.")] = "magnitude",
    include: Include = None,
    exclude: Exclude = None,
    dtype: Dtype = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    json: Json = False,
    html: Html = None,
) -> None:
    """Set weights to zero so that every layer holds the pattern. The result is still dense; compress comes next.

    Example: twofour prune all-MiniLM-L6-v2 minilm-2of4
    """
    require_page(html)
    wanted = parse_dtype(dtype)
    models.require_target(model, output, overwrite or dry_run)
    loaded = models.open_model(model, wanted)
    report = prune(loaded, pattern, method=method, include=include, exclude=exclude, dry_run=dry_run)
    if not dry_run:
        models.write_dense(loaded, model, output, overwrite)
    show(models.with_guess(report, model), json, html)
