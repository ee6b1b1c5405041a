"""twofour explain"""

from __future__ import annotations

from ..workflows import explain
from . import models
from .options import Dtype, Html, Json, Model, parse_dtype, require_page, show

NAME = "explain"


def run(model: Model, dtype: Dtype = None, json: Json = False, html: Html = None) -> None:
    """Tell which kernel runs each layer, and why not a faster one.

    Example: twofour explain minilm-small
    """
    require_page(html)
    wanted = parse_dtype(dtype)
    show(models.with_guess(explain(models.open_model(model, wanted)), model), json, html)
