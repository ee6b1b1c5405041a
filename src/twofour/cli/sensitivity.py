"""twofour sensitivity"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import TwofourError
from ..workflows import sensitivity
from . import models
from .inputs import PYTHON, calibration_batches
from .options import Dtype, Exclude, Html, Include, Json, Threads, parse_dtype, require_page, set_threads, show

NAME = "sensitivity"


def run(
    model: Annotated[Path, typer.Argument(help="A folder with a transformers config.json.")],
    pattern: Annotated[
        list[str] | None, typer.Option("--pattern", "-p", help="A pattern to try; may be repeated. Default: 2:4.")
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="Inputs: a text file, 'python' for Python's documentation, or a .safetensors file.")
    ] = PYTHON,
    method: Annotated[str, typer.Option(help="sparsegpt, admm, wanda, ria or magnitude.")] = "sparsegpt",
    samples: Annotated[int, typer.Option(min=1, help="Lines (or pieces of running text) taken of --calibration.")] = 64,
    length: Annotated[int, typer.Option(min=1, help="Most tokens of each.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Samples that run at once.")] = 32,
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
    if not model.is_dir():
        raise TwofourError(f"{model} is not a model folder: sensitivity runs the model.")
    set_threads(threads)
    loaded = models.open_model(model, wanted)
    inputs = calibration_batches(model, loaded, calibration, samples, length, batch)
    show(sensitivity(loaded, inputs, pattern or ["2:4"], method=method, include=include, exclude=exclude), json, html)
