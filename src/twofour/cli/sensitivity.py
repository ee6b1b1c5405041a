"""twofour sensitivity"""

from __future__ import annotations

from typing import Annotated

import typer

from ..workflows import sensitivity
from . import models
from .inputs import PYTHON, calibration_batches
from .options import (
    BatchSize,
    Calibration,
    Dtype,
    Exclude,
    Folder,
    Html,
    Include,
    Json,
    Length,
    Samples,
    Threads,
    parse_dtype,
    require_page,
    set_threads,
    show,
)

NAME = "sensitivity"


def run(
    model: Folder,
    pattern: Annotated[
        list[str] | None, typer.Option("--pattern", "-p", help="A pattern to try; may be repeated. Default: 2:4.")
    ] = None,
    calibration: Calibration = PYTHON,
    method: Annotated[str, typer.Option(help="sparsegpt, admm, wanda, ria or magnitude.")] = "sparsegpt",
    samples: Samples = 64,
    length: Length = 128,
    batch: BatchSize = 32,
    include: Include = None,
    exclude: Exclude = None,
    dtype: Dtype = None,
    threads: Threads = None,
    json: Json = False,
    html: Html = None,
) -> None:
    """Tell how much the model's outputs change when one layer alone is pruned: which layers to leave dense.

    Example: twofour sensitivity all-MiniLM-L6-v2 -p 2:4 -p 2:4x4 --html sensitivity.html
    """
    require_page(html)
    wanted = parse_dtype(dtype)
    models.require_folder(model, "sensitivity runs the model")
    set_threads(threads)
    loaded = models.open_model(model, wanted)
    inputs = calibration_batches(model, loaded, calibration, samples, length, batch)
    show(sensitivity(loaded, inputs, pattern or ["2:4"], method=method, include=include, exclude=exclude), json, html)
