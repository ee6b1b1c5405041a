"""twofour explain"""

from __future__ import annotations

from typing import Annotated

import typer

from ..workflows import explain
from . import models
from .options import Dtype, Html, Json, Model, Threads, parse_dtype, require_page, set_threads, show

NAME = "explain"


def run(
    model: Model,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Every kernel for each layer, with its time where it was measured here.")
    ] = False,
    dtype: Dtype = None,
    threads: Threads = None,
    json: Json = False,
    html: Html = None,
) -> None:
    """Tell which kernel runs each layer, and why not a faster one.

    Example: twofour explain minilm-small
    """
    require_page(html)
    wanted = parse_dtype(dtype)
    set_threads(threads)
    show(models.with_guess(explain(models.open_model(model, wanted), kernels=kernels), model), json, html)
