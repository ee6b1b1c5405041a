"""twofour check"""

from __future__ import annotations

import typer

from ..workflows import check
from ..workflows.check import CheckFailed
from . import models
from .options import Exclude, Html, Include, Json, Model, PatternText, require_page, show

NAME = "check"


def run(
    model: Model,
    pattern: PatternText = "2:4",
    include: Include = None,
    exclude: Exclude = None,
    json: Json = False,
    html: Html = None,
) -> None:
    """Confirm that every layer holds the pattern; exit code 1 if one does not.

    Example: twofour check minilm-2of4
    """
    require_page(html)
    loaded = models.open_model(model)
    try:
        report = check(loaded, pattern, include=include, exclude=exclude)
    except CheckFailed as failure:
        show(models.with_guess(failure.report, model), json, html)
        typer.echo(f"no: {str(failure).splitlines()[0]}", err=True)
        raise typer.Exit(1) from None
    show(models.with_guess(report, model), json, html)
